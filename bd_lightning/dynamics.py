r"""Samplers: they know fields as functions, and nothing of networks or training.

Bellman Diffusion dynamics (arXiv 2410.01796, §4), whose stationary density is p for every kernel:

    dx = g(x) dt + √s(x) dW,        Euler–Maruyama: x ← x + η g + √(η s) z.

`AnnealedDynamics` runs them down a ladder of noise levels, `ProbabilityFlow` solves dx/dσ = −σ ∇log p_σ from the same
two fields, since ∇log p_σ = (2g − ∇s)/s.

`fields(x, sigma)` returns (s, g) of shapes (B,) and (B, *) for sigma of shape (B,). It has an attribute
`reference(sigma)`, the typical mobility m_ref, which turns a dimensionless step into a time step.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §4
    | Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv 1907.05600 (annealing)
    | Karras et al., EDM, arXiv 2206.00364, Algorithm 1 (Heun's method and the grid of noise levels)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bd_lightning.checks import UserError, in_range, positive
from bd_lightning.divergences import bcast
from bd_lightning.fields import log_gradient


class FieldPair(Protocol):
    """What a sampler asks of fields; `fields.Fields` is one."""

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g)."""
        ...

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref."""
        ...


class SamplingDiverged(UserError):
    """Chains left the region of the data or became non-finite.

    Attributes:
        x: the state when the sampler stopped, shape (B, *), lost chains included.
        lost: which chains were lost, shape (B,).
    """

    def __init__(self, step: int, x: Tensor, lost: Tensor) -> None:
        super().__init__(
            f"{int(lost.sum())} of {len(x)} samples were lost at step {step} of the sampler (non-finite or far out); "
            "the likely cause is a step size that is too large, or fields queried where they saw no data "
            "(a single-scale model does that from a far start, a multi-scale one does not)"
        )
        self.x, self.lost = x, lost


class SampleNoise:
    """Gaussian noise with one random stream per sample, so that sample i is the same in any batch, on any rank.

    The streams are counter-based (Philox) with the key (seed, index), so that no two of them overlap.

    Args:
        indices: index of each sample, length B.
        shape: shape of one sample.
        seed: seed of the whole set of samples.
        device: where the noise is wanted. It is drawn on the CPU, so that devices agree.
    """

    def __init__(
        self, indices: Sequence[int], shape: Sequence[int], seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.device = tuple(shape), torch.device(device)
        self.streams = [np.random.Generator(np.random.Philox(key=[seed, int(i)])) for i in indices]

    def __len__(self) -> int:
        return len(self.streams)

    def __call__(self) -> Tensor:
        """The next standard normal draw, shape (B, *shape)."""
        draws = np.stack([stream.standard_normal(self.shape, dtype=np.float32) for stream in self.streams])
        return torch.from_numpy(draws).to(self.device)


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


def score(fields: FieldPair, x: Tensor, sigma: Tensor, exact: bool = False) -> Tensor:
    """∇log p_σ = S − ∇log s, S = 2g/s, at x (B, *) for sigma (B,); shape (B, *).

    Args:
        fields: the pair of fields.
        x: points.
        sigma: noise levels.
        exact: subtract ∇log s, by differentiation through the scalar field. Where the mobility is a mean over many
            dimensions, ∇log s is about 1/(2d) of S, and leaving it out halves the cost.
    """
    if not exact:
        return log_gradient(*fields(x, sigma))
    with torch.inference_mode(False), torch.enable_grad():
        point = x.clone().requires_grad_(True)
        s, g = fields(point, sigma.clone())
        S = log_gradient(s, g)
        if s.requires_grad:  # a constant mobility has no gradient to subtract
            (grad_log_s,) = torch.autograd.grad(s.clamp_min(torch.finfo(s.dtype).tiny).log().sum(), point)
            S = S - grad_log_s
        return S.detach()


def geometric_ladder(sigma_max: float, sigma_min: float, levels: int) -> Tensor:
    """Noise levels from sigma_max down to sigma_min at equal ratios, shape (levels,), double precision."""
    ladder = torch.linspace(0, 1, levels, dtype=torch.float64)
    return sigma_max * (sigma_min / sigma_max) ** ladder


def edm_grid(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Tensor:
    """EDM's noise levels (Eq. 5) from sigma_max down to sigma_min and then 0, shape (steps + 1,), double precision."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


@dataclass(frozen=True)
class Sampler(ABC):
    """Base of the samplers: guards the chains and keeps what a caller wants to see of the way.

    Args:
        bound: a chain is lost when a coordinate exceeds bound × (σ_max + 1), in data units.
    """

    bound: float = 20.0

    def __post_init__(self) -> None:
        positive(bound=self.bound)

    @property
    @abstractmethod
    def start_scale(self) -> float:
        """Standard deviation of the starting points, in data units."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """Number of network calls for one sample (NFE)."""

    @abstractmethod
    def path(self, fields: FieldPair, noise: SampleNoise) -> Iterator[Tensor]:
        """Yield the state after every step, the start first; each of shape (B, *)."""

    def __call__(
        self, fields: FieldPair, noise: SampleNoise, watch: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Draw one sample per stream of `noise`.

        Args:
            fields: the pair of fields.
            noise: source of the start and of every step.
            watch: called with (step, state) at the start and after every step.

        Returns:
            Samples, shape (B, *).

        Raises:
            SamplingDiverged: when a chain becomes non-finite or leaves the region of the data.
        """
        limit = self.bound * (self.start_scale + 1)
        x = torch.empty(0)
        for step, x in enumerate(self.path(fields, noise)):
            lost = ~(x.abs().flatten(1).amax(1) <= limit)  # true for NaN as well
            if lost.any():
                raise SamplingDiverged(step, x, lost)
            if watch is not None:
                watch(step, x)
        return x


