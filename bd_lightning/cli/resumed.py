"""A run that goes on from a checkpoint: what it may not do otherwise, and what it does otherwise."""

import inspect
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bd_lightning.checks import UserError
from bd_lightning.cli.plan import Plan
from bd_lightning.facts import Facts
from bd_lightning.report.comparison import flat


def refuse_other_data(trained: Facts, given: Facts) -> None:
    """Refuse data that are not those of the checkpoint.

    Raises:
        UserError: naming the first fact that differs.
    """
    mine = given.plain()
    for name, value in trained.plain().items():
        if name != "kind" and mine.get(name) != value:
            raise UserError(
                f"the checkpoint was trained on data with {name} {value}, this data has {mine.get(name)}: "
                "leave data as it was, or start a new run"
            )


def refuse_other_optimizer(plan: Plan, model: Any) -> None:
    """Refuse to go on with another optimiser than that of the checkpoint, or with other settings of it.

    They are restored with its state; the rate is the schedule's, and may change.

    Raises:
        UserError: naming what differs.
    """
    if plan.checkpoint is None:
        return
    nodes = (plan.checkpoint["hyper_parameters"]["model"], plan.config["model"])
    own: dict[str, Any] = {"_target_": "bd_lightning.optimizers.AdamW"}
    for name, one in inspect.signature(type(model.optimizer)).parameters.items():
        own[name] = list(one.default) if isinstance(one.default, tuple) else one.default
    before, now = (own | (node.get("optimizer") or {}) for node in nodes)
    for name in now | before:
        was, given = before.get(name), now.get(name)
        if was != given and not (name == "_target_" and not any("bd_lightning." in str(one) for one in (was, given))):
            key = "model.optimizer" + ("" if name == "_target_" else f".{name}")
            raise UserError(
                f"{plan.config['ckpt_path']} was trained with {key}={was}, whose state cannot go on with {given}: "
                "leave model.optimizer as it is there (model.lr, model.warmup_steps and model.lr_decay may change), or "
                "train anew"
            )


def refuse_other_beginning(plan: Plan) -> None:
    """Refuse other weights to begin with for a run that goes on, which has its own.

    Raises:
        UserError: naming both.
    """
    if plan.checkpoint is None:
        return
    was, given = (node.get("init") for node in (plan.checkpoint["hyper_parameters"]["model"], plan.config["model"]))
    if was != given:
        began = f"began with the weights of {was}" if was else "began anew"
        raise UserError(
            f"{plan.config['ckpt_path']} is of a run that {began} and goes on with its own: leave model.init={given} "
            "out, or start a new run with it"
        )


def changed(plan: Plan) -> str:
    """What a resumed run has otherwise than its checkpoint, in a sentence; empty for nothing."""
    if plan.checkpoint is None:
        return ""
    before, now = flat(plan.checkpoint["hyper_parameters"]), flat(plan.config)
    keys = [key for key in now | before if key.partition(".")[0] in ("data", "model", "trainer", "callbacks", "seed")]
    found = [
        f"{key}={now.get(key)} (was {before.get(key)})" for key in keys if str(before.get(key)) != str(now.get(key))
    ]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"not as in the checkpoint: {', '.join(found[:8])}{more}" if found else ""


class SoundStates(L.Callback):
    """Looks at the states of a checkpoint before Lightning takes them over, which believes all that they say."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse counts that are none; keep of the files that checkpoint callbacks know of those of the run itself.

        Raises:
            ValueError: naming what is damaged.
        """
        refuse_other_counts("fit_loop", trainer.fit_loop.state_dict(), checkpoint["loops"]["fit_loop"])
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                carry_over(callback, checkpoint["callbacks"][callback.state_key])


def refuse_other_counts(place: str, own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse states of Lightning's loops in which something else stands where it counts.

    Args:
        place: what they are of.
        own: the states of loops that have not run.
        stored: the states to go on with.

    Raises:
        ValueError: naming the first.
    """
    for name, value in own.items():
        given = stored.get(name, value)
        if type(given) is not type(value) or isinstance(value, int) and given < 0:
            raise ValueError(f"{place}.{name} is {given!r}")
        if isinstance(value, dict):
            refuse_other_counts(f"{place}.{name}", value, given)


def carry_over(callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Carry the files that a `ModelCheckpoint` has written over to the run's folder, which may have been moved.

    Lightning deletes the worst of them, a folder with all that is in it, wherever a path leads. So a path that does not
    name a checkpoint inside the folder that it was written to is left out.

    Args:
        callback: the callback that will go on.
        state: its state in the checkpoint, changed in place.

    Raises:
        ValueError: if the scores are damaged.
    """
    before, folder = os.path.join(str(state.get("dirpath")), ""), str(callback.dirpath)

    def moved(path: Any) -> str:
        inside = str(path).removeprefix(before)
        plain = inside.isprintable() and not any(c in inside for c in ":\\") and ".." not in PurePath(inside).parts
        known = plain and inside != path and inside.endswith(".ckpt") and not os.path.isabs(inside)
        return os.path.join(folder, inside) if known else ""

    for name in ("best_model_score", "current_score", "kth_value"):
        value = state.get(name)
        if value is not None and not _score(value):
            raise ValueError(f"{name} of a checkpoint callback is {value!r}")
    models = state.get("best_k_models")
    if not isinstance(models, dict) or not all(map(_score, models.values())):
        raise ValueError(f"best_k_models of a checkpoint callback is {models!r}")
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state.get(name))
    state["best_k_models"] = kept = {moved(path): score for path, score in models.items() if moved(path)}
    worst = state["kth_best_model_path"]
    if worst not in kept and (worst or len(kept) == callback.save_top_k):  # known once there are so many
        raise ValueError(f"kth_best_model_path of a checkpoint callback is none of {list(models)}")
    state["dirpath"] = folder


def _score(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype in (torch.float32, torch.float64)
