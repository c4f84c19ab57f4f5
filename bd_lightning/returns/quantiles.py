"""QR-DQN: a return distribution as its quantiles at fixed levels."""

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.returns.representation import Representation

TIE = 1e-6
"""Cumulated shares this near to a level are taken for equal to it; single precision of shares and levels is finer."""


class Quantiles(Representation):
    """Quantiles θ at the levels τ_i = (i + ½)/N, learned by the quantile Huber loss.

    θ is that of the uniform distribution over [v_min, v_max], with which learning therefore starts, plus the range
    times the network's output. Backed up they move without projection. Mixtures are not linear in quantiles: those of
    several distributions are sorted together. As a density each quantile is spread as `Categorical` spreads an atom.

    Args:
        v_min: smallest return that is expected.
        v_max: largest one.
        quantiles: their number N.
        kappa: where the Huber loss turns linear, in units of (v_max − v_min)/N.

    References:
        | Dabney et al., Distributional Reinforcement Learning with Quantile Regression, arXiv 1710.10044, Eq. 10
    """

    levels: Tensor
    changeable = ("kappa",)

    def __init__(self, v_min: float, v_max: float, quantiles: int = 51, kappa: float = 1.0) -> None:
        super().__init__(v_min, v_max)
        in_range(2, 10_000, quantiles=quantiles)
        positive(kappa=kappa)
        self.outputs, self.kappa = quantiles, kappa
        self.spacing = (v_max - v_min) / quantiles
        levels = (torch.arange(quantiles, dtype=torch.float64) + 0.5) / quantiles
        self._keep(levels=levels, x=v_min + (v_max - v_min) * levels)

    def read(self, y: Tensor) -> Tensor:
        """Quantiles θ (*, N), in units of reward."""
        return self.x + (self.v_max - self.v_min) * y

    def target(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """r + γθ."""
        return reward[:, None] + discount[:, None] * w

    def mixture(self, shares: Tensor, w: Tensor) -> Tensor:
        """Quantiles of the mixture, at the same levels.

        Where a level is reached exactly at the end of one quantile's share, as of an even number of actions alike, it
        is the middle between that quantile and the next, as of a median: the lower one would lower every mean. Means of
        skewed mixtures still move a little, as quantiles at these levels are what is nearest in W1.
        """
        each = (shares.double() / self.outputs)[..., None].expand(w.shape).flatten(-2)
        ordered, place = w.flatten(-2).sort(-1)
        total = each.gather(-1, place).cumsum(-1)
        levels = self.levels.double().expand(*total.shape[:-1], -1)
        sides = [torch.searchsorted(total, (levels + side * TIE).contiguous()) for side in (-1, 1)]
        low, high = (ordered.gather(-1, side.clamp_max(ordered.shape[-1] - 1)) for side in sides)
        return (low + high) / 2

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """The quantile Huber loss of every pair of quantile and target, summed over quantiles, mean over targets."""
        error = (target / self.spacing)[..., None, :] - (self.read(y) / self.spacing)[..., :, None]
        with torch.no_grad():
            slope = error.clamp(-self.kappa, self.kappa)
            weight = slope * torch.where(error < 0, 1 - self.levels[:, None], self.levels[:, None]) / self.kappa
        return (weight * (error - 0.5 * slope)).mean(-1).sum(-1)  # with the slope held its gradient is Huber's

    def mean(self, w: Tensor) -> Tensor:
        """Their mean."""
        return w.mean(-1)

    def outside(self, w: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Share of the moved quantiles."""
        moved = reward[:, None] + discount[:, None] * w
        out = (moved < self.v_min - 0.5 * self.spacing) | (moved > self.v_max + 0.5 * self.spacing)
        return out.float().mean(1)

    def fields(self, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each quantile as a hat of twice the spacing, and its slope; wider than what `cdf` spreads."""
        u = (x - w[..., None]) / self.spacing
        hat = (1 - u.abs()).clamp_min(0)
        return hat.mean(-2) / self.spacing, (-u.sign() * (hat > 0)).mean(-2) / self.spacing**2

    def cdf(self, w: Tensor, x: Tensor) -> Tensor:
        """Each quantile spread evenly over the spacing."""
        return ((x - w[..., None]) / self.spacing + 0.5).clamp(0, 1).mean(-2)
