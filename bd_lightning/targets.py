r"""Densities whose fields are known in closed form, at every noise level.

A `Density` p gives p_σ = p * N(0, σ²I) and its gradient for σ ≥ 0, exact samples, and the density of wᵀx along a
direction w. They are data sets of experiments (see `datamodules.Synthetic`) and the truth that learned fields are
compared with: `fields.AnalyticFields` makes of a density and a kernel the minimisers of the losses,

    s* = m,        g* = ½ (m ∇log p_σ + ∇m),

with the mobility m = E_y k(x, y) in closed form (`Kernel.mobility`), not from samples.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §5 (low-dimensional targets)
    | Karras et al., EDM2, arXiv 2312.02696 (a Gaussian mixture as the oracle behind a toy example)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bd_lightning.checks import positive


class Density(ABC):
    """A density on R^d with closed-form smoothing.

    Wherever a method takes sigma, it is the standard deviation σ ≥ 0 of the noise, a number or of shape (B,), in data
    units. Results have the dtype and device of x.
    """

    dim: int

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples, shape (n, d), double precision, on the CPU."""

    @abstractmethod
    def log_and_score(self, x: Tensor, sigma: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """log p_σ (B,) and ∇log p_σ (B, d) at x (B, d)."""

    @abstractmethod
    def marginal(self, direction: Tensor, t: Tensor, sigma: float = 0.0) -> Tensor:
        """Density of wᵀx̃, x̃ ~ p_σ, for a direction w (d,) of any length, at values t (T,); shape (T,)."""

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_σ at x (B, d); shape (B,)."""
        return self.log_and_score(x, sigma)[0]

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """∇log p_σ at x (B, d); shape (B, d)."""
        return self.log_and_score(x, sigma)[1]

    def smoothed(self, x: Tensor, sigma: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """p_σ (B,), in 1 / units^d, and ∇p_σ (B, d) at x (B, d): the fields of the paper."""
        log, score = self.log_and_score(x, sigma)
        return log.exp(), log.exp()[:, None] * score

    @property
    def mode_weights(self) -> Tensor:
        """Weight of each mode, shape (M,); a density without separate modes has one."""
        return torch.ones(1, dtype=torch.float64)

    def mode_of(self, x: Tensor) -> Tensor:
        """Which mode each point of x (B, d) most likely comes from; shape (B,)."""
        return torch.zeros(len(x), dtype=torch.long, device=x.device)


def _column(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Noise levels as a column (B, 1), or (1, 1) for a number, with the dtype and device of `like`."""
    return torch.as_tensor(sigma, dtype=like.dtype, device=like.device).reshape(-1, 1)


class GaussianMixture(Density):
    """A mixture of Gaussians in any dimension.

    Args:
        means: K means of length d.
        weights: K weights, not negative; they are divided by their sum. None gives equal ones.
        sd: standard deviation of every component in every direction, one number or one per component.
        covariances: K covariance matrices, d×d, instead of sd.

    Raises:
        ValueError: if lengths do not agree, or values are out of range.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        weights: Sequence[float] | None = None,
        sd: float | Sequence[float] = 1.0,
        covariances: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> None:
        try:
            self.means = torch.as_tensor(means, dtype=torch.float64)
            count, self.dim = self.means.shape
        except (ValueError, TypeError) as error:
            raise ValueError("means must be a list of points, each a list of d numbers") from error
        weights = [1.0] * count if weights is None else weights
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.weights.shape != (count,) or not (self.weights >= 0).all() or not self.weights.sum() > 0:
            raise ValueError(f"weights must be {count} numbers, one per mean, not negative and not all zero")
        self.weights = self.weights / self.weights.sum()
        if covariances is None:
            spread = torch.as_tensor(sd, dtype=torch.float64)
            if spread.shape not in ((), (count,)) or not (spread > 0).all():
                raise ValueError(f"sd must be one positive number, or {count} of them")
            self.isotropic = True
            self.variances = spread.square().expand(count)[:, None].expand(count, self.dim)
            self.axes = torch.eye(self.dim, dtype=torch.float64).expand(count, self.dim, self.dim)
        else:
            matrices = torch.as_tensor(covariances, dtype=torch.float64)
            if matrices.shape != (count, self.dim, self.dim) or not torch.allclose(matrices, matrices.mT):
                raise ValueError(f"covariances must be {count} symmetric matrices of size {self.dim}×{self.dim}")
            self.isotropic = False
            self.variances, self.axes = torch.linalg.eigh(matrices)
            if not (self.variances > 0).all():
                raise ValueError("covariances must be positive definite")

    def sample(self, n, generator=None):
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.means[which] + torch.einsum("bij,bj->bi", self.axes[which], self.variances[which].sqrt() * z)

    def _components(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """log of weight × component density, (B, K), displacements along the axes, (B, K, d), and their variances.

        Isotropic components need no displacements, only one variance each, (B, K, 1).
        """
        means, noise = self.means.to(x), _column(sigma, x)[..., None].square()
        if self.isotropic:
            variances, u = self.variances.to(x)[:, :1] + noise, x.new_zeros(0)
            r2 = sum((x[:, i, None] - means[:, i]).square() for i in range(self.dim))
            log = -(r2 / variances[..., 0] + self.dim * (2 * math.pi * variances[..., 0]).log()) / 2
        else:
            variances = self.variances.to(x) + noise  # (B, K, d)
            u = torch.einsum("bki,kij->bkj", x[:, None] - means, self.axes.to(x))
            log = -(u.square() / variances + (2 * math.pi * variances).log()).sum(-1) / 2
        return self.weights.to(x).log() + log, u, variances

    def log_and_score(self, x, sigma=0.0):
        log, u, variances = self._components(x, sigma)
        share = log.softmax(1)
        if self.isotropic:
            pull = share / variances[..., 0]
            return log.logsumexp(1), pull @ self.means.to(x) - pull.sum(1, keepdim=True) * x
        return log.logsumexp(1), -torch.einsum("bk,kij,bkj->bi", share, self.axes.to(x), u / variances)

    def marginal(self, direction, t, sigma=0.0):
        w = direction.to(t)
        projected = torch.einsum("kij,i->kj", self.axes.to(t), w)
        variance = (projected.square() * self.variances.to(t)).sum(1) + sigma**2 * w.square().sum()
        u = t[:, None] - self.means.to(t) @ w
        return ((-u.square() / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()) @ self.weights.to(t)

    @property
    def mode_weights(self):
        return self.weights

    def mode_of(self, x):
        return self._components(x, 0.0)[0].argmax(1)


class _Curves(GaussianMixture):
    """Points on curves, with Gaussian noise.

    A convolution of a smooth curve with a Gaussian is a mixture over nodes of a quadrature rule, to machine precision
    once nodes are closer than the noise is wide. Samples do not use the nodes.

    Args:
        nodes: quadrature nodes on each curve, shape (M, N, 2).
        node_weights: weight of each node within its curve, shape (N,), summing to one.
        weights: weight of each curve.
        noise: standard deviation of the noise.
    """

    def __init__(self, nodes: Tensor, node_weights: Tensor, weights: Sequence[float], noise: float) -> None:
        positive(noise=noise)
        share = torch.as_tensor(weights, dtype=torch.float64)
        super().__init__(nodes.flatten(0, 1).tolist(), torch.outer(share, node_weights).flatten().tolist(), noise)
        self.noise, self._share, self._nodes = noise, share / share.sum(), nodes.shape[1]

    @abstractmethod
    def curve(self, which: Tensor, u: Tensor) -> Tensor:
        """Points of curves `which` (n,) at parameters u (n,) in [0, 1], uniform in u; shape (n, 2)."""

    def sample(self, n, generator=None):
        which = torch.multinomial(self._share, n, replacement=True, generator=generator)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return self.curve(which, u) + self.noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    @property
    def mode_weights(self):
        return self._share

    def mode_of(self, x):
        return self._components(x, 0.0)[0].unflatten(1, (-1, self._nodes)).logsumexp(2).argmax(1)


class Moons(_Curves):
    """Two interleaved half circles of radius one, centred on the origin together.

    Args:
        noise: standard deviation of the noise, in data units; at least 0.03.

    Raises:
        ValueError: for less noise.
    """

    def __init__(self, noise: float = 0.1) -> None:
        if not noise >= 0.03:
            raise ValueError(f"noise must be at least 0.03 for moons, got {noise}")
        from numpy.polynomial.legendre import leggauss

        count = math.ceil(7 / noise)  # nodes lie 0.71 of the noise apart at most, for errors below 1e-15
        nodes, node_weights = (torch.from_numpy(a) for a in leggauss(count))
        u = (nodes + 1) / 2
        points = torch.stack([self.curve(torch.full((count,), i), u) for i in range(2)])
        super().__init__(points, node_weights / 2, (0.5, 0.5), noise)

    def curve(self, which, u):
        angle, lower = math.pi * u, which == 1
        x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
        y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
        return torch.stack([x, y], 1)


class Rings(_Curves):
    """Concentric circles.

    Args:
        radii: radius of each circle, in data units.
        weights: weight of each circle, divided by their sum; None gives equal ones.
        noise: standard deviation of the noise, in data units; at least a fiftieth of the largest radius.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self, radii: Sequence[float] = (0.5, 1.0, 1.5), weights: Sequence[float] | None = None, noise: float = 0.08
    ) -> None:
        for i, radius in enumerate(radii):
            positive(**{f"radii[{i}]": radius})
        if not noise >= max(radii) / 50:
            raise ValueError(
                f"noise must be at least a fiftieth of the largest radius, {max(radii) / 50:g}; got {noise}"
            )
        weights = [1.0] * len(radii) if weights is None else weights
        if len(weights) != len(radii):
            raise ValueError(f"weights must be {len(radii)} numbers, one per radius")
        self.radii = torch.as_tensor(radii, dtype=torch.float64)
        count = math.ceil(9 * max(radii) / noise)  # nodes lie 0.7 of the noise apart at most, for errors below 1e-15
        u = torch.arange(count, dtype=torch.float64) / count
        points = torch.stack([self.curve(torch.full((count,), i), u) for i in range(len(radii))])
        super().__init__(points, torch.full((count,), 1 / count, dtype=torch.float64), weights, noise)

    def curve(self, which, u):
        angle = 2 * math.pi * u
        return self.radii[which, None] * torch.stack([angle.cos(), angle.sin()], 1)


