r"""Linear algebra on fields relative to a base Gaussian.

With ρ_c and U_c of `relative`, a mixture has

    ρ = Σ_c w_c ρ_c,        U = Σ_c w_c ρ_c U_c / ρ,        ∇log p_σ = U − x/(σ_d² + σ²),

and any positive mobility makes dynamics of it that leave it unchanged (see `kernels`): m = ρ, the field itself
(s = ρ, g = ½ρ(∇log p_σ + U)), or m = 1, which needs the fewest steps (s = 1, g = ½∇log p_σ).

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 (linearity of the modelling operator)
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bd_lightning.checks import UserError, one_of
from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair


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

    `a + b`, `a - b` and `2 * a` are the same operations on the densities; the sum is not normalised, and need not be.

    Where the negative part N of the sum comes within `floor` of the positive part P, the sum is not a density there, or
    the estimates are not good enough to tell; it is held at floor × P, and such points are counted.

    Args:
        terms: sources and their weights: (C,), or (B, C) for one mixture per sample.
        mobility: "constant" or "density", m = 1 or m = ρ.
        floor: smallest share of the positive part.

    Attributes:
        queried: number of points asked for so far.
        held: how many of them were held at the floor.

    Raises:
        ValueError: if base Gaussians differ, and when a mixture without a positive weight is used.
    """

    def __init__(self, terms: Sequence[tuple[Source, Tensor]], mobility: str = "constant", floor: float = 0.01) -> None:
        one_of(("constant", "density"), mobility=mobility)
        merged: dict[int, tuple[Source, Tensor]] = {}
        for source, weights in terms:
            before = merged.get(id(source))
            merged[id(source)] = source, weights if before is None else before[1] + weights
        self.terms = [(source, weights) for source, weights in merged.values() if weights.any()]
        bases = {source.sigma_data for source, _ in self.terms}
        if len(bases) > 1:
            raise ValueError(f"the base Gaussians differ: sigma_data is {' and '.join(map(str, sorted(bases)))}")
        self.sigma_data, self.mobility, self.floor = bases.pop() if bases else 1.0, mobility, floor
        self.queried = self.held = 0

    def __mul__(self, factor: float) -> "Mixture":
        return Mixture([(source, factor * weights) for source, weights in self.terms], self.mobility, self.floor)

    __rmul__ = __mul__

    def __add__(self, other: "Mixture") -> "Mixture":
        return Mixture([*self.terms, *other.terms], self.mobility, self.floor)

    def __sub__(self, other: "Mixture") -> "Mixture":
        negative = [(source, -weights) for source, weights in other.terms]
        return Mixture([*self.terms, *negative], self.mobility, self.floor)

    def mass(self) -> float:
        """Sum of w π_c: the integral of the mixture."""
        return sum(float((weights * source.shares.to(weights)).sum()) for source, weights in self.terms)

    def log_ratio(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log ρ (B,) and U (B, *) of the sum, at x (B, *) and noise levels sigma (B,)."""
        if not any((weights > 0).any() for _, weights in self.terms):
            raise ValueError("a mixture needs a positive weight")
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
        share = (negative_log - positive_log).exp()  # N/P
        self.queried += len(x)
        self.held += int((share > 1 - self.floor).sum())
        share = share.clamp_max(1 - self.floor)
        odds = bcast(share / (1 - share), x)
        return positive_log + (1 - share).log(), positive_slope + odds * (positive_slope - negative_slope)

    def at(self, level: float) -> FieldPair:
        """The same fields for points that are all at one noise level, which networks then embed once, not for each."""
        return _AtLevel(self, level)

    def posterior(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """Shares of the classes with positive weights at x (B, *) and sigma (B,): for every source, (B, C)."""
        logs = []
        for source, weights in self.terms:
            log, _ = source.components(x, sigma)
            logs.append(log + weights.to(x).clamp_min(0).log())
        return list(torch.cat(logs, 1).softmax(1).split([log.shape[1] for log in logs], 1))

    def densities(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """log w_c π_c (B, C) and ∇log p_c (B, C, *) of the classes that have a weight, of all sources in order."""
        logs, scores = [], []
        center = x / bcast(sigma.square() + self.sigma_data**2, x)
        for source, weights in self.terms:
            if (weights < 0).any():
                raise UserError(
                    "TrackedPosterior carries the weights of a sum of densities, and here is a negative weight: take "
                    "another model.sampler"
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


@torch.no_grad()
def calibrated(
    mixture: Mixture, draw: Callable[[Mixture], Tensor], sigma: float = 0.1, rounds: int = 3, floor: float = 1e-4
) -> Mixture:
    """The mixture with weights corrected so that its samples have the shares that were asked for.

    With exact fields the mean of the classes' posterior is the same at every noise level, namely what was asked for.
    Errors of learned fields let it drift on the way down, mostly towards the training data's shares. Each round draws
    pilot samples, takes the mean posterior at the end, by the fields themselves, and multiplies the weights by what is
    missing. No classifier is involved.

    Args:
        mixture: what is asked for.
        draw: draws pilot samples of a mixture, shape (N, *).
        sigma: noise level at which the posterior is taken, in data units.
        rounds: how often the weights are corrected.
        floor: shares below it are not corrected.

    Returns:
        The corrected mixture.
    """
    asked = [(weights * source.shares.to(weights)).clamp_min(0) for source, weights in mixture.terms]
    total = sum(part.sum() for part in asked)
    current = mixture
    for _ in range(rounds):
        x = draw(current)
        found = [part.mean(0) for part in mixture.posterior(x, x.new_full((len(x),), sigma))]
        terms = []
        for (source, weights), wanted, have in zip(current.terms, asked, found):
            wanted = (wanted / total).to(have)
            factor = torch.where((wanted > floor) & (have > floor), wanted / have.clamp_min(floor), 1.0)
            terms.append((source, weights * factor.to(weights)))
        current = Mixture(terms, mixture.mobility, mixture.floor)
    return current


def _cancel(parts: Sequence[tuple[Source, Sequence[str], Tensor]], known: Sequence[str]) -> None:
    """Scale the weights (C,) of each source, in place, so that no class is both added and taken."""
    for name in known:
        places = [  # a source of one density has one weight, whatever names its data has
            (weights, c, source) for source, names, weights in parts for c, own in zip(range(len(weights)), names)
            if own == name
        ]  # fmt: skip
        held = [float((weights[c] * source.shares[c]).nan_to_num(0)) for weights, c, source in places]
        plus, minus = sum(max(part, 0.0) for part in held), -sum(min(part, 0.0) for part in held)
        if plus and minus:
            for (weights, c, _), part in zip(places, held):
                weights[c] *= max(0.0, 1 - minus / plus if part > 0 else 1 - plus / minus)


def combine(
    sources: Sequence[tuple[Source, Sequence[str], float]],
    mix: dict[str, float] | None = None,
    remove: Sequence[str] = (),
) -> Mixture:
    """The mixture that is asked for by the names of classes.

    What has one name is one density. So a class that is added by one source and taken by another is taken from the
    former's own fields, where nothing is left of it, and not as the difference of two estimates.

    Args:
        sources: each with the names of its classes and a weight for its whole density.
        mix: weight of each class, all others zero; a class that several sources have is their average. None takes each
            source's density as it was trained.
        remove: classes whose weight becomes zero.

    Returns:
        The mixture. With a warning where a class would have a negative share, so that the sum is not a density: what is
        sampled then is its positive part.

    Raises:
        UserError: for unknown classes, and for weights whose sum is not positive.
    """
    known = list(dict.fromkeys(name for _, names, _ in sources for name in names))
    for name in [*(mix or ()), *remove]:
        if name not in known:
            raise UserError(f"no class '{name}': the classes are {', '.join(known) or 'not known'}")
    terms = []
    for source, names, weight in sources:
        weights = torch.full_like(source.shares, weight)
        for c, name in enumerate(names):
            if mix is not None:
                owners = sum(name in others for _, others, _ in sources)
                share = float(source.shares[c])
                wanted = mix.get(name, 0.0)
                if wanted and not share > 0:
                    raise UserError(f"class '{name}' was not seen in training")
                weights[c] = wanted / owners / share if wanted else 0.0
            if name in remove:
                weights[c] = 0.0
        terms.append((source, weights))
    _cancel([(source, names, weights) for (source, names, _), (_, weights) in zip(sources, terms)], known)
    asked = dict.fromkeys(known or [""], 0.0)
    for (source, names, _), (_, weights) in zip(sources, terms):
        for name, part in zip(names or [""], (weights * source.shares).nan_to_num(0).tolist()):
            asked[name] += part
    total = sum(asked.values())
    if not total > 0:
        raise UserError(f"the weights of the mixture sum to {total:.3g}; they must sum to a positive number")
    for name, part in asked.items():
        if part < -0.01 * total:
            warnings.warn(
                f"class '{name}' has the negative share {part / total:.3g}: that is not a density; its positive "
                "part is sampled",
                stacklevel=2,
            )
    return Mixture(terms)
