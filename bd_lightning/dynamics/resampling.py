r"""Guided sampling with Feynman–Kac weights, which make of guided chains samples of the density that guidance means.

Guidance of scale w follows the score S_w = S₀ + w(S_c − S₀) of q_σ ∝ p₀,σ^{1−w} p_c,σ^w. But these q_σ are not noised
versions of one density: with τ = σ², log q differs from a solution of the heat equation by the rate

    ∂_τ log q − ½(Δ log q + ‖∇log q‖²) = ½ w(1 − w) ‖S_c − S₀‖²,

so that chains that follow S_w do not have the density q_σ. They have it with weights W, which on the way from σ down to
σ' = e^{−h}σ grow by

    Δ log W = w(w − 1) d² h,        d = σ‖S_c − S₀‖,

for the flow and for every dynamics beside it that leave q_σ unchanged. Where the weights become uneven the chains are
resampled by them.

References:
    | Jain et al., Classifier-Free Guidance inside the Attraction Basin May Cause Memorization, arXiv 2411.16738 (d)
    | Skreta et al., Feynman-Kac Correctors in Diffusion, arXiv 2503.02819, §3.1 (the weights of guidance)
    | Douc and Cappé, Comparison of Resampling Schemes for Particle Filtering, 2005 (systematic resampling)
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.dynamics.langevin import geometric_ladder
from bd_lightning.dynamics.sampler import MultiScaleSampler


def systematic(weights: Tensor, place: Tensor) -> Tensor:
    """Which chain each of as many new ones goes on from, (B,); chain i is taken B·wᵢ times, rounded up or down.

    Args:
        weights: wᵢ, of sum one, shape (B,).
        place: uniform in [0, 1), a scalar, for the whole set.
    """
    count = len(weights)
    marks = (torch.arange(count, device=weights.device) + place) / count
    return torch.searchsorted(weights.double().cumsum(0), marks.double()).clamp_max(count - 1)


def _warn_of_few(ancestors: int, count: int) -> None:
    """Say when samples descend from few of the chains that were begun, and are alike."""
    if ancestors < count / 10:
        warnings.warn(
            f"Feynman–Kac: these {count} samples descend from {ancestors} of the chains that were begun, so that many "
            "are alike: take less guidance, more samples at once, or another model.sampler",
            stacklevel=3,
        )


@dataclass(frozen=True)
class FeynmanKac(MultiScaleSampler):
    """Samples of q ∝ p₀^{1−w} p_c^w of guidance of scale w, by chains that are weighted and resampled on their way.

    The chains are those of one batch, and are no longer independent of each other: a sample depends on the others of
    its batch. Large batches are better. At the last level they are resampled, so that samples have equal weights.
    Without guidance it is the reversed diffusion of the constant kernel, each step's target extrapolated to its middle.

    Args:
        levels: number of noise levels, at equal ratios; as many calls of the fields.
        relaxation: λ² of the dynamics beside the flow; 0 is the flow alone, in which copies of a chain stay copies.
        threshold: share of the chains that the weights are worth, (Σ W)²/(B Σ W²), below which they are resampled.

    References:
        | Skreta et al., Feynman-Kac Correctors in Diffusion, arXiv 2503.02819
    """

    levels: int = 100
    relaxation: float = 1.0
    threshold: float = 0.5
    interacting: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels)
        in_range(0, math.inf, relaxation=self.relaxation)
        in_range(0, 1, threshold=self.threshold)

    @property
    def calls(self):
        return self.levels

    def with_calls(self, calls):
        return replace(self, levels=calls)

    def path(self, fields, noise):
        x = self.first(noise)
        yield x
        ladder = geometric_ladder(self.sigma_max, self.sigma_min, self.levels).tolist()
        h, kappa = math.log(ladder[0] / ladder[-1]) / max(1, self.levels - 1), 1 + self.relaxation
        log_weight, ancestor = x.new_zeros(len(x), dtype=torch.float64), torch.arange(len(x), device=x.device)
        last: tuple[Tensor, Tensor] | None = None  # the rate and the target of the last level
        for here, there in zip(ladder, [*ladder[1:], 0.0]):
            score, rate = fields.weighted_score(x, x.new_full((len(x),), here), self.exact_score)
            before, behind = last or (rate, x + here**2 * score)
            log_weight = log_weight + (0 if last is None else h) * (rate + before).double() / 2  # the trapezium rule
            log_weight = torch.where(log_weight.isfinite(), log_weight, -math.inf)  # a chain that is lost, alone
            weights = log_weight.softmax(0)
            if there == 0 or 1 / weights.square().sum() < self.threshold * len(x):
                taken = systematic(weights, noise.uniform().flatten()[0] / math.sqrt(12) + 0.5)
                x, score, rate, behind = x[taken], score[taken], rate[taken], behind[taken]
                ancestor = ancestor[taken]
                log_weight = torch.zeros_like(log_weight)
            target = x + here**2 * score
            if there == 0:
                _warn_of_few(len(ancestor.unique()), len(x))
                yield target
                return
            aim, spread = target + (target - behind) / 2, -math.expm1(-2 * self.relaxation * h)
            x = aim + math.exp(-kappa * h) * (x - aim) + there * math.sqrt(spread) * noise()
            last = rate, target
            yield x
