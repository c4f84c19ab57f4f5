r"""Field divergences as losses that need only samples.

For a mobility m(x) = E_y[k(x, y)] (see `kernels`) the two field divergences of the paper (arXiv 2410.01796, §3) are,
up to a constant,

    L_grad(g) = E_x[ ‖g(x)‖² + m(x) tr ∇g(x) ],        L_id(s) = E_x[ s(x)² − 2 m(x) s(x) ],

with m replaced by its estimate m̂ from pairs of samples. Integration by parts shows the minimisers
s* = m and g* = ½(m ∇log p + ∇m).

At a noise level σ > 0, where x̃ = x + σn with n ~ N(0, I), Stein's identity takes the trace: the same g* also minimises
the *denoising* form

    E ‖ g(x̃) − ½( m̂(x̃) (−n/σ) + ∇m̂(x̃) ) ‖²,        m̂ independent of (x, n) given x̃.

*Factored* fields put g = ½ m S, so that S* = ∇log p_σ + ∇log m. Training multiplies S by m̂ rather than by a network:

    by Stein     ¼ m̂² ‖ S + n/σ − ∇log m̂ ‖²
    with a trace ¼ m̂² ‖S‖² + ½ m̂² tr ∇S + ½ m̂ ∇m̂·S        (tr ∇(m̂S) = m̂ tr ∇S + ∇m̂·S)

Divided by m̂ once the first is linear in m̂ but for a term without S, so that its minimiser is S* however noisy m̂ is.

The two ways of taking the trace can be *combined*: at every σ the difference between a probe and Stein's identity,

    m̂ vᵀ∇h v − m̂ h·n/σ + ∇m̂·h,

has mean zero for any field h, g or S, given that a point's weight depends on σ alone, so that any multiple 1 − a(σ) of
it may be added to the denoising form (half of it to that of factored fields, divided by m̂). a = 1 is denoising, a = 0 a
probe; with `stein_weight` the gradient of the parameters is less noisy than with either.

*Kernel field regression*, for low dimension. With the exact kernel, m and ∇m are conditional means of k(x, y) and
∇_x k(x, y) given x, whatever the density of x, so that the squared errors

    E_x ( s(x) − m̂(x) )²,        E_x ‖ g(x) − ∇m̂(x) ‖²

reach s = m and g = ∇m wherever an `objectives.Proposal` sends x, off the data too. These are the fields of m itself, p
smoothed by the kernel: g m − ½∇(m m) = 0.

All functions return one loss per sample, shape (B,), without weights; x, fields and ∇m̂ have shape (B, *), m̂ (B,).

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §3
    | Vincent, A Connection Between Score Matching and Denoising Autoencoders, 2011 (the denoising form)
    | Hutchinson, A Stochastic Estimator of the Trace, 1989
    | Gutmann and Hyvärinen, Noise-Contrastive Estimation, 2010 (the logistic loss)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bd_lightning.checks import UserError, one_of

PROBES = ("hutchinson", "gaussian", "sliced", "exact")
NOT_TWICE = (
    "layer_norm", "batch_norm", "instance_norm", "softmax", "log_softmax", "logsumexp", "softmin", "gumbel_softmax",
    "logcumsumexp", "glu", "multi_head_attention_forward",
)  # fmt: skip
"""Functions that PyTorch (2.15) differentiates in forward mode, and whose gradients are then wrong or fail."""
NO_FORWARD_MODE = (
    "this network cannot be differentiated in forward mode, which a trace by a probe needs: take objective.trace=stein"
)


def bcast(a: Tensor, like: Tensor) -> Tensor:
    """Reshape a, shape (B,), so that it multiplies `like`, shape (B, *)."""
    return a.reshape(-1, *(1,) * (like.ndim - 1))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean inner products of two batches of shape (B, *); shape (B,)."""
    return (a * b).flatten(1).sum(1)


def scalar_loss(s: Tensor, m: Tensor) -> Tensor:
    """L_id per sample: s² − 2 m̂ s, minimised by s = m."""
    return s.square() - 2 * m * s


def divergence_loss(g: Tensor, trace: Tensor, m: Tensor) -> Tensor:
    """L_grad per sample: ‖g‖² + m̂ tr ∇g."""
    return inner(g, g) + m * trace


def sliced_divergence_loss(g: Tensor, v: Tensor, vjv: Tensor, m: Tensor) -> Tensor:
    """The paper's sliced L_grad per sample: (vᵀg)² + m̂ vᵀ(∇g)v, E vvᵀ = I."""
    return inner(g, v).square() + m * vjv


def factored_divergence_loss(S: Tensor, trace: Tensor, m: Tensor, grad_m: Tensor) -> Tensor:
    """L_grad of g = ½ m̂ S per sample: ¼ m̂²‖S‖² + ½ m̂² tr ∇S + ½ m̂ ∇m̂·S."""
    return m.square() * (inner(S, S) / 4 + trace / 2) + m * inner(grad_m, S) / 2


