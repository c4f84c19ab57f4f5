r"""Inverse problems: samples of p(x | y) for y = A(x) + ηn, by fields of the posterior.

At each noise level p(y | x̃) is taken for a Gaussian with the denoiser's own mean and covariance, E[x | x̃] and
σ²∇E[x | x̃] (moment matching), which is exact where p is a Gaussian. Its score is added to that of p, and any sampler
draws from the sum. A may be any differentiable function, such as a decoder and a mask behind it.

References:
    | Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization, arXiv 2405.13712
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bd_lightning.checks import UserError, positive
from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair

Operator = Callable[[Tensor], Tensor]
"""Measurements (B, D) of samples (B, *)."""


class Outside:
    """The pixels of images outside a hole.

    Args:
        hole: what is to be filled, (H, W) of truth values.

    Raises:
        ValueError: if nothing is outside, or nothing is to be filled.
    """

    def __init__(self, hole: Tensor) -> None:
        if hole.all() or not hole.any():
            raise ValueError("a mask needs pixels that are to be filled (white) and pixels that are kept (black)")
        self.hole = hole

    def __call__(self, images: Tensor) -> Tensor:
        """The kept pixels (B, D) of images (B, C, H, W)."""
        return images[..., ~self.hole.to(images.device)].flatten(1)


class Shrunk:
    """Images shrunk by the mean of blocks of pixels.

    Args:
        factor: side of a block.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, images: Tensor) -> Tensor:
        """The means (B, D) of the blocks of images (B, C, H, W)."""
        return F.avg_pool2d(images, self.factor).flatten(1)


class PosteriorFields(FieldPair):
    """Fields of p_σ(x̃ | y) for the constant kernel: s = 1, g = ½(E[x | x̃, y] − x̃)/σ².

    Args:
        fields: the fields of p.
        y: measurements, one for each point that the fields are asked for, shape (B, D).
        operator: A; it has to be differentiable.
        noise: η, standard deviation of the noise of y.
        iterations: steps of the linear solver at each call.

    Raises:
        UserError: if azula, whose solver and moment matching these are, is not installed.
    """

    def __init__(
        self, fields: FieldPair, y: Tensor, operator: Operator, noise: float = 0.05, iterations: int = 3
    ) -> None:
        positive(noise=noise, iterations=iterations)
        try:
            from azula.guidance import MMPSDenoiser
            from azula.linalg.covariance import IsotropicCovariance
        except ImportError as error:
            raise UserError("azula is not installed: uv sync --group azula") from error
        from bd_lightning.azula import FieldsDenoiser

        self.denoiser = FieldsDenoiser(fields, 1e-4, 1e4)
        variance = IsotropicCovariance(torch.tensor(noise**2, dtype=y.dtype, device=y.device))
        self.posterior = MMPSDenoiser(self.denoiser, y, operator, variance, iterations=iterations)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,), which are one."""
        with torch.inference_mode(False):
            schedule = self.denoiser.schedule
            low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
            t = (sigma[0].clone().log() - low) / (high - low)
            mean = self.posterior(x.clone(), t).mean.detach()
        return torch.ones_like(sigma), bcast(0.5 / sigma.square(), x) * (mean - x)


def nearest_filled(images: Tensor, hole: Tensor) -> Tensor:
    """Images (B, C, H, W) with the pixels of a hole (H, W) taken from the nearest outside, the mean of several."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in hole.shape), indexing="ij"), -1).float()
    distance = torch.cdist(place[hole], place[~hole])
    nearest = (distance <= distance.amin(1, keepdim=True) + 1e-4).float()
    filled = images.clone()
    weights = (nearest / nearest.sum(1, keepdim=True)).to(images)
    filled[..., hole.to(images.device)] = images[..., ~hole.to(images.device)] @ weights.mT
    return filled
