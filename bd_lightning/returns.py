r"""Return distributions on the line: how they are represented, backed up by the Bellman equation, and read.

The return G of a state-action pair has a density p on R. After a transition with reward r and discount γ (γⁿ after n
steps, 0 at the end of an episode) the distributional Bellman equation makes of the density p' of what follows the
density of r + γG', and in the fields of Bellman Diffusion, s = p and g = ∂p, it is linear:

    s(x) ← (1/γ) s'((x − r)/γ),        g(x) ← (1/γ²) g'((x − r)/γ).

`GaussianFields` writes s as Σ_j w_j N(x; x_j, h²) over fixed nodes x_j, with weights w of any sign and Σ_j w_j = 1.
Pushed forward, component j is N(γx_j + r, γ²h²); noise of variance h²(1 − γ²) restores its width (it is linear too), so
that the target is Σ_j w_j N(x; γx_j + r, h²) for all x, without projection. Its fixed point is the density of G + hn,
n ~ N(0, 1). What is learned, by squared error, is a linear functional of it at collocation points:

- "cumulative": F = ∫ s at the midpoints between nodes. The squared error is Cramér's distance, in which the operator
  contracts by √γ, and the mass is one by construction.
- "density": s at the nodes. In ∫(s − t)² the operator expands by 1/√γ; errors of mass are not contracted at all, unless
  the weights are shifted back to mass one (`mass`, linear) or their positive part is rescaled (`positive`, not linear).

`Categorical` is C51: probabilities of fixed atoms, whose target is projected onto the atoms, learned by cross entropy.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 and §6 (the Bellman equation of fields)
    | Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning, arXiv 1707.06887 (C51)
    | Rowland et al., An Analysis of Categorical Distributional RL, arXiv 1802.08163 (Cramér's distance, √γ)
    | Bellemare et al., Distributional RL with Linear Function Approximation, arXiv 1902.03149 (signed masses)
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from bd_lightning.checks import in_range, one_of, positive
from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.fields import FieldPair

GROUP = 8  # as many transitions must share a reward and a discount on average before matrices are shared too


def normal(u: Tensor, variance: Tensor | float) -> Tensor:
    """N(u; 0, variance); shape of u."""
    return torch.exp(-u.square() / (2 * variance)) / (2 * math.pi * torch.as_tensor(variance)).sqrt()


def normal_cdf(u: Tensor) -> Tensor:
    """P(n ≤ u) of a standard normal n; shape of u."""
    return torch.special.ndtr(u)


class Representation(nn.Module, ABC):
    """What a network says about a return distribution, and how it is backed up.

    A network gives `outputs` numbers y for each action; `read` makes of them weights w of fixed components, of which
    everything else is a linear function.

    Args:
        v_min: smallest return that is expected, in units of reward.
        v_max: largest one.
    """

    outputs: int
    x: Tensor
    """Positions of the components, shape (N,), in units of reward."""
    spacing: float
    """Their distance."""

    def __init__(self, v_min: float, v_max: float) -> None:
        super().__init__()
        if not (math.isfinite(v_min) and math.isfinite(v_max) and v_min < v_max):
            raise ValueError(f"v_min must be below v_max, both finite; got {v_min} and {v_max}")
        self.v_min, self.v_max = float(v_min), float(v_max)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float(), persistent=False)

    @abstractmethod
    def read(self, y: Tensor) -> Tensor:
        """Weights (*, N), summing to one, of outputs y (*, outputs)."""

    @abstractmethod
    def matrix(self, reward: Tensor, discount: Tensor) -> Tensor:
        """Matrices (B, outputs, N) from weights to targets, for rewards and discounts (B,)."""

    @abstractmethod
    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Loss (*,) of outputs y (*, outputs) against a target of the same shape."""

    @abstractmethod
    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """s = p and g = ∂p at points x (Q,), for weights (*, N); both (*, Q)."""

    @abstractmethod
    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """P(G ≤ x) at points x (Q,), for weights (*, N); shape (*, Q)."""

    def target(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What outputs are regressed on after a transition.

        Args:
            w: weights of the return from the next state on, shape (B, N).
            reward: reward r, summed and discounted over the steps of the transition, shape (B,).
            discount: γⁿ for n steps, 0 where the episode ended, shape (B,).

        Returns:
            Targets, shape (B, outputs).
        """
        pairs, place = torch.stack([reward, discount], 1).unique(dim=0, return_inverse=True)
        matrices = self.matrix(pairs[:, 0], pairs[:, 1])
        if GROUP * len(pairs) <= len(w):  # few distinct rewards: one product for each
            return (w @ matrices.mT)[place, torch.arange(len(w), device=w.device)]
        return (matrices[place] @ w[..., None])[..., 0]

    def mean(self, w: Tensor) -> Tensor:
        """Expected returns (*,) of weights (*, N): the values of actions."""
        return w @ self.x

    def outside(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Share (B,) of the mass of r + γG, G of weights w (B, N), that lies outside [v_min, v_max]."""
        moved = reward[:, None] + discount[:, None] * self.x
        out = (moved < self.v_min - 0.5 * self.spacing) | (moved > self.v_max + 0.5 * self.spacing)
        return (w.clamp_min(0) * out).sum(1) / w.clamp_min(0).sum(1)

    def grid(self, points: int = 2001) -> Tensor:
        """Points (Q,) that reach well beyond every component, for quadratures and inverse functions."""
        pad = 4 * self.spacing
        return torch.linspace(float(self.x[0]) - pad, float(self.x[-1]) + pad, points, device=self.x.device)


class GaussianFields(Representation):
    """Fields as sums of Gaussians over fixed nodes; see the module's text.

    Outputs are deviations from the uniform distribution over [v_min, v_max], with which learning therefore starts.

    Args:
        v_min: smallest return that is expected.
        v_max: largest one.
        nodes: number of nodes, padding included.
        bandwidth: h in units of the distance between nodes. Narrow ones blur returns less; above 1 the interpolation is
            badly conditioned.
        padding: nodes on either side outside [v_min, v_max].
        learn: "cumulative" or "density".
        mass: shift the weights of "density" to mass one, equally at all nodes.
        positive: replace s by its positive part, rescaled to mass one, in values and targets.
    """

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
        super().__init__(v_min, v_max)
        one_of(("cumulative", "density"), learn=learn)
        in_range(0.3, 1.5, bandwidth=bandwidth)
        in_range(0, 1000, padding=padding)
        in_range(2 * padding + 2, 10_000, nodes=nodes)
        self.learn, self.mass, self.positive = learn, mass, positive
        self.spacing = (v_max - v_min) / (nodes - 2 * padding - 1)
        self.h = bandwidth * self.spacing
        x = v_min + self.spacing * (torch.arange(nodes, dtype=torch.float64) - padding)
        inside = torch.zeros(nodes, dtype=torch.float64)
        inside[padding : nodes - padding] = 1 / (nodes - 2 * padding)
        gram = normal(x[:, None] - x, self.h**2) * self.spacing
        if learn == "density":
            points = x
            back = torch.linalg.inv(gram)
        else:  # w = differences of c, c_0 = 0 and c_N = 1; F at the midpoints fixes c
            points = (x[1:] + x[:-1]) / 2
            steps = torch.eye(nodes, nodes - 1, dtype=torch.float64)
            steps = steps - steps.roll(1, 0)
            back = steps @ torch.linalg.inv(normal_cdf((points[:, None] - x) / self.h) @ steps)
        self.outputs = len(points)
        self._keep(x=x, points=points, back=back, gram=gram, inverse=torch.linalg.inv(gram), uniform=inside)
        self._keep(start=self._functional(points[:, None] - x) @ inside)

    def _functional(self, u: Tensor) -> Tensor:
        """What is learned of a component at distance u from its position."""
        return normal_cdf(u / self.h) if self.learn == "cumulative" else normal(u, self.h**2) * self.spacing

    def read(self, y: Tensor) -> Tensor:
        """Weights (*, N); linear in y but for `positive`."""
        w = self.uniform + y @ self.back.T
        if self.learn == "density" and self.mass:
            w = w + (1 - w.sum(-1, keepdim=True)) / w.shape[-1]
        if self.positive:
            w = (w @ self.gram).clamp_min(0) @ self.inverse
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

    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in closed form."""
        u = x - self.x[:, None]
        k = normal(u, self.h**2)
        return w @ k, w @ (-u / self.h**2 * k)

    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """In closed form; not quite monotone where s is negative."""
        return w @ normal_cdf((x - self.x[:, None]) / self.h)


class Categorical(Representation):
    """C51: probabilities of atoms, by softmax.

    As a density an atom is spread evenly over the spacing around it, which makes its distribution function continuous
    (`interpolate`), or it is a step.

    Args:
        v_min: position of the first atom.
        v_max: position of the last one.
        atoms: their number.
        interpolate: spread the atoms when a density or a distribution function is asked for.
    """

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
        """Linear interpolation of the probabilities over the spacing, and its slope."""
        u = (x - self.x[:, None]) / self.spacing
        hat = (1 - u.abs()).clamp_min(0)
        return w @ hat / self.spacing, w @ (-u.sign() * (hat > 0)) / self.spacing**2

    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """Piecewise linear, or steps."""
        u = (x - self.x[:, None]) / self.spacing
        return w @ ((u + 0.5).clamp(0, 1) if self.interpolate else (u >= 0).to(w.dtype))


def mixed_policy(values: Tensor, uniform: float = 0.0) -> Tensor:
    """Probabilities (B, A) of actions with these values (B, A): uniform with that probability, else the best one."""
    actions = values.shape[-1]
    best = nn.functional.one_hot(values.argmax(-1), actions).to(values.dtype)
    return (1 - uniform) * best + uniform / actions


def bellman_target(
    representation: Representation, y: Tensor, reward: Tensor, discount: Tensor, uniform: float = 0.0
) -> Tensor:
    """The distributional Bellman target for a policy that is greedy, uniform, or a mixture of the two.

    The return under a policy is the mixture of the returns of its actions; it is taken over all actions exactly.

    Args:
        representation: how distributions are represented.
        y: outputs of the target network at the next state, shape (B, A, outputs).
        reward: shape (B,).
        discount: shape (B,), 0 where the episode ended.
        uniform: share of the uniform policy: 0 is control, 1 evaluates the uniform policy.

    Returns:
        Targets, shape (B, outputs), without gradient.
    """
    with torch.no_grad():
        w = representation.read(y)
        policy = mixed_policy(representation.mean(w), uniform)
        return representation.target((policy[..., None] * w).sum(-2), reward, discount)


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

    By its dual form, CVaR_a = q − E[(q − G)₊]/a at the a-quantile q, with E[(q − G)₊] = ∫_{−∞}^q F.

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


def sample_returns(
    representation: Representation, w: Tensor, n: int, generator: torch.Generator | None = None
) -> Tensor:
    """n returns of each distribution by inverse CDF, shape (*, n), for weights (*, N)."""
    x = representation.grid()
    levels = torch.rand(*w.shape[:-1], n, generator=generator, device=w.device)
    return quantile(x, representation.cdf(w, x), levels)


class ReturnFields(FieldPair):
    """The fields of one return distribution as the suite's samplers take them (`bd_lightning.dynamics`).

    Args:
        representation: `GaussianFields`; at noise level σ the variance of its kernel is h² + σ².
        w: weights, shape (N,).
        origin: what points are counted from, in units of reward.
    """

    def __init__(self, representation: GaussianFields, w: Tensor, origin: float = 0.0) -> None:
        self.x, self.h, self.w = representation.x.double() - origin, representation.h, w.double()
        self.spread = float((self.w @ (self.x - self.w @ self.x).square()).clamp_min(0)) + self.h**2

    def _fields(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        u, variance = x.double() - self.x, self.h**2 + sigma.double().square()[:, None]
        k = normal(u, variance)
        s, g = k @ self.w, (-u / variance * k) @ self.w
        return s.clamp_min(0), torch.where(s > 0, g, 0.0)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """s (B,), 0 where it is negative, and g (B, 1) at points x (B, 1) and noise levels sigma (B,)."""
        s, g = self._fields(x, sigma)
        return s.to(x.dtype), g[:, None].to(x.dtype)

    def log_gradients(self, x: Tensor, sigma: Tensor, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """s, S = 2g/s and ∇log s = g/s: the mobility is the density, so that S is twice ∇log s."""
        s, g = self._fields(x, sigma)
        slope = (g / s.clamp_min(1e-30))[:, None].to(x.dtype)
        return s.to(x.dtype), 2 * slope, slope

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical density, shape of sigma."""
        return (4 * math.pi * (self.spread + sigma.square())).rsqrt()


def sample_by_sde(representation: GaussianFields, w: Tensor, noise: SampleNoise, levels: int = 60) -> Tensor:
    """Returns (n,) of one distribution w (N,) by Bellman Diffusion dynamics, the kernel's width falling on the way.

    The added width falls from twice the range of returns to a tenth of h. At the kernel's own width, from a uniform
    start, the same dynamics stand still in the tails, where both fields vanish.
    """
    width, origin = representation.v_max - representation.v_min, float(representation.mean(w))
    dynamics = MultistepDynamics(levels=levels, relaxation=1.0, sigma_max=2 * width, sigma_min=representation.h / 10)
    return origin + dynamics(ReturnFields(representation, w, origin), noise)[:, 0]
