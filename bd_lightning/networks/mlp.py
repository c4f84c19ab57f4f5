"""A residual MLP for small images, latents and low-dimensional data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bd_lightning.checks import in_range, positive
from bd_lightning.networks.base import Network
from bd_lightning.networks.dual import LayerNorm, Linear, modulate
from bd_lightning.networks.embedding import ConditionEmbedding, head_shape, zero_init


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.inner = Linear(width, width)
        self.condition = nn.Linear(width, 2 * width)
        self.outer = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.condition(emb).chunk(2, dim=1)
        return x + self.outer(modulate(self.inner(self.norm(x)), 1 + scale, shift))


class MLP(Network):
    """Residual MLP on the flattened input.

    Args:
        shape: shape of one sample, from the data module.
        num_classes: number of classes of the data.
        conditional: condition on the class.
        per_class: heads for every class (see `networks`).
        width: width of the hidden layers.
        depth: number of residual blocks.
        dropout: dropout probability inside the blocks.
        fourier: frequencies ω of further inputs sin(ωx), cos(ωx) of each coordinate, in radians per standard deviation
            of the noised data; for low-dimensional data with detail.

    References:
        | Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains,
          arXiv 2006.10739
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int = 0,
        conditional: bool = False,
        per_class: bool = False,
        width: int = 256,
        depth: int = 4,
        dropout: float = 0.0,
        fourier: Sequence[float] = (),
    ) -> None:
        super().__init__()
        positive(width=width, depth=depth, **{f"fourier[{i}]": omega for i, omega in enumerate(fourier)})
        in_range(0, 1, dropout=dropout)
        dim = math.prod(shape)
        self.conditional, self.fourier = conditional, tuple(fourier)
        self.embed = ConditionEmbedding(width, num_classes, conditional)
        self.act = nn.SiLU()
        self.enter = Linear(dim * (1 + 2 * len(self.fourier)), width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.head_shape = head_shape(num_classes, per_class)
        self.gradient_head = zero_init(Linear(width, dim * math.prod(self.head_shape)))
        self.scalar_head = zero_init(Linear(width, math.prod(self.head_shape)))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, *shape), c_noise (B,) and label (B,) or None to F (B, *shape) and a (B,).

        With `per_class` there is a dimension for the classes after the first.
        """
        emb = self.act(self.embed(c_noise, label))
        flat = x.flatten(1)
        waves = [wave(omega * flat) for omega in self.fourier for wave in (torch.sin, torch.cos)]
        h = self.enter(torch.cat([flat, *waves], 1))
        for block in self.blocks:
            h = block(h, emb)
        h = self.act(self.norm(h))
        shape = (len(x), *self.head_shape)
        return self.gradient_head(h).reshape(*shape, *x.shape[1:]), self.scalar_head(h).reshape(shape)
