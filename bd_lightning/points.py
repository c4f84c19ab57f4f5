"""Where the losses are taken: noise levels, query points, and the partners of their kernel estimates."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from bd_lightning import kernels
from bd_lightning.checks import UserError, in_range, one_of, positive
from bd_lightning.divergences import bcast


@dataclass(frozen=True)
class NoiseLevels:
    """log σ ~ N(mean, std²).

    Args:
        mean: mean of log σ, σ in data units.
        std: standard deviation of log σ.
        stratified: draw the quantiles of a batch's noise levels from as many equal intervals, one from each, so that
            every batch has low and high ones in the right shares.
        antithetic: points at noise levels below this one, in units of the data's standard deviation, come in pairs with
            opposite noise, x + σn and x − σn; 0 for none.
    """

    mean: float = -0.8
    std: float = 1.2
    stratified: bool = False
    antithetic: float = 0.0

    def __post_init__(self) -> None:
        in_range(-40, 40, mean=self.mean)
        positive(std=self.std)
        if not (self.mean + 5 * self.std <= 10 and self.mean - 5 * self.std >= -40):
            raise ValueError(
                f"mean ± 5 std must lie between -40 and 10, got mean={self.mean:g} and std={self.std:g}: at such noise "
                "levels losses are no numbers of single precision"
            )
        in_range(0, math.inf, antithetic=self.antithetic)

    def pairs(self, n: int, sigma_data: float) -> int:
        """How many antithetic pairs there are among n points: their share of the noise levels, rounded down."""
        below = self.antithetic * sigma_data
        if not below:
            return 0
        z = (math.log(below) - self.mean) / self.std
        return int(n * 0.5 * math.erfc(-z / math.sqrt(2)) / 2)

    def __call__(
        self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None, pairs: int = 0
    ) -> Tensor:
        """Draw n noise levels, shape (n,).

        With pairs the first 2·pairs of them are the lowest, in twos that are equal: quantiles from 0 to 2·pairs/n.
        """
        if not (self.stratified or pairs):
            return (self.mean + self.std * torch.randn(n, device=device, generator=generator)).exp()
        share = 2 * pairs / n
        low = share * self._quantiles(pairs, device, generator).repeat_interleave(2)
        high = share + (1 - share) * self._quantiles(n - 2 * pairs, device, generator)
        quantile = torch.cat([low, high]).clamp(1e-6, 1 - 1e-6)
        return (self.mean + self.std * torch.special.ndtri(quantile)).exp()

    def _quantiles(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        u = torch.rand(n, device=device, generator=generator)
        return (torch.arange(n, device=device) + u) / n if self.stratified else u


@dataclass(frozen=True)
class Queries:
    """Clean points that the losses are taken at.

    Args:
        x: the points, shape (Q, *).
        sigma: noise level of each, shape (Q,), in data units; None for a single scale.
        label: class indices, shape (Q,), for class-conditional fields.
        told: how each was augmented, shape (Q, n), for networks that are told.
        pairs: how many antithetic pairs the first points are: 2i and 2i + 1 are one point at one noise level.
    """

    x: Tensor
    sigma: Tensor | None = None
    label: Tensor | None = None
    told: Tensor | None = None
    pairs: int = 0

    def perturbed(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x̃ = x + σn, n ~ N(0, I), opposite in a pair, and σ; at a single scale x itself, no noise, and zeros.

        Returns:
            Points (Q, *), noise (Q, *) and noise levels (Q,).
        """
        if self.sigma is None:
            return self.x, torch.zeros_like(self.x), self.x.new_zeros(len(self.x))
        noise = torch.randn(self.x.shape, device=self.x.device, generator=generator)
        if self.pairs:
            noise[1 : 2 * self.pairs : 2] = -noise[0 : 2 * self.pairs : 2]
        return self.x + bcast(self.sigma, self.x) * noise, noise, self.sigma


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
        """m̂ (B,) and ∇m̂ (B, *) at x (B, *) and noise levels sigma (B,), in single precision at least.

        Raises:
            UserError: for a kernel whose estimates have other shapes.
        """
        with torch.autocast(x.device.type, enabled=False):
            flat, y = x.flatten(1).float(), self.y.flatten(1).float()
            m, grad_m = kernel(flat, y, sigma.float(), self.weights, generator)
        if m.shape != sigma.shape or grad_m.shape != flat.shape:
            raise UserError(
                f"{type(kernel).__name__} must return the mobility of shape {list(sigma.shape)} and its gradient of "
                f"shape {list(flat.shape)}, one for each point; got {list(m.shape)} and {list(grad_m.shape)}"
            )
        return m, grad_m.reshape(x.shape)


@dataclass(frozen=True)
class Partners:
    """Which points of a batch the fields are trained at, and which are their partners.

    Args:
        pairs: "all" pairs of a batch except a point with itself, or a "single" partner for each point, as in the paper.
        queries: at how many points of a batch, at most, the fields are trained; the others are partners only, which
            cost little and make the mobility's estimate less noisy. None takes all.
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


def queries(
    x: Tensor,
    label: Tensor | None,
    noise: NoiseLevels | None,
    sigma_data: float,
    generator: torch.Generator | None = None,
    pool: Pool | None = None,
    told: Tensor | None = None,
) -> tuple[Queries, Pool | None]:
    """Noise levels for points x (Q, *), of classes label (Q,) and augmented as told (Q, n) if not None, and their pool.

    With antithetic pairs the first points are taken twice and as many of the last are left out. All stay in the pool,
    and both points of a pair have the partners of the clean point, which is not among them.
    """
    if noise is None:
        return Queries(x, None, label, told), pool
    pairs = noise.pairs(len(x), sigma_data)
    sigma = noise(len(x), x.device, generator, pairs)
    if pairs:
        once = torch.arange(len(x) - pairs, device=x.device)
        rows = torch.cat([once[:pairs].repeat_interleave(2), once[pairs:]])
        x, label, told = x[rows], None if label is None else label[rows], None if told is None else told[rows]
        pool = None if pool is None else Pool(pool.y, pool.weights[rows])
    return Queries(x, sigma, label, told, pairs), pool


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
