"""How return distributions are represented, and backed up exactly; see the text of `bd_lightning.returns`."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from bd_lightning.checks import UserError, in_range, one_of
from bd_lightning.returns.fields import ReturnFields, normal, normal_cdf

GROUP = 8  # as many transitions must share a reward and a discount on average before matrices are shared too


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in single precision at least, under autocast too: half precision is coarser than what values differ by."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() if a.dtype in (torch.float16, torch.bfloat16) else a) @ b


class Representation(nn.Module, ABC):
    """What a network says about a return distribution, and how it is backed up.

    A network gives `outputs` numbers y for each action; `read` makes of them the numbers w that describe a distribution
    of returns: weights of fixed components (`LinearRepresentation`), or quantiles.

    Args:
        v_min: smallest return that is expected, in units of reward.
        v_max: largest one.

    Attributes:
        changeable: arguments that do not change what trained outputs stand for, and may change after training.
    """

    outputs: int
    changeable: ClassVar[tuple[str, ...]] = ()
    x: Tensor
    """Positions of the components, shape (N,), in units of reward; where quantiles start from."""
    spacing: float
    """Their distance."""

    def __init__(self, v_min: float, v_max: float) -> None:
        super().__init__()
        if not (math.isfinite(v_min) and math.isfinite(v_max) and v_min < v_max):
            raise ValueError(f"v_min must be below v_max, both finite; got {v_min} and {v_max}")
        if v_max - v_min < max(2e-5 * max(abs(v_min), abs(v_max)), 1e-30):
            raise ValueError(
                f"v_min and v_max are too close to be told apart in single precision, {v_min} and {v_max}: shift "
                "rewards towards zero, or widen the range"
            )
        self.v_min, self.v_max = float(v_min), float(v_max)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float(), persistent=False)

    @abstractmethod
    def read(self, y: Tensor) -> Tensor:
        """Distributions w (*, N) of outputs y (*, outputs)."""

    @abstractmethod
    def target(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What outputs are regressed on after a transition.

        Args:
            w: the return from the next state on, shape (B, N).
            reward: reward r, summed and discounted over the steps of the transition, shape (B,).
            discount: γⁿ for n steps, 0 where the episode ended, shape (B,).

        Returns:
            Targets, shape (B, outputs).
        """

    @abstractmethod
    def mixture(self, shares: Tensor, w: Tensor) -> Tensor:
        """The mixture (*, N) of K distributions w (*, K, N), or of K targets, with shares (*, K) that sum to one."""

    @abstractmethod
    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Loss (*,) of outputs y (*, outputs) against a target of the same shape."""

    @abstractmethod
    def mean(self, w: Tensor) -> Tensor:
        """Expected returns (*,) of distributions w (*, N): the values of actions."""

    @abstractmethod
    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """s = p and g = ∂p at points x (Q,), for distributions (*, N); both (*, Q)."""

    @abstractmethod
    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """P(G ≤ x) at points x (Q,), for distributions (*, N); shape (*, Q)."""

    @abstractmethod
    def outside(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Share (B,) of the mass of r + γG, G of distributions w (B, N), that lies outside [v_min, v_max]."""

    def check(self) -> None:
        """Refuse a representation of one's own whose parts do not fit each other.

        Raises:
            UserError: naming the first that does not.
        """
        own = type(self).__name__
        for part in ("outputs", "x", "spacing"):
            if not hasattr(self, part):
                raise UserError(f"{own} has no '{part}': its __init__ has to set outputs, x and spacing")

        def shaped(part: str, found: Tensor, *shape: int) -> Tensor:
            if tuple(found.shape) != shape:
                raise UserError(f"{own}.{part} gives the shape {list(found.shape)} where {list(shape)} is needed")
            return found

        count, outputs, rows = len(self.x), self.outputs, 2
        y, still = torch.zeros(rows, outputs), torch.zeros(rows)
        w = shaped("read", self.read(y), rows, count)
        target = shaped("target", self.target(w, still, still + 0.5), rows, outputs)
        shaped("loss", self.loss(y, target), rows)
        shaped("mean", self.mean(w), rows)
        shaped("mixture", self.mixture(torch.full((rows, 3), 1 / 3), w[:, None].expand(rows, 3, count)), rows, count)
        shaped("cdf", self.cdf(w, self.x), rows, count)
        shaped("outside", self.outside(w, still, still + 0.5), rows)

    def field_pair(self, w: Tensor, origin: float = 0.0) -> ReturnFields:
        """The fields of one distribution w (N,) at all noise levels, for samplers; points are counted from `origin`.

        Raises:
            UserError: if the representation has none.
        """
        raise UserError("the sde needs fields: sample with model.sampler=inverse_cdf, or train model=returns")

    def grid(self, points: int = 2001) -> Tensor:
        """Points (Q,) that reach well beyond [v_min, v_max], for quadratures and inverse functions.

        Returns outside, which `Quantiles` can stand for, count as at the ends there; `mean` takes them as they are.
        """
        pad = 4 * self.spacing
        return torch.linspace(float(self.x[0]) - pad, float(self.x[-1]) + pad, points, device=self.x.device)


