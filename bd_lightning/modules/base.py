"""What the LightningModules share: the optimiser, its schedule, and reproducible evaluation."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from bd_lightning.checks import UserError, in_range, one_of, positive
from bd_lightning.facts import Facts
from bd_lightning.optimizers import AdamW, Optimizer

LR_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def batch_seed(trainer: L.Trainer, *seeds: int) -> int:
    """A seed for the randomness of the training batch at hand, from (seeds, rank, epoch, place in the epoch) alone.

    So a resumed run meets the noise that it would have met, and no state of a generator has to be kept.
    """
    epoch, batch = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress.current
    place = (*seeds, trainer.global_rank, epoch.processed, batch.ready)  # type: ignore[attr-defined]
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def learning_rate(step: int, warmup_steps: int = 0, decay_steps: int | None = None) -> float:
    """The learning rate at a step as a share of the full one.

    Args:
        step: optimiser steps done so far.
        warmup_steps: steps over which it rises linearly.
        decay_steps: steps until a cosine has brought it to zero; None leaves it where it is.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    return warm * (0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps))) if decay_steps else 1.0)


class Schedule(LambdaLR):
    """The schedule of an optimiser's rate (see `learning_rate`), to be stepped with it.

    A run that goes on from a state has the full rates that its config gives now.

    Args:
        optimizer: an optimiser at its full rates.
        warmup_steps: steps over which they rise linearly.
        decay_steps: steps until a cosine has brought them to zero; None leaves them where they are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, decay_steps: int | None) -> None:
        super().__init__(optimizer, lambda step: learning_rate(step, warmup_steps, decay_steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the step of a state, once the optimiser has its own; at that state's rate if none has changed.

        Raises:
            ValueError: if it does not say which step.
        """
        step = state_dict.get("last_epoch")
        if type(step) is not int or step < 0:
            raise ValueError(f"the schedule is at step {step!r}")
        self.last_epoch, self._step_count, rates = step, step + 1, self.base_lrs
        if state_dict.get("base_lrs") == rates:  # the rate of the next step is in the optimiser's state
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
            return
        self._last_lr = [full * share(self.last_epoch) for full, share in zip(rates, self.lr_lambdas)]
        for group, full, rate in zip(self.optimizer.param_groups, rates, self._last_lr):
            group.update(initial_lr=full, lr=rate)