class UniformBox(Density):
    """The uniform density on a box.

    At σ = 0 the gradient is zero inside and a surface measure on the faces; the score is then zero inside, and NaN
    outside, where there is no density.

    Args:
        low: lower corner, length d.
        high: upper corner, length d.

    Raises:
        ValueError: if a side is not positive.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        self.low, self.high = (torch.as_tensor(corner, dtype=torch.float64) for corner in (low, high))
        if self.low.shape != self.high.shape or self.low.ndim != 1 or not (self.high > self.low).all():
            raise ValueError(f"low and high must be of equal length with low < high throughout, got {low} and {high}")
        self.dim = len(self.low)

    def sample(self, n, generator=None):
        u = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        return self.low + (self.high - self.low) * u

    def log_and_score(self, x, sigma=0.0):
        low, high, scale = self.low.to(x), self.high.to(x), _column(sigma, x)
        log_volume = (high - low).log().sum()
        if (scale == 0).all():
            inside = ((x >= low) & (x <= high)).all(1)
            log = torch.where(inside, -log_volume, -math.inf)
            return log, torch.where(inside, 0.0, math.nan).to(x)[:, None].expand_as(x)
        mirrored = torch.where(x > (low + high) / 2, low + high - x, x)  # where Φ(b) − Φ(a) = Φ(−a) − Φ(−b) is safe
        a, b = (low - mirrored) / scale, (high - mirrored) / scale
        upper, lower = torch.special.log_ndtr(-a), torch.special.log_ndtr(-b)
        log_mass = upper + torch.log1p(-(lower - upper).exp())
        log_peak = -math.log(2 * math.pi) / 2 - log_mass
        slope = ((log_peak - a.square() / 2).exp() - (log_peak - b.square() / 2).exp()) / scale
        return log_mass.sum(1) - log_volume, torch.where(mirrored == x, slope, -slope)

    def marginal(self, direction, t, sigma=0.0):
        """Density along a direction.

        wᵀx is a sum of uniform variables: a spline, smoothed by noise of variance σ²‖w‖², with one term per corner.

        Raises:
            ValueError: for a direction of zeros, or of more than 12 components, where the terms cancel.
        """
        w = direction.to(t)
        used = w != 0
        count = int(used.sum())
        if not 1 <= count <= 12:
            raise ValueError(f"the direction must have 1 to 12 components other than zero, got {count}")
        spread = sigma * float(w.norm())
        first, width = w[used] * self.low.to(t)[used], w[used] * (self.high - self.low).to(t)[used]
        start = torch.minimum(first, first + width).sum()
        total = torch.zeros_like(t)
        for corner in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * count).reshape(-1, count).to(t):
            u = t - start - (corner * width.abs()).sum()
            total += (-1) ** int(corner.sum()) * _ramp(u, spread, count - 1)
        return total / width.abs().prod()


def _ramp(u: Tensor, sigma: float, order: int) -> Tensor:
    """E[(u + σz)₊^k] / k! for k = order and standard normal z, by the recursion k h_k = u h_{k−1} + σ² h_{k−2}."""
    if sigma == 0:
        return u.clamp_min(0) ** order / math.factorial(order) * (u >= 0)
    previous = (-(u / sigma).square() / 2).exp() / (math.sqrt(2 * math.pi) * sigma)
    current = torch.special.ndtr(u / sigma)
    for k in range(1, order + 1):
        previous, current = current, (u * current + sigma**2 * previous) / k
    return current
