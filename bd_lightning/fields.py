r"""The pair of gradient and scalar field networks, and the pair that they should become.

`Fields` turns the two outputs (F, a) of a network into fields at noise level σ, with m_ref(σ) the kernel's typical
mobility and σ_d the standard deviation of the data:

    scalar field     s = m_ref(σ) softplus(a + c),   c such that s = m_ref at a = 0; s ≥ 0 keeps √s defined
    gradient field   factored   g = ½ s S,  S = (D − x)/σ²,  D = c_skip x + c_out F(c_in x, c_noise)
                     direct     g = ½ m_ref(σ) F / √(ε + σ²)

S stands for ∇log p_σ + ∇log m and D for a denoiser. The coefficients are those of EDM:
c_skip = σ_d²/(σ² + σ_d²), c_out = σσ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), c_noise = ¼ ln σ.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §3
    | Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, Table 1
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd_lightning.checks import one_of, positive
from bd_lightning.divergences import bcast
from bd_lightning.kernels import Kernel
from bd_lightning.targets import Density

PARAMETRISATIONS = ("factored", "direct")
_SOFTPLUS_SHIFT = math.log(math.e - 1)  # softplus of it is one


class Fields(nn.Module):
    """Gradient and scalar field from one network with two heads, or from two networks.

    Args:
        network: maps (x, c_noise, label) to (F, a), see `networks`.
        kernel: the pair kernel that the fields are trained with; it fixes their scale.
        sigma_data: standard deviation σ_d of the data.
        dim: number of data dimensions.
        parametrisation: "factored" or "direct". A single-scale model (σ = 0) has to be "direct".
        scalar_network: a network of its own for the scalar field; None shares the trunk. Of two networks the heads
            `scalar_head` and `gradient_head` that go unused are frozen.
    """

    def __init__(
        self,
        network: nn.Module,
        kernel: Kernel,
        sigma_data: float,
        dim: int,
        parametrisation: str = "factored",
        scalar_network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        one_of(PARAMETRISATIONS, parametrisation=parametrisation)
        positive(sigma_data=sigma_data, dim=dim)
        self.network, self.scalar_network = network, scalar_network
        self.kernel, self.sigma_data, self.dim = kernel, sigma_data, dim
        self.factored = parametrisation == "factored"
        if scalar_network is not None:  # heads that no loss reaches would make DDP wait for their gradients
            network.scalar_head.requires_grad_(False)
            scalar_network.gradient_head.requires_grad_(False)

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref at noise levels sigma; shape of sigma."""
        return self.kernel.reference(sigma, self.sigma_data, self.dim)

    def heads(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the losses are written in: (S, s) of factored fields, (g, s) of direct ones.

        Args:
            x: points, shape (B, *).
            sigma: noise levels, shape (B,).
            label: class indices, shape (B,), for class-conditional networks.

        Returns:
            S or g, shape (B, *), and s, shape (B,).
        """
        total = sigma.square() + self.sigma_data**2
        scaled = x * bcast(total.rsqrt(), x)
        c_noise = sigma.clamp_min(1e-4).log() / 4
        out, a = self.network(scaled, c_noise, label)
        if self.scalar_network is not None:
            _, a = self.scalar_network(scaled, c_noise, label)
        out, a = out.to(x.dtype), a.to(x.dtype)  # from the lower precision of autocast, if it is on
        s = self.reference(sigma) * F.softplus(a + _SOFTPLUS_SHIFT)
        if self.factored:
            # S = (D − x)/σ² with c_skip − 1 = −σ²/(σ² + σ_d²): written without the cancellation at small σ
            return bcast(self.sigma_data / (sigma * total.sqrt()), x) * out - x / bcast(total, x), s
        return bcast(0.5 * self.reference(sigma) * (self.kernel.epsilon + sigma.square()).rsqrt(), x) * out, s

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, *) and noise levels sigma (B,); shapes (B,) and (B, *)."""
        h, s = self.heads(x, sigma, label)
        return s, 0.5 * bcast(s, x) * h if self.factored else h


class AnalyticFields:
    """The fields that the losses are minimised by, as a sampler or a metric takes them.

    Args:
        density: the density p.
        kernel: the pair kernel.
        sigma_data: standard deviation of the data, for the kernel's reference.
        smoothed: the fields of kernel field regression, g* = ∇m, which leave m instead of p_σ unchanged.
    """

    def __init__(self, density: Density, kernel: Kernel, sigma_data: float = 1.0, smoothed: bool = False) -> None:
        self.density, self.kernel, self.sigma_data, self.smoothed = density, kernel, sigma_data, smoothed

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s* (B,) and g* (B, d) at x (B, d) and noise levels sigma (B,)."""
        m, grad_m = self.kernel.mobility(self.density, x, sigma)
        return m, grad_m if self.smoothed else 0.5 * (m[:, None] * self.density.score(x, sigma) + grad_m)

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref; shape of sigma."""
        return self.kernel.reference(sigma, self.sigma_data, self.density.dim)


class Guided:
    """Classifier-free guidance in an interval of noise levels: S = S₀ + w (S_c − S₀), with the mobility s of the class.

    Guidance at high noise levels narrows what is sampled and invites copies of training images; at low ones it does
    little for its cost. Outside the interval the unconditional fields are not computed.

    Args:
        fields: fields of the class, a function of (x, sigma).
        base: fields of all the data.
        scale: w; 1 is no guidance, 0 no class.
        interval: noise levels, in data units, between which it acts.

    References:
        | Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598
        | Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality,
          arXiv 2404.07724
    """

    def __init__(self, fields: Any, base: Any, scale: float, interval: Sequence[float] = (0.0, math.inf)) -> None:
        self.fields, self.base, self.scale, self.interval = fields, base, scale, interval
        self.reference = fields.reference

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,)."""
        s, g = self.fields(x, sigma)
        inside = (sigma >= self.interval[0]) & (sigma <= self.interval[1])
        if not inside.any():
            return s, g
        base = log_gradient(*self.base(x, sigma))
        guided = base + self.scale * (log_gradient(s, g) - base)
        return s, torch.where(bcast(inside, x), 0.5 * bcast(s, x) * guided, g)


def log_gradient(s: Tensor, g: Tensor) -> Tensor:
    """S = 2g/s, which stands for ∇log p_σ + ∇log m; shape of g. s is kept above the smallest normal number."""
    return 2 * g / bcast(s.clamp_min(torch.finfo(s.dtype).tiny), g)
