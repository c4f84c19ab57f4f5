"""Where the losses are taken: noise levels, query points, and the partners of their kernel estimates."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from bd_lightning import kernels
from bd_lightning.checks import in_range, one_of, positive
from bd_lightning.divergences import bcast


@dataclass(frozen=True)
class NoiseLevels:
    """log σ ~ N(mean, std²).

    Args:
        mean: mean of log σ, σ in data units.
        std: standard deviation of log σ.
    """

    mean: float = -0.8
    std: float = 1.2

    def __post_init__(self) -> None:
        in_range(-100, 100, mean=self.mean)
        positive(std=self.std)

    def __call__(self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
        """Draw n noise levels, shape (n,)."""
        return (self.mean + self.std * torch.randn(n, device=device, generator=generator)).exp()


@dataclass(frozen=True)
class Pool:
    """Clean points that stand as partners in the kernel estimates at B query points.

    Args:
        y: the points, shape (N, *).
        weights: which of the pairs take part, shape (B, N), rows that sum to one.
    """

    y: Tensor
    weights: Tensor

    def mobility(
        self, kernel: kernels.Kernel, x: Tensor, sigma: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """m̂ (B,) and ∇m̂ (B, *) at x (B, *) and noise levels sigma (B,), in single precision at least."""
        with torch.autocast(x.device.type, enabled=False):
            flat, y = x.flatten(1).float(), self.y.flatten(1).float()
            m, grad_m = kernel(flat, y, sigma.float(), self.weights, generator)
        return m, grad_m.reshape(x.shape)


@dataclass(frozen=True)
class Partners:
    """Which points of a batch the fields are trained at, and which are their partners.

    Args:
        pairs: "all" pairs of a batch except a point with itself, or a "single" partner for each point, as in the paper.
        queries: how many points of a batch the fields are trained at; the others are partners only, which cost little
            and make the mobility's estimate less noisy. None takes all.
        gather: in training, take partners from the batches of all devices. A step is then that of one device with the
            joined batch; otherwise every device has its own, noisier, estimate of the mobility.
    """

    pairs: str = "all"
    queries: int | None = None
    gather: bool = False

    def __post_init__(self) -> None:
        one_of(("all", "single"), pairs=self.pairs)
        if self.queries is not None and self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")

    def __call__(self, x: Tensor, training: bool = True) -> tuple[Tensor, Pool]:
        """Queries (Q, *) and their pool, of a batch x (B, *).

        Raises:
            ValueError: if there are fewer than two points.
        """
        y = gathered(x) if self.gather and training else x
        x = x[: self.queries]
        pair = kernels.leave_one_out if self.pairs == "all" else kernels.single_partner
        return x, Pool(y, pair(len(x), len(y), device=x.device))


def gathered(x: Tensor) -> Tensor:
    """The batches of all ranks, (W·B, *shape), this rank's first. All ranks call it, with batches of one size."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat([parts.pop(distributed.get_rank()), *parts])


def perturbed(x: Tensor, sigma: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """x̃ = x + σn, n ~ N(0, I), and σ; at a single scale x itself, no noise, and zeros.

    Args:
        x: clean data, shape (B, *).
        sigma: noise levels, shape (B,), or None.
        generator: source of the noise.

    Returns:
        Points (B, *), noise (B, *) and noise levels (B,).
    """
    if sigma is None:
        return x, torch.zeros_like(x), x.new_zeros(len(x))
    noise = torch.randn(x.shape, device=x.device, generator=generator)
    return x + bcast(sigma, x) * noise, noise, sigma


@dataclass(frozen=True)
class Proposal:
    """Query points of kernel field regression: some near the data, the others all over its surroundings.

    Args:
        box: share of points drawn uniformly from the bounding box of the pool, widened by `margin`.
        margin: by how much the box is widened on each side, as a share of its side.
        spread: the other points are data with noise of this standard deviation, in widths √(ε + σ²) of the kernel.
    """

    box: float = 0.5
    margin: float = 0.3
    spread: float = 1.5

    def __post_init__(self) -> None:
        in_range(0, 1, box=self.box)
        positive(spread=self.spread)
        in_range(0, 10, margin=self.margin)

    def __call__(self, x: Tensor, pool: Tensor, width: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one query point per data point.

        Args:
            x: data, shape (B, *).
            pool: data that spans the box, shape (N, *).
            width: kernel width at each point, shape (B,).
            generator: source of randomness.

        Returns:
            Points, shape (B, *).
        """

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, device=x.device, dtype=x.dtype, generator=generator)

        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
        near = x + self.spread * bcast(width, x) * noise
        low, high = pool.amin(0), pool.amax(0)
        side = high - low
        anywhere = low - self.margin * side + (1 + 2 * self.margin) * side * uniform(*x.shape)
        return torch.where(bcast(uniform(len(x)) < self.box, x), anywhere, near)