class Module(L.LightningModule):
    """Base: losses of a batch become training, validation and test steps.

    Args:
        lr: learning rate.
        optimizer: how parameters follow their gradients (see `optimizers`).
        warmup_steps: steps over which the learning rate rises linearly.
        lr_decay: "cosine" to zero over the run, or "none".
        lr_scaling: how the learning rate follows the effective batch: times the number of devices × accumulated batches
            ("linear"), its square root ("sqrt"), or not at all ("none").

    Attributes:
        loaded_step: the step at which the checkpoint that was loaded was saved.
        takes_labels: whether classes can be asked for.
        fixed: settings, beside those of networks, that say what trained weights stand for: they cannot change later.
        example: Python for the card of an exported model, which lies in "FOLDER"; empty for none.
    """

    takes_labels: bool = False
    fixed: tuple[str, ...] = ()
    example: str = ""

    def __init__(
        self,
        lr: float = 1e-3,
        optimizer: Optimizer = AdamW(),  # noqa: B008 (frozen)
        warmup_steps: int = 100,
        lr_decay: str = "cosine",
        lr_scaling: str = "none",
    ) -> None:
        super().__init__()
        positive(lr=lr)
        in_range(0, math.inf, warmup_steps=warmup_steps)
        one_of(("cosine", "none"), lr_decay=lr_decay)
        if lr_decay != "none" and not optimizer.decays:
            raise ValueError(f"{type(optimizer).__name__} averages instead of a decaying rate: set lr_decay=none")
        self.lr, self.optimizer = lr, optimizer
        one_of(tuple(LR_POWERS), lr_scaling=lr_scaling)
        self.warmup_steps, self.lr_decay, self.lr_scaling = warmup_steps, lr_decay, lr_scaling
        self.loaded_step = 0

    def prepare(self, fresh: bool, facts: Facts) -> None:
        """Take what training needs besides data, before it begins.

        Args:
            fresh: whether the run is new, not resumed.
            facts: facts of the data.

        Raises:
            UserError: for what does not fit.
        """

    def check_predict(self) -> None:
        """Refuse to draw samples, where the model has none of its own.

        Raises:
            UserError: saying what it is for.
        """

    def check_likelihood(self) -> None:
        """Refuse to say how likely data is, where the model has no density of it.

        Raises:
            UserError: naming models that have one.
        """
        raise UserError(
            f"likelihood is that of a model of a density, and {type(self).__name__} is none: take a checkpoint of "
            "model=mlp, unet, points or relative"
        )

    def check_calls(self) -> None:
        """Refuse to judge samplers at other numbers of network calls, where the model has none that make calls.

        Raises:
            UserError: saying so.
        """
        raise UserError(f"calls are network calls of samplers of noise levels, and {type(self).__name__} has none")

    def next_step(self, checkpoint: str) -> str:
        """What one does with a trained model, for the last line of a run: words and a command line."""
        return f"to sample: train.py predict ckpt_path={checkpoint} n=64"

    def available(self, n: int, stage: str) -> int:
        """How many different samples there are to judge at a stage, val or test, of n that are asked for."""
        return n

    def codes_of(self, path: str) -> str:
        """What the codes of this model, whose checkpoint lies at a path, are known by; empty if it has none."""
        return ""

    def describe(self) -> str:
        """What a card says of a model beside its class and its network."""
        return ""

    def interacting(self) -> bool:
        """Whether samples that a process draws together depend on each other."""
        return False

    def drawing(self, sampler: str) -> str | None:
        """All that samples depend on beside weights and noise, to be compared; None where no sampler has a part."""
        return None

    def drawings(self) -> list[str]:
        """How it draws, or acts, in each of the ways that it has now, as rows of records say it ("drawn")."""
        return []

    def refuse_changes(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse settings of a trained model that can no longer change.

        Args:
            was: the model's node in the config that it was trained with.
            now: the node that is asked for.

        Raises:
            UserError: naming the key.
        """

    def mixture_source(self) -> Any:
        """The fields that mixtures of classes and models are made of.

        Raises:
            UserError: where there are none.
        """
        raise UserError("mix, remove and merge need fields relative to a base Gaussian: train with model=relative")

    def mixture_identity(self) -> dict[str, Any]:
        """What has to agree for two models to be merged: names and plain values. Empty where there is no source."""
        return {}

    @abstractmethod
    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of a batch.

        Args:
            batch: as the data module gives it, (x, label).
            generator: source of all randomness; the global one if None.

        Returns:
            Scalars to log, "loss" among them, and vectors (B,) for callbacks.
        """

    def _step(self, stage: str, batch: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        values, vectors = self.compute(batch, generator)
        self.log_dict(
            {f"{stage}/{name}": value.detach() for name, value in values.items()},
            on_step=stage == "train",
            on_epoch=stage != "train",
            sync_dist=stage != "train",
            batch_size=len(batch[0]),
        )
        return {"loss": values["loss"]} | {name: value.detach() for name, value in vectors.items()}

    def on_train_start(self) -> None:
        """Remember the run's seed."""
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the noise of this step."""
        torch.manual_seed(batch_seed(self.trainer, self.seed))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how long the loaded weights were trained."""
        self.loaded_step = checkpoint["global_step"]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Losses of one batch (x, label); the vectors beside "loss" are for callbacks."""
        return self._step("train", batch)

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        if len(batch[0]) == 1:  # what is left over of a split: one point has no partners for a kernel estimate
            return None
        trainer = self.trainer
        place = batch_idx * trainer.world_size + trainer.global_rank
        generator = torch.Generator(self.device).manual_seed(place)
        with torch.inference_mode(False), torch.no_grad():
            return self._step(stage, batch, generator)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """The training losses with the same noise at every validation."""
        return self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """The training losses on the test split, with fixed noise."""
        return self._evaluate("test", batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """The optimiser, with linear warm-up and, if asked for, cosine decay over the run, stepped every batch.

        Raises:
            UserError: for an optimiser that cannot train this model.
        """
        batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
        lr = self.lr * batches ** LR_POWERS[self.lr_scaling]
        total = int(self.trainer.estimated_stepping_batches) if self.lr_decay == "cosine" else None
        try:
            optimizer = self.optimizer(self, lr)
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(
                f"model.optimizer: {type(self.optimizer).__name__} makes a {type(optimizer).__name__}, no "
                "torch.optim.Optimizer"
            )
        scheduler = Schedule(optimizer, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def told(node: Any) -> str:
    """A data class, with all of its values; equal numbers are written alike."""
    if is_dataclass(node):
        values = ", ".join(f"{one.name}={told(getattr(node, one.name))}" for one in fields(node))
        return f"{type(node).__name__}({values})"
    if isinstance(node, Sequence) and not isinstance(node, str):
        return f"({', '.join(map(told, node))})"
    if type(node).__repr__ is object.__repr__:  # which would tell where it lies in memory
        return type(node).__name__
    return repr(float(node)) if isinstance(node, (int, float)) and not isinstance(node, bool) else str(node)
