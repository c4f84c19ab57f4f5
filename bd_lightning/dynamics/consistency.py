r"""The sampler of a consistency function, f(x, σ) = x + σ²S(x, σ), which takes a point of the flow to its end at σ = 0.

References:
    | Song et al., Consistency Models, arXiv 2303.01469, Algorithm 1
    | Geng et al., Consistency Models Made Easy, arXiv 2406.14548 (the level between two calls)
"""

from dataclasses import dataclass
from typing import ClassVar

from bd_lightning.checks import positive
from bd_lightning.divergences import bcast
from bd_lightning.dynamics.sampler import Sampler


@dataclass(frozen=True)
class ConsistencySteps(Sampler):
    """x = f(σ_max n, σ_max), and for every level between, x ← f(x + σ n, σ) with fresh noise n.

    Args:
        sigma_max: first noise level, in data units.
        between: lower noise levels, in data units, one more call each.

    Raises:
        ValueError: for levels that do not fall.
    """

    sigma_max: float = 20.0
    between: tuple[float, ...] = ()
    noise_levels: ClassVar[bool] = True
    consistency: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(sigma_max=self.sigma_max, **{f"between[{i}]": one for i, one in enumerate(self.between)})
        levels = [self.sigma_max, *self.between]
        if any(low >= high for high, low in zip(levels, levels[1:])):
            raise ValueError(f"between must fall, from below sigma_max {self.sigma_max:g}; got {list(self.between)}")

    @property
    def start_scale(self) -> float:
        return self.sigma_max

    @property
    def calls(self) -> int:
        return 1 + len(self.between)

    def path(self, fields, noise):
        x = self.first(noise)
        yield x
        for i, level in enumerate((self.sigma_max, *self.between)):
            sigma = x.new_full((len(x),), level)
            x = x + level * noise() if i else x
            x = x + bcast(sigma.square(), x) * fields.at(level).score(x, sigma)
            yield x
