"""A small U-Net for images.

Residual blocks modulated by the noise level, after Dhariwal and Nichol (arXiv 2105.05233), with self-attention at
the resolutions asked for. Convolutions run channels-last, which is faster on CPUs and on GPUs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd_lightning.checks import in_range, positive
from bd_lightning.networks.base import Network
from bd_lightning.networks.dual import Conv2d, GroupNorm, Linear, attention, modulate
from bd_lightning.networks.embedding import ConditionEmbedding, head_shape, zero_init


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(math.gcd(8, channels), channels)


def _pooled_norm(channels: int) -> GroupNorm:
    """As `_norm` for a map that was averaged to one pixel: a group has at least four channels, or it says nothing."""
    return GroupNorm(math.gcd(8, channels, max(1, channels // 4)), channels)


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // 64), 0, -1) if channels % n == 0)
        self.norm = _norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        return x + self.out(attention(q, k, v).reshape(b, c, h, w))


class _Block(nn.Module):
    """Two 3×3 convolutions with a residual connection; the embedding scales and shifts between them."""

    def __init__(self, c_in: int, c_out: int, width: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(c_in), _norm(c_out)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = zero_init(Conv2d(c_out, c_out, 3, padding=1))
        self.condition = nn.Linear(width, 2 * c_out)
        self.dropout = nn.Dropout(dropout)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = _Attention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(modulate(self.norm2(h), 1 + scale, shift))
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class UNet(Network):
    """U-Net with a gradient head at full resolution and a scalar head on the pooled bottleneck.

    Args:
        shape: (channels, height, width) of one image, from the data module.
        num_classes: number of classes of the data.
        conditional: condition on the class.
        per_class: heads for every class (see `networks`).
        channels: channels at each resolution; every further entry halves height and width (odd sizes round up).
        blocks: residual blocks at each resolution, going down; one more going up.
        attention: indices into `channels` where blocks attend to the whole image, e.g. [1, 2].
        dropout: dropout probability inside the blocks.
        patch: side of the pixel blocks that are folded into channels before the first convolution and out of them
            after the last; 2 makes the network about four times cheaper on images that can spare it.
        told: length of the vector that says how an image was augmented (9 of `augmentation.Geometric`); 0 for none.
        channels_last: keep channels innermost in memory, which convolutions are faster with.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        conditional: bool = False,
        per_class: bool = False,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        patch: int = 1,
        told: int = 0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"a U-Net needs images of shape (channels, height, width), the data has shape {shape}")
        if not channels:
            raise ValueError("channels needs at least one entry")
        for level in attention:
            if not 0 <= level < len(channels):
                raise ValueError(f"attention level {level} does not exist: channels has {len(channels)} entries")
        in_range(0, 1, dropout=dropout)
        in_range(0, 1e4, told=told)
        positive(patch=patch, blocks=blocks, **{f"channels[{i}]": c for i, c in enumerate(channels)})
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(f"patch {patch} does not divide images of {shape[1]}×{shape[2]} pixels")
        width, folded = 4 * channels[0], shape[0] * patch**2
        self.conditional, self.head_shape = conditional, head_shape(num_classes, per_class)
        self.embed, self.told = ConditionEmbedding(width, num_classes, conditional, told), told

        def block(c_in: int, c_out: int, level: int) -> _Block:
            return _Block(c_in, c_out, width, dropout, level in attention)

        self.enter = nn.Sequential(nn.PixelUnshuffle(patch), Conv2d(folded, channels[0], 3, padding=1))
        self.down, self.pool = nn.ModuleList(), nn.ModuleList()
        skips, c = [channels[0]], channels[0]
        for level, c_out in enumerate(channels):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(block(c, c_out, level))
                c = c_out
                skips.append(c)
            self.down.append(stage)
            if level < len(channels) - 1:
                self.pool.append(Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = block(c, c, len(channels) - 1)
        self.scalar_head = nn.Sequential(_pooled_norm(c), nn.SiLU(), zero_init(Linear(c, math.prod(self.head_shape))))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, c_out in reversed(list(enumerate(channels))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(block(c + skips.pop(), c_out, level))
                c = c_out
            self.up.append(stage)
            if level > 0:
                self.grow.append(Conv2d(c, c, 3, padding=1))
        self.gradient_head = nn.Sequential(
            _norm(c),
            nn.SiLU(),
            zero_init(Conv2d(c, folded * math.prod(self.head_shape), 3, padding=1)),
            nn.PixelShuffle(patch),
        )
        self.memory = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory)  # type: ignore[call-overload]

    def forward(
        self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x (B, C, H, W), c_noise (B,), label (B,) or None, told (B, n) or None to F (B, C, H, W) and a (B,);
        with `per_class` there is a dimension for the classes after the first.
        """
        emb = F.silu(self.embed(c_noise, label, told))
        h = self.enter(x.contiguous(memory_format=self.memory))
        skips = [h]
        for level, stage in enumerate(self.down):
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, emb)
                skips.append(h)
            if level < len(self.pool):
                h = self.pool[level](h)
                skips.append(h)
        h = self.middle(h, emb)
        shape = (len(x), *self.head_shape)
        a = self.scalar_head(h.mean((2, 3))).reshape(shape)
        for level, stage in enumerate(self.up):
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], 1), emb)
            if level < len(self.grow):
                h = self.grow[level](F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        return self.gradient_head(h).reshape(*shape, *x.shape[1:]), a
