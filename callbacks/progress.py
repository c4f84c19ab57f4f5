"""One progress bar for the whole run, counted in optimiser steps."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from bd_lightning.checks import at_hand, positive
from callbacks.evaluation import shown


class StepProgress(ProgressBar):
    """Shows steps, time left, the smoothed loss, and the latest value of the first metric of each `Evaluation`. Epochs
    of small data sets are too short to watch.

    Args:
        refresh_rate: steps between updates; the loss of a GPU is read at logging steps alone.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__()
        positive(refresh_rate=refresh_rate)
        self.refresh_rate, self.bar, self.loss, self.enabled = refresh_rate, None, None, True

    def disable(self) -> None:
        """Hide the bar (ranks other than 0)."""
        self.enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without tearing the bar."""
        tqdm.write(" ".join(map(str, args)))

    def _open(self, total: float | None, what: str, initial: int = 0) -> None:
        self.bar = tqdm(total=total, initial=initial, desc=what, disable=not self.enabled, dynamic_ncols=True)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step the run starts from."""
        total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        self._open(total, "training", trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        step = trainer.global_step
        if self.bar is not None and (step % self.refresh_rate == 0 or step == self.bar.total) and step > self.bar.n:
            if at_hand(outputs["loss"]) or step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                loss = float(outputs["loss"])
                self.loss = loss if self.loss is None else 0.9 * self.loss + 0.1 * loss
            words = {} if self.loss is None else {"loss": f"{self.loss:.3f}"}
            self.bar.set_postfix(words | shown(trainer), refresh=False)
            self.bar.update(step - self.bar.n)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the pause is an evaluation."""
        if self.bar is not None:
            self.bar.set_description("evaluating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to training."""
        if self.bar is not None:
            self.bar.set_description("training")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar over batches."""
        self._open(sum(trainer.num_predict_batches), "sampling")

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()
