"""Averages of the weights whose length is chosen after training."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bd_lightning.averages import SNAPSHOTS, Profile, gamma_of, kept, save_snapshot
from bd_lightning.checks import UserError, in_range
from bd_lightning.modules.base import Module
from callbacks.checkpoints import AveragedWeights
from callbacks.records import run_folder


class PowerAverages(AveragedWeights):
    """Two power-function averages of the weights, and snapshots of both, of which `train.py average` makes one of any
    length (see `bd_lightning.averages`). The first is what validation, samples and checkpoints use.

    Lengths are shares of the training so far, so that they suit short and long runs alike. Snapshots lie in
    <run folder>/averages/<step>.pt; in half precision, each is as large as the weights in single.

    Args:
        lengths: relative lengths σ_rel of the two.
        snapshots: how many are kept of a run, at equal distances; the last step is always one.

    Raises:
        ValueError: for lengths that are out of range or equal, and less than one snapshot.

    References:
        | Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, §3
    """

    def __init__(self, lengths: tuple[float, float] = (0.05, 0.1), snapshots: int = 16) -> None:
        super().__init__(decay=0.0)
        in_range(1, 10_000, snapshots=snapshots)
        if len(set(lengths)) < 2:
            raise ValueError(f"lengths must be two that differ, got {list(lengths)}")
        self.gammas = tuple(gamma_of(length) for length in lengths)
        self.snapshots = snapshots
        self.second: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an optimiser that averages by itself, and make room.

        Raises:
            UserError: naming the optimiser.
        """
        super().setup(trainer, pl_module, stage)
        optimizer = pl_module.optimizer if isinstance(pl_module, Module) else None
        if optimizer is not None and not optimizer.decays:
            raise UserError(
                f"{type(optimizer).__name__} has an average of its own, of which PowerAverages knows nothing: take "
                "callbacks.AveragedWeights for callbacks.ema"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to go on from a run that has not followed these averages from its beginning.

        Raises:
            UserError: saying what to do.
        """
        super().on_train_start(trainer, pl_module)
        if trainer.global_step > 0 and not self.second:
            raise UserError("the checkpoint has no power averages to go on with: leave callbacks.ema as it was")
        if trainer.is_global_zero:  # steps after the checkpoint are repeated, perhaps otherwise
            for path in (run_folder(trainer) / SNAPSHOTS).glob("*.pt"):
                if path.stem.isdecimal() and int(path.stem) > trainer.global_step:
                    path.unlink()

    def past(self, update: int) -> float:
        """β of the first average."""
        return kept(update, self.gammas[0])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update both averages after an optimiser step, and keep a snapshot where one is due."""
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._average_model is None or self._latest_update_step == before:
            return
        step = int(self._average_model.n_averaged)
        weights = {name: value.detach() for name, value in pl_module.named_parameters(remove_duplicate=False)}
        if not self.second:
            self.second = {name: value.clone() for name, value in weights.items()}
        names, rate = list(weights), 1 - kept(step, self.gammas[1])
        torch._foreach_lerp_([self.second[name] for name in names], [weights[name] for name in names], rate)
        if self.due(step, trainer.max_steps) and trainer.is_global_zero:
            self.keep(run_folder(trainer), step, pl_module)

    def due(self, step: int, last: int) -> bool:
        """Whether a snapshot is kept at a step of a run."""
        return step * self.snapshots // last > (step - 1) * self.snapshots // last

    def keep(self, folder: Path, step: int, pl_module: L.LightningModule) -> None:
        """Write a snapshot."""
        assert self._average_model is not None
        first = floating(self._average_model.module)
        parameters = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
        both = (first, first | {name: self.second[name] for name in parameters})
        profiles = [Profile(step, gamma) for gamma in self.gammas]
        save_snapshot(folder / SNAPSHOTS / f"{step:08d}.pt", profiles, both, parameters)

    def state_dict(self) -> dict[str, Any]:
        """The second average; the first is in the checkpoint as every average is."""
        return {**super().state_dict(), "gammas": list(self.gammas), "second": self.second}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with both averages.

        Raises:
            UserError: if they were of other lengths.
        """
        if state_dict.get("gammas") != list(self.gammas):
            raise UserError("the checkpoint has averages of other lengths: leave callbacks.ema as it was")
        super().load_state_dict(state_dict)
        self.second = {name: value.to(self._device) for name, value in state_dict["second"].items()}


def floating(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a module and what else of its state is no whole number, by name."""
    return {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
