"""What trace.py measures on: data, networks, kernels and ways to take the trace."""

import math
from typing import Any

import torch

from bd_lightning import kernels
from bd_lightning.targets import GaussianMixture
from benchmarks import common

KERNELS = {"closed-form slices": kernels.ClosedFormSlices(), "constant": kernels.Constant()}
PAIRED = math.inf
WAYS: dict[str, tuple[str, float]] = {
    "Stein": ("stein", 0.0),
    "Hutchinson": ("hutchinson", 0.0),
    "exact": ("exact", 0.0),
    "combined": ("combined", 0.0),
    "antithetic": ("stein", PAIRED),
    "combined, antithetic": ("combined", PAIRED),
}


def mixture(dim: int, modes: int) -> GaussianMixture:
    """Modes at random on a sphere of radius √d, a third as wide as that sphere's coordinates."""
    means = torch.randn(modes, dim, generator=torch.Generator().manual_seed(dim))
    return GaussianMixture((means / means.norm(dim=1, keepdim=True) * math.sqrt(dim)).tolist(), sd=0.3)


PROBLEMS: dict[str, list[str]] = {
    "mixture_2d": ["data=gaussians_2d", "model=points", "callbacks=points"],
    "mixture_32d": ["data=gaussians_2d", "model=mlp", "callbacks=points"],
    "mnist_codes": ["experiment=mnist_latent"],
    "mnist_pixels": ["experiment=mnist_small", "model.parametrisation=factored"],
}


def words_of(name: str, words: list[str]) -> list[str]:
    """Those of the words that are for a problem: none for mixtures, and for pixels none of an autoencoder."""
    if name.startswith("mixture"):
        return []
    return sorted(word for word in words if name == "mnist_codes" or not word.startswith("data.autoencoder"))


def problem_of(name: str, words: list[str]) -> tuple[dict[str, Any], Any]:
    """The config and the data of a problem."""
    config = common.compose(*PROBLEMS[name], *words)
    data = common.make_data(config)
    if name == "mixture_32d":
        data = type(data)(density=mixture(32, 10), batch_size=data.batch_size)
    data.prepare_data()
    data.setup("fit")
    return config, data
