"""What goes into a checkpoint when a run does not end as planned."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from callbacks.diagnostics import NonFiniteLoss


class AveragedWeights(EMAWeightAveraging):
    """Exponential moving average of the weights: validation, samples and FID use it, checkpoints hold both.

    Lightning's, except that averaged and current weights are put back in their places when an exception stops a
    validation, so that a checkpoint saved then does not hold them the wrong way round.

    Args:
        decay: weight of the past at each step.
        update_every_n_steps: steps between updates.
        update_starting_at_step: step of the first update.
    """

    def __init__(
        self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int | None = None
    ) -> None:
        super().__init__(
            decay=decay, update_every_n_steps=update_every_n_steps, update_starting_at_step=update_starting_at_step
        )
        self.swapped = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap averaged weights in."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap them out again."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.swapped = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Swap them out if the exception came in between; runs before checkpoints are saved."""
        if self.swapped:
            self.on_validation_epoch_end(trainer, pl_module)


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt, overwritten at every validation and when the run is interrupted.

    A non-finite loss does not overwrite it: the weights that led there are of no use.

    Args:
        dirpath: the folder; `train.py` gives the run's.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename="last", enable_version_counter=False, save_on_exception=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> Any:
        """Save, unless the loss is no longer finite."""
        if not isinstance(exception, NonFiniteLoss):
            super().on_exception(trainer, pl_module, exception)