@dataclass(frozen=True)
class BellmanDynamics(Sampler):
    """The paper's single-scale dynamics, from a uniform or Gaussian start.

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

    def path(self, fields, noise):
        x = self.scale * noise()
        sigma = x.new_zeros(len(x))
        step = self.step_size * self.scale**2 / fields.reference(sigma)
        yield x
        for _ in range(self.steps):
            s, g = fields(x, sigma)
            x = bellman_step(x, s, g, step, noise())
            yield x


@dataclass(frozen=True)
class AnnealedDynamics(Sampler):
    r"""Bellman Diffusion dynamics down a geometric ladder of noise levels, with a last denoising step.

    At level σ the time step is η = c σ²/m_ref(σ). Where p_σ is locally a Gaussian of width σ, a step of the dynamics
    multiplies the distance to its centre by 1 − a, a = ηs/(2σ²). With `corrected` the noise √(ηs) z is scaled by κ,

        κ² = max(0, σ'² − (1 − a)² σ²) / (2aσ²),

    which puts the variance at σ'² for any step: σ' = σ for all but the last step of a level (κ² = 1 − a/2, the error
    of a plain Euler–Maruyama step), and the next level for the last one. κ → 1 as η → 0 at a fixed level.

    Args:
        levels: number of noise levels.
        steps_per_level: steps at each level.
        step_size: c above, dimensionless.
        sigma_max: first noise level, in data units.
        sigma_min: last noise level, in data units.
        corrected: scale the noise as above; False is the plain Euler–Maruyama step.
    """

    levels: int = 100
    steps_per_level: int = 1
    step_size: float = 0.25
    sigma_max: float = 20.0
    sigma_min: float = 0.02
    corrected: bool = True

    def __post_init__(self):
        super().__post_init__()
        positive(levels=self.levels, steps_per_level=self.steps_per_level, step_size=self.step_size)
        positive(sigma_max=self.sigma_max, sigma_min=self.sigma_min)
        in_range(0, self.sigma_max, sigma_min=self.sigma_min)

    @property
    def start_scale(self):
        return self.sigma_max

    @property
    def calls(self):
        return self.levels * self.steps_per_level + 1

    def path(self, fields, noise):
        x = self.sigma_max * noise()
        yield x
        ladder = geometric_ladder(self.sigma_max, self.sigma_min, self.levels).tolist()
        for level, following in zip(ladder, [*ladder[1:], ladder[-1]]):
            sigma = x.new_full((len(x),), level)
            step = self.step_size * level**2 / fields.reference(sigma)
            for i in range(self.steps_per_level):
                s, g = fields(x, sigma)
                z = noise()
                if self.corrected:
                    a = step * s / (2 * level**2)
                    target = (following if i == self.steps_per_level - 1 else level) / level
                    excess = (target**2 - (1 - a).square()).clamp_min(0)
                    z = z * bcast((excess / (2 * a).clamp_min(torch.finfo(a.dtype).tiny)).sqrt(), x)
                x = bellman_step(x, s, g, step, z)
                yield x
        yield x + bcast(sigma.square(), x) * score(fields, x, sigma)


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The deterministic flow dx/dσ = −σ ∇log p_σ, by Heun's method on EDM's grid (EDM, Algorithm 1).

    Args:
        steps: number of grid points; 2·steps − 1 network calls.
        sigma_max: first noise level, in data units.
        sigma_min: last noise level above zero, in data units.
        rho: how strongly the grid favours small noise levels.
        exact_score: subtract ∇log s from S (see `score`); for low dimension.
    """

    steps: int = 18
    sigma_max: float = 20.0
    sigma_min: float = 0.02
    rho: float = 7.0
    exact_score: bool = False

    def __post_init__(self):
        super().__post_init__()
        positive(steps=self.steps, sigma_max=self.sigma_max, sigma_min=self.sigma_min, rho=self.rho)
        in_range(0, self.sigma_max, sigma_min=self.sigma_min)

    @property
    def start_scale(self):
        return self.sigma_max

    @property
    def calls(self):
        return 2 * self.steps - 1

    def path(self, fields, noise):
        def slope(x: Tensor, level: float) -> Tensor:
            return -level * score(fields, x, x.new_full((len(x),), level), self.exact_score)

        x = self.sigma_max * noise()
        yield x
        grid = edm_grid(self.sigma_max, self.sigma_min, self.steps, self.rho).tolist()
        for here, there in zip(grid, grid[1:]):
            d = slope(x, here)
            euler = x + (there - here) * d
            x = euler if there == 0 else x + (there - here) * (d + slope(euler, there)) / 2
            yield x
