"""What the fields do during training, and a stop when the loss is no longer a number."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bd_lightning.checks import UserError, one_of
from callbacks.records import run_folder


class NonFiniteLoss(UserError):
    """Training met a loss that is not a number."""


class TrainingDiagnostics(L.Callback):
    """Logs, every `trainer.log_every_n_steps` steps: the norm of the gradient before clipping, and samples per second
    over all devices (validation not counted).

    A loss or gradient that is not finite changes no weights: on all ranks alike the run stops, or leaves the step out.
    The batch at fault is kept in the run folder.

    Args:
        nonfinite: "stop", or "skip" the step, which is counted and logged as train/skipped_steps.
    """

    def __init__(self, nonfinite: str = "stop") -> None:
        one_of(("stop", "skip"), nonfinite=nonfinite)
        self.nonfinite, self.skipped = nonfinite, 0
        self.logged_step = 0
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"skipped": self.skipped, "logged_step": self.logged_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over from a checkpoint."""
        self.__dict__.update(state_dict)

    def _clear(self) -> None:
        self.samples, self.seconds, self.last = 0, 0.0, time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.last = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out of the rate."""
        self.last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int):
        """Remember the batch, in case its loss is not finite."""
        self.batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the loss. Gradients are looked at instead: they are averaged, so that all ranks decide alike."""
        self.loss = loss.detach()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Log the norm of the gradient; stop at one that is not finite, or leave the step out."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/gradient_norm", norm)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # float16 looks after itself
        if scaled or torch.isfinite(norm + self.loss):
            return
        path = run_folder(trainer) / f"nonfinite-batch-rank{trainer.global_rank}.pt"
        torch.save({"batch": self.batch, "step": trainer.global_step, "loss": self.loss}, path)
        what, value = ("the gradient's norm", norm) if self.loss.isfinite() else ("the loss", self.loss)
        what = f"{what} is {value.item():g} at step {trainer.global_step}"
        if self.nonfinite == "stop":
            raise NonFiniteLoss(
                f"{what}; the batch is kept in {path}. Look for broken data, or lower model.lr or set "
                "trainer.gradient_clip_val; callbacks.diagnostics.nonfinite=skip leaves such steps out"
            )
        self.skipped += 1
        if self.skipped == 1:
            rank_zero_info(f"{what}: the step is left out, and so are others like it; the batch is kept in {path}")
        pl_module.log("train/skipped_steps", float(self.skipped), on_step=True)
        for p in pl_module.parameters():
            p.grad = None  # the optimiser passes over parameters without a gradient

    def values(self) -> dict[str, float]:
        """What is logged at a logging step."""
        return {"train/samples_per_second": self.samples / self.seconds}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and, at a logging step, log."""
        now = time.perf_counter()
        self.samples += len(outputs.get("sigma", batch[0])) * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and trainer.global_step not in (0, self.logged_step):
            self.logged_step = trainer.global_step
            pl_module.log_dict(self.values(), on_step=True)
            self._clear()


class FieldDiagnostics(TrainingDiagnostics):
    """`TrainingDiagnostics`, and the two losses by noise level and the share of the scalar field near zero.

    Args:
        edges: borders of the noise levels' bins, in data units.
        near_zero: s counts as near zero below this share of its typical size m_ref.
        options: arguments of `TrainingDiagnostics`.
    """

    sums: dict[str, Tensor]

    def __init__(
        self,
        edges: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
        near_zero: float = 1e-3,
        **options: Any,
    ) -> None:
        if list(edges) != sorted(edges) or not edges:
            raise ValueError(f"edges must ascend, got {list(edges)}")
        self.edges, self.near_zero = tuple(edges), near_zero
        borders = [f"{e:g}" for e in self.edges]
        self.bins = [f"below-{borders[0]}", *map("-".join, zip(borders, borders[1:])), f"above-{borders[-1]}"]
        super().__init__(**options)

    def state_dict(self) -> dict[str, Any]:
        """The means that are not logged yet, too."""
        return super().state_dict() | {"sums": self.sums}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; sums from a checkpoint go to the module's device."""
        super().on_train_start(trainer, pl_module)
        self.sums = {name: total.to(pl_module.device) for name, total in self.sums.items()}

    def _clear(self) -> None:
        super()._clear()
        self.sums = {}

    def values(self) -> dict[str, float]:
        """Means over the batches since they were last logged."""
        counts = self.sums["count"].tolist()
        values = super().values() | {"field/s_near_zero": float(self.sums["near_zero"].sum()) / sum(counts)}
        for term in ("gradient", "scalar"):
            for name, total, count in zip(self.bins, self.sums[term].tolist(), counts):
                if count:
                    values[f"field/{term}_loss_sigma_{name}"] = total / count
        return values

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch to the bins and, at a logging step, log."""
        sigma = outputs["sigma"]
        place = torch.bucketize(sigma, torch.tensor(self.edges, device=sigma.device))
        vectors = {
            "count": torch.ones_like(sigma),
            "gradient": outputs["gradient"],
            "scalar": outputs["scalar"],
            "near_zero": (outputs["relative_s"] < self.near_zero).float(),
        }
        for name, vector in vectors.items():
            binned = torch.zeros(len(self.bins), device=sigma.device).index_add_(0, place, vector.float())
            self.sums[name] = self.sums[name] + binned if name in self.sums else binned
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
