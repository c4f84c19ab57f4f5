"""Reading and writing checkpoints: tensors and plain data only, with the config that rebuilds the model."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bd_lightning import addresses, exported, facts
from bd_lightning.checks import UserError, reason_of, regular_file
from bd_lightning.cli import build
from bd_lightning.modules.base import Module
from bd_lightning.upgrade import upgrade

PROGRESS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress")
"""What Lightning's loop keeps of how far training has come."""


class SavingFailed(UserError):
    """A checkpoint that could not be written."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is on the disk, so that it is whole or not there.

    (Lightning's own goes through the system's folder for temporary files, and is copied if that is another disk.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SavingFailed: if the disk is full, or the file cannot be written; what was at `path` is still there.
        """
        save(checkpoint, Path(path), "part")  # one name: what a killed process leaves is overwritten


def save(checkpoint: Mapping[str, Any], path: Path, ending: str) -> None:
    """Write a checkpoint to `path`.`ending`, and move it to its place.

    Raises:
        SavingFailed: if the disk is full, or the file cannot be written; what was at `path` is still there.
    """
    part = path.with_name(f"{path.name}.{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns some failures to write into a RuntimeError
        kept = "the one that was there before is intact" if path.is_file() else "there is none yet"
        raise SavingFailed(
            f"cannot write the checkpoint {path} ({reason_of(error)}), {kept}: make room, then resume or start again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project, or an exported model.

    Args:
        path: a file, the folder of an export, or an address of one (see `addresses`).

    Returns:
        The checkpoint; `hyper_parameters` holds the run's config and the facts of its data, in today's format.

    Raises:
        UserError: if it is missing, broken, not one of ours, or written by a later version.
    """
    path = addresses.local(path)
    folder = Path(path).is_dir()
    if not folder:
        regular_file(path, "checkpoint")
    try:
        checkpoint = exported.read(path) if folder else _file(path)
        lacking = [key for key in ("hyper_parameters", "state_dict") if key not in checkpoint]
        if lacking:
            raise ValueError(f"it has no {lacking[0]!r}")
        stored = upgrade(checkpoint["hyper_parameters"], str(path))
        if not {"data", "model", "facts"} <= stored.keys() or not isinstance(checkpoint["state_dict"], dict):
            raise ValueError("it says nothing of its data and its model")
        step = checkpoint.get("global_step", 0)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"global_step is {step!r}")
        facts.read(stored["facts"])
        for key in ("state_dict", "current_model_state"):
            refuse_not_finite(checkpoint.get(key) or {})
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this project, or it is damaged ({reason})") from error
    return {"global_step": 0, **checkpoint, "hyper_parameters": stored}


def refuse_not_finite(weights: Mapping[str, Any]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ValueError: naming the first.
    """
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the weights {name} are not finite")


def _file(path: str | Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not what torch.save writes, or not the whole of it")
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise ValueError(f"bytes of its part {part} have changed: its checksum is another one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # torch's sentence tells how to load it all the same
        raise ValueError("it holds more than tensors and plain values, which is not read") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a mapping")
    return content


def refuse_stateless(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to train on from a checkpoint without the states of loops, callbacks, optimiser and schedule.

    Raises:
        UserError: naming the first that is missing or of another kind.
    """
    for key, kind in (("loops", dict), ("callbacks", dict), ("optimizer_states", list), ("lr_schedulers", list)):
        states = checkpoint.get(key)
        sound = isinstance(states, kind) and bool(states or key == "callbacks")
        if isinstance(states, dict) and key == "loops":
            fitted = states.get("fit_loop")
            sound = isinstance(fitted, dict) and all(isinstance(fitted.get(name), dict) for name in PROGRESS)
        inner: Any = states.values() if isinstance(states, dict) else states
        if not sound or not all(isinstance(state, dict) for state in inner):
            raise UserError(
                f"training cannot go on from {path}: it has no sound {key!r}, only weights to evaluate and sample from"
            )


def misfit(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """How weights differ from those of a module, in a few words: the first that does, and how many more."""
    different = []
    for name, value in mine.items():
        shapes = [list(getattr(one, "shape", ())) for one in (theirs.get(name), value)]
        if name in theirs and shapes[0] != shapes[1]:
            different.append(f"{name} has the shape {shapes[0]}, the model's {shapes[1]}")
        elif name in theirs and theirs[name].is_floating_point() != value.is_floating_point():
            different.append(f"{name} is of {theirs[name].dtype}, the model's of {value.dtype}")
    different += [f"{name} is missing" for name in mine if name not in theirs]
    different += [f"{name} is not one of the model's" for name in theirs if name not in mine]
    more = f", and {len(different) - 1} more" if len(different) > 1 else ""
    return different[0] + more if different else ""


def restore(module: Module, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Give a module the (averaged) weights of a checkpoint.

    Raises:
        UserError: if they are not those of such a module.
    """
    try:
        module.on_load_checkpoint(dict(checkpoint))
        if reason := misfit(checkpoint["state_dict"], module.state_dict()):
            raise ValueError(reason)
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:  # of other shapes, names or types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {path} do not fit the model: leave model as it was ({reason})") from error


def load(path: str | Path, kind: type[Module] = Module) -> tuple[Any, dict]:
    """Build the module of a checkpoint with its (averaged) weights, frozen and in evaluation mode.

    Args:
        path: the checkpoint.
        kind: the class that the module has to be of.

    Returns:
        The module and the stored config, `facts` among it, in today's format.

    Raises:
        UserError: as `read`, for a config that is not sound, and for a module of another class.
    """
    checkpoint = read(path)
    stored = checkpoint["hyper_parameters"]
    build.refuse_strangers(stored["model"], str(path))
    build.check_kind(stored["model"], "model", build.KINDS["model"])
    module = build.instantiate(stored["model"], "model", facts.read(stored["facts"]).arguments)
    if not isinstance(module, kind):
        raise UserError(f"{path} is of class {type(module).__name__}, and what is needed here is a {kind.__name__}")
    restore(module, checkpoint, path)
    return module.requires_grad_(False).eval(), stored
