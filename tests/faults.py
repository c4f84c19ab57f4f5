"""Callbacks that do a run harm, for tests of what is left of it. Named in configs by their path."""

import os
import signal
from pathlib import Path

import lightning as L
import torch

from callbacks import drawing


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(L.Callback):
    """SIGKILL to this process.

    Args:
        step: at the first chance once so many optimiser steps are done.
        where: "batch" (between forward and backward pass), "step" (after the optimiser's step, before the averages'),
            "validation" (in the middle), "drawing" and "end" (of samples, at its end), or "saving" (when half of a
            checkpoint is written).
        signum: "SIGINT" and "SIGTERM" are other signals to send.
        rank: the process that it is sent to; None is all of them.
    """

    def __init__(self, step: int, where: str = "batch", signum: str = "SIGKILL", rank: int | None = None) -> None:
        self.step, self.where, self.signum, self.rank = step, where, signum, rank

    def _strike(self, trainer, where):
        if self.rank not in (None, trainer.global_rank):
            return
        if self.where == where and trainer.global_step >= self.step and self.signum:
            signum, self.signum = self.signum, ""
            os.kill(os.getpid(), getattr(signal, signum))

    def on_before_backward(self, trainer, pl_module, loss):
        self._strike(trainer, "batch")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._strike(trainer, "step")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx:
            self._strike(trainer, "validation")

    def on_validation_start(self, trainer, pl_module):
        if (
            self.where in ("drawing", "end")
            and not trainer.sanity_checking
            and trainer.global_step >= self.step
            and self.signum
        ):
            move = drawing._move

            def struck(*args):
                drawing._move = move
                self._strike(trainer, self.where)
                move(*args)

            drawing._move = struck

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "saving" and trainer.global_step >= self.step:

            def half(checkpoint, file):
                whole = Path(file.name).with_name("whole")
                save(checkpoint, whole)
                data = whole.read_bytes()
                whole.unlink()
                file.write(data[: len(data) // 2])
                file.flush()
                _kill()

            save, torch.save = torch.save, half


class FillDisk(L.Callback):
    """No space is left on the device for a file.

    Args:
        step: from this optimiser step on; None is before the first.
        file: the file in the run folder, as it is called while it is written.
    """

    def __init__(self, step: int | None, file: str = "checkpoints/last.ckpt.part") -> None:
        self.step, self.file = step, file

    def _fill(self, trainer):
        Path(trainer.default_root_dir, self.file).symlink_to("/dev/full")

    def setup(self, trainer, pl_module, stage):
        if self.step is None:
            self._fill(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self._fill(trainer)


class Poison(L.Callback):
    """Makes the images of a batch infinite on one rank.

    Args:
        steps: the optimiser steps at which it does.
        rank: the rank.
    """

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            batch[0].fill_(float("inf"))


class Stranger:
    """Of no kind that a config takes; it remembers that it was called."""

    calls = 0

    def __init__(self, *args, **kwargs) -> None:
        Stranger.calls += 1
