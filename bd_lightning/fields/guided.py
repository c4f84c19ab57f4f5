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

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,)."""
        s, g = self.fields(x, sigma)
        inside = (sigma >= self.interval[0]) & (sigma <= self.interval[1])
        if not inside.any():
            return s, g
        base = log_gradient(*self.base(x, sigma))
        guided = base + self.scale * (log_gradient(s, g) - base)
        return s, torch.where(bcast(inside, x), 0.5 * bcast(s, x) * guided, g)