class LinearRepresentation(Representation):
    """Distributions as weights w of fixed components, in which backups, mixtures and values are linear."""

    @abstractmethod
    def matrix(self, reward: Tensor, discount: Tensor) -> Tensor:
        """Matrices (B, outputs, N) from weights to targets, for rewards and discounts (B,)."""

    def target(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """A matrix for each reward and discount, times the weights.

        Raises:
            UserError: if `matrix` gives others than of one row for each output and one column for each weight.
        """
        pairs, place = torch.stack([reward, discount], 1).unique(dim=0, return_inverse=True)
        matrices = self.matrix(pairs[:, 0], pairs[:, 1])
        if matrices.shape != (needed := (len(pairs), self.outputs, w.shape[-1])):
            raise UserError(
                f"{type(self).__name__}.matrix gives the shape {list(matrices.shape)} for {len(pairs)} rewards and "
                f"discounts, and not {list(needed)}: a row for each output, a column for each weight"
            )
        if GROUP * len(pairs) <= len(w):  # few distinct rewards: one product for each
            return product(w, matrices.mT)[place, torch.arange(len(w), device=w.device)]
        return product(matrices[place], w[..., None])[..., 0]

    def mixture(self, shares: Tensor, w: Tensor) -> Tensor:
        """The weighted sum."""
        return (shares[..., None] * w).sum(-2)

    def mean(self, w: Tensor) -> Tensor:
        """The weighted sum of the components' positions."""
        return product(w, self.x)

    def outside(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Of positive weights."""
        moved = reward[:, None] + discount[:, None] * self.x
        out = (moved < self.v_min - 0.5 * self.spacing) | (moved > self.v_max + 0.5 * self.spacing)
        return (w.clamp_min(0) * out).sum(1) / w.clamp_min(0).sum(1)


class GaussianNodes(LinearRepresentation):
    """Base: fields as sums of Gaussians over fixed nodes; see the text of `bd_lightning.returns`.

    Args:
        v_min: smallest return that is expected.
        v_max: largest one.
        nodes: number of nodes, padding included.
        bandwidth: h in units of the distance between nodes. Narrow ones blur returns less; above 1 the interpolation is
            badly conditioned.
        padding: nodes on either side outside [v_min, v_max].
    """

    def __init__(self, v_min: float, v_max: float, nodes: int, bandwidth: float, padding: int) -> None:
        super().__init__(v_min, v_max)
        in_range(0.3, 1.5, bandwidth=bandwidth)
        in_range(0, 1000, padding=padding)
        in_range(2 * padding + 2, 10_000, nodes=nodes)
        self.spacing = (v_max - v_min) / (nodes - 2 * padding - 1)
        self.h = bandwidth * self.spacing
        x = v_min + self.spacing * (torch.arange(nodes, dtype=torch.float64) - padding)
        self._keep(x=x)

    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in closed form."""
        u = x - self.x[:, None]
        k = normal(u, self.h**2)
        return product(w, k), product(w, -u / self.h**2 * k)

    def field_pair(self, w: Tensor, origin: float = 0.0) -> ReturnFields:
        """At noise level σ the components have the variance h² + σ²."""
        return ReturnFields(self.x, self.h, w, origin)

    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """In closed form; not quite monotone where s is negative."""
        return product(w, normal_cdf((x - self.x[:, None]) / self.h))


class GaussianFields(GaussianNodes):
    """Fields with weights of any sign, which networks give linearly: all of the Bellman equation is linear in outputs.

    Outputs are deviations from the uniform distribution over [v_min, v_max], with which learning therefore starts.
    Mass that a target puts well beyond the range does not go to its ends, as with the other representations: the last
    nodes take it with large weights of either sign, by which means go astray. So v_min and v_max have to hold.

    Args:
        v_min: as for `GaussianNodes`.
        v_max: as for `GaussianNodes`.
        nodes: as for `GaussianNodes`.
        bandwidth: as for `GaussianNodes`; 0.5 at least for "density", 1.1 at most for "cumulative".
        padding: as for `GaussianNodes`.
        learn: "cumulative" or "density".
        mass: shift the weights of "density" to mass one, equally at all nodes.
        positive: replace s by its positive part, rescaled to mass one, in values and targets.
    """

    changeable = ("mass", "positive")
    points: Tensor
    back: Tensor
    gram: Tensor
    inverse: Tensor
    uniform: Tensor
    start: Tensor

    def __init__(
        self,
        v_min: float,
        v_max: float,
        nodes: int = 52,
        bandwidth: float = 0.7,
        padding: int = 3,
        learn: str = "cumulative",
        mass: bool = True,
        positive: bool = False,
    ) -> None:
        one_of(("cumulative", "density"), learn=learn)
        ends = (
            (0.5, 1.5) if learn == "density" else (0.3, 1.1)
        )  # sums over nodes are mass one; differences of c keep it
        in_range(*ends, bandwidth=bandwidth)
        super().__init__(v_min, v_max, nodes, bandwidth, padding)
        self.learn, self.mass, self.positive = learn, mass, positive
        x = v_min + self.spacing * (torch.arange(nodes, dtype=torch.float64) - padding)
        inside = torch.zeros(nodes, dtype=torch.float64)
        inside[padding : nodes - padding] = 1 / (nodes - 2 * padding)
        gram = normal(x[:, None] - x, self.h**2) * self.spacing  # in double precision, to be inverted
        if learn == "density":
            points = x
            back = torch.linalg.inv(gram)
        else:  # w = differences of c, c_0 = 0 and c_N = 1; F at the midpoints fixes c
            points = (x[1:] + x[:-1]) / 2
            steps = torch.eye(nodes, nodes - 1, dtype=torch.float64)
            steps = steps - steps.roll(1, 0)
            back = steps @ torch.linalg.inv(normal_cdf((points[:, None] - x) / self.h) @ steps)
        self.outputs = len(points)
        self._keep(points=points, back=back, gram=gram, inverse=torch.linalg.inv(gram), uniform=inside)
        self._keep(start=self._functional(points[:, None] - x) @ inside)

    def _functional(self, u: Tensor) -> Tensor:
        """What is learned of a component at distance u from its position."""
        return normal_cdf(u / self.h) if self.learn == "cumulative" else normal(u, self.h**2) * self.spacing

    def read(self, y: Tensor) -> Tensor:
        """Weights (*, N); linear in y but for `positive`."""
        w = self.uniform + product(y, self.back.T)
        if self.learn == "density" and self.mass:
            w = w + (1 - w.sum(-1, keepdim=True)) / w.shape[-1]
        if self.positive:
            w = product(product(w, self.gram).clamp_min(0), self.inverse)
            w = w / w.sum(-1, keepdim=True).clamp_min(1e-6)
        return w

    def matrix(self, reward: Tensor, discount: Tensor) -> Tensor:
        """Push-forward, re-smoothing and evaluation at the collocation points, exactly."""
        return self._functional(self.points[:, None] - discount[:, None, None] * self.x - reward[:, None, None])

    def target(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """As deviations from the uniform distribution's."""
        return super().target(w, reward, discount) - self.start

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Squared error, summed over collocation points."""
        return (y - target).square().sum(-1)


class PositiveFields(GaussianNodes):
    """Fields with positive weights of sum one, by softmax, learned by likelihood; see `bd_lightning.returns`.

    Mixtures and values are linear in the weights, and so are targets, which are exact; weights are no linear function
    of outputs. Fields whose Gaussians lie between nodes have no positive weights: the nearest ones, of a constant
    reward, have means that are off by up to a tenth of the distance between nodes, in sum over all backups. Returns
    beyond the range are moved to its ends, as those of `Categorical` are.

    Args:
        v_min: as for `GaussianNodes`.
        v_max: as for `GaussianNodes`.
        nodes: as for `GaussianNodes`.
        bandwidth: as for `GaussianNodes`; 0.6 at least.
        padding: as for `GaussianNodes`.
    """

    shares: Tensor

    def __init__(self, v_min: float, v_max: float, nodes: int = 52, bandwidth: float = 0.7, padding: int = 3) -> None:
        in_range(0.6, 1.5, bandwidth=bandwidth)  # sums over the nodes stand for integrals
        super().__init__(v_min, v_max, nodes, bandwidth, padding)
        self.outputs = nodes
        self._keep(shares=self._shares(self.x[:, None] - self.x).T)

    def _shares(self, u: Tensor) -> Tensor:
        """Shares (*, N, M) of M Gaussians at nodes that are u away, which sum to one over the nodes.

        Those below 1e-12 are left out, and exponents end where they are far below: denormal numbers would be slow.
        """
        k = (-0.5 * (u / self.h).square()).clamp_min(-30).softmax(-2)
        return nn.functional.threshold(k, 1e-12, 0.0)

    def read(self, y: Tensor) -> Tensor:
        """Weights (*, N), all positive."""
        return y.softmax(-1)

    def matrix(self, reward: Tensor, discount: Tensor) -> Tensor:
        """Push-forward and re-smoothing, exactly: shares of s at the nodes."""
        moved = (reward[:, None] + discount[:, None] * self.x).clamp(self.v_min, self.v_max)
        return self._shares(self.x[:, None] - moved[:, None, :])

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Cross entropy −∫ t log s of densities, by their shares at the nodes."""
        s = product(y.softmax(-1), self.shares)
        return -(target * s.clamp_min(torch.finfo(s.dtype).tiny).log()).sum(-1)


class Categorical(LinearRepresentation):
    """C51: probabilities of atoms, by softmax.

    As a density an atom is spread evenly over the spacing around it, which makes its distribution function continuous
    (`interpolate`), or it is a step.

    Args:
        v_min: position of the first atom.
        v_max: position of the last one.
        atoms: their number.
        interpolate: spread the atoms when a density or a distribution function is asked for.
    """

    changeable = ("interpolate",)

    def __init__(self, v_min: float, v_max: float, atoms: int = 51, interpolate: bool = True) -> None:
        super().__init__(v_min, v_max)
        in_range(2, 10_000, atoms=atoms)
        self.outputs, self.interpolate = atoms, interpolate
        self.spacing = (v_max - v_min) / (atoms - 1)
        self._keep(x=torch.linspace(v_min, v_max, atoms, dtype=torch.float64))

    def read(self, y: Tensor) -> Tensor:
        """Probabilities (*, N)."""
        return y.softmax(-1)

    def matrix(self, reward: Tensor, discount: Tensor) -> Tensor:
        """The projection (arXiv 1707.06887, Eq. 7): a shifted atom is shared between its two neighbours."""
        moved = (reward[:, None] + discount[:, None] * self.x).clamp(self.v_min, self.v_max)
        return (1 - (self.x[:, None] - moved[:, None, :]).abs() / self.spacing).clamp_min(0)

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Cross entropy."""
        return -(target * y.log_softmax(-1)).sum(-1)

    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Linear interpolation of the probabilities over the spacing, and its slope; wider than what `cdf` spreads."""
        u = (x - self.x[:, None]) / self.spacing
        hat = (1 - u.abs()).clamp_min(0)
        return product(w, hat) / self.spacing, product(w, -u.sign() * (hat > 0)) / self.spacing**2

    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """Piecewise linear, or steps."""
        u = (x - self.x[:, None]) / self.spacing
        return product(w, (u + 0.5).clamp(0, 1) if self.interpolate else (u >= 0).to(w.dtype))
