"""What goes into a checkpoint when a run does not end as planned."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bd_lightning.checkpoints import SavingFailed
from bd_lightning.checks import in_range
from bd_lightning.modules.base import Module
from callbacks.diagnostics import NonFiniteLoss

LOOK = 50
"""Optimiser steps between two looks at the clock."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of what is done here, which must not be half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)


class AveragedWeights(EMAWeightAveraging):
    """Exponential moving average of the weights: validation, samples and FID use it, checkpoints hold both.

    Lightning's, except that the averages live on the device that trains, where one call updates them all and nothing is
    read back; and that averaged and current weights are put back in their places when an exception stops a validation,
    so that a checkpoint saved then does not hold them the wrong way round.

    Args:
        decay: weight of the past at each step.
        update_every_n_steps: steps between updates.
        update_starting_at_step: step of the first update.

    Raises:
        ValueError: for a decay outside [0, 1], and steps that are no counts.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        in_range(0, 1, decay=decay)
        in_range(1, float("inf"), update_every_n_steps=update_every_n_steps)
        in_range(0, float("inf"), update_starting_at_step=update_starting_at_step or 0)
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )
        self.decay, self.swapped = decay, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make room for the averages on the device that the module will be moved to after this.

        The count of updates stays on the CPU: it is looked at before each.
        """
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages after an optimiser step. Up to the first update they are the weights themselves.

        Buffers, such as counts of classes, are no weights: they are those of the step. An optimiser with averages of
        its own gives those instead.
        """
        step, average = trainer.global_step, self._average_model
        if average is None or step <= self._latest_update_step:
            return
        due = self.should_update(step_idx=step - 1)
        if not due and average.n_averaged > 0:
            return
        decay = self.past(int(average.n_averaged) + 1)
        torch._foreach_lerp_([*average.module.parameters()], [*pl_module.parameters()], 1 - decay)
        if buffers := [*average.module.buffers()]:
            torch._foreach_copy_(buffers, [*pl_module.buffers()])
        own = cast(Module, pl_module).optimizer.averaged(trainer.optimizers[0]) or {}
        for mean, p in zip(average.module.parameters(), pl_module.parameters()):
            if p in own:
                mean.copy_(own[p])
        average.n_averaged += due
        self._latest_update_step = step

    def past(self, update: int) -> float:
        """The weight of the past at an update, counted from 1."""
        return self.decay if update > 1 else 0.0

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap averaged weights in."""
        with uninterrupted():
            super().on_validation_epoch_start(trainer, pl_module)
            self.swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap them out again."""
        with uninterrupted():
            super().on_validation_epoch_end(trainer, pl_module)
            self.swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Swap them out if the exception came in between; runs before checkpoints are saved."""
        if self.swapped:
            self.on_validation_epoch_end(trainer, pl_module)


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt, overwritten at every validation, every few minutes in between, and when the run is interrupted.

    Weights that are not finite do not overwrite it, nor does a loss that stops the run since it is not.

    SIGTERM and Ctrl-C in the middle of a step wait for its end, that of all the batches it accumulates, so that no part
    of it is lost; a second Ctrl-C does not wait. With several processes either may reach any of them: they agree before
    each step whether one was asked to stop, and then all stop there, so that none waits for another while saving.

    Args:
        dirpath: the folder; `train.py` gives the run's.
        every: optimiser steps between saves, which is what a killed run loses at most; 0 saves at validations alone.
            None looks at the clock of rank 0 every 50 steps, and saves if it is `minutes` since it last did.
        minutes: see `every`.
    """

    def __init__(self, dirpath: str | None = None, every: int | None = None, minutes: float = 3.0) -> None:
        in_range(0, float("inf"), every=every or 0, minutes=minutes)
        super().__init__(dirpath=dirpath, filename="last", enable_version_counter=False, save_on_exception=True)
        self.every, self.minutes, self.saved = every, minutes, time.monotonic()
        self.interrupted, self.begun, self.started = False, 0, False
        self.together, self.asked = False, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take signals over: Ctrl-C from Python, and SIGTERM from Lightning, which stops between batches that are
        accumulated, and with several processes communicates at once and may hang.

        Lightning puts the handlers of before the run back when it ends.
        """
        self.started = True
        self.together = trainer.world_size > 1 and torch.distributed.is_initialized()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: self._note(number, trainer))

    def _note(self, number: int, trainer: L.Trainer) -> None:
        """Remember the signal until the step ends; a second Ctrl-C does not wait, nor does one in a validation."""
        alone = not self.together and trainer.validating
        if number == signal.SIGINT and (alone or self.asked == number):
            raise KeyboardInterrupt
        self.asked = number
        if alone:
            self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        """Have Lightning know of SIGTERM, as by its own handler: what draws stops, or else the validation does."""
        trainer._signal_connector.received_sigterm = self.asked == signal.SIGTERM

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a checkpoint of an interrupted run, put Lightning's counters back to what was finished.

        A batch that had begun is begun again, and so are those accumulated before it, and a validation from its first.
        """
        if not self.interrupted:
            return
        loops = checkpoint["loops"]["fit_loop"]
        total = loops["epoch_loop.batch_progress"]["total"]
        current = loops["epoch_loop.batch_progress"]["current"]
        if not trainer.validating:  # a batch that had begun is no last one of an epoch yet
            loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        pending = current["processed"] % trainer.accumulate_grad_batches  # batches whose gradients are lost
        if pending:
            for counts in (current, total):
                counts.update(dict.fromkeys(counts, counts["processed"] - pending))
            current["ready"] += 1  # as where a run is stopped before a step: the first batch of it was fetched
        total["ready"] = total["started"] = total["processed"]
        if trainer.validating:
            progress = loops["epoch_loop.val_loop.batch_progress"]
            progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["current"] = dict(progress["total"])
            progress["is_last_batch"] = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step that the batch begins at; stop if any process was asked to and the last step is whole."""
        self.begun = trainer.global_step
        if (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches:
            return  # the gradients of the batches before would be lost
        asked = self.asked
        if self.together:
            shared = torch.tensor(asked, device=pl_module.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            asked = int(shared)
        if asked:
            raise KeyboardInterrupt if asked == signal.SIGINT else SIGTERMException

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation too, which may be long; several processes stop at the next batch.

        Whatever one that was stopped had begun is begun again: counters that said so for ever would have every resumed
        run repeat a part of its last validation.
        """
        if self.asked == signal.SIGINT and not self.together:
            raise KeyboardInterrupt
        if self.asked and not self.together:
            self._tell(trainer)
        total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time and no validation follows, which saves by itself."""
        due = self._due(trainer) and (trainer.fit_loop.total_batch_idx + 1) % (trainer.val_check_batch or math.inf) != 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _due(self, trainer: L.Trainer) -> bool:
        """Whether it is time to save, the same on every rank."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return False
        if self.every is not None:
            return self.every > 0 and trainer.global_step % self.every == 0
        if trainer.global_step % LOOK:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Save, if weights are finite on all ranks, and start the clock anew."""
        sound = all(bool(p.isfinite().all()) for p in trainer.lightning_module.parameters())
        if trainer.strategy.reduce_boolean_decision(sound, all=True):
            super()._save_checkpoint(trainer, filepath)
        else:
            rank_zero_info(f"weights are not finite at step {trainer.global_step}: {self.filename}.ckpt stays as it is")
        self.saved = time.monotonic()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> Any:
        """Save, unless training has not begun (what it goes on from could not be restored, say), the loss is no longer
        finite, nothing can be saved, or the weights are half changed.
        """
        if not self.started:
            return
        steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        changing = steps.total.ready != steps.total.completed  # the optimiser was at work
        changed = batches.ready != batches.processed and trainer.global_step != self.begun  # and not all counted yet
        if not (isinstance(exception, (NonFiniteLoss, SavingFailed)) or changing or changed):
            self.interrupted = True
            super().on_exception(trainer, pl_module, exception)
