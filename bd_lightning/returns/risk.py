"""Quantiles, risk measures and distances of distribution functions that are given on a grid."""

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive


def monotone(cdf: Tensor) -> Tensor:
    """A distribution function (*, Q) that does not fall and stays in [0, 1].

    Between its running maximum from the left and its running minimum from the right, so that neither end is favoured.
    """
    f = cdf.clamp(0, 1)
    return (f.cummax(-1).values + f.flip(-1).cummin(-1).values.flip(-1)) / 2


def quantile(x: Tensor, cdf: Tensor, levels: Tensor) -> Tensor:
    """Where a distribution function first reaches the levels, interpolated linearly.

    Args:
        x: grid, shape (Q,), rising.
        cdf: values at the grid, shape (*, Q).
        levels: probabilities, shape (*, L), the same leading shape as cdf.

    Returns:
        Quantiles, shape (*, L), in units of x.
    """
    f = monotone(cdf).contiguous()
    right = torch.searchsorted(f, levels.contiguous()).clamp(1, len(x) - 1)
    low, high = f.gather(-1, right - 1), f.gather(-1, right)
    share = ((levels - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return x[right - 1] + share * (x[right] - x[right - 1])


def conditional_value_at_risk(x: Tensor, cdf: Tensor, level: float) -> Tensor:
    """CVaR, the mean return over the worst share `level` of outcomes, shape (*,).

    By its dual form, CVaR_a = q − E[(q − G)₊]/a at the a-quantile q, with E[(q − G)₊] = ∫_{−∞}^q F, of F made
    `monotone`. Where F has errors of both signs, as that of fields of any sign has where there is no mass, they so all
    count downwards, divided by a: by 0.9 in a range of 25 for errors of 0.005 and a = 0.1. With F as it is there is no
    such bias, but policies that are greedy in it stand still (docs/returns.md).

    Args:
        x: grid, shape (Q,), rising and even.
        cdf: values at the grid, shape (*, Q).
        level: a, above 0 and at most 1.

    References:
        | Rockafellar and Uryasev, Optimization of Conditional Value-at-Risk, 2000
    """
    positive(level=level)
    in_range(0, 1, level=level)
    f = monotone(cdf)
    q = quantile(x, f, f.new_full((*f.shape[:-1], 1), level))
    below = torch.minimum(f, f.new_tensor(level))
    width = (torch.minimum(x[1:], q) - torch.minimum(x[:-1], q)).clamp_min(0)
    return q[..., 0] - ((below[..., 1:] + below[..., :-1]) / 2 * width).sum(-1) / level


def ruin(x: Tensor, cdf: Tensor, threshold: float) -> Tensor:
    """Probability that the return is at most a threshold, shape (*,), from F (*, Q) at the grid x (Q,)."""
    f = monotone(cdf)
    right = int(torch.searchsorted(x, threshold).clamp(1, len(x) - 1))
    share = ((threshold - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return f[..., right - 1] + share * (f[..., right] - f[..., right - 1])


def wasserstein1(x: Tensor, cdf: Tensor, samples: Tensor) -> Tensor:
    """1-Wasserstein distance ∫|F − F̂| to a sample, in units of x, shape (*,).

    Args:
        x: grid, shape (Q,), even, reaching beyond all samples; the error is of the order of its spacing.
        cdf: F at the grid, shape (*, Q).
        samples: shape (*, n).
    """
    ranks = torch.searchsorted(samples.sort(-1).values, x.expand(*samples.shape[:-1], -1).contiguous(), right=True)
    return (cdf - ranks / samples.shape[-1]).abs().sum(-1) * (x[1] - x[0])
