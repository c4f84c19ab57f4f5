r"""Chains of a mixture that carry its weights along: by where they have come from, not by where they are.

The score of Σ_c w_c p_c at a noise level is Σ_c W_c ∇log p_c,σ with W_c the posterior of c at a point. Learned scalar
fields say it with an error, by which the shares drift on the way down. The scores alone say it too: a step of the
dynamics from σ to σ' takes a chain of class c to a normal of a mean m_c and a variance v that knows no class, so that
by Bayes' rule on the steps taken

    log W_c ← log W_c − ‖x' − m_c‖²/(2v) + const,        W_c = w_c at the start.

A step of the mixture is one of a class c that is drawn by W, x' = m_c + √v ε. So W_c stays w_c on average, and the law
of the chains is that of the class drawn once, before the first step, with the shares w_c: at any number of levels, and
whatever the errors of the scores. (A step by the mean Σ_c W_c m_c, as in the reference, has that law only in the limit
of small steps: at 60 levels it gave 0.91 for 0.9.) It needs noise in every step and no negative weights.

References:
    | Skreta et al., The Superposition of Diffusion Models Using the Itô Density Estimator, arXiv 2412.17762
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.dynamics.langevin import geometric_ladder
from bd_lightning.dynamics.noise import SampleNoise
from bd_lightning.dynamics.sampler import MultiScaleSampler


def _drawn(weight: Tensor, parts: Tensor, noise: SampleNoise) -> Tensor:
    """a_c (B, *) of a class c for every chain, drawn by log W_c (B, C), of a (B, C, *)."""
    if weight.shape[1] == 1:
        return parts[:, 0]
    heaped = weight.exp().cumsum(1)
    chosen = (heaped < noise.fraction()[:, None] * heaped[:, -1:]).sum(1)
    return parts[torch.arange(len(parts), device=parts.device), chosen]


@dataclass(frozen=True)
class TrackedPosterior(MultiScaleSampler):
    """The dynamics of `MultistepDynamics` of second order for a mixture whose weights are carried along the chains.

    For fields that are one density it is those dynamics, with the constant mobility.

    Args:
        levels: number of noise levels, at equal ratios; as many calls of the fields.
        relaxation: λ² of the dynamics beside the flow, above zero.
    """

    levels: int = 60
    relaxation: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels, relaxation=self.relaxation)

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
        spread = math.sqrt(-math.expm1(-2 * self.relaxation * h))
        weight = before = None
        for here, there in zip(ladder, [*ladder[1:], 0.0]):
            shares, scores = fields.at(here).densities(x, x.new_full((len(x),), here), self.exact_score)
            weight = shares.log_softmax(1) if weight is None else weight
            target = x[:, None] + here**2 * scores
            if there == 0:
                yield _drawn(weight, target, noise)
                return
            aim = target if before is None else target + (target - before) / 2
            means = aim + math.exp(-kappa * h) * (x[:, None] - aim)
            mean, width, step = _drawn(weight, means, noise), there * spread, noise()
            x = mean + width * step
            gap = (mean[:, None] - means) / width  # x' − m_c without what all classes share
            weight = (weight - (gap.square() / 2 + gap * step[:, None]).flatten(2).sum(2)).log_softmax(1)
            before = target
            yield x
