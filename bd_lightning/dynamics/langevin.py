r"""Bellman Diffusion dynamics by Euler–Maruyama, at one noise level and down a ladder of them.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §4
    | Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv 1907.05600 (annealing)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.divergences import bcast
from bd_lightning.dynamics.sampler import MultiScaleSampler, Sampler


def bellman_step(x: Tensor, s: Tensor, g: Tensor, step: Tensor | float, z: Tensor) -> Tensor:
    """One Euler–Maruyama step of the dynamics: x + η g + √(η s) z.

    Args:
        x: points, shape (B, *).
        s: scalar field at x, shape (B,).
        g: gradient field at x, shape (B, *).
        step: time step η, a number or of shape (B,).
        z: standard normal noise, shape (B, *).

    Returns:
        The next points, shape (B, *).
    """
    step = torch.as_tensor(step, dtype=x.dtype, device=x.device).expand(len(x))
    return x + bcast(step, x) * g + bcast((step * s).sqrt(), x) * z


def geometric_ladder(sigma_max: float, sigma_min: float, levels: int) -> Tensor:
    """Noise levels from sigma_max down to sigma_min at equal ratios, shape (levels,), double precision."""
    ladder = torch.linspace(0, 1, levels, dtype=torch.float64)
    return sigma_max * (sigma_min / sigma_max) ** ladder


@dataclass(frozen=True)
class BellmanDynamics(Sampler):
    """The paper's single-scale dynamics.

    Between modes that hardly overlap no mass moves in reasonable time: their weights stay those of the start.

    Args:
        steps: number of Euler–Maruyama steps.
        step_size: time step η in units of scale²/m_ref(0); the paper's η is step_size · scale² / m_ref.
        scale: standard deviation of the start, in data units; choose that of the data.
    """

    steps: int = 300
    step_size: float = 0.01
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        positive(steps=self.steps, step_size=self.step_size, scale=self.scale)

    @property
    def start_scale(self):
        return self.scale

    @property
    def calls(self):
        return self.steps

    def with_calls(self, calls):
        return replace(self, steps=calls)

    def path(self, fields, noise):
        x = self.first(noise)
        sigma = x.new_zeros(len(x))
        step = self.step_size * self.scale**2 / fields.reference(sigma)
        fields = fields.at(0.0)
        yield x
        for _ in range(self.steps):
            s, g = fields(x, sigma)
            x = bellman_step(x, s, g, step, noise())
            yield x


@dataclass(frozen=True)
class AnnealedDynamics(MultiScaleSampler):
    r"""The dynamics with η = c σ²/m_ref(σ) down a geometric ladder of noise levels, then a last denoising step.

    At every level they are let relax towards p_σ. `MultistepDynamics` reaches the same with far fewer network calls.

    Args:
        levels: number of noise levels.
        steps_per_level: steps at each level.
        step_size: c above, dimensionless.
    """

    levels: int = 30
    steps_per_level: int = 20
    step_size: float = 0.6

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels, steps_per_level=self.steps_per_level, step_size=self.step_size)

    @property
    def calls(self):
        return self.levels * self.steps_per_level + 1

    def with_calls(self, calls):
        steps = max(1, (calls - 1) // self.levels)
        return replace(self, levels=min(self.levels, max(1, calls - 1)), steps_per_level=steps)

    def path(self, fields, noise):
        x = self.first(noise)
        yield x
        for level in geometric_ladder(self.sigma_max, self.sigma_min, self.levels).tolist():
            sigma = x.new_full((len(x),), level)
            step, here = self.step_size * level**2 / fields.reference(sigma), fields.at(level)
            for _ in range(self.steps_per_level):
                s, g = here(x, sigma)
                x = bellman_step(x, s, g, step, noise())
                yield x
        yield x + bcast(sigma.square(), x) * here.score(x, sigma, self.exact_score)
