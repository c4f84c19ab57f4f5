r"""How a network is preconditioned, and the meanings that its gradient output can have.

A network maps (c_in x, c_noise, label) to (F, a), with σ_d the standard deviation of the data and

    c_in = 1/√(σ² + σ_d²),        c_noise = ¼ ln σ,        U = σ_d F / (σ √(σ² + σ_d²)).

U is the slope of log p_σ over the Gaussian N(0, (σ² + σ_d²)I), so that ∇log p_σ = U − x/(σ² + σ_d²) is the score of
EDM's denoiser D = c_skip x + c_out F, c_skip = σ_d²/(σ² + σ_d²), c_out = σσ_d/√(σ² + σ_d²).

A `Parametrisation` says what the gradient output stands for, and writes the field divergence in it (see `divergences`):

    factored   S = U − x/(σ² + σ_d²) stands for ∇log p_σ + ∇log m, and g = ½ s S
    velocity   the same S of flow matching's preconditioning: c_in = 1/(σ + σ_d), S = (σ_d F − x)/(σ (σ + σ_d)), so that
               F stands for the velocity x/σ_d − n along the straight path from noise n to data x
    direct     g = ½ m_ref(σ) F / √(ε + σ²)

References:
    | Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, Table 1
    | Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bd_lightning import divergences
from bd_lightning.checks import UserError
from bd_lightning.divergences import bcast
from bd_lightning.kernels import Kernel

HIGHEST = 100.0
"""Weight m̂/m_ref of a point at most: slices stay below √(2σ_d²/ε + 2), the exact kernel spans twenty magnitudes in 32
dimensions."""


def call(
    network: Callable[..., Any],
    x: Tensor,
    sigma: Tensor,
    scale: Tensor,
    label: Tensor | None = None,
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A network's outputs (F, a) at x (B, *) and noise levels sigma (B,), in the precision of x.

    Args:
        network: maps (c_in x, c_noise, label) to (F, a), see `networks`.
        x: points, shape (B, *).
        sigma: noise levels, shape (B,), in data units.
        scale: c_in, shape (B,).
        label: class indices, shape (B,), for class-conditional networks.
        told: how each image was augmented, shape (B, n), for networks that are told.

    Raises:
        UserError: if the network gives something else than two tensors, or of other shapes.
    """
    given = network(x * bcast(scale, x), sigma.clamp_min(1e-4).log() / 4, label, *(() if told is None else (told,)))
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(one, Tensor) for one in given)):
        raise UserError(f"the network gives a {type(given).__name__}; it must give two tensors, F and a")
    out, a = given
    if out.shape != (*a.shape, *x.shape[1:]) or a.ndim < 1 or len(a) != len(x):
        raise UserError(
            f"the network gives F of shape {tuple(out.shape)} and a of shape {tuple(a.shape)} for x of shape "
            f"{tuple(x.shape)}; they must be (B, *shape) and (B,), or with classes (B, C, *shape) and (B, C)"
        )
    return out.to(x.dtype), a.to(x.dtype)  # from the lower precision of autocast, if it is on


