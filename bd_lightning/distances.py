"""Distances between two samples of the same space.

References:
    | Peyré and Cuturi, Computational Optimal Transport, arXiv 1803.00567
    | Gretton et al., A Kernel Two-Sample Test, JMLR 2012
    | Székely and Rizzo, Energy Statistics: A Class of Statistics Based on Distances, JSPI 2013
"""

import torch
from torch import Tensor


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two samples of shapes (N, d) and (M, d), got {tuple(x.shape)} and {tuple(y.shape)}")


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """2-Wasserstein distance between two empirical distributions, exactly, by POT's network simplex.

    Args:
        x: sample, shape (N, d). The time grows like N³ for d > 1; 2,000 points take a second or two.
        y: sample, shape (M, d).

    Returns:
        The distance, in the units of the data.

    Raises:
        ValueError: for shapes that do not agree.
    """
    import ot

    _check(x, y)
    x, y = x.double().cpu(), y.double().cpu()
    if x.shape[1] == 1:
        return float(ot.wasserstein_1d(x[:, 0].numpy(), y[:, 0].numpy(), p=2)) ** 0.5
    cost = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return max(0.0, float(ot.emd2([], [], cost, numItermax=10_000_000))) ** 0.5


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    """Maximum mean discrepancy with a Gaussian kernel, the (biased) V-statistic, which is never negative.

    Args:
        x: sample, shape (N, d).
        y: sample, shape (M, d).
        bandwidth: standard deviation of the kernel, in data units; None takes the median distance within y.

    Returns:
        The MMD (not its square), dimensionless; at most √2.

    Raises:
        ValueError: for shapes that do not agree.
    """
    _check(x, y)
    x, y = x.double(), y.double()
    if bandwidth is None:
        bandwidth = max(float(torch.pdist(y[:2000]).median()), 1e-12)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        sums = [(-torch.cdist(rows, b).square() / (2 * bandwidth**2)).exp().sum() for rows in a.split(2000)]
        return torch.stack(sums).sum() / (len(a) * len(b))

    return float((mean(x, x) + mean(y, y) - 2 * mean(x, y)).clamp_min(0).sqrt())


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖, without bias, and differentiable: as a loss its minimum is equality.

    Args:
        x: sample, shape (N, d), N > 1.
        y: sample, shape (M, d), M > 1, independent of the first.

    Returns:
        A scalar, in data units; below zero by chance.

    Raises:
        ValueError: for shapes that do not agree, and fewer than two points.
    """
    _check(x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError("an energy distance needs two points of each sample at least")

    return 2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """‖estimate − truth‖ / ‖truth‖ over all entries."""
    return float((estimate - truth).double().norm() / truth.double().norm())
