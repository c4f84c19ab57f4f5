"""What all image data modules share: scaling and augmentation.

Images travel as bytes and are scaled to [−1, 1] a batch at a time. Augmentation touches the training split only.
"""

from typing import Any

import torch
from torch import Tensor

from datamodules.base import DataModule, Rows


def to_uint8(x: Tensor) -> Tensor:
    """Images from [−1, 1] (clipped) to bytes, the same shape."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_unit(x: Tensor) -> Tensor:
    """Images from bytes to [−1, 1], float32, the same shape."""
    return x.float() / 127.5 - 1


class ByteImages(Rows):
    """A split of images held in memory: x (N, C, H, W) of bytes and labels (N,).

    Attributes:
        flip: mirror images left to right with probability one half.
    """

    flip = False

    def __getitems__(self, indices):
        x, labels = super().__getitems__(indices)
        x = to_unit(x)
        if self.flip:
            mirrored = torch.rand(len(x)) < 0.5
            x[mirrored] = x[mirrored].flip(-1)
        return x, labels


class ImageDataModule(DataModule):
    """Base of the image data modules: `shape` is (channels, height, width), and samples lie in [−1, 1].

    The splits have an attribute `flip`, which turns mirroring on.

    Args:
        flip: mirror training images left to right at random.
        options: arguments of `DataModule`.
    """

    shape: tuple[int, int, int]

    def __init__(self, flip: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.flip = flip

    def split(self, split):
        loaded = super().split(split)
        loaded.flip = self.flip and split == "train"
        return loaded
