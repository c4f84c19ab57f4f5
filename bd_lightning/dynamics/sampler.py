"""What all samplers share: the start, and the guard."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bd_lightning.checks import UserError, at_hand, one_of, positive
from bd_lightning.dynamics.noise import SampleNoise
from bd_lightning.fields import FieldPair

LOOK = 50
"""Steps between two looks for lost chains, where a look waits for the device."""


class SamplingDiverged(UserError):
    """Chains left the region of the data or became non-finite.

    Attributes:
        step: the step at which the sampler stopped.
        x: the state there, shape (B, *), lost chains included.
        lost: which chains were lost, shape (B,).
    """

    def __init__(self, step: int, x: Tensor, lost: Tensor) -> None:
        share = 100 * int(lost.sum()) / len(x)
        cause = (
            "the likely cause is a step size that is too large, or fields queried off the data (a single-scale model "
            "does that from a far start, a multi-scale one does not)"
        )
        if step == 1 and bool(x[lost].isnan().all()):
            cause = "the fields are not a number from the first call on, so no setting of the sampler helps"
        super().__init__(
            f"{int(lost.sum())} of {len(x)} samples ({share:.3g} %) were lost at step {step} "
            f"of the sampler (non-finite or far out); {cause}"
        )
        self.step, self.x, self.lost = step, x, lost


@dataclass(frozen=True)
class Sampler(ABC):
    """Base of the samplers: guards the chains and keeps what a caller wants to see of the way.

    Args:
        bound: a chain is lost when a coordinate exceeds bound × (`start_scale` + 1), in data units.
        start: "gaussian", or "uniform" on a cube of the same variance.

    Attributes:
        noise_levels: whether it asks for fields at noise levels above zero, which single-scale fields do not have.
        consistency: whether it takes the fields for a consistency function, not for a score.
        interacting: whether the chains of a batch depend on each other.
    """

    bound: float = 20.0
    start: str = "gaussian"
    noise_levels: ClassVar[bool] = False
    consistency: ClassVar[bool] = False
    interacting: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive(bound=self.bound)
        one_of(("gaussian", "uniform"), start=self.start)

    @property
    @abstractmethod
    def start_scale(self) -> float:
        """Standard deviation of the starting points, in data units."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """Number of network calls for one sample (NFE)."""

    def with_calls(self, calls: int) -> "Sampler":
        """The same sampler with so many network calls, or the nearest number below; itself where there is no choice."""
        return self

    @abstractmethod
    def path(self, fields: FieldPair, noise: SampleNoise) -> Iterator[Tensor]:
        """Yield the state after every step, the start first; each of shape (B, *)."""

    def first(self, noise: SampleNoise) -> Tensor:
        """Starting points, shape (B, *)."""
        return self.start_scale * (noise() if self.start == "gaussian" else noise.uniform())

    def __call__(
        self,
        fields: FieldPair,
        noise: SampleNoise,
        watch: Callable[[int, Tensor], None] | None = None,
        finite_part: bool = False,
    ) -> Tensor:
        """Draw one sample per stream of `noise`.

        Args:
            fields: the pair of fields.
            noise: source of the start and of every step.
            watch: called with (step, state) at the start and after every step.
            finite_part: go on without lost chains, warn, and return the others, in order.

        Returns:
            Samples, shape (B, *), or fewer with `finite_part`.

        Raises:
            SamplingDiverged: when a chain becomes non-finite or leaves the region of the data; with `finite_part`
                when none is left.
        """
        guard, step, x = _Guard(self.bound * (self.start_scale + 1), finite_part), 0, torch.empty(0)
        expected = (len(noise), *noise.shape)
        for step, x in enumerate(self.path(fields, noise)):
            self._check(step, x, expected)
            guard.look(step, x)
            if at_hand(x) or step % LOOK == LOOK - 1:
                guard.stop()
            if watch is not None:
                watch(step, x)
        self._check(step, x, expected)  # a path may have yielded nothing
        guard.stop()
        return guard.left(x)

    def _check(self, step: int, x: object, expected: tuple[int, ...]) -> None:
        """Refuse what is no state.

        Raises:
            UserError: saying what it has to be.
        """
        if not isinstance(x, Tensor) or x.shape != expected or not x.is_floating_point():
            found = f"{x.dtype} of the shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise UserError(
                f"{type(self).__name__}.path must yield states of the shape {expected}, that of step {step} is {found}"
            )


class _Guard:
    """Notes on the device which chains are lost, and how things stood when sampling had to stop; reads it when asked.

    Args:
        limit: a chain is lost when a coordinate exceeds it.
        finite_part: stop when all chains are lost, not at the first.
    """

    def __init__(self, limit: float, finite_part: bool) -> None:
        self.limit, self.finite_part = limit, finite_part
        self.lost: Tensor | None = None

    def look(self, step: int, x: Tensor) -> None:
        """Look at the state x (B, *) after a step; once it has to stop, what was seen there is kept."""
        now = torch.full((), step, device=x.device)
        bad = ~(x.abs().flatten(1).amax(1) <= self.limit)  # true for NaN as well
        if self.lost is None:
            self.lost = torch.zeros_like(bad)
            self.first = self.step = now
            self.over, self.x = torch.zeros_like(bad[0]), x
        lost = self.lost | bad
        self.first = torch.where(self.lost.any(), self.first, now)
        self.step, self.x = torch.where(self.over, self.step, now), torch.where(self.over, self.x, x)
        self.lost = torch.where(self.over, self.lost, lost)
        self.over = self.over | (lost.all() if self.finite_part else lost.any())

    def stop(self) -> None:
        """Raise if sampling had to stop."""
        if self.lost is not None and self.over:
            raise SamplingDiverged(int(self.step), self.x, self.lost)

    def left(self, x: Tensor) -> Tensor:
        """The chains of x that are not lost, with a warning if some are."""
        if self.lost is None or not self.finite_part or not self.lost.any():
            return x
        what = SamplingDiverged(int(self.first), x, self.lost)
        warnings.warn(f"{what}; the finite part is returned", stacklevel=3)
        return x[~self.lost]


@dataclass(frozen=True)
class MultiScaleSampler(Sampler):
    """Base of the samplers that go down the noise levels of a multi-scale model.

    Args:
        sigma_max: first noise level, in data units; the start has this standard deviation.
        sigma_min: last noise level above zero, in data units.
        exact_score: take ∇log s into account wherever a score is needed (see `FieldPair.log_gradients`); for low
            dimension.
    """

    sigma_max: float = 20.0
    sigma_min: float = 0.02
    exact_score: bool = False
    noise_levels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(sigma_max=self.sigma_max, sigma_min=self.sigma_min)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must lie below sigma_max {self.sigma_max:g}, got {self.sigma_min:g}")

    @property
    def start_scale(self) -> float:
        return self.sigma_max
