r"""Inverse problems: samples of p(x | y) for y = A(x) + ηn, by fields of the posterior.

At each noise level p(y | x̃) is taken for a Gaussian with the denoiser's own mean and covariance, E[x | x̃] and
σ²∇E[x | x̃] (moment matching), which is exact where p is a Gaussian. Its score is added to that of p, and any sampler
draws from the sum. A may be any differentiable function, such as a decoder and a mask behind it.

References:
    | Rozet et al., Learning Diffusion Priors from Observations by Expectation Maximization, arXiv 2405.13712
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair, log_gradient

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


def gmres(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """The x of M x = b whose residual is least among combinations of b, Mb, M²b, …, for each row by itself.

    Args:
        matrix: M v (B, D) of v (B, D).
        b: right sides, shape (B, D).
        iterations: number of products with M.

    Returns:
        x, shape (B, D).

    References:
        | Saad and Schultz, GMRES, 1986
    """
    tiny = torch.finfo(b.dtype).tiny
    size = b.norm(dim=1)
    basis = [b / size.clamp_min(tiny)[:, None]]
    H = b.new_zeros(len(b), iterations + 1, iterations)
    for j in range(iterations):
        w = matrix(basis[j])
        for i, v in enumerate(basis):
            H[:, i, j] = (w * v).sum(1)
            w = w - H[:, i, j, None] * v
        H[:, j + 1, j] = w.norm(dim=1)
        basis.append(w / H[:, j + 1, j, None].clamp_min(tiny))
    parts = torch.linalg.pinv(H)[:, :, 0] * size[:, None]
    return torch.einsum("bk,kbd->bd", parts, torch.stack(basis[:-1]))


class PosteriorFields(FieldPair):
    """Fields of p_σ(x̃ | y) for the constant kernel: s = 1, g = ½(E[x | x̃, y] − x̃)/σ².

    Args:
        fields: the fields of p.
        y: measurements, one for each point that the fields are asked for, shape (B, D).
        operator: A; it has to be differentiable.
        noise: η, standard deviation of the noise of y.
        iterations: steps of the linear solver at each call, one derivative of the fields and two of A each.
    """

    def __init__(
        self, fields: FieldPair, y: Tensor, operator: Operator, noise: float = 0.05, iterations: int = 3
    ) -> None:
        positive(noise=noise, iterations=iterations)
        self.fields, self.y, self.operator, self.noise, self.iterations = fields, y, operator, noise, iterations

    def mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x̃, y] (B, *) at x̃ (B, *) and noise levels sigma (B,).

        With D = E[x | x̃], V = σ²∇D and A linearised at D it is D + V Aᵀ (η² + A V Aᵀ)⁻¹ (y − A(D)).
        """
        with torch.inference_mode(False), torch.enable_grad():
            point, variance = x.clone().requires_grad_(True), bcast(sigma.clone().square(), x)
            s, g = self.fields(point, sigma.clone())
            D = point + variance * log_gradient(s, g)
            seen = self.operator(D)
            place = D.detach().requires_grad_(True)
            u = torch.zeros_like(seen, requires_grad=True)
            (back,) = torch.autograd.grad(self.operator(place), place, u, create_graph=True)

            def spread(v: Tensor) -> Tensor:
                """V Aᵀ v: ∇D is symmetric."""
                return variance * torch.autograd.grad(seen, point, v, retain_graph=True)[0]

            def covariance(v: Tensor) -> Tensor:
                (forth,) = torch.autograd.grad(back, u, spread(v), retain_graph=True)
                return self.noise**2 * v + forth

            return (D + spread(gmres(covariance, (self.y - seen).detach(), self.iterations))).detach()

    def remark(self) -> str:
        """What the fields of p say of the chains."""
        return self.fields.remark()

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,) and g (B, *) at x (B, *) and noise levels sigma (B,)."""
        return torch.ones_like(sigma), bcast(0.5 / sigma.square(), x) * (self.mean(x, sigma) - x)


def nearest_filled(images: Tensor, hole: Tensor) -> Tensor:
    """Images (B, C, H, W) with the pixels of a hole (H, W) taken from the nearest outside, the mean of several."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in hole.shape), indexing="ij"), -1).float()
    distance = torch.cdist(place[hole], place[~hole])
    nearest = (distance <= distance.amin(1, keepdim=True) + 1e-4).float()
    filled = images.clone()
    weights = (nearest / nearest.sum(1, keepdim=True)).to(images)
    filled[..., hole.to(images.device)] = images[..., ~hole.to(images.device)] @ weights.mT
    return filled