def unit_scale(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's c_in at noise levels sigma (B,), of their shape: inputs have unit variance."""
    return (sigma.square() + sigma_data**2).rsqrt()


def relative_slope(out: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """U of a network's output F (B, *), of the same shape."""
    return bcast(sigma_data / (sigma * (sigma.square() + sigma_data**2).sqrt()), out) * out


class Parametrisation(ABC):
    """What the gradient output of a network stands for, h, and the losses of the gradient field in terms of it.

    The losses are per sample, (B,), divided by the square of a mobility: by m_ref(σ)², or, for the denoising form of
    factored fields, by m̂ m_ref(σ), which leaves one factor of m̂: whatever its noise, the minimiser is that of its mean.

    Attributes:
        traces: the ways of taking the trace for which there is a loss (see `objectives.FieldDivergence`).
        at_any_point: whether h can be regressed on ∇m̂ off the data (see `objectives.KernelRegression`).
        single_scale: whether h has a meaning at σ = 0.
    """

    traces: tuple[str, ...]
    at_any_point: bool
    single_scale: bool

    def scale(self, sigma: Tensor, sigma_data: float) -> Tensor:
        """c_in at noise levels sigma (B,), of their shape."""
        return unit_scale(sigma, sigma_data)

    def weight(self, sigma: Tensor, sigma_data: float, dim: int) -> Tensor:
        """Weight of the losses at noise levels sigma above zero (B,), of their shape: (2σ)²(1 + σ²/σ_d²)/d.

        It is EDM's weight of the denoising error, by which the squared error of F counts alike at all levels.
        """
        return 4 * sigma.square() * (1 + sigma.square() / sigma_data**2) / dim

    @abstractmethod
    def output(self, out: Tensor, x: Tensor, sigma: Tensor, sigma_data: float, kernel: Kernel, m_ref: Tensor) -> Tensor:
        """h (B, *) of a network's output F (B, *) at x (B, *)."""

    @abstractmethod
    def gradient(self, h: Tensor, s: Tensor) -> Tensor:
        """The gradient field g (B, *)."""

    @abstractmethod
    def stein_loss(self, h: Tensor, noise: Tensor, sigma: Tensor, m: Tensor, grad_m: Tensor, m_ref: Tensor) -> Tensor:
        """The divergence with its trace taken by Stein's identity: the denoising form."""

    @abstractmethod
    def control(
        self, h: Tensor, trace: Tensor, noise: Tensor, sigma: Tensor, m: Tensor, grad_m: Tensor, m_ref: Tensor
    ) -> Tensor:
        """What the same divergence with tr ∇h by a probe has more, in the weights of `stein_loss`; its mean is zero."""

    @abstractmethod
    def probed_loss(self, h: Tensor, trace: Tensor, m: Tensor, grad_m: Tensor, m_ref: Tensor) -> Tensor:
        """The divergence with tr ∇h, or an unbiased estimate of it, given."""


class Factored(Parametrisation):
    """h = S, g = ½ s S: EDM's denoiser. In training S meets m̂ in place of s.

    By Stein's identity, alone or combined, S* = ∇log p_σ + ∇log E m̂, where m̂ stays below `HIGHEST` m_ref. By a probe
    alone it is ∇log p_σ + ½∇log E m̂², which differs by the noise of the kernel: by 5 to 6 % with one drawn slice in the
    plane, by nothing to speak of with closed-form slices.
    """

    traces = ("stein", "combined", "hutchinson", "gaussian", "exact")
    at_any_point = False
    single_scale = False

    def output(self, out, x, sigma, sigma_data, kernel, m_ref):
        # S = (D − x)/σ² with c_skip − 1 = −σ²/(σ² + σ_d²): written without the cancellation at small σ
        return relative_slope(out, sigma, sigma_data) - x / bcast(sigma.square() + sigma_data**2, x)

    def gradient(self, h, s):
        return 0.5 * bcast(s, h) * h

    def stein_loss(self, h, noise, sigma, m, grad_m, m_ref):
        seen = m > 1e-6 * m_ref  # elsewhere m̂ underflows
        slope = torch.where(bcast(seen, h), grad_m / bcast(torch.where(seen, m, 1.0), h), 0.0)
        loss = divergences.factored_stein_loss(h, noise, sigma, torch.ones_like(m), slope)
        return torch.where(seen, (m / m_ref).clamp_max(HIGHEST) * loss, 0.0)

    def control(self, h, trace, noise, sigma, m, grad_m, m_ref):
        m, grad_m = m / m_ref, grad_m / bcast(m_ref, h)
        low = bcast(m < HIGHEST, h)
        return (
            divergences.stein_control(h, trace, noise, sigma, m.clamp_max(HIGHEST), torch.where(low, grad_m, 0.0)) / 2
        )

    def probed_loss(self, h, trace, m, grad_m, m_ref):
        return divergences.factored_divergence_loss(h, trace, m, grad_m) / m_ref.square()


class Velocity(Factored):
    """The fields of `Factored` with the preconditioning of flow matching, where F is a velocity.

    At t = σ_d/(σ + σ_d) the network sees t x/σ_d = t x₀/σ_d + (1 − t) n, a point of the straight path from noise n to
    data x₀/σ_d, whose velocity x₀/σ_d − n is what F is regressed on with the constant kernel.
    """

    def scale(self, sigma, sigma_data):
        return (sigma + sigma_data).reciprocal()

    def weight(self, sigma, sigma_data, dim):
        """2σ²(1 + σ/σ_d)²/d: half the squared error of F, whose target has twice the variance of EDM's."""
        return 2 * sigma.square() * (1 + sigma / sigma_data).square() / dim

    def output(self, out, x, sigma, sigma_data, kernel, m_ref):
        return (sigma_data * out - x) / bcast(sigma * (sigma + sigma_data), x)


class Direct(Parametrisation):
    """h = g."""

    traces = ("stein", "combined", "hutchinson", "gaussian", "exact", "sliced")
    at_any_point = True
    single_scale = True

    def output(self, out, x, sigma, sigma_data, kernel, m_ref):
        return bcast(0.5 * m_ref * (kernel.epsilon + sigma.square()).rsqrt(), x) * out

    def gradient(self, h, s):
        return h

    def stein_loss(self, h, noise, sigma, m, grad_m, m_ref):
        return divergences.stein_loss(h, noise, sigma, m, grad_m) / m_ref.square()

    def control(self, h, trace, noise, sigma, m, grad_m, m_ref):
        return divergences.stein_control(h, trace, noise, sigma, m, grad_m) / m_ref.square()

    def probed_loss(self, h, trace, m, grad_m, m_ref):
        return divergences.divergence_loss(h, trace, m) / m_ref.square()


PARAMETRISATIONS: dict[str, Any] = {"factored": Factored(), "velocity": Velocity(), "direct": Direct()}
