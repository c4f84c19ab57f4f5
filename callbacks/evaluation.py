"""What callbacks that evaluate have in common: they declare what they log and where they record it."""

from typing import NamedTuple

import lightning as L


class Metric(NamedTuple):
    """A figure of an evaluation, logged as val/<name> and test/<name>.

    Args:
        name: its name.
        digits: decimals that it is shown with.
        mode: "min" if less is better, "max" if more is.
    """

    name: str
    digits: int = 3
    mode: str = "min"


class Evaluation(L.Callback):
    """Base of the callbacks that evaluate.

    Attributes:
        metrics: what is logged.
        record: JSON file of the rows in the run folder.
    """

    metrics: tuple[Metric, ...] = ()
    record: str | None = None
