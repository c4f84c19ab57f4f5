"""Normalisations whose forward-mode derivative can itself be differentiated.

The divergence estimator takes a Jacobian–vector product in forward mode and then gradients of it. PyTorch's fused
normalisations treat the saved statistics as constants in that second step, which gives wrong gradients without an
error, and its softmax stops there with one. A network for that estimator uses these instead: the fused kernels, and
plain operations while a forward-mode tangent is carried through them.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


def _carries_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _standardise(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x (*, n)."""
    value, tangent = forward_ad.unpack_dual(x)
    y = value.softmax(-1)
    if tangent is None:
        return y
    return forward_ad.make_dual(y, y * (tangent - (y * tangent).sum(-1, keepdim=True)))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (*, width); the same shape."""
        if not _carries_tangent(x):
            return super().forward(x)
        return _standardise(x, self.eps) * self.weight + self.bias


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (B, C, *)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, *); the same shape."""
        if not _carries_tangent(x):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        normal = _standardise(x.reshape(len(x), self.num_groups, -1), self.eps).reshape(x.shape)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return normal * self.weight.reshape(shape) + self.bias.reshape(shape)
