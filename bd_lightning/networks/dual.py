"""Layers of dual numbers: a value, and the forward-mode tangent that it may carry.

A divergence with a probed trace takes a Jacobian–vector product in forward mode and then gradients of it. PyTorch's own
rules serve badly there: they give the weights tangents of zero and add them; fused layer, batch and instance
normalisation treat the saved statistics as constants in the second step, which makes its gradients wrong without an
error; and softmax stops there with one. A network for it uses these layers instead. Without a tangent they are
PyTorch's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def _affine(x: Tensor, value: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor]) -> Tensor:
    """An affine function of x, whose linear part maps tangents."""
    x, tangent = forward_ad.unpack_dual(x)
    return value(x) if tangent is None else forward_ad.make_dual(value(x), linear(tangent))


class Linear(nn.Linear):
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (*, in) to (*, out)."""
        return _affine(x, super().forward, lambda tangent: F.linear(tangent, self.weight))


class Conv2d(nn.Conv2d):
    """A convolution of images."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, in, H, W) to (B, out, H', W')."""
        return _affine(x, super().forward, lambda tangent: self._conv_forward(tangent, self.weight, None))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift of x (B, *), with scale and shift that do not depend on x and broadcast to it."""
    return _affine(x, lambda x: torch.addcmul(shift, x, scale), lambda tangent: tangent * scale)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x (*, n)."""
    value, tangent = forward_ad.unpack_dual(x)
    y = value.softmax(-1)
    if tangent is None:
        return y
    return forward_ad.make_dual(y, y * (tangent - (y * tangent).sum(-1, keepdim=True)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Σ_j softmax_j(q_i·k_j/√d) v_j at every place i, for q, k, v of shape (B, heads, d, n); the same shape.

    A GPU has it in one kernel, which keeps no (n, n) matrix and has no forward-mode derivative.
    """
    if q.device.type == "cpu" or _carries_tangent(q):
        return v @ softmax(q.transpose(-1, -2) @ k / math.sqrt(q.shape[-2])).transpose(-1, -2)
    q, k, v = (one.transpose(-1, -2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


class _Standardise(torch.autograd.Function):
    """Standardisation y of x (B, C, *) in groups of channels, and its derivative Jt in the direction t of a tangent.

    With ⟨·⟩ the mean over a group, y = r(x − ⟨x⟩) and r = (⟨(x − ⟨x⟩)²⟩ + eps)^(−1/2). The Jacobian is symmetric,
    Jv = r(v − ⟨v⟩ − ⟨yv⟩y), and is what the fused kernel applies on its way back. The derivative of uᵀJt with respect
    to x is −r(⟨u·Jt⟩y + ⟨yt⟩Ju + ⟨uy⟩Jt).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        x, t = _dense(x), _dense(t)
        size = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, r = torch.native_group_norm(x, None, None, *size, eps)
        pushed = _jacobian(t, x, mean, r, size)
        ctx.size = size
        ctx.save_for_backward(x, t, y, mean, r, pushed)
        return y, pushed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, u: Tensor) -> tuple[Tensor | None, ...]:
        x, t, y, mean, r, pushed = ctx.saved_tensors
        groups = ctx.size[-1]

        def coefficient(a: Tensor, b: Tensor) -> Tensor:
            product = (a * b).unflatten(1, (groups, -1))
            factor = r * product.mean(tuple(range(2, product.ndim)))
            return factor.repeat_interleave(x.shape[1] // groups, 1).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))

        pulled = _jacobian(_dense(u), x, mean, r, ctx.size)
        grad_x = _jacobian(_dense(grad), x, mean, r, ctx.size)
        for a, b, c in ((u, pushed, y), (y, t, pulled), (u, y, pushed)):
            grad_x = torch.addcmul(grad_x, coefficient(a, b), c, value=-1)
        return grad_x, pulled, None, None


def _dense(x: Tensor) -> Tensor:
    """x in a layout that the kernel takes; channels-last, on CPUs alone."""
    last = x.device.type == "cpu" and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def _jacobian(v: Tensor, x: Tensor, mean: Tensor, r: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    return torch.ops.aten.native_group_norm_backward(v, x, mean, r, None, *size, [True, False, False])[0]


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalisation of a dual x (B, C, *). Half precision is raised to single, as autocast does it."""
    value, tangent = (half.to(torch.promote_types(half.dtype, torch.float32)) for half in forward_ad.unpack_dual(x))
    value, tangent = _Standardise.apply(value, tangent, groups, eps)
    if weight is None:
        return forward_ad.make_dual(value, tangent)
    shape = (-1, *(1,) * (x.ndim - 2))
    shift = torch.zeros_like(weight) if bias is None else bias
    normal = forward_ad.make_dual(value.to(weight.dtype), tangent.to(weight.dtype))
    return modulate(normal, weight.reshape(shape), shift.reshape(shape))


def _carries_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension. Arguments are those of PyTorch's.

    Raises:
        ValueError: for a norm over more dimensions.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if len(self.normalized_shape) > 1:
            raise ValueError(f"LayerNorm is over the last dimension alone, got {self.normalized_shape}: flatten them")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, *, width); the same shape."""
        if _carries_tangent(x):
            rows = x.reshape(-1, x.shape[-1])
            return _group_norm(rows, 1, self.weight, self.bias, self.eps).reshape(x.shape)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (B, C, *)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, *); the same shape."""
        if _carries_tangent(x):
            return _group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)  # one sample of one value too


def refuse_fused(network: nn.Module) -> None:
    """Check that a network can be trained through its forward-mode derivative.

    Raises:
        ValueError: for a layer whose second derivatives PyTorch gets wrong.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) or type(layer) is nn.LayerNorm:
            raise ValueError(
                f"a trace by forward mode cannot train the {type(layer).__name__} at network.{name}: PyTorch's second "
                "derivatives of it are wrong. Take LayerNorm or GroupNorm of bd_lightning.networks.dual"
            )
