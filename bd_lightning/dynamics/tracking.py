r"""Chains of a mixture that carry its weights along: by where they have come from, not by where they are.

The score of Σ_c w_c p_c at a noise level is Σ_c W_c ∇log p_c,σ with W_c the posterior of c at a point. Learned scalar
fields say it with an error, by which the shares drift on the way down. The scores alone say it too: a step of the
dynamics from σ to σ' takes a chain of class c to a normal of a mean m_c and a variance v that knows no class, so that
by Bayes' rule on the steps taken

    log W_c ← log W_c − ‖x' − m_c‖²/(2v) + const,        W_c = w_c at the start.

In the limit of small steps the law of the chains is that of the class drawn first, with the shares w_c, whatever the
errors of the scores. It needs noise in every step and no negative weights.

References:
    | Skreta et al., The Superposition of Diffusion Models Using the Itô Density Estimator, arXiv 2412.17762
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.dynamics.langevin import geometric_ladder
from bd_lightning.dynamics.sampler import MultiScaleSampler


def _mean(weight: Tensor, parts: Tensor) -> Tensor:
    """Σ_c w_c a_c (B, *), weights (B, C) of a (B, C, *); by no matrix product, which autocast would round."""
    return (weight.reshape(*weight.shape, *(1,) * (parts.ndim - 2)) * parts).sum(1)


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
        spread = -math.expm1(-2 * self.relaxation * h)
        weight = before = None
        for here, there in zip(ladder, [*ladder[1:], 0.0]):
            shares, scores = fields.at(here).densities(x, x.new_full((len(x),), here), self.exact_score)
            weight = shares.log_softmax(1) if weight is None else weight
            target = x[:, None] + here**2 * scores
            if there == 0:
                yield _mean(weight.exp(), target)
                return
            aim = target if before is None else target + (target - before) / 2
            means = aim + math.exp(-kappa * h) * (x[:, None] - aim)
            x = _mean(weight.exp(), means) + there * math.sqrt(spread) * noise()
            far = (x[:, None] - means).flatten(2).square().sum(2)
            weight = (weight - far / (2 * there**2 * spread)).log_softmax(1)
            before = target
            yield x