def stein_loss(g: Tensor, noise: Tensor, sigma: Tensor, m: Tensor, grad_m: Tensor) -> Tensor:
    """L_grad with its trace by Stein's identity, per sample: ‖g − ½(m̂(−n/σ) + ∇m̂)‖², for x̃ = x + σn."""
    residual = g - 0.5 * (grad_m - bcast(m / sigma, g) * noise)
    return inner(residual, residual)


def factored_stein_loss(S: Tensor, noise: Tensor, sigma: Tensor, m: Tensor, grad_m: Tensor) -> Tensor:
    """By Stein's identity for g = ½ m̂ S, per sample: ¼ ‖m̂(S + n/σ) − ∇m̂‖²."""
    residual = bcast(m, S) * (S + noise / bcast(sigma, S)) - grad_m
    return inner(residual, residual) / 4


def stein_control(h: Tensor, trace: Tensor, noise: Tensor, sigma: Tensor, m: Tensor, grad_m: Tensor) -> Tensor:
    """m̂ tr ∇h − m̂ h·n/σ + ∇m̂·h per sample, of mean zero over x̃ = x + σn for every field h."""
    return m * (trace - inner(h, noise) / sigma) + inner(grad_m, h)


def stein_weight(sigma: Tensor, crossover: float) -> Tensor:
    """Weight a of Stein's identity in a combined trace, σ²/(σ² + c²), a crossover c in data units; of sigma's shape."""
    return 1 / (1 + (crossover / sigma).square())


def regression_loss(g: Tensor, grad_m: Tensor) -> Tensor:
    """‖g − ∇m̂‖² per sample, at any points x."""
    return inner(g - grad_m, g - grad_m)


def ratio_loss(data: Tensor, reference: Tensor, label: Tensor) -> Tensor:
    """The logistic loss of several densities and a reference r, each point told apart from all the others, per sample.

    With as many points from r as from the data it is minimised by log(π_c p_c/r), π_c the share of class c in the data.

    Args:
        data: logits at points of the data, shape (B, C).
        reference: logits at points drawn from r, shape (B, C).
        label: class of each point of the data, shape (B,).
    """
    zero = data.new_zeros(len(data), 1)  # the logit of r
    other = torch.full_like(label, data.shape[1])
    return torch.nn.functional.cross_entropy(
        torch.cat([data, zero], 1), label, reduction="none"
    ) + torch.nn.functional.cross_entropy(torch.cat([reference, zero], 1), other, reduction="none")


def probes(x: Tensor, method: str, generator: torch.Generator | None = None) -> Tensor:
    """Directions v in which the Jacobian is probed, with Σ_k E v_k v_kᵀ = I.

    Args:
        x: points, shape (B, *).
        method: "hutchinson" (Rademacher), "gaussian", "sliced" (Rademacher; the paper's losses use v for ‖g‖² too),
            or "exact" (all d unit vectors; for d up to about eight).
        generator: source of randomness.

    Returns:
        Directions, shape (K, B, *): K = d for "exact", else 1.

    Raises:
        ValueError: for another method.
    """
    one_of(PROBES, trace=method)
    if method == "exact":
        d = x[0].numel()
        eye = torch.eye(d, device=x.device, dtype=x.dtype)
        return eye.reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
    v = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return (v if method == "gaussian" else torch.where(v < 0, -1.0, 1.0).to(x.dtype))[None]


class _Twice(TorchFunctionMode):
    """Refuses functions of a dual tensor that gradients could not be taken through, if they are to be taken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").removeprefix("special_")
        if name in NOT_TWICE and torch.is_grad_enabled() and args and isinstance(args[0], Tensor):
            if forward_ad.unpack_dual(args[0]).tangent is not None:
                raise UserError(
                    f"a trace by forward mode cannot train through torch's {name}: its second derivatives are wrong, "
                    "or missing. Take LayerNorm, GroupNorm or softmax of bd_lightning.networks.dual, or "
                    "objective.trace=stein"
                )
        return func(*args, **(kwargs or {}))


def probe_jacobian(
    function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor, v: Tensor
) -> tuple[Tensor, Any, Tensor]:
    """Value and Σ_k v_kᵀ J v_k of a field, by forward-mode differentiation; gradients reach the parameters.

    Args:
        function: maps x, shape (B, *), to (field of the same shape, anything else computed with it). It is called
            once per direction.
        x: points, shape (B, *).
        v: directions, shape (K, B, *), from `probes`.

    Returns:
        The field at x, the function's second output without its tangent, and the quadratic form Σ_k v_kᵀ J v_k,
        shape (B,): the trace, exactly or in expectation.

    Raises:
        UserError: for a field that forward mode cannot differentiate, or, where gradients are taken, not twice.
    """
    total = x.new_zeros(len(x))
    for direction in v:
        with forward_ad.dual_level():
            try:
                with _Twice():
                    value, aux = function(forward_ad.make_dual(x, direction))
            except NotImplementedError as error:
                raise UserError(f"{NO_FORWARD_MODE} ({str(error).partition(' because')[0]})") from error
            value, tangent = forward_ad.unpack_dual(value)
            aux = forward_ad.unpack_dual(aux).primal
        if tangent is None:
            raise UserError(f"{NO_FORWARD_MODE} (what it gives does not depend on its input)")
        total = total + inner(tangent, direction)
    return value, aux, total
