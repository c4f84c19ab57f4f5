r"""Samplers that follow p_σ down to σ = 0 instead of relaxing to it level by level.

Let t = −ln σ and write D for the denoiser of a score, D = x + σ² ∇log p_σ. The probability flow is
dx/dt = −(x − D). The dynamics leave every p_σ unchanged, so they can be added to it at any rate λ² ≥ 0, with the time
step 2λ²σ² dt / m_ref:

    dx = [σ² ∇log p_σ + l σ² S] dt + √(2l) σ dW,      l = λ² s / m_ref,      S = 2g/s = ∇log p_σ + ∇log s.

The solution has the density p_σ at every σ, for every kernel. Where the mobility s vanishes it is the flow alone, so
that no chain freezes. λ = 0 is the flow; the constant kernel with λ = 1 is the reversed diffusion of score models.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §4
    | Song et al., Score-Based Generative Modeling through SDEs, arXiv 2011.13456 (probability flow)
    | Karras et al., EDM, arXiv 2206.00364, Algorithm 1 (Heun's method and the grid of noise levels)
    | Lu et al., DPM-Solver++, arXiv 2211.01095 (exponential integrators in ln σ, two-step extrapolation)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd_lightning.checks import in_range, interval, positive
from bd_lightning.divergences import bcast
from bd_lightning.dynamics.langevin import geometric_ladder
from bd_lightning.dynamics.sampler import MultiScaleSampler


def edm_grid(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Tensor:
    """EDM's noise levels (Eq. 5) from sigma_max down to sigma_min and then 0, shape (steps + 1,), double precision."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


@dataclass(frozen=True)
class MultistepDynamics(MultiScaleSampler):
    r"""The SDE above by a second-order rule, one network call for each noise level.

    With the drift −(1 + l)(x − T), T = D + l/(1 + l) σ² ∇log s, and T and l held fixed over a step of length
    h = ln(σ/σ') the SDE is solved exactly:

        x' = T + e^{−(1+l)h} (x − T) + σ' √(1 − e^{−2lh}) z.

    T is extrapolated to the middle of the step from the last two levels, T + (T − T₋)h/(2h₋), which makes the drift
    second order. A last step returns D.

    Args:
        levels: number of noise levels, at equal ratios.
        relaxation: λ² above, how much the dynamics act beside the flow. More of it corrects errors of the fields and
            of earlier steps, and needs more levels.
    """

    levels: int = 40
    relaxation: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels)
        in_range(0, math.inf, relaxation=self.relaxation)

    @property
    def calls(self):
        return self.levels

    def path(self, fields, noise):
        x = self.first(noise)
        yield x
        ladder = geometric_ladder(self.sigma_max, self.sigma_min, self.levels).tolist()
        before: tuple[Tensor, float] | None = None
        for here, there in zip(ladder, [*ladder[1:], 0.0]):
            sigma = x.new_full((len(x),), here)
            s, S, slope = fields.log_gradients(x, sigma, self.exact_score)
            if there == 0:
                yield x + here**2 * (S - slope)
                return
            h = math.log(here / there)
            rate = bcast(self.relaxation * s / fields.reference(sigma), x)
            target = x + here**2 * (S - slope / (1 + rate))
            middle = target if before is None else target + (target - before[0]) * (h / (2 * before[1]))
            before = target, h
            x = middle + (-(1 + rate) * h).exp() * (x - middle) + there * (-torch.expm1(-2 * rate * h)).sqrt() * noise()
            yield x


@dataclass(frozen=True)
class ProbabilityFlow(MultiScaleSampler):
    """The flow dx/dσ = −σ ∇log p_σ, by Heun's method on EDM's grid (EDM, Algorithms 1 and 2).

    Args:
        steps: number of grid points; 2·steps − 1 network calls.
        rho: how strongly the grid favours small noise levels.
        churn: EDM's S_churn (Algorithm 2): before each step the noise level is raised by the factor
            1 + min(churn/steps, √2 − 1) with fresh noise. 0 is the deterministic flow.
        churn_interval: noise levels at which that is done.
    """

    steps: int = 18
    rho: float = 7.0
    churn: float = 0.0
    churn_interval: tuple[float, float] = (0.05, 50.0)

    def __post_init__(self):
        super().__post_init__()
        positive(steps=self.steps, rho=self.rho)
        in_range(0, math.inf, churn=self.churn)
        interval(churn_interval=self.churn_interval)

    @property
    def calls(self):
        return 2 * self.steps - 1

    def path(self, fields, noise):
        def slope(x: Tensor, level: float) -> Tensor:
            return -level * fields.score(x, x.new_full((len(x),), level), self.exact_score)

        x = self.first(noise)
        yield x
        grid = edm_grid(self.sigma_max, self.sigma_min, self.steps, self.rho).tolist()
        for here, there in zip(grid, grid[1:]):
            if self.churn and self.churn_interval[0] <= here <= self.churn_interval[1]:
                raised = here * (1 + min(self.churn / self.steps, math.sqrt(2) - 1))
                x, here = x + math.sqrt(raised**2 - here**2) * noise(), raised
            d = slope(x, here)
            euler = x + (there - here) * d
            x = euler if there == 0 else x + (there - here) * (d + slope(euler, there)) / 2
            yield x
