"""Guidance: fields made of fields."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError, in_range, positive
from bd_lightning.checks import interval as check_interval
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
        return _GuidedAt(self, fields, self.base.at(level), level) if inside else fields

    def scales(self, sigma: Tensor, difference: Tensor, level: float) -> Tensor:
        """w inside the interval, (B,).

        Args:
            sigma: noise levels, shape (B,).
            difference: S_c − S₀, shape (B, *).
            level: noise level of the first point, which chains on their way down have in common.
        """
        return torch.full_like(sigma, self.scale)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,)."""
        inside = self._inside(sigma)
        if not inside.any():
            return self.fields(x, sigma)
        s, g = self.fields(x, sigma)
        guided = self.guided(s, g, log_gradient(*self.base(x, sigma)), sigma, float(sigma[0]))
        return s, torch.where(bcast(inside, x), guided, g)

    def weighted_score(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The score S_w of p₀^{1−w} p_c^w (B, *), and the rate w(w − 1) d², d = σ‖S_c − S₀‖, of its weights (B,).

        Raises:
            UserError: outside the interval, where the density that is aimed at would change between levels.
        """
        if not self._inside(sigma).all():
            raise UserError(
                "Feynman–Kac weights are those of one scale at all noise levels of the sampler: leave "
                "guidance.interval out, or take another model.sampler"
            )
        base = self.base.score(x, sigma, exact)
        difference = self.fields.score(x, sigma, exact) - base
        d = sigma * difference.flatten(1).norm(dim=1)
        return base + self.scale * difference, self.scale * (self.scale - 1) * d.square()

    def guided(self, s: Tensor, g: Tensor, base: Tensor, sigma: Tensor, level: float) -> Tensor:
        """The guided gradient field (B, *), of the class's fields s (B,) and g (B, *) and of S₀, base (B, *)."""
        difference = log_gradient(s, g) - base
        return 0.5 * bcast(s, g) * (base + bcast(self.scales(sigma, difference, level), g) * difference)


class _GuidedAt(FieldPair):
    """Guided fields at one noise level inside the interval.

    Args:
        whole: the guided fields.
        fields: fields of the class, at this level.
        base: fields of all the data, at this level.
        level: the noise level.
    """

    def __init__(self, whole: GuidedFields, fields: FieldPair, base: FieldPair, level: float) -> None:
        self.whole, self.fields, self.base, self.level = whole, fields, base, level
        self.mobility_is_density = whole.mobility_is_density

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility of the fields of the class; shape of sigma."""
        return self.fields.reference(sigma)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,), all the same."""
        s, g = self.fields(x, sigma)
        return s, self.whole.guided(s, g, log_gradient(*self.base(x, sigma)), sigma, self.level)


class _Begun(GuidedFields):
    """Guidance that has another scale, `before`, until something has come to pass."""

    def __init__(
        self,
        fields: FieldPair,
        base: FieldPair,
        scale: float,
        before: float,
        interval: Sequence[float] = (0.0, math.inf),
    ) -> None:
        super().__init__(fields, base, scale, interval)
        self.before = before

    def weighted_score(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Refused: the density that is aimed at changes at the transition."""
        raise UserError(
            "Feynman–Kac weights are those of one scale at all noise levels: leave guidance.transition out, or take "
            "another model.sampler"
        )


class LateGuidedFields(_Begun):
    """Guidance with another scale above a noise level, where guided chains would be drawn to copies of training data.

    Args:
        fields: fields of the class.
        base: fields of all the data.
        scale: w from the transition on.
        before: w before: 1 is no guidance, 0 no class, −2 away from it.
        transition: noise level, in data units.
        interval: noise levels, in data units, between which guidance acts.

    References:
        | Jain et al., Classifier-Free Guidance inside the Attraction Basin May Cause Memorization, arXiv 2411.16738
    """

    def __init__(
        self,
        fields: FieldPair,
        base: FieldPair,
        scale: float,
        before: float,
        transition: float,
        interval: Sequence[float] = (0.0, math.inf),
    ) -> None:
        super().__init__(fields, base, scale, before, interval)
        self.transition = transition

    def scales(self, sigma: Tensor, difference: Tensor, level: float) -> Tensor:
        """The scale of each chain by its noise level, (B,)."""
        return torch.where(sigma > self.transition, self.before, self.scale)


class DynamicGuidedFields(_Begun):
    """Guidance with another scale until d = σ‖S_c − S₀‖ has risen, fallen and rises again, along each chain for itself.

    This is the first local minimum of d. In noise so large that classes are alike d is the error of the networks: that
    it falls there before it has risen counts for nothing. The chains are those of one batch on its way down the noise
    levels: the fields remember d of the last level, and begin anew with another batch or at a first level. A level that
    is asked for twice counts once.

    Args:
        fields: fields of the class.
        base: fields of all the data.
        scale: w from the transition on.
        before: w before: 1 is no guidance, 0 no class, −2 away from it.
        interval: noise levels, in data units, between which guidance acts.

    References:
        | Jain et al., Classifier-Free Guidance inside the Attraction Basin May Cause Memorization, arXiv 2411.16738
    """

    def __init__(
        self,
        fields: FieldPair,
        base: FieldPair,
        scale: float,
        before: float,
        interval: Sequence[float] = (0.0, math.inf),
    ) -> None:
        super().__init__(fields, base, scale, before, interval)
        self.first = self.level = math.inf
        self.last, self.risen, self.falling, self.passed = (torch.zeros(0) for _ in range(4))

    def scales(self, sigma: Tensor, difference: Tensor, level: float) -> Tensor:
        """The scale of each chain by what it has passed, (B,)."""
        d = sigma * difference.flatten(1).norm(dim=1)
        if len(d) != len(self.last) or level >= self.first:
            self.first, never = level, torch.zeros_like(d, dtype=torch.bool)
            self.level, self.last, self.risen, self.falling, self.passed = level, d, never, never, never
        elif level < self.level:
            rises = d > self.last
            self.passed, self.risen = self.passed | self.falling & rises, self.risen | rises
            self.level, self.last, self.falling = level, d, self.risen & (d < self.last)
        return torch.where(self.passed, self.scale, self.before)

    def remark(self) -> str:
        """How many chains never met their transition, where these are more than a tenth."""
        kept = 1 - float(self.passed.double().mean()) if len(self.passed) else 0.0
        if kept <= 0.1:
            return ""
        return (
            f"dynamic guidance: {kept:.0%} of {len(self.passed)} chains never met their transition and kept the scale "
            f"{self.before:g}: take more noise levels, or a transition at one of them"
        )


@dataclass(frozen=True)
class Guidance:
    """How chains are guided.

    Args:
        scale: w; 1 is none.
        interval: noise levels, in data units, between which guidance acts.
        before: w until the transition.
        transition: noise level, in data units, or "dynamic", the first local minimum of d after it has risen, along a
            chain; None guides from the beginning.

    Raises:
        ValueError: for values out of range, and for `before` without a transition.
    """

    scale: float = 1.0
    interval: Sequence[float] = (0.0, math.inf)
    before: float = 1.0
    transition: float | str | None = None

    def __post_init__(self) -> None:
        in_range(0, 1000, guidance=self.scale)
        check_interval(guidance_interval=self.interval)
        in_range(-100, 100, **{"guidance.before": self.before})
        if self.transition is None and self.before != 1:
            raise ValueError("guidance.before is the scale until a transition: give guidance.transition too")
        if isinstance(self.transition, str) and self.transition != "dynamic":
            raise ValueError(f"guidance.transition must be a noise level, or dynamic; got {self.transition!r}")
        for name in ("scale", "before", "transition"):
            if isinstance(value := getattr(self, name), bool):
                raise ValueError(f"guidance.{name} must be a number, got {value}")
        if isinstance(self.transition, (int, float)):
            positive(**{"guidance.transition": self.transition})

    @classmethod
    def read(cls, given: Any, interval: Sequence[float]) -> "Guidance":
        """Of a scale, or of a mapping with the arguments above; the interval is that of a mapping that has none.

        Raises:
            ValueError: for keys that are none of these, and as above.
        """
        if not isinstance(given, Mapping):
            return cls(given, interval)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"guidance has no {name!r}: it takes {', '.join(known)}")
        if "scale" not in given:
            raise ValueError("guidance needs its scale: {scale: 2, …}")
        if "interval" in given and tuple(interval) != (0.0, math.inf):
            raise ValueError("guidance has an interval, and guidance_interval is another: leave one out")
        try:
            return cls(**{"interval": interval, **given})
        except TypeError as error:
            raise ValueError(f"guidance takes numbers, and 'dynamic' for a transition; got {dict(given)}") from error

    @property
    def acts(self) -> bool:
        """Whether there is any."""
        return not self.scale == self.before == 1

    def guided(self, pair: FieldPair, base: FieldPair) -> FieldPair:
        """Fields of a class guided away from those of all the data."""
        if not self.acts:
            return pair
        if self.transition is None:
            return GuidedFields(pair, base, self.scale, self.interval)
        if self.transition == "dynamic":
            return DynamicGuidedFields(pair, base, self.scale, self.before, self.interval)
        return LateGuidedFields(pair, base, self.scale, self.before, float(self.transition), self.interval)
