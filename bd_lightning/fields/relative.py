r"""Fields relative to a base Gaussian.

p ↦ (p, ∇p) is linear, so the fields of Σ_c w_c p_c are Σ_c w_c times the fields of p_c. Divided by the fixed *base*
Gaussian r_σ = N(0, (σ_d² + σ²)I), which keeps linearity, they stay in range in a latent space:

    ρ_c = p_c,σ / r_σ,        ∇ρ_c = ρ_c U_c,        U_c = ∇log ρ_c = ∇log p_c,σ + x/(σ_d² + σ²).

In EDM's parametrisation the denoising network *is* U (see `preconditioning`). `mixture` does linear algebra on them,
and `objectives.DensityRatio` trains them.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 (linearity of the modelling operator)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bd_lightning.checks import positive
from bd_lightning.fields import preconditioning
from bd_lightning.fields.analytic import log_ratio
from bd_lightning.fields.base import FieldPair
from bd_lightning.fields.mixture import Mixture
from bd_lightning.networks.base import Network
from bd_lightning.targets import Density

MOST = 2**23
"""Counts in single precision stop at twice as much. From here on all are halved, so that later ones weigh more."""


class RelativeFields(nn.Module, FieldPair):
    """Fields of every class relative to the base Gaussian, from one network.

    Args:
        network: maps (x, c_noise, None) to (F, a), with a dimension for the classes or without (see `networks`).
        sigma_data: standard deviation σ_d of the data.
        classes: number of classes that the network has heads for; 1 if it has no such dimension.

    Attributes:
        shares: share of each class in the training data seen so far.
        learned: what the network stands for, in words.
    """

    def __init__(self, network: Network, sigma_data: float, classes: int = 1) -> None:
        super().__init__()
        positive(sigma_data=sigma_data, classes=classes)
        self.network, self.sigma_data = network, sigma_data
        self.learned = "densities relative to a Gaussian"
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(classes))

    @property
    def shares(self) -> Tensor:
        """π_c, shape (C,)."""
        return self.counts / self.counts.sum() if self.counts.any() else torch.full_like(self.counts, math.nan)

    def components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(π_c ρ_c) (B, C) and U_c (B, C, *) at x (B, *) and noise levels sigma (B,)."""
        out, a = preconditioning.call(self.network, x, sigma, preconditioning.unit_scale(sigma, self.sigma_data))
        if a.ndim == 1:
            out, a = out[:, None], a[:, None]
        return a, preconditioning.relative_slope(out, sigma, self.sigma_data)

    def count(self, label: Tensor) -> None:
        """Count the classes (B,) of a batch of training data."""
        self.counts.index_add_(0, label, torch.ones_like(label, dtype=self.counts.dtype))  # bincount reads back
        self.counts.mul_(torch.where(self.counts.max() < MOST, 1.0, 0.5))

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """ρ (B,) and g = ½ρ(∇log p_σ + U) (B, *) of the density of the training data."""
        return Mixture([(self, torch.ones_like(self.counts))], mobility="density")(x, sigma)

    def conditioned(self, label: Tensor | None) -> FieldPair:
        """The mixture of one class for each sample, label (B,), or of all the data for None."""
        if label is None:
            return Mixture([(self, torch.ones_like(self.counts))])
        return Mixture([(self, nn.functional.one_hot(label, len(self.counts)).to(self.counts))])


class AnalyticSource:
    """Densities in closed form as a source.

    Args:
        densities: the densities p_c.
        shares: π_c.
        sigma_data: σ_d of the base Gaussian.
    """

    def __init__(self, densities: Sequence[Density], shares: Sequence[float], sigma_data: float = 1.0) -> None:
        self.densities, self.sigma_data = densities, sigma_data
        self._shares = torch.tensor(shares, dtype=torch.float64)

    @property
    def shares(self) -> Tensor:
        """π_c, shape (C,)."""
        return self._shares

    def components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(π_c ρ_c) (B, C) and U_c (B, C, d) at x (B, d) and noise levels sigma (B,)."""
        sigma = sigma.expand(len(x))
        parts = [log_ratio(density, x, sigma, self.sigma_data) for density in self.densities]
        logs, slopes = zip(*parts)
        return torch.stack(logs, 1) + self._shares.to(x).log(), torch.stack(slopes, 1)
