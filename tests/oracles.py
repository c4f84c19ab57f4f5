"""Targets that many tests share."""

from bd_lightning.targets import GaussianMixture


def square() -> GaussianMixture:
    """Four modes of weights .4/.3/.2/.1 in the plane, on which plain dynamics keep the weights of their start."""
    return GaussianMixture([[1, 1], [-1, -1], [1, -1], [-1, 1]], [0.4, 0.3, 0.2, 0.1], 0.3)
