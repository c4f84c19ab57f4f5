"""Means and covariances of features: summed a batch at a time, compared, and kept in files that others read."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from bd_lightning.checks import UserError


class Gaussian(NamedTuple):
    """What FID knows of a set of features.

    Args:
        mean: shape (F,), double precision.
        covariance: shape (F, F), double precision.
    """

    mean: Tensor
    covariance: Tensor


class Moments:
    """Sums of features and of their products, in double precision on the CPU, in memory that does not grow.

    Apple's GPUs have no double precision, and on the others the sums are small beside the network.

    Args:
        num_features: size F of a feature vector.
    """

    def __init__(self, num_features: int) -> None:
        self.n = 0
        self.total = torch.zeros(num_features, dtype=torch.float64)
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Add features, (B, F), of any precision, from any device."""
        rows = rows.cpu().double()
        self.n += len(rows)
        self.total += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def add_ranks(self, trainer: L.Trainer) -> None:
        """Add up the sums of all ranks."""
        if trainer.world_size == 1:
            return
        device = trainer.strategy.root_device
        parts = [torch.tensor([self.n], dtype=torch.float64), self.total, self.products]
        count, self.total, self.products = (
            trainer.strategy.reduce(part.to(device), reduce_op="sum").cpu()  # type: ignore[union-attr]
            for part in parts
        )
        self.n = int(count)

    def gaussian(self) -> Gaussian:
        """Mean, and covariance with n − 1 in its denominator."""
        mean = self.total / self.n
        return Gaussian(mean, (self.products - self.n * mean.outer(mean)) / max(1, self.n - 1))


def moments_of(rows: Tensor) -> Gaussian:
    """Mean and covariance of features (N, F)."""
    sums = Moments(rows.shape[1])
    sums.update(rows)
    return sums.gaussian()


def frechet(a: Gaussian, b: Gaussian) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½), the trace of the root by two symmetric eigenvalue problems.

    References:
        | Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    distance = apart + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return float(distance.clamp_min(0))  # rounding goes below; what is no number stays none


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID between two sets of features, (N, F) and (M, F)."""
    return frechet(moments_of(a), moments_of(b))


def save_statistics(path: Path, found: Gaussian, features: str) -> None:
    """Write mu and sigma as EDM and guided-diffusion publish them, and what they are features of.

    Args:
        path: an .npz file.
        found: the statistics.
        features: description of the features.
    """
    with path.open("wb") as file:
        np.savez(file, mu=found.mean.numpy(), sigma=found.covariance.numpy(), features=np.array(features))


def load_statistics(path: str | Path, num_features: int, features: str) -> Gaussian:
    """Read mu and sigma from an .npz file; nothing in it is run.

    Args:
        path: the file.
        num_features: size of the feature vectors that they will be compared with.
        features: description of those, or its beginning; a file of this suite's `export` has to share it.

    Raises:
        UserError: saying what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"callbacks.metrics.reference: file not found: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("mu", "sigma") if key not in file]
            arrays: dict[str, Any] = {key: file[key] for key in ("mu", "sigma", "features") if key in file}
            held = ", ".join(file.files)
    except Exception as error:  # whatever the reader raises, the file is at fault
        raise UserError(
            f"{path} cannot be read as an .npz file of arrays, with mu and sigma as numpy.savez writes them"
        ) from error
    if missing:
        statistics = path.with_suffix(".stats.npz")  # which `export` writes beside samples
        beside = f", as {statistics} has them" if statistics.is_file() else ""
        raise UserError(
            f"{path} has no {' and no '.join(missing)} (it has {held}): a reference needs mu and sigma{beside}"
        )
    mean, covariance = arrays["mu"], arrays["sigma"]
    if covariance.shape != (*mean.shape, *mean.shape) or not {mean.dtype.kind, covariance.dtype.kind} <= set("fiu"):
        raise UserError(
            f"{path} has mu of {mean.dtype}, shape {mean.shape}, and sigma of {covariance.dtype}, shape "
            f"{covariance.shape}: numbers of the shapes (F,) and (F, F) are needed"
        )
    if mean.shape != (num_features,):
        raise UserError(
            f"{path} is of {mean.size} features, callbacks.metrics.features are {num_features} ({features}): "
            "choose the features that it was made with"
        )
    own = str(arrays.get("features", features))
    if own != features and not own.startswith(f"{features} trained "):  # which is known later
        raise UserError(f"{path} was made in other features ({own}), callbacks.metrics.features are: {features}")
    found = Gaussian(*(torch.from_numpy(one.astype(np.float64)) for one in (mean, covariance)))
    if not (found.mean.isfinite().all() and found.covariance.isfinite().all()):
        raise UserError(f"{path} has numbers that are not finite")
    if not (found.covariance.diagonal() >= 0).all() or not torch.allclose(found.covariance, found.covariance.T):
        raise UserError(f"{path} has a sigma that is no covariance: it is not symmetric, or has negative variances")
    values = torch.linalg.eigvalsh(found.covariance)
    if values[0] < -1e-6 * values[-1]:
        raise UserError(f"{path} has a sigma that is no covariance: its variance in some direction is negative")
    return found
