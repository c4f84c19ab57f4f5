"""What the fields do during training, and a stop when the loss is no longer a number."""

import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bd_lightning.checks import UserError, at_hand, one_of
from bd_lightning.modules.base import Module
from callbacks.records import run_folder


class NonFiniteLoss(UserError):
    """Training met a loss that is not a number."""


def shapes(found: Any) -> list[Any]:
    """Shapes of all tensors of a nest of them, in order."""
    return [one.shape for one in tree_leaves(found) if isinstance(one, Tensor)]


def either(take: Tensor, new: Any, old: Any) -> Any:
    """`new` where the scalar `take` is true, else `old`: nests of tensors, chosen on the device if they are alike."""
    if at_hand(take) or shapes(new) != shapes(old):
        return new if take else old
    return tree_map(lambda a, b: torch.where(take, a, b) if isinstance(a, Tensor) else a, new, old)


class TrainingDiagnostics(L.Callback):
    """Logs, every `trainer.log_every_n_steps` steps: the norm of the gradient before clipping, and samples per second
    over all devices (validation not counted).

    A loss or gradient that is not finite changes no weights: on all ranks alike the run stops, or leaves the step out.
    In float16 (trainer.precision=16-mixed) the loss alone counts: gradients that overflow there lower the scale.
    The batch at fault is kept in the run folder, of several that are accumulated the first whose loss is not finite, or
    the last where gradients alone are not. On a GPU the optimiser is told so on the device, and the host looks at
    logging steps, before validations and before checkpoints; a run that stops changes no weights until then.

    Args:
        nonfinite: "stop", or "skip" the step, which is counted and logged as train/skipped_steps.
    """

    def __init__(self, nonfinite: str = "stop") -> None:
        one_of(("stop", "skip"), nonfinite=nonfinite)
        self.nonfinite, self.skipped = nonfinite, 0
        self.logged_step = self.logged_skips = 0
        self.faults: Tensor | None = None  # steps at fault since the host last looked, on the device
        self.fault: dict[str, Any] = {}  # the last of them
        self.found: dict[str, Any] = {}  # of the batches of a step, the first whose loss is not finite, else the last
        self.shown: set[str] = set()  # what was logged last
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        new = 0 if self.faults is None else int(self.faults)
        return {"skipped": self.skipped + new, "logged_step": self.logged_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over from a checkpoint."""
        self.skipped, self.logged_step = int(state_dict["skipped"]), int(state_dict["logged_step"])
        self.logged_skips = self.skipped

    def _clear(self) -> None:
        self.samples, self.seconds, self.last = 0, 0.0, time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.last = time.perf_counter()
        self.faults = torch.zeros((), dtype=torch.long, device=pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether there were steps at fault."""
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether there were steps at fault."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look whether there were steps at fault, so that none of a run that has to stop gets into a checkpoint."""
        self._look(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave validation out of the rate."""
        self.last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int):
        """Remember the batch, in case its loss is not finite."""
        self.batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the batch and its loss, unless that of an earlier one of the step is not finite."""
        loss = loss.detach() * trainer.accumulate_grad_batches
        found, earlier = {"batch": self.batch, "loss": loss, "step": trainer.global_step}, self.found
        same = earlier.get("step") == trainer.global_step
        self.found = either(earlier["loss"].isfinite(), found, earlier) if same else found

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Log the norm of the gradient; stop at one that is not finite, or leave the step out."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        due = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due:
            pl_module.log("train/gradient_norm", norm)
        if self.faults is None:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # float16 looks after its gradients
        bad = ~torch.isfinite(self.found["loss"] if scaled else norm + self.found["loss"])
        if trainer.world_size > 1:  # a loss is its rank's own, and may be infinite where gradients are not
            bad = trainer.strategy.reduce(bad.float(), reduce_op="max") > 0
        step = torch.full((), trainer.global_step, device=bad.device)
        self._note(trainer, bad, self.found | {"step": step, "norm": norm})
        self.faults = self.faults + bad
        cast(Module, pl_module).optimizer.unless(optimizer, bad if self.nonfinite == "skip" else self.faults > 0)
        if due or at_hand(bad):
            self._look(trainer)
        if self.skipped > self.logged_skips:
            self.logged_skips = self.skipped
            pl_module.log("train/skipped_steps", float(self.skipped), on_step=True)

    def _note(self, trainer: L.Trainer, bad: Tensor, found: dict[str, Any]) -> None:
        """Keep what was found at a step if it is the last at fault, or the first where the run stops there."""
        if shapes(self.fault) != shapes(found):
            self._look(trainer)
        else:
            found = either(bad if self.nonfinite == "skip" else bad & (self.faults == 0), found, self.fault)
        self.fault = found

    def _look(self, trainer: L.Trainer) -> None:
        """Stop if there was a step at fault since the last look, or count those that were left out.

        Raises:
            NonFiniteLoss: if the run is to stop.
        """
        new = 0 if self.faults is None else int(self.faults)
        if self.faults is None or not new:
            return
        self.faults = torch.zeros_like(self.faults)
        step, loss, norm = int(self.fault["step"]), self.fault["loss"], self.fault["norm"]
        path = run_folder(trainer) / f"nonfinite-batch-rank{trainer.global_rank}.pt"
        torch.save({"batch": self.fault["batch"], "step": step, "loss": loss}, path)
        what = f"the loss is {loss.item():g}" if not loss.isfinite() else f"the gradient's norm is {norm.item():g}"
        if (loss + norm).isfinite():
            what = "the loss on another device is not finite"
        what = f"{what} at step {step}"
        if self.nonfinite == "stop":
            look = "Look for broken data, or lower model.lr or set trainer.gradient_clip_val"
            if step == 0:  # no rate has had a say
                look = "Look for broken data, or for weights to begin with that are not finite"
            raise NonFiniteLoss(
                f"{what}; the batch is kept in {path}. {look}; "
                "callbacks.diagnostics.nonfinite=skip leaves such steps out"
            )
        if not self.skipped:
            rank_zero_info(f"{what}: the step is left out, and so are others like it; the batch is kept in {path}")
        self.skipped += new

    def values(self) -> dict[str, float]:
        """What is logged at a logging step."""
        return {"train/samples_per_second": self.samples / self.seconds}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and, at a logging step, log."""
        now = time.perf_counter()
        self.samples += len(batch[0]) * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and trainer.global_step not in (0, self.logged_step):
            self.logged_step = trainer.global_step
            values = self.values()
            for name in self.shown.difference(values):  # Lightning would log their last values again
                trainer.fit_loop.epoch_loop._results.pop(f"on_train_batch_end.{name}", None)
            pl_module.log_dict(values, on_step=True)
            self.shown = set(values)
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them.

        Raises:
            ValueError: if they are no sums of these bins.
        """
        super().load_state_dict(state_dict)
        for name, total in state_dict.get("sums", {}).items():
            if total.shape != (len(self.bins),) or total.dtype != torch.float32 or not total.isfinite().all():
                raise ValueError(f"the sums of {name} over the noise levels are {total!r}")
        self.sums = dict(state_dict.get("sums", {}))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; sums from a checkpoint go to the module's device."""
        super().on_train_start(trainer, pl_module)
        self.sums = {name: total.to(pl_module.device) for name, total in self.sums.items()}
        self.borders = torch.tensor(self.edges, device=pl_module.device)

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
        place = torch.bucketize(sigma, self.borders)
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
