"""One return distribution as a pair of fields, for the suite's samplers."""

import math

import torch
from torch import Tensor

from bd_lightning.fields import FieldPair


def normal(u: Tensor, variance: Tensor | float) -> Tensor:
    """N(u; 0, variance); shape of u."""
    return torch.exp(-u.square() / (2 * variance)) / (2 * math.pi * torch.as_tensor(variance)).sqrt()


def normal_cdf(u: Tensor) -> Tensor:
    """P(n ≤ u) of a standard normal n; shape of u."""
    return torch.special.ndtr(u)


class ReturnFields(FieldPair):
    """The fields of one return distribution as the suite's samplers take them (`bd_lightning.dynamics`).

    They are those of Σ_j w_j N(x; x_j, h² + σ²) at noise level σ, in double precision.

    Args:
        x: positions x_j of the components, shape (N,), in units of reward.
        h: their width.
        w: their weights, shape (N,), of any sign; they sum to one.
        origin: what points are counted from, in units of reward.
    """

    mobility_is_density = True

    def __init__(self, x: Tensor, h: float, w: Tensor, origin: float = 0.0) -> None:
        self.x, self.h, self.w = x.double() - origin, h, w.double()
        self.spread = float((self.w @ (self.x - self.w @ self.x).square()).clamp_min(0)) + self.h**2

    def _fields(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        u, variance = x.double() - self.x, self.h**2 + sigma.double().square()[:, None]
        k = normal(u, variance)
        s, g = k @ self.w, (-u / variance * k) @ self.w
        return s.clamp_min(0), torch.where(s > 0, g, 0.0)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,), 0 where it is negative, and g (B, 1) at points x (B, 1) and noise levels sigma (B,)."""
        s, g = self._fields(x, sigma)
        return s.to(x.dtype), g[:, None].to(x.dtype)

    def log_gradients(self, x: Tensor, sigma: Tensor, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """s, S = 2g/s and ∇log s = g/s: the mobility is the density, so that S is twice ∇log s."""
        s, g = self._fields(x, sigma)
        slope = (g / s.clamp_min(1e-30))[:, None].to(x.dtype)
        return s.to(x.dtype), 2 * slope, slope

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical density, shape of sigma."""
        return (4 * math.pi * (self.spread + sigma.square())).rsqrt()
