"""What every command builds from its plan."""

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from bd_lightning import checkpoints, progress
from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.cli.plan import Plan
from bd_lightning.cli.quiet import quiet
from bd_lightning.facts import Facts
from callbacks.evaluation import Evaluation
from callbacks.metrics import ImageMetrics


def prepare(config: Mapping[str, Any]) -> None:
    """Refuse a device that is not there, seed everything, and silence the libraries.

    Raises:
        UserError: if the config asks for a GPU and there is none.
    """
    quiet()
    accelerator = config["trainer"].get("accelerator")
    gpus = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda", "mps") and not gpus:
        raise UserError(
            f"'trainer.accelerator' is {accelerator}, and PyTorch finds no GPU here; "
            "set trainer=cpu, and to train choose an experiment of that size, e.g. experiment=mnist_small"
        )
    _refuse_processes(config["trainer"], accelerator == "cpu" or not gpus)
    progress.show((config["callbacks"] or {}).get("progress") is not None)
    L.seed_everything(config["seed"], workers=True, verbose=False)


def _refuse_processes(trainer: Mapping[str, Any], cpu: bool) -> None:
    """Refuse more processes on a CPU than it has cores, which would take the memory of the machine. Two may share one.

    Raises:
        UserError: with the number of cores.
    """
    devices = str(trainer.get("devices") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpu and devices.isdigit() and int(devices) > max(2, cores):
        raise UserError(
            f"'trainer.devices' is {devices}, a process each, and this machine has {cores} cores: set trainer.devices "
            f"to {cores} or less"
        )


def model(plan: Plan, facts: Facts) -> Any:
    """The model, with the weights of the checkpoint if there is one."""
    built = build.instantiate(plan.config["model"], "model", facts.arguments)
    if plan.checkpoint is not None:
        checkpoints.restore(built, plan.checkpoint, plan.config["ckpt_path"])
    return built


def callbacks(plan: Plan) -> list[Any]:
    """Callbacks in the order they have to run: averaging after everything that looks at averaged weights.

    Raises:
        UserError: if the best checkpoint is chosen by what no callback measures.
    """
    built = []
    for name, node in (plan.config["callbacks"] or {}).items():
        if node is None:
            continue
        cls = build.locate(node["_target_"], f"callbacks.{name}")
        saves = issubclass(cls, ModelCheckpoint)
        if plan.command != "fit" and (saves or issubclass(cls, WeightAveraging)):
            continue
        extra: Any = {"dirpath": str(plan.run_dir / "checkpoints")} if saves and "dirpath" not in node else {}
        if plan.config["export"] and issubclass(cls, ImageMetrics):
            extra["export"] = plan.config["export"]
        built.append(build.instantiate(node, f"callbacks.{name}", **extra))
    _check_monitors(built)
    if plan.config["export"] and not any(isinstance(callback, ImageMetrics) for callback in built):
        raise UserError("export keeps the samples that ImageMetrics judges, and no such callback is here")
    return sorted(built, key=lambda callback: isinstance(callback, WeightAveraging))


def _check_monitors(built: list[Any]) -> None:
    """Refuse to choose a checkpoint by a metric that a callback of the suite would measure, and none here does."""
    here = metrics(evaluations(built))
    for monitor in (callback.monitor for callback in built if isinstance(callback, ModelCheckpoint)):
        able = [cls.__name__ for cls in _subclasses(Evaluation) if monitor in metrics([cls])]
        if able and monitor not in here:
            raise UserError(
                f"no callback measures {monitor}, to choose the best checkpoint by ({able[0]} does): "
                "set callbacks.best=null too, or callbacks.best.monitor=val/loss"
            )


def evaluations(built: list[Any]) -> list[Evaluation]:
    """The callbacks that evaluate."""
    return [callback for callback in built if isinstance(callback, Evaluation)]


def metrics(evaluations: list[Any]) -> dict[str, str]:
    """Whether "min" or "max" is better, for the name of every metric that callbacks, or classes of them, log."""
    declared = [metric for one in evaluations for metric in one.metrics]
    return {f"{stage}/{metric.name}": metric.mode for metric in declared for stage in ("val", "test")}


def _subclasses(cls: type) -> list[Any]:
    found: list[type] = cls.__subclasses__()
    return [deep for sub in found for deep in (sub, *_subclasses(sub))]


def trainer(plan: Plan, **extra: Any) -> L.Trainer:
    """The trainer, in the run folder."""
    return build.instantiate(plan.config["trainer"], "trainer", default_root_dir=str(plan.run_dir), **extra)
