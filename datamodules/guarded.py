"""What environments are stepped through, so that a mistake in their code is named as theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np

from datamodules.splits import DataError

LARGEST = float(np.finfo(np.float32).max)


class Guarded(gymnasium.Wrapper):
    """An environment whose mistakes are one sentence that names it and the method.

    Args:
        env: the environment.
        name: its id, for messages.

    Raises:
        DataError: for whatever `reset` or `step` raise, observations that are not of the environment's own space, and
            rewards that are no finite numbers in single precision.
    """

    def __init__(self, env: gymnasium.Env, name: str) -> None:
        super().__init__(env)
        self.name = name

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        with self._named("reset"):
            observed, info = super().reset(**options)
        self._check(observed, "reset")
        return observed, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take an action."""
        with self._named("step"):
            observed, reward, terminated, truncated, info = super().step(action)
        self._check(observed, "step")
        with self._named("step"):
            value = float(reward)
        if not abs(value) <= LARGEST:
            raise DataError(
                f"'{self.name}' gives the reward {value} in step(): rewards must be finite numbers in single precision"
            )
        return observed, reward, terminated, truncated, info

    def _check(self, observed: Any, method: str) -> None:
        space = self.observation_space
        with self._named(method):
            value = np.asarray(observed)
            finite = bool((np.abs(value, dtype=float) <= LARGEST).all())
        if value.shape != space.shape:
            raise DataError(
                f"'{self.name}' observes the shape {list(value.shape)} in {method}(), and its observation_space says "
                f"{list(space.shape or ())}"
            )
        if not finite:
            raise DataError(f"'{self.name}' observes numbers that are not finite in single precision in {method}()")
        if isinstance(space, gymnasium.spaces.Discrete) and not space.contains(observed):
            raise DataError(
                f"'{self.name}' observes {observed!r} in {method}(), and its observation_space has the integers "
                f"{space.start} to {space.start + space.n - 1}"
            )

    @contextmanager
    def _named(self, method: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the environment's own code raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"'{self.name}' failed in {method}(): {reason}") from error
