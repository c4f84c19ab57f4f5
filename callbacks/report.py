"""The page of a run, for people without a logger's web site."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from bd_lightning import report
from bd_lightning.cli import build
from bd_lightning.loggers import MetricsCSV
from callbacks.evaluation import Evaluation
from callbacks.records import run_folder


class Report(L.Callback):
    """Writes <run folder>/report.html at every validation and when a run ends, finished or not.

    It is made of the files of the run folder, on rank 0. A failure is reported in one line and does not end the run.
    How the metrics are to be read is kept in metrics.json, for `train.py compare`.

    Attributes:
        seconds: what the last page took.
    """

    seconds: float = float("nan")

    def __init__(self) -> None:
        self.told: set[str] = set()

    def write(self, trainer: L.Trainer) -> None:
        """Write both files."""
        folder, module = run_folder(trainer), trainer.lightning_module
        if not trainer.is_global_zero or trainer.sanity_checking or not (folder / "config.yaml").is_file():
            return
        start = time.perf_counter()
        try:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.save()
            (folder / "metrics.json").write_text(json.dumps(self.metrics(trainer), indent=1))
            self.page(folder, module)
        except Exception as error:  # a page is not worth a run
            line = f"report.html was not written: {' '.join(str(error).split()) or type(error).__name__}"
            if line not in self.told:
                self.told.add(line)
                rank_zero_info(line)
        self.seconds = time.perf_counter() - start

    @staticmethod
    def page(folder: Path, module: Any) -> None:
        """Write the page of a run folder, whose model is given."""
        best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
        run = report.read(folder)
        trust = build.trust(run.config)
        then = module.next_step(report.short(best if best.is_file() else last) + trust)
        report.write(report.run_page(run, then, trust), folder / "report.html")

    @staticmethod
    def metrics(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
        """How the numbers of the evaluations are read: which way is better, and how many decimals are shown."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluations = [callback for callback in callbacks if isinstance(callback, Evaluation)]
        declared = [metric for one in evaluations if "val" in one.stages for metric in one.metrics]
        return {f"val/{metric.name}": {"mode": metric.mode, "digits": metric.digits} for metric in declared}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        if trainer.training or trainer.validating:
            self.write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write it, as far as the run came."""
        self.write(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it with what came last: the animation, or the rows of a test."""
        self.write(trainer)
