"""Returns drawn from learned distributions: by inverse CDF, and by Bellman Diffusion dynamics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.returns.representation import Representation
from bd_lightning.returns.risk import quantile


def sample_by_inverse_cdf(representation: Representation, w: Tensor, indices: Sequence[int], seed: int = 0) -> Tensor:
    """Returns (n, K) of K distributions w (K, N), at uniform levels of their distribution functions.

    Args:
        representation: how the distributions are represented.
        w: weights, shape (K, N).
        indices: indices of the samples, length n; sample i of a seed is the same in any batch.
        seed: seed of the whole set.
    """
    levels = (SampleNoise(indices, (len(w),), seed, w.device).uniform() / 3**0.5 + 1) / 2
    x = representation.grid()
    return quantile(x, representation.cdf(w, x), levels.T).T


def sample_by_sde(
    representation: Representation, w: Tensor, indices: Sequence[int], seed: int = 0, levels: int = 60
) -> Tensor:
    """Returns (n, K) of K distributions by Bellman Diffusion dynamics, the kernel's width falling on the way.

    The added width falls from twice the range of returns to a tenth of h. At the kernel's own width, from a uniform
    start, the same dynamics stand still in the tails, where both fields vanish. The first arguments are as those of
    `sample_by_inverse_cdf`; `levels` is the number of widths. Each distribution has noise of its own.

    Raises:
        UserError: if the representation has no fields.
    """
    width, draws = representation.v_max - representation.v_min, []
    for k, row in enumerate(w):
        origin = float(representation.mean(row))
        fields = representation.field_pair(row, origin)
        dynamics = MultistepDynamics(levels=levels, relaxation=1.0, sigma_max=2 * width, sigma_min=fields.h / 10)
        draws.append(origin + dynamics(fields, SampleNoise(indices, (1,), seed + 1_000_000 * k, w.device))[:, 0])
    return torch.stack(draws, 1)


SAMPLERS = {"inverse_cdf": sample_by_inverse_cdf, "sde": sample_by_sde}
"""Ways to draw returns, by the names that `model.sampler` takes."""
