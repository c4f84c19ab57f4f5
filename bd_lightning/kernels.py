r"""Pair kernels and the mobility they estimate.

A pair kernel k(x, y) stands for the density in the field divergences: averaged over data points y it is the
*mobility*

    m(x) = E_y[k(x, y)],        ∇m(x) = E_y[∇_x k(x, y)].

For every kernel the minimisers of the two field divergences (arXiv 2410.01796, §3) are, on the support of p,

    s*(x) = m(x),        g*(x) = ½ (m ∇log p + ∇m)(x) = ∇(p m)(x) / (2 p(x)),

and the Bellman Diffusion dynamics with these fields leave p unchanged. `Exact` with ε → 0 gives the fields of the
paper, m = p and g* = ∇p. With slices m is an average of one-dimensional marginals and stays O(1) in any dimension.

Noise levels. At noise level σ the fields belong to p_σ = p * N(0, σ²I): x is a noised point, y stays clean, and the
kernel's variance is v = ε + σ². A single-scale model is σ = 0 throughout.

A kernel is called as `kernel(x, y, sigma, weights)` and returns the estimate (m̂, ∇m̂) of shapes (B,) and (B, d). The
weights, (B, N) with rows that sum to one, say which pairs take part: `leave_one_out` or `single_partner`.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §3 (field divergences, slicing)
    | Song et al., Sliced Score Matching, arXiv 1905.07088 (random projections)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bd_lightning.checks import positive


class Smoothable(Protocol):
    """What a kernel asks of a density to know its mobility in closed form; `targets.Density` is one."""

    def smoothed(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """p_σ and ∇p_σ at x."""
        ...

    def log_and_score(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """log p_σ and ∇log p_σ at x."""
        ...


class NoClosedForm(NotImplementedError):
    """A mean that no formula is known for."""


def leave_one_out(batch: int, pool: int | None = None, device: torch.device | None = None) -> Tensor:
    """Weights that average over every pair except a point with itself.

    Args:
        batch: number of query points B.
        pool: number of partners N ≥ B, the query points' own first; the batch itself if None.
        device: where to put the result.

    Returns:
        Weights, shape (B, N), rows summing to one.

    Raises:
        ValueError: if the pool has fewer than two points.
    """
    pool = batch if pool is None else pool
    if pool < 2:
        raise ValueError(f"a kernel estimate needs a batch of at least 2 points, got {pool}; raise the batch size")
    weights = torch.full((batch, pool), 1 / (pool - 1), device=device)
    return weights.fill_diagonal_(0)


def single_partner(batch: int, pool: int | None = None, device: torch.device | None = None) -> Tensor:
    """Weights that give point i the single partner i + 1 (cyclic), one pair per sample as in the paper.

    Args:
        batch: number of query points B.
        pool: number of partners N ≥ B, the query points' own first; the batch itself if None.
        device: where to put the result.

    Returns:
        Weights, shape (B, N), rows summing to one.

    Raises:
        ValueError: if the pool has fewer than two points.
    """
    pool = batch if pool is None else pool
    if pool < 2:
        raise ValueError(f"a kernel estimate needs a batch of at least 2 points, got {pool}; raise the batch size")
    return torch.eye(pool, device=device).roll(1, dims=1)[:batch]


@contextmanager
def whole_products() -> Iterator[None]:
    """Matrix products in whole single precision, also where TF32 is on: ‖x‖² + ‖y‖² − 2x·y cancels its digits."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² for x of shape (B, d) and y of shape (N, d); shape (B, N)."""
    cross = torch.addmm(x.square().sum(1, keepdim=True), x, y.T, alpha=-2)
    return (cross + y.square().sum(1)).clamp_min(0)


