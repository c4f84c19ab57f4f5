"""Guidance: fields made of fields."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair, log_gradient


class GuidedFields(FieldPair):
    """Classifier-free guidance in an interval of noise levels: S = S₀ + w (S_c − S₀), with the mobility s of the class.

    Guidance at high noise levels narrows what is sampled and invites copies of training images; at low ones it does
    little for its cost. Outside the interval the unconditional fields are not computed.

    Args:
        fields: fields of the class.
        base: fields of all the data.
        scale: w; 1 is no guidance, 0 no class.
        interval: noise levels, in data units, between which it acts.

    References:
        | Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598
        | Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality,
          arXiv 2404.07724
    """

    def __init__(
        self, fields: FieldPair, base: FieldPair, scale: float, interval: Sequence[float] = (0.0, math.inf)
    ) -> None:
        self.fields, self.base, self.scale, self.interval = fields, base, scale, interval

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility of the fields of the class; shape of sigma."""
        return self.fields.reference(sigma)

    def _inside(self, sigma: Tensor) -> Tensor:
        return (sigma >= self.interval[0]) & (sigma <= self.interval[1])

    def at(self, level: float) -> FieldPair:
        """Guided fields inside the interval, those of the class outside."""
        fields = self.fields.at(level)
        inside = bool(self._inside(torch.tensor(level)))  # in single precision, as levels of points are
        return _GuidedEverywhere(fields, self.base.at(level), self.scale) if inside else fields

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,)."""
        inside = self._inside(sigma)
        if not inside.any():
            return self.fields(x, sigma)
        s, g = self.fields(x, sigma)
        return s, torch.where(bcast(inside, x), self._guided(x, sigma, s, g), g)

    def _guided(self, x: Tensor, sigma: Tensor, s: Tensor, g: Tensor) -> Tensor:
        base = log_gradient(*self.base(x, sigma))
        return 0.5 * bcast(s, x) * (base + self.scale * (log_gradient(s, g) - base))


class _GuidedEverywhere(GuidedFields):
    """Guidance at whatever noise level there is."""

    def at(self, level: float) -> FieldPair:
        return self

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        s, g = self.fields(x, sigma)
        return s, self._guided(x, sigma, s, g)
