"""Densities whose fields are known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd_lightning.kernels import Kernel


@dataclass
class Mixture:
    """Isotropic Gaussian mixture: means (K, d), weights (K,), one standard deviation."""

    means: Tensor
    weights: Tensor
    sd: float

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.sd * noise

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p_σ at x (B, d); (B,)."""
        variance = self.sd**2 + sigma**2
        r2 = (x[:, None] - self.means).square().sum(-1)
        d = x.shape[1]
        return (self.weights.log() - r2 / (2 * variance) - d / 2 * math.log(2 * math.pi * variance)).logsumexp(1)

    def score(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """∇log p_σ at x (B, d); (B, d)."""
        variance = self.sd**2 + sigma**2
        r2 = (x[:, None] - self.means).square().sum(-1)
        share = (self.weights.log() - r2 / (2 * variance)).softmax(1)
        return (share @ self.means - x) / variance


def square(dtype: torch.dtype = torch.float64) -> Mixture:
    """Four modes of weights .4/.3/.2/.1 in the plane."""
    means = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1]], dtype=dtype)
    return Mixture(means, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=dtype), 0.3)


class OracleFields:
    """The minimisers s* = m and g* = ½(m ∇log p_σ + ∇m), with the mobility of a kernel over a large pool."""

    def __init__(self, target: Mixture, kernel: Kernel, pool: int = 4000, sigma_data: float = 1.0) -> None:
        self.target, self.kernel, self.sigma_data = target, kernel, sigma_data
        self.pool = target.sample(pool, torch.Generator().manual_seed(99))

    def mobility(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.full((len(x), len(self.pool)), 1 / len(self.pool), dtype=x.dtype)
        return self.kernel(x, self.pool, sigma, weights)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        m, grad_m = self.mobility(x, sigma)
        return m, 0.5 * (m[:, None] * self.target.score(x, float(sigma[0])) + grad_m)

    def reference(self, sigma: Tensor) -> Tensor:
        return self.kernel.reference(sigma, self.sigma_data, self.pool.shape[1])