@dataclass(frozen=True)
class Kernel(ABC):
    """Base of the pair kernels.

    Args:
        epsilon: variance ε of the kernel at σ = 0, in squared data units.

    Attributes:
        mobility_is_density: whether m is a density on R^d, p smoothed by the kernel, as in the paper.
        changeable: arguments of the estimate's noise alone, not of what is estimated: they may change after training.
    """

    epsilon: float = 1e-3
    mobility_is_density: ClassVar[bool] = False
    changeable: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        positive(epsilon=self.epsilon)

    @abstractmethod
    def __call__(
        self, x: Tensor, y: Tensor, sigma: Tensor, weights: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the mobility and its gradient.

        Args:
            x: query points, shape (B, d).
            y: clean data points, shape (N, d).
            sigma: noise level of each query point, shape (B,), in data units.
            weights: pair weights, shape (B, N), rows summing to one.
            generator: source of randomness, for kernels that draw directions.

        Returns:
            The estimates m̂, shape (B,), and ∇m̂, shape (B, d).
        """

    def mobility(self, density: Smoothable, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The mobility that the estimates have as their mean, for a density with closed-form smoothing.

        Args:
            density: the density of y.
            x: query points, shape (B, d).
            sigma: noise level of each query point, shape (B,), in data units.

        Returns:
            m, shape (B,), and ∇m, shape (B, d).

        Raises:
            NoClosedForm: unless a kernel says what it is; errors of fields against closed forms are left out then.
        """
        raise NoClosedForm(f"{type(self).__name__} knows no closed form of its mobility")

    @abstractmethod
    def order(self, dim: int) -> int:
        """The dimension of the Gaussian density that k stands for: d, 1 for slices, 0 for a constant."""

    def reference(self, sigma: Tensor, sigma_data: float, dim: int) -> Tensor:
        r"""The typical mobility m_ref(σ), by which networks and step sizes are scaled.

        It is (2π(ε + 2σ² + 2σ_data²))^{−k/2} with k = `order(dim)`, the mean of a Gaussian kernel of k dimensions over
        data from N(0, σ_data² I); slices of few dimensions have a larger mean.

        Args:
            sigma: noise levels, any shape.
            sigma_data: standard deviation of the data.
            dim: number of data dimensions d.

        Returns:
            m_ref, of the shape of sigma.
        """
        variance = self.epsilon + 2 * sigma.square() + 2 * sigma_data**2
        return (2 * math.pi * variance).pow(-self.order(dim) / 2)


class _Radial(Kernel):
    """Kernels of the distance alone: k = exp(l(r², v)), r² = ‖x − y‖²."""

    @abstractmethod
    def log(self, r2: Tensor, variance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """log k and its derivative in r², for r2 of shape (B, N) and variance of shape (B, 1)."""

    def __call__(self, x, y, sigma, weights, generator=None):
        variance = (self.epsilon + sigma.square())[:, None]
        with whole_products():
            log_k, slope = self.log(squared_distances(x, y), variance, x.shape[1])
            k = weights * log_k.exp()
            pull = 2 * k * slope  # ∇_x k(r²) = 2 k'(r²) (x − y)
            return k.sum(1), pull.sum(1, keepdim=True) * x - pull @ y


@dataclass(frozen=True)
class Exact(_Radial):
    """k = N(x − y; 0, vI), v = ε + σ²: the mobility is the density p_√v itself.

    For low dimension. The density under- or overflows single precision in tens of dimensions, and it all but
    vanishes between modes, where the dynamics then stand still.
    """

    mobility_is_density: ClassVar[bool] = True

    def order(self, dim):
        return dim

    def mobility(self, density, x, sigma):
        return density.smoothed(x, (self.epsilon + sigma.square()).sqrt())

    def log(self, r2, variance, dim):
        return -r2 / (2 * variance) - dim / 2 * (2 * math.pi * variance).log(), -1 / (2 * variance)


def _slice_average(density: Smoothable, x: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """E_y (2π(v + ‖x − y‖²/d))^{−1/2} and its gradient, for v of shape (B,).

    A^{−1/2} = (2/√π) ∫₀^∞ exp(−u²A) du makes the kernel a mixture of Gaussians in x − y, of variances τ² = d/(2u²):

        m = (√2/π) ∫₀^∞ exp(−u²v) (2πτ²)^{d/2} p_τ(x) du,

    by the trapezoid rule in t, u = exp(t − exp(−t)) in units of the smallest 1/‖x − y‖ that occurs.
    """
    d = x.shape[1]
    far = float(x.detach().norm(dim=1).max()) + 30.0
    end = math.log(far * math.sqrt(30 / float(variance.min())))
    nodes = torch.linspace(-2.8, end, math.ceil((end + 2.8) / 0.3), dtype=torch.float64)
    h = float(nodes[1] - nodes[0])
    m, grad_m = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
    for t in nodes.tolist():
        u = math.exp(t - math.exp(-t)) / far
        width = math.sqrt(d / 2) / u
        log_scale = (
            math.log(math.sqrt(2) / math.pi * h * u * (1 + math.exp(-t)))
            + d * math.log(width)
            + (d / 2 * math.log(2 * math.pi))
        )
        log_p, score = density.log_and_score(x, width)  # (2πτ²)^{d/2} overflows alone, and cancels against p
        part = (log_scale - u**2 * variance + log_p).exp()
        m, grad_m = m + part, grad_m + part[:, None] * score
    return m, grad_m


@dataclass(frozen=True)
class ClosedFormSlices(_Radial):
    """The mean over all slices, k = E_w N(wᵀ(x − y); 0, v) for w ~ N(0, I/d).

    wᵀu is Gaussian with variance ‖u‖²/d, so that k = (2π(v + ‖x − y‖²/d))^{−1/2}: an inverse multiquadric kernel,
    without the noise of drawn slices, at the cost of one distance matrix.
    """

    def order(self, dim):
        return 1

    def mobility(self, density, x, sigma):
        return _slice_average(density, x, self.epsilon + sigma.square())

    def log(self, r2, variance, dim):
        total = variance + r2 / dim
        return -0.5 * (2 * math.pi * total).log(), -1 / (2 * dim * total)


@dataclass(frozen=True)
class Sliced(Kernel):
    """Drawn slices, k_w = N(wᵀ(x − y); 0, v) with w ~ N(0, I/d), as in the paper's sliced losses.

    Every query point draws its own directions. The mean over directions is `ClosedFormSlices`.

    Args:
        epsilon: variance ε of the kernel at σ = 0, in squared units of the projected data.
        slices: number of directions drawn for each query point.
    """

    slices: int = 1
    changeable: ClassVar[tuple[str, ...]] = ("slices",)

    def __post_init__(self):
        super().__post_init__()
        positive(slices=self.slices)

    def order(self, dim):
        return 1

    def mobility(self, density, x, sigma):
        return _slice_average(density, x, self.epsilon + sigma.square())

    def __call__(self, x, y, sigma, weights, generator=None):
        w = torch.randn(len(x), self.slices, x.shape[1], device=x.device, dtype=x.dtype, generator=generator)
        w = w / math.sqrt(x.shape[1])
        variance = (self.epsilon + sigma.square())[:, None, None]
        u = torch.einsum("bkd,bd->bk", w, x)[..., None] - w @ y.T  # (B, slices, N)
        k = weights[:, None] * (-u.square() / (2 * variance)).exp() / (2 * math.pi * variance).sqrt() / self.slices
        slope = (-u / variance * k).sum(-1)
        return k.sum((1, 2)), torch.einsum("bk,bkd->bd", slope, w)


@dataclass(frozen=True)
class Constant(Kernel):
    """k = 1: the gradient field is ½ ∇log p_σ, training is denoising score matching, sampling is Langevin's."""

    def order(self, dim):
        return 0

    def mobility(self, density, x, sigma):
        return torch.ones_like(x[:, 0]), torch.zeros_like(x)

    def __call__(self, x, y, sigma, weights, generator=None):
        return torch.ones_like(x[:, 0]), torch.zeros_like(x)
