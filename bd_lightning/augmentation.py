"""Augmentation of images that does not leak: the network is told what was done, and samples of what was not.

An augmentation maps a batch and a generator to a batch and a vector for each image, zeros for an image that was left as
it is: `x, told = augmentation(x, generator)`. Samples are drawn at zeros.

References:
    | Karras et al., EDM, arXiv 2206.00364, Appendix F.2 (the transformations, their strengths, and the vectors)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bd_lightning.checks import in_range, positive


@dataclass(frozen=True)
class Augmentation(ABC):
    """Base of the augmentations.

    Attributes:
        size: length of the vector that says what was done.
    """

    size: ClassVar[int]

    @abstractmethod
    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [−1, 1], changed at random, and what was done to each, (B, size).

        Raises:
            ValueError: if these are no images.
        """


@dataclass(frozen=True)
class Geometric(Augmentation):
    """Flips, scaling, rotation, stretching and shifts, each with probability p, in that order.

    An image is sampled once, bicubically, with mirrored borders (EDM filters it with wavelets). One that nothing was
    done to is left bit for bit. `flip` of the data, which the network is not told of, goes with it as before.

    Args:
        p: probability of each transformation.
        scale: standard deviation of log₂ of the factors of scaling and of stretching.
        rotation: largest angle, in half turns.
        shift: standard deviation of a shift, in widths of the image.
    """

    p: float = 0.12
    scale: float = 0.2
    rotation: float = 1.0
    shift: float = 0.125
    size: ClassVar[int] = 9

    def __post_init__(self) -> None:
        in_range(0, 1, p=self.p, rotation=self.rotation)
        positive(scale=self.scale, shift=self.shift)
        in_range(0, 10, scale=self.scale, shift=self.shift)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """As the base says."""
        if x.ndim != 4:
            raise ValueError(f"an augmentation of images was given data of shape {tuple(x.shape[1:])}")
        ratio = x.shape[3] / x.shape[2]
        with torch.autocast(x.device.type, enabled=False):  # places of pixels are finer than half precision
            matrix, told = self.transforms(len(x), x.device, generator)
            matrix[:, 0, 1] /= ratio  # pixels are square, and both halves are called one
            matrix[:, 1, 0] *= ratio
            matrix[:, 1, 2] *= ratio
            grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
            changed = F.grid_sample(x.float(), grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)
        same = (told == 0).all(1)[:, None, None, None]
        return torch.where(same, x, changed.to(x.dtype)), told

    def transforms(
        self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """n maps from the changed image's coordinates, in half widths, to the image's, (n, 2, 3), and vectors (n, 9).

        Told are: both flips (0 or 1), log₂ of the scale in units of its deviation, cos α − 1 and sin α of the rotation,
        log₂ of the stretching in units of its deviation, towards twice the angle of its axis, and the shift in units of
        its deviation. An axis and its opposite are one: twice the angle tells them as one, so that what is told decides
        what was done (EDM's code tells the angle, and calls stretching and shrinking along an axis the same).
        """

        def one(name: str) -> Tensor:
            return getattr(torch, name)(n, device=device, generator=generator)

        done = torch.rand(n, 6, device=device, generator=generator) < self.p
        flips = (done[:, :2] & (torch.rand(n, 2, device=device, generator=generator) < 0.5)).float()
        scaled = one("randn") * done[:, 2]
        angle = (2 * one("rand") - 1) * math.pi * self.rotation * done[:, 3]
        stretched, direction = one("randn") * done[:, 4], math.pi * one("rand")
        shifted = torch.randn(n, 2, device=device, generator=generator) * done[:, 5:]
        told = torch.stack([
            flips[:, 0], flips[:, 1], scaled, angle.cos() - 1, angle.sin(),
            stretched * (2 * direction).cos(), stretched * (2 * direction).sin(), shifted[:, 0], shifted[:, 1],
        ], 1)  # fmt: skip
        grown, wide = (self.scale * scaled).exp2(), (self.scale * stretched).exp2()
        back = torch.diag_embed(1 - 2 * flips)
        back = back @ torch.diag_embed(torch.stack([1 / grown, 1 / grown], 1)) @ _rotation(-angle)
        back = back @ _rotation(direction) @ torch.diag_embed(torch.stack([1 / wide, wide], 1)) @ _rotation(-direction)
        offset = -2 * self.shift * (back @ shifted[:, :, None])
        return torch.cat([back, offset], 2), told


def _rotation(angle: Tensor) -> Tensor:
    """Rotations by angles (n,), matrices (n, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
