"""What callbacks that judge or show samples have in common."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from bd_lightning.checks import UserError
from callbacks.drawing import SampleModule, check, data_of
from callbacks.records import append_record, step_of

T = TypeVar("T")


class Metric(NamedTuple):
    """A number that a callback logs as val/<name> and test/<name>.

    Args:
        name: its name.
        digits: decimals that people are shown.
        mode: "min" or "max", whichever is better.
    """

    name: str
    digits: int = 3
    mode: str = "min"


class Findings(NamedTuple):
    """What was found out about samples.

    Args:
        values: numbers by the names that they are logged under, on all ranks.
        row: what is written to the record beside the step; "protocol" says how the numbers came about, and "summary"
            is printed when the run ends.
    """

    values: dict[str, float]
    row: dict[str, Any]

    def check(self, owner: str) -> None:
        """Refuse what cannot be logged or written.

        Raises:
            UserError: naming the evaluation, `owner`, and what is wrong.
        """
        if not isinstance(self.values, dict) or not isinstance(self.row, dict):
            raise UserError(f"{owner}: Findings are a dictionary of numbers to log and one of what is written")
        for name, value in self.values.items():
            if not isinstance(name, str) or not isinstance(value, (int, float)):
                raise UserError(f"{owner}: values of Findings are plain numbers by name, got {value!r} for {name!r}")


class Evaluation(L.Callback):
    """Base of the callbacks that judge or show samples: they say what is drawn and what is made of it.

    At the end of a validation or test, for every chosen sampler: random numbers are isolated, `draw` runs on all ranks
    and `judge` on rank 0, its values are logged on all ranks and its row goes to the record. If chains are lost, one
    line says so, and the run goes on. A sub-class with another way of its own overrides the hooks.

    Attributes:
        metrics: the numbers that are logged; the first is the one that the progress bar shows.
        more: patterns of the names of other numbers that may be logged, as of file names.
        record: the file of rows in the run folder; None writes none.
        subject: what is missing if chains are lost, for that line; {sampler} stands for the sampler's name.
        stages: of "val" and "test", those it evaluates at.
        kind: samples are "images" or "vectors".
        sampler: name of the module's sampler; None takes its default.
    """

    metrics: tuple[Metric, ...] = ()
    more: tuple[str, ...] = ()
    record: str | None = None
    subject: str = "evaluation"
    stages: tuple[str, ...] = ("val", "test")
    kind: str = "images"
    sampler: str | None = None

    def chosen(self, pl_module: SampleModule) -> Sequence[str]:
        """Names of the samplers that are evaluated."""
        return (self.sampler or pl_module.sampler,)

    @abstractmethod
    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> Any:
        """What `judge` is given, drawn on all ranks together.

        Raises:
            UserError: on every rank, if chains were lost on any.
        """

    @abstractmethod
    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: Any
    ) -> Findings | None:
        """Evaluate, on rank 0, what was drawn, or None if chains were lost; returns None if there is nothing to log."""

    def log_values(self, trainer: L.Trainer, pl_module: SampleModule, values: dict[str, float]) -> None:
        """Log values, which are the same on every rank."""
        pl_module.log_dict(values, sync_dist=True)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the kind of the samples and the name of the sampler."""
        check(trainer, pl_module, type(self).__name__, self.kind, (self.sampler,))

    def findings(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> Findings | None:
        """What `draw` and `judge` find out about a sampler, the same on every rank."""
        found = None
        with isolate_rng():
            subject = self.subject.format(sampler=sampler)
            drawn = unless_lost(trainer, subject, partial(self.draw, trainer, pl_module, stage, sampler))
            if trainer.is_global_zero:
                found = self.judge(trainer, pl_module, stage, sampler, drawn)
        found = trainer.strategy.broadcast(found)
        if found is not None and not isinstance(found, Findings):
            raise UserError(f"{type(self).__name__}.judge must return Findings or None, got a {type(found).__name__}")
        if found is not None:
            found.check(type(self).__name__)
        return found

    def evaluate(self, trainer: L.Trainer, pl_module: SampleModule, stage: str) -> None:
        """Draw, judge, log and record."""
        if stage not in self.stages or trainer.sanity_checking:
            return
        for sampler in self.chosen(pl_module):
            found = self.findings(trainer, pl_module, stage, sampler)
            if found is not None:
                self.log_values(trainer, pl_module, found.values)
                if trainer.is_global_zero and self.record is not None:
                    step = {"step": step_of(trainer)}
                    row = {"drawn": pl_module.drawing(sampler)} | found.row | step
                    append_record(trainer, self.record, remarked(row, data_of(trainer).remark))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate."""
        self.evaluate(trainer, cast(SampleModule, pl_module), "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate."""
        self.evaluate(trainer, cast(SampleModule, pl_module), "test")


def remarked(row: dict[str, Any], remark: str) -> dict[str, Any]:
    """A row of a record, with a remark in its protocol and its summary."""
    told = {name: f"{row[name]}; {remark}" for name in ("protocol", "summary") if remark and name in row}
    return row | told


def unless_lost(trainer: L.Trainer, subject: str, draw: Callable[[], T]) -> T | None:
    """What `draw` gives, with the random numbers of training left alone; None, and one line, if chains are lost."""
    with isolate_rng():
        try:
            return draw()
        except UserError as error:
            rank_zero_info(f"no {subject} at step {step_of(trainer)}: {error}")
            return None


def shown(trainer: L.Trainer) -> dict[str, str]:
    """The latest value of the first metric of each evaluation of a run, by name, as text."""
    values = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for metric in callback.metrics[:1] if isinstance(callback, Evaluation) else ():
            if f"val/{metric.name}" in trainer.callback_metrics:
                value = float(trainer.callback_metrics[f"val/{metric.name}"])
                values[metric.name] = f"{value:.{metric.digits}f}"
    return values
