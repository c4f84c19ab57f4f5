"""Densities in closed form as data sets."""

from typing import Any

import torch

from bd_lightning.checks import positive
from bd_lightning.targets import Density
from datamodules.base import DataModule
from datamodules.splits import Rows


class Synthetic(DataModule):
    """Samples of a density with known fields: a training set, and validation and test sets, drawn from fixed seeds.

    Args:
        density: the density (see `bd_lightning.targets`).
        size: number of training samples.
        held_out: number of validation samples, and of test samples.
        data_seed: seed of the samples.
        options: arguments of `DataModule`.

    Attributes:
        sigma_data: root mean square of the samples, about zero, where the models' base Gaussian is.
    """

    density: Density

    def __init__(
        self, density: Density, size: int = 1_000_000, held_out: int = 10_000, data_seed: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        positive(size=size, held_out=held_out)
        self.density, self.size, self.held_out, self.data_seed = density, size, held_out, data_seed
        self.name = f"{type(density).__name__}-{density.dim}d"
        self.shape = (density.dim,)
        self.sigma_data = round(float(self._draw(10_000, 3).square().mean().sqrt()), 4)
        if not 0 < self.sigma_data < float("inf"):
            raise ValueError(f"density: its samples have standard deviation {self.sigma_data}; look at its arguments")

    def _draw(self, n: int, stream: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4 * self.data_seed + stream)
        return self.density.sample(n, generator).float()

    def load_split(self, split):
        stream = ("train", "val", "test").index(split)
        return Rows(self._draw(self.size if split == "train" else self.held_out, stream))
