"""Convolutional encoder and decoder of images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd_lightning.checks import positive


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def reduced(shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int]:
    """Height and width after halving once for every entry of channels, odd sizes rounded up."""
    height, width = shape[1:]
    for _ in channels:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


class Encoder(nn.Module):
    """Images to the mean and log-variance of their codes.

    Args:
        shape: (channels, height, width) of one image.
        latent: shape of a code, (d,) or (c, h, w).
        channels: channels after each halving of height and width.
        blocks: residual blocks at each resolution.
    """

    def __init__(self, shape: Sequence[int], latent: Sequence[int], channels: Sequence[int], blocks: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c = shape[0]
        for c_out in channels:
            layers += [nn.Conv2d(c, c_out, 3, stride=2, padding=1), *(_Residual(c_out) for _ in range(blocks))]
            c = c_out
        layers += [nn.GroupNorm(math.gcd(8, c), c), nn.SiLU()]
        if len(latent) == 1:
            layers += [nn.Flatten(), nn.Linear(c * math.prod(reduced(shape, channels)), 2 * latent[0])]
        else:
            layers += [nn.Conv2d(c, 2 * latent[0], 1)]
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, C, H, W) to means and log-variances, each (B, *latent)."""
        mean, log_variance = self.layers(x.contiguous(memory_format=torch.channels_last)).chunk(2, dim=1)
        return mean, log_variance


class Decoder(nn.Module):
    """Codes to images; the mirror image of `Encoder`, with the same arguments."""

    def __init__(self, shape: Sequence[int], latent: Sequence[int], channels: Sequence[int], blocks: int = 1) -> None:
        super().__init__()
        sizes = [reduced(shape, channels[:i]) for i in range(len(channels))]
        c, bottom = channels[-1], reduced(shape, channels)
        if len(latent) == 1:
            self.enter: nn.Module = nn.Sequential(
                nn.Linear(latent[0], c * math.prod(bottom)), nn.Unflatten(1, (c, *bottom))
            )
        else:
            self.enter = nn.Conv2d(latent[0], c, 3, padding=1)
        self.stages, self.grow = nn.ModuleList(), nn.ModuleList()
        self.sizes = sizes[::-1]
        for c_out in [*channels[-2::-1], channels[0]]:
            self.stages.append(nn.Sequential(*(_Residual(c) for _ in range(blocks))))
            self.grow.append(nn.Conv2d(c, c_out, 3, padding=1))
            c = c_out
        self.leave = nn.Sequential(nn.GroupNorm(math.gcd(8, c), c), nn.SiLU(), nn.Conv2d(c, shape[0], 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor) -> Tensor:
        """Map codes (B, *latent) to images (B, C, H, W)."""
        h = self.enter(z)
        h = h.contiguous(memory_format=torch.channels_last)
        for stage, grow, size in zip(self.stages, self.grow, self.sizes):
            h = grow(F.interpolate(stage(h), size=size, mode="nearest"))
        return self.leave(h)


def check_latent(shape: Sequence[int], latent: Sequence[int], channels: Sequence[int]) -> None:
    """Refuse shapes that do not fit each other.

    Raises:
        ValueError: saying what would fit.
    """
    if len(shape) != 3:
        raise ValueError(f"an autoencoder needs images of shape (channels, height, width), the data has shape {shape}")
    if not channels:
        raise ValueError("channels needs at least one entry")
    positive(
        **{f"channels[{i}]": c for i, c in enumerate(channels)}, **{f"latent[{i}]": c for i, c in enumerate(latent)}
    )
    bottom = reduced(shape, channels)
    if len(latent) != 1 and tuple(latent[1:]) != bottom:
        raise ValueError(
            f"latent must be [d], or [c, {bottom[0]}, {bottom[1]}] after {len(channels)} halvings of "
            f"{shape[1]}×{shape[2]} pixels; got {list(latent)}"
        )
