"""What an action is preferred for: its mean return, or another number of the distribution of its returns.

A preference scores distributions; a policy is greedy in the scores, but for a share of the uniform policy. Preferences
make risk-sensitive control (the policy whose returns are learned is greedy in them) and directed exploration (the
policy that collects experience is).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from bd_lightning.checks import in_range, positive
from bd_lightning.returns.representation import Representation
from bd_lightning.returns.risk import conditional_value_at_risk, quantile

POINTS = 201
"""Points of the grid on which distribution functions are read."""


class Preference(ABC):
    """A number of each distribution of returns, the larger the better."""

    @abstractmethod
    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """Scores (*,) of distributions w (*, N), in units of reward."""


@dataclass(frozen=True)
class MeanReturn(Preference):
    """The expected return: the usual values of actions."""

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """The mean."""
        return representation.mean(w)


@dataclass(frozen=True)
class CVaR(Preference):
    """The mean of the worst share of returns: a cautious policy.

    Greedy at every step in the CVaR of what is still to come, which need not be the best for the CVaR of the whole.

    Args:
        level: that share, above 0 and at most 1, which is the mean.

    References:
        | Dabney et al., Implicit Quantile Networks, arXiv 1806.06923, §4 (policies that are greedy in a risk measure)
        | Lim and Malik, Distributional RL for Risk-Sensitive Policies, 2022 (what they do and do not optimise)
    """

    level: float = 0.1

    def __post_init__(self) -> None:
        positive(level=self.level)
        in_range(0, 1, level=self.level)

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """CVaR of each distribution."""
        x = representation.grid(POINTS)
        return conditional_value_at_risk(x, representation.cdf(w, x), self.level)


@dataclass(frozen=True)
class UpperQuantile(Preference):
    """A high quantile of the return: optimism, for exploration.

    Learning starts with the uniform distribution over the range of returns: it is high where little was learned.

    Args:
        level: its level, in (0, 1).
    """

    level: float = 0.9

    def __post_init__(self) -> None:
        in_range(0, 1, level=self.level)
        if self.level in (0, 1):  # the ends of the range for all actions
            raise ValueError(f"level must lie between 0 and 1, got {self.level:g}")

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """The quantile of each distribution."""
        x = representation.grid(POINTS)
        return quantile(x, representation.cdf(w, x), w.new_full((*w.shape[:-1], 1), self.level))[..., 0]


@dataclass(frozen=True)
class Spread(Preference):
    """The mean and a multiple of the standard deviation: optimism, for exploration, or caution if it is negative.

    Args:
        weight: standard deviations that are added to the mean.

    References:
        | Mavrin et al., Distributional RL for Efficient Exploration, arXiv 1905.06125 (a bonus of the spread)
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        in_range(-1e6, 1e6, weight=self.weight)

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """Mean and spread, by quadrature of the distribution function."""
        x = representation.grid(POINTS)
        below = x[-1] - x  # from the upper end, for ranges that lie far from 0
        f, step = representation.cdf(w, x), below[0] / (len(x) - 1)
        mean = (f[..., 1:] + f[..., :-1]).sum(-1) * step / 2
        square = (below[1:] * f[..., 1:] + below[:-1] * f[..., :-1]).sum(-1) * step
        return representation.mean(w) + self.weight * (square - mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Policy:
    """Greedy in a preference, but for a share of the uniform policy.

    Args:
        preference: what an action is preferred for.
        uniform: share of the uniform policy; 1 is that policy.
    """

    preference: Preference = MeanReturn()
    uniform: float = 0.0

    def __post_init__(self) -> None:
        in_range(0, 1, uniform_policy=self.uniform)

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """Probabilities (B, A) of the actions with returns w (B, A, N)."""
        return mixed_policy(self.preference(representation, w), self.uniform)


def mixed_policy(values: Tensor, uniform_policy: float = 0.0) -> Tensor:
    """Probabilities (B, A) of actions of these values (B, A): a share of the uniform policy, the rest the best one."""
    actions = values.shape[-1]
    best = nn.functional.one_hot(values.argmax(-1), actions).to(values.dtype)
    return (1 - uniform_policy) * best + uniform_policy / actions
