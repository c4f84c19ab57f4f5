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
    | Lu et al., DPM-Solver++, arXiv 2211.01095 (exponential integrators in ln σ, multistep extrapolation)
    | Zhao et al., UniPC, arXiv 2302.04867 (the corrector of the flow)
    | Xue et al., SA-Solver, arXiv 2309.05019 (the corrector of the SDE)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
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


def step_target(past: Sequence[tuple[float, Tensor]], start: float, h: float, kappa: Tensor) -> Tensor:
    r"""A = ∫₀^h κ e^{−κ(h−u)} T(u) du / ∫₀^h κ e^{−κ(h−u)} du, of the polynomial T through given values.

    Args:
        past: ln σ and T, shape (B, *), at different noise levels.
        start: ln σ where the step begins; u = start − ln σ.
        h: length of the step.
        kappa: κ, shape (B, 1, …).

    Returns:
        A, shape (B, *). By Gauss's rule of 16 points, which is exact to rounding while κh < 20.
    """
    places, values = [start - level for level, _ in past], [value for _, value in past]
    rule = np.polynomial.legendre.leggauss(16)
    points, weights = (torch.from_numpy(one).to(kappa, non_blocking=True) for one in rule)
    u = h * (1 + points) / 2
    decay = (weights.log() - kappa.flatten()[:, None] * (h - u)).softmax(1)
    aim = values[0]
    for j in range(1, len(past)):
        lagrange = torch.ones_like(u)
        for k, place in enumerate(places):
            if k != j:
                lagrange = lagrange * (u - place) / (places[j] - place)
        weight = (decay * lagrange).sum(1).reshape(kappa.shape)  # a product of matrices would be in half precision
        aim = aim + weight * (values[j] - values[0])
    return aim


@dataclass(frozen=True)
class MultistepDynamics(MultiScaleSampler):
    r"""The SDE above by an exponential multistep rule, one network call for each noise level.

    With the drift −(1 + l)(x − T), T = D + l/(1 + l) σ² ∇log s, and l held fixed over a step of length h = ln(σ/σ') the
    SDE is solved exactly for a polynomial T(u), u the way gone since σ in t:

        x' = A + e^{−κh} (x − A) + σ' √(1 − e^{−2lh}) z,   κ = 1 + l,   A = ∫₀^h κ e^{−κ(h−u)} T(u) du / (1 − e^{−κh}).

    T is the polynomial through its values at the last `order` levels. The corrector does a step again, with the same
    noise, once T is known at its end too, from the call that the next step needs anyway. λ = 0 and the corrector are
    UniPC, λ > 0 and the corrector SA-Solver. Order 2 without it takes T at the middle of the step, which is
    DPM-Solver++(2M) at λ = 0. The first steps have fewer levels behind them and are of lower order. A last step
    returns D.

    Args:
        levels: number of noise levels.
        relaxation: λ² above, how much the dynamics act beside the flow. More of it corrects errors of the fields and
            of earlier steps, and needs more levels.
        order: levels that T is extrapolated from, 1 to 3.
        corrector: correct each step by the call of the next.
        rho: the levels are EDM's grid with this ρ; None is equal ratios.
    """

    levels: int = 40
    relaxation: float = 0.5
    order: int = 2
    corrector: bool = False
    rho: float | None = None

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels, **({} if self.rho is None else {"rho": self.rho}))
        in_range(0, math.inf, relaxation=self.relaxation)
        in_range(1, 3, order=self.order)

    @property
    def calls(self):
        return self.levels

    def with_calls(self, calls):
        return replace(self, levels=calls)

    def ladder(self) -> list[float]:
        """The noise levels, and 0 after them."""
        if self.rho is None:
            return [*geometric_ladder(self.sigma_max, self.sigma_min, self.levels).tolist(), 0.0]
        return edm_grid(self.sigma_max, self.sigma_min, self.levels, self.rho).tolist()

    def path(self, fields, noise):
        x = self.first(noise)
        ladder = self.ladder()
        past: list[tuple[float, Tensor]] = []  # ln σ and T at the last levels, latest first
        h, kappa, aim = 0.0, x, x  # of the last step; kappa and aim have no meaning before the first
        for here, there in zip(ladder, ladder[1:]):
            sigma = x.new_full((len(x),), here)
            s, S, slope = fields.at(here).log_gradients(x, sigma, self.exact_score)
            rate = bcast(self.relaxation * s / fields.reference(sigma), x)
            target = x + here**2 * (S - slope / (1 + rate))
            score = S - slope
            if past and self.corrector:
                again = step_target([(math.log(here), target), *past], math.log(here) + h, h, kappa)
                x = x - torch.expm1(-kappa * h) * (again - aim)
            yield x
            if there == 0:
                yield x + here**2 * score
                return
            kappa, h, behind = 1 + rate, math.log(here / there), h
            past = [(math.log(here), target), *past][: self.order]
            if len(past) == 2 == self.order and not self.corrector:
                aim = target + (target - past[1][1]) * (h / (2 * behind))
            else:
                aim = step_target(past, math.log(here), h, kappa)
            x = aim + (-kappa * h).exp() * (x - aim) + there * (-torch.expm1(-2 * rate * h)).sqrt() * noise()


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

    def with_calls(self, calls):
        return replace(self, steps=(calls + 1) // 2)

    def path(self, fields, noise):
        def slope(x: Tensor, level: float) -> Tensor:
            return -level * fields.at(level).score(x, x.new_full((len(x),), level), self.exact_score)

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
