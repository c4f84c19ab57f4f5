"""What every command builds from its plan."""

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, WeightAveraging

from bd_lightning import checkpoints, progress
from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.cli.folders import METRIC, leads_elsewhere, short
from bd_lightning.cli.plan import Plan
from bd_lightning.cli.quiet import quiet
from bd_lightning.cli.resumed import refuse_other_fields
from bd_lightning.facts import Facts
from callbacks.checkpoints import LastCheckpoint
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
    wanted = config["trainer"].get("enable_progress_bar") is not False
    progress.show(wanted and (config["callbacks"] or {}).get("progress") is not None)
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
        refuse_other_fields(plan, built)
        built.refuse_changes(plan.checkpoint["hyper_parameters"]["model"], plan.config["model"])
    return built


def callbacks(plan: Plan) -> list[Any]:
    """Callbacks in the order they have to run: averaging after everything that looks at averaged weights, and last.ckpt
    after the other checkpoints, whose scores it holds.

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
        extra: Any = {}
        if saves:
            extra = {"dirpath": checkpoint_folder(node, f"callbacks.{name}", plan.run_dir, cls)}
            node = {key: value for key, value in node.items() if key != "dirpath"}
        if plan.config["export"] and issubclass(cls, ImageMetrics):
            extra["export"] = plan.config["export"]
        built.append(build.instantiate(node, f"callbacks.{name}", **extra))
    _check_monitors(built)
    if plan.config["export"] and not any(isinstance(callback, ImageMetrics) for callback in built):
        raise UserError("export keeps the samples that ImageMetrics judges, and no such callback is here")
    return sorted(built, key=lambda one: (isinstance(one, WeightAveraging), isinstance(one, LastCheckpoint)))


def checkpoint_folder(node: Mapping[str, Any], key: str, run_dir: Path, cls: type) -> str:
    """Where a callback writes its checkpoints.

    Raises:
        UserError: if that is outside the run folder, or they would be written over last.ckpt.
    """
    folder = Path(node.get("dirpath") or run_dir / "checkpoints").resolve()
    file = str(node.get("filename") or "")
    plain = METRIC.sub("", file)
    if not folder.is_relative_to(run_dir.resolve()):
        raise UserError(
            f"'{key}.dirpath' {node['dirpath']!r} is outside the run folder {short(run_dir)}, where the checkpoints "
            "of this run belong: leave it out"
        )
    if leads_elsewhere(file) or plain.startswith("."):
        raise UserError(
            f"'{key}.filename' must be the name of a file, got {file!r}: checkpoints stay in the run folder"
        )
    if plain.lower() in ("last", "last.ckpt") and not issubclass(cls, LastCheckpoint):
        raise UserError(f"'{key}.filename' is {file!r}, the name of what a run resumes from: give another name")
    return str(folder)


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


def check_monitors(trainer: L.Trainer) -> None:
    """Refuse to choose a checkpoint by what no validation will measure, once the training's losses are known.

    Raises:
        UserError: naming what there is.
    """
    built: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [type(one) for one in (*built, trainer.lightning_module)]
    if not all(cls.__module__.partition(".")[0] in (*build.OWN, "lightning") for cls in others):
        return  # classes of the user's own may log anything
    losses = {f"val/{name.removeprefix('train/')}" for name in trainer.callback_metrics if name.startswith("train/")}
    names = losses | {name for name in metrics(evaluations(built)) if name.startswith("val/")}
    patterns = [f"val/{pattern}" for one in evaluations(built) for pattern in one.more]
    for monitor in (callback.monitor for callback in built if isinstance(callback, ModelCheckpoint)):
        stage, _, rest = (monitor or "val/loss").partition("/")
        if rest and stage != "val" or monitor is None:
            continue
        if monitor not in names and not any(fnmatch(monitor, pattern) for pattern in patterns):
            raise UserError(
                f"nothing measures {monitor}, to choose the best checkpoint by: there is "
                f"{', '.join(sorted([*names, *patterns]))}"
            )


def evaluations(built: list[Any]) -> list[Evaluation]:
    """The callbacks that evaluate."""
    return [callback for callback in built if isinstance(callback, Evaluation)]


def metrics(evaluations: list[Any]) -> dict[str, str]:
    """Whether "min" or "max" is better, for the name of every metric that callbacks, or classes of them, log."""
    return {f"{stage}/{m.name}": m.mode for one in evaluations for stage in one.stages for m in one.metrics}


def _subclasses(cls: type) -> list[Any]:
    found: list[type] = cls.__subclasses__()
    return [deep for sub in found for deep in (sub, *_subclasses(sub))]


def trainer(plan: Plan, **extra: Any) -> L.Trainer:
    """The trainer, in the run folder; without a progress bar of its own where no callback is one, or none is wanted."""
    node = plan.config["trainer"]
    if node.get("enable_progress_bar") is False:
        extra["callbacks"] = [one for one in extra["callbacks"] if not isinstance(one, ProgressBar)]
    if not any(isinstance(callback, ProgressBar) for callback in extra["callbacks"]):
        node = {"enable_progress_bar": False, **node}
    return build.instantiate(node, "trainer", default_root_dir=str(plan.run_dir), **extra)
