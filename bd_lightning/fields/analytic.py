"""Fields in closed form: what the losses are minimised by."""

import math

from torch import Tensor

from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair
from bd_lightning.kernels import Kernel
from bd_lightning.targets import Density


class AnalyticFields(FieldPair):
    """The fields that the losses are minimised by, as a sampler or a metric takes them.

    Args:
        density: the density p.
        kernel: the pair kernel.
        sigma_data: standard deviation of the data, for the typical mobility.
        smoothed: the fields of kernel field regression, g* = ∇m, which leave m instead of p_σ unchanged.
    """

    def __init__(self, density: Density, kernel: Kernel, sigma_data: float = 1.0, smoothed: bool = False) -> None:
        self.density, self.kernel, self.sigma_data, self.smoothed = density, kernel, sigma_data, smoothed
        self.mobility_is_density = kernel.mobility_is_density

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s* (B,) and g* (B, d) at x (B, d) and noise levels sigma (B,)."""
        m, grad_m = self.kernel.mobility(self.density, x, sigma)
        return m, grad_m if self.smoothed else 0.5 * (m[:, None] * self.density.score(x, sigma) + grad_m)

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref; shape of sigma."""
        return self.kernel.reference(sigma, self.sigma_data, self.density.dim)


def log_ratio(density: Density, x: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """log p_σ/r_σ (B,) and its gradient (B, d) for the base Gaussian r_σ = N(0, (σ_data² + σ²)I).

    Args:
        density: the density p.
        x: points, shape (B, d).
        sigma: noise levels, shape (B,).
        sigma_data: standard deviation of the data.
    """
    log, score = density.log_and_score(x, sigma)
    variance = (sigma.square() + sigma_data**2)[:, None]
    return log + (x.square() / variance + (2 * math.pi * variance).log()).sum(1) / 2, score + x / variance


class AnalyticRelative(FieldPair):
    """The fields of a density relative to the base Gaussian: s = ρ = p_σ/r_σ and g = ½ρ(∇log p_σ + ∇log ρ).

    Args:
        density: the density p.
        sigma_data: standard deviation σ_d of the base Gaussian at σ = 0.
    """

    def __init__(self, density: Density, sigma_data: float = 1.0) -> None:
        self.density, self.sigma_data = density, sigma_data

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """ρ (B,) and g (B, d) at x (B, d) and noise levels sigma (B,)."""
        log, slope = log_ratio(self.density, x, sigma, self.sigma_data)
        rho = log.exp()
        return rho, 0.5 * bcast(rho, x) * (self.density.score(x, sigma) + slope)
