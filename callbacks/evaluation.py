"""What callbacks that evaluate declare."""

from typing import NamedTuple

import lightning as L


class Metric(NamedTuple):
    """A metric that is logged as val/<name> and test/<name>."""

    name: str
    digits: int = 3
    mode: str = "min"


class Evaluation(L.Callback):
    """Base of the callbacks that evaluate a model."""

    metrics: tuple[Metric, ...] = ()
    record: str | None = None
