r"""Linear algebra on fields relative to a base Gaussian.

With ρ_c and U_c of `relative`, a mixture has

    ρ = Σ_c w_c ρ_c,        U = Σ_c w_c ρ_c U_c / ρ,        ∇log p_σ = U − x/(σ_d² + σ²),

and any positive mobility makes dynamics of it that leave it unchanged (see `kernels`): m = ρ, the field itself
(s = ρ, g = ½ρ(∇log p_σ + U)), or m = 1, which needs the fewest steps (s = 1, g = ½∇log p_σ).

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 (linearity of the modelling operator)
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bd_lightning.checks import UserError, in_range, one_of
from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair

ROUNDING = 1e-6
"""What is left of a sum below this share of what was added to it is rounding, and nothing."""


class Source(Protocol):
    """Several densities π_c p_c on one space, relative to one base Gaussian.

    Attributes:
        sigma_data: σ_d of the base Gaussian.
    """

    sigma_data: float

    @property
    def shares(self) -> Tensor:
        """π_c, shape (C,)."""
        ...

    def components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(π_c ρ_c) (B, C) and U_c (B, C, *) at x (B, *) and noise levels sigma: (B,), or (1,) for one of all."""
        ...


class Mixture(FieldPair):
    """Σ over sources and classes of w π_c p_c, as fields that every sampler accepts. Weights may be negative.

    `a + b`, `a - b`, `2 * a`, `a / 2`, `-a` and `sum([a, b])` are the same operations on the densities; the sum is not
    normalised, and need not be. It has the mobility and the floor of the first.

    Where the negative part N of the sum comes within `floor` of the positive part P, the sum is not a density there, or
    the estimates are not good enough to tell; it is held at floor × P.

    Args:
        terms: sources and their weights: (C,), or (B, C) for one mixture per sample.
        mobility: "constant" or "density", m = 1 or m = ρ.
        floor: smallest share of the positive part, above 0 and below 1.

    Raises:
        ValueError: for a floor outside that, if base Gaussians differ, and when a mixture without a positive weight is
            used.
    """

    def __init__(self, terms: Sequence[tuple[Source, Tensor]], mobility: str = "constant", floor: float = 0.01) -> None:
        one_of(("constant", "density"), mobility=mobility)
        in_range(1e-6, 1 - 1e-6, floor=floor)
        merged: dict[int, tuple[Source, Tensor, Tensor]] = {}
        for source, weights in terms:
            _, before, size = merged.get(id(source), (source, torch.zeros_like(weights), torch.zeros_like(weights)))
            merged[id(source)] = source, before + weights, size + weights.abs()
        summed = [(one, w.masked_fill(w.abs() <= ROUNDING * size, 0.0)) for one, w, size in merged.values()]
        self.terms = [(source, weights) for source, weights in summed if weights.any()]
        bases = {source.sigma_data for source, _ in self.terms}
        if len(bases) > 1:
            raise ValueError(f"the base Gaussians differ: sigma_data is {' and '.join(map(str, sorted(bases)))}")
        self.sigma_data, self.mobility, self.floor = bases.pop() if bases else 1.0, mobility, floor

    def __mul__(self, factor: float) -> "Mixture":
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return Mixture([(source, factor * weights) for source, weights in self.terms], self.mobility, self.floor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Mixture":
        return self * (1 / divisor) if isinstance(divisor, (int, float)) else NotImplemented

    def __neg__(self) -> "Mixture":
        return -1 * self

    def __add__(self, other: "Mixture") -> "Mixture":
        if not isinstance(other, Mixture):
            return NotImplemented
        return Mixture([*self.terms, *other.terms], self.mobility, self.floor)

    def __radd__(self, other: int) -> "Mixture":
        return self if other == 0 else NotImplemented  # what sum() begins with

    def __sub__(self, other: "Mixture") -> "Mixture":
        return self + -other if isinstance(other, Mixture) else NotImplemented

    def check(self) -> None:
        """Refuse to be sampled.

        Raises:
            ValueError: without a positive weight, for a point where points have weights of their own.
        """
        positive = [(weights > 0).any(-1) for _, weights in self.terms]
        if not positive or not torch.stack(torch.broadcast_tensors(*positive)).any(0).all():
            raise ValueError("a mixture needs a positive weight")

    def mass(self) -> float:
        """Sum of w π_c: the integral of the mixture."""
        return sum(float((weights * source.shares.to(weights)).sum()) for source, weights in self.terms)

    def log_ratio(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log ρ (B,) and U (B, *) of the sum, at x (B, *) and noise levels sigma (B,)."""
        self.check()
        logs, slopes, signs = [], [], []
        for source, weights in self.terms:
            weights = weights.to(x).expand(len(x), -1)
            used = (weights != 0).any(0)
            log, slope = source.components(x, sigma)
            logs.append(log[:, used] + weights[:, used].abs().log())
            slopes.append(slope[:, used])
            signs.append(weights[:, used] < 0)
        log, slope, negative = torch.cat(logs, 1), torch.cat(slopes, 1), torch.cat(signs, 1)

        def total(mask: Tensor) -> tuple[Tensor, Tensor]:
            chosen = log.masked_fill(~mask, -math.inf)
            top = chosen.logsumexp(1)
            share = (chosen - top.clamp_min(torch.finfo(x.dtype).min)[:, None]).exp()
            return top, (share.reshape(*share.shape, *(1,) * (x.ndim - 1)) * slope).sum(1)

        positive_log, positive_slope = total(~negative)
        if not negative.any():
            return positive_log, positive_slope
        negative_log, negative_slope = total(negative)
        share = (negative_log - positive_log).exp().clamp_max(1 - self.floor)  # N/P
        odds = bcast(share / (1 - share), x)
        return positive_log + (1 - share).log(), positive_slope + odds * (positive_slope - negative_slope)

    def at(self, level: float) -> FieldPair:
        """The same fields for points that are all at one noise level, which networks then embed once, not for each."""
        return _AtLevel(self, level)

    def posterior(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """Shares of the classes with positive weights at x (B, *) and sigma (B,): for every source, (B, C)."""
        self.check()
        logs = []
        for source, weights in self.terms:
            log, _ = source.components(x, sigma)
            logs.append(log + weights.to(x).clamp_min(0).log())
        return list(torch.cat(logs, 1).softmax(1).split([log.shape[1] for log in logs], 1))

    def densities(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """log w_c π_c (B, C) and ∇log p_c (B, C, *) of the classes that have a weight, of all sources in order."""
        self.check()
        logs, scores = [], []
        center = x / bcast(sigma.square() + self.sigma_data**2, x)
        for source, weights in self.terms:
            if (weights < 0).any():
                raise UserError(
                    "weights are carried along chains of a sum of densities, and here is a negative weight: take "
                    "another model.sampler than tracked"
                )
            asked = (weights * source.shares.to(weights)).to(x).expand(len(x), -1)
            used = (asked > 0).any(0)
            logs.append(asked[:, used].log())
            scores.append(source.components(x, sigma)[1][:, used] - center[:, None])
        return torch.cat(logs, 1), torch.cat(scores, 1)

    def log_gradients(self, x: Tensor, sigma: Tensor, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """s (B,), S = ∇log p_σ + ∇log s (B, *) and ∇log s (B, *), always exact."""
        log, slope = self.log_ratio(x, sigma)
        score = slope - x / bcast(sigma.square() + self.sigma_data**2, x)
        if self.mobility == "constant":
            return torch.ones_like(log), score, torch.zeros_like(x)
        return log.clamp(-60, 60).exp(), score + slope, slope

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) of the sum at x (B, *) and noise levels sigma (B,); shapes (B,) and (B, *)."""
        s, S, _ = self.log_gradients(x, sigma)
        return s, bcast(s / 2, x) * S


class _AtLevel(FieldPair):
    """A mixture at one noise level."""

    def __init__(self, mixture: Mixture, level: float) -> None:
        self.mixture, self.level = mixture, level

    def log_gradients(self, x: Tensor, sigma: Tensor, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return self.mixture.log_gradients(x, x.new_full((1,), self.level))

    def densities(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        return self.mixture.densities(x, x.new_full((1,), self.level))

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixture(x, x.new_full((1,), self.level))
