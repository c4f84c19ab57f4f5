"""A run that goes on from a checkpoint: what it may not do otherwise, and what it does otherwise."""

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop

from bd_lightning.checks import UserError
from bd_lightning.cli.plan import Plan
from bd_lightning.facts import Facts
from bd_lightning.report.comparison import LOADING, flat

SCORED = ("callbacks.metrics.", "model.sampler", "model.guidance")
"""Beginnings of the keys, beside those of data, that scores depend on."""


def refuse_other_data(trained: Facts, given: Facts) -> None:
    """Refuse data that are not those of the checkpoint.

    Raises:
        UserError: naming the first fact that differs.
    """
    mine = given.plain()
    for name, value in trained.plain().items():
        if name != "kind" and mine.get(name) != value:
            keep = f"set data.sigma_data={value}" if name == "sigma_data" else "leave data as it was"
            raise UserError(
                f"the checkpoint was trained on data with {name} {value}, this data has {mine.get(name)}: "
                f"{keep}, or start a new run"
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
    usual = {"_target_": "bd_lightning.optimizers.AdamW"}
    before, now = (usual | (node.get("optimizer") or {}) for node in nodes)
    for name, was, given in _differences(before, now, type(model.optimizer)):
        key = "model.optimizer" + ("" if name == "_target_" else f".{name}")
        raise UserError(
            f"{plan.config['ckpt_path']} was trained with {key}={was}, whose state cannot go on with {given}: "
            "leave model.optimizer as it is there (model.lr, model.warmup_steps and model.lr_decay may change), or "
            "train anew"
        )


def refuse_other_fields(plan: Plan, model: Any) -> None:
    """Refuse settings by which the weights of the checkpoint would stand for something else, which no shape tells.

    Raises:
        UserError: naming what differs.
    """
    if plan.checkpoint is None:
        return
    nodes = (plan.checkpoint["hyper_parameters"]["model"], plan.config["model"])
    trained, asked = (str(node["_target_"]) for node in nodes)
    if not any(cls.__name__ == trained.rpartition(".")[2] for cls in type(model).__mro__):  # a sub-class may draw
        raise UserError(
            f"{plan.config['ckpt_path']} holds a {trained}, and its weights stand for something else in a {asked}: "
            "leave model=… out (model.init takes the weights of another model into a new run)"
        )
    for key in model.fixed:
        known = (inspect.signature(cls).parameters for cls in type(model).__mro__)  # **options hand it on
        default = next(arguments[key].default for arguments in known if key in arguments)
        before, now = (node.get(key, default) for node in nodes)
        if not isinstance(before, Mapping) or not isinstance(now, Mapping):
            found = [("", before, now)] if before != now else []
        else:
            part = getattr(model, key)
            found = [one for one in _differences(before, now, type(part)) if one[0] not in part.changeable]
        for name, was, given in found:
            whole = f"model.{key}" + (f".{name}" if name else "")
            raise UserError(
                f"{plan.config['ckpt_path']} was trained with {whole}={was}, and its weights stand for something else "
                f"with {given}: leave it out, and add {whole}={was} where another word or a file says so"
            )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], cls: type) -> list[tuple[str, Any, Any]]:
    """Settings that two nodes of a class have otherwise, as (name, before, now); what they leave out has its default.

    A class of the user's own may have moved to another file.
    """
    own = {
        name: list(one.default) if isinstance(one.default, tuple) else one.default
        for name, one in inspect.signature(cls).parameters.items()
    }
    found = []
    for name in {**own, **now, **before}:
        was, given = (node.get(name, own.get(name)) for node in (before, now))
        own_class = name == "_target_" and not any("bd_lightning." in str(one) for one in (was, given))
        moved = own_class and str(was).rpartition(".")[2] == str(given).rpartition(".")[2]
        if was != given and not moved:
            found.append((name, was, given))
    return sorted(found, key=lambda one: one[0] != "_target_")


def refuse_other_accumulation(plan: Plan) -> None:
    """Refuse to accumulate other numbers of batches: steps and validations are counted in them.

    Raises:
        UserError: naming both.
    """
    if plan.checkpoint is None:
        return
    trainers = (plan.checkpoint["hyper_parameters"].get("trainer") or {}, plan.config["trainer"])
    was, given = (node.get("accumulate_grad_batches") or 1 for node in trainers)
    if was != given:
        raise UserError(
            f"{plan.config['ckpt_path']} was trained with trainer.accumulate_grad_batches={was}, by which its batches "
            f"are counted, not {given}: set trainer.accumulate_grad_batches={was} (data.batch_size may change), or "
            "begin a new run with model.init"
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


def refuse_other_choice(plan: Plan) -> None:
    """Refuse that a run goes on in its folder and chooses a checkpoint by something else, which would overwrite it.

    Raises:
        UserError: naming the key.
    """
    if plan.checkpoint is None or plan.new:
        return
    before, now = (node["callbacks"] or {} for node in (plan.checkpoint["hyper_parameters"], plan.config))
    for name, node in now.items():
        was = before.get(name) or {}
        for key in ("monitor", "mode") if node and "monitor" in was else ():
            if was.get(key) != node.get(key):
                raise UserError(
                    f"'callbacks.{name}.{key}' is {node.get(key)}, and the run chose its {name}.ckpt by "
                    f"{was.get(key, 'the default')}, which the first validation would overwrite: leave it as it was, "
                    "or give run_id=… for another run that goes on from here"
                )


def data_keys(plan: Plan) -> list[str]:
    """The keys of data that are not as in the checkpoint, but for loading; an export has names for paths."""
    if plan.checkpoint is None:
        return []
    before, now = (
        flat({"data": node.get("data") or {}}) for node in (plan.checkpoint["hyper_parameters"], plan.config)
    )
    keys = [key for key in now | before if key.rpartition(".")[2] not in LOADING]
    exported = [key for key in keys if PurePath(str(now.get(key))).name == before.get(key)]  # names are left of paths
    return [key for key in keys if str(before.get(key)) != str(now.get(key)) and key not in exported]


def other_data(plan: Plan) -> str:
    """What protocols of an evaluation say of data that are not as they were trained on; empty if they are."""
    keys = ", ".join(sorted(data_keys(plan)))
    said = "what is held out here may have been trained on, and losses may be of another scale"
    return f"data not as in training ({keys}): {said}" if keys else ""


LEFT_OUT = "left out"
"""What is said of a key that a config does not have: its class knows the default."""


def changed(plan: Plan) -> str:
    """What a resumed run has otherwise than its checkpoint, in a sentence; empty for nothing."""
    if plan.checkpoint is None:
        return ""
    before, now = flat(plan.checkpoint["hyper_parameters"]), flat(plan.config)
    keys = [key for key in now | before if key.partition(".")[0] in ("data", "model", "trainer", "callbacks", "seed")]
    found = [
        f"{key}={now.get(key, LEFT_OUT)} (was {before.get(key, LEFT_OUT)})"
        for key in keys
        if str(before.get(key)) != str(now.get(key))
    ]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    scored = any(one.startswith(SCORED) for one in found)
    verb = "do not" if scored else "may not"  # a folder may only have been moved
    other = f"; scores from here on {verb} compare with those before, and best.ckpt is the best of both"
    other = other if scored or data_keys(plan) else ""
    return f"not as in the checkpoint: {', '.join(found[:8])}{more}{other}" if found else ""


class WholeFit(_FitLoop):
    """A training that is not over before its last validation is: Lightning leaves it out if a run was stopped in it."""

    @property
    def done(self) -> bool:
        """Whether all steps are done, and a validation that was stopped has been repeated."""
        validation = self.epoch_loop.val_loop
        total = validation.batch_progress.total
        stopped = self.restarting and not validation._has_run and total.ready != total.completed
        return not stopped and super().done

    @classmethod
    def instead(cls, trainer: L.Trainer) -> None:
        """Put one in the place of a trainer's own."""
        loop = cls(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
        loop.epoch_loop, trainer.fit_loop = trainer.fit_loop.epoch_loop, loop


class SoundStates(L.Callback):
    """Looks at the states of a checkpoint before Lightning takes them over, which believes all that they say."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse counts that are none; keep of the files that checkpoint callbacks know of those of the run itself.

        A run that no longer averages goes on from its current weights, not from the averages. A validation that is due
        at the step of the checkpoint, and was not before, is done.

        Raises:
            ValueError: naming what is damaged.
        """
        refuse_other_counts("fit_loop", trainer.fit_loop.state_dict(), checkpoint["loops"]["fit_loop"])
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                carry_over(callback, checkpoint["callbacks"][callback.state_key])
        averaging = any(isinstance(one, WeightAveraging) for one in trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averaging:
            pl_module.load_state_dict(checkpoint["current_model_state"])
        validate_anew(checkpoint, cast(int, trainer.val_check_interval))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put right the step that rows are logged at: Lightning counts it by itself, from where validations were."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validate_anew(checkpoint: dict[str, Any], interval: int) -> None:
    """Have a checkpoint's validation done, as of a run that was stopped in it, if it is due by another interval.

    Args:
        checkpoint: the checkpoint, changed in place.
        interval: batches between validations.

    Raises:
        ValueError: if the interval of before is none.
    """
    loops, config = checkpoint["loops"]["fit_loop"], checkpoint["hyper_parameters"]
    counts = (config["eval_every"], (config.get("trainer") or {}).get("accumulate_grad_batches") or 1)
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"eval_every and trainer.accumulate_grad_batches are {counts}")
    before = math.prod(counts)
    done = loops["epoch_loop.batch_progress"]["total"]["processed"]
    if done % before and not done % interval:
        progress = loops["epoch_loop.val_loop.batch_progress"]
        progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        progress["current"] = dict(progress["total"])
        progress["is_last_batch"] = False
        stepped = loops["epoch_loop.state_dict"]
        stepped["_batches_that_stepped"] = stepped.get("_batches_that_stepped", 0) - 1  # the validation's end adds one


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

    Lightning deletes the worst of them, a folder with all that is in it, wherever a path leads. So only what is there,
    inside the folder that the callback writes to, is taken over.

    Args:
        callback: the callback that will go on.
        state: its state in the checkpoint, changed in place.

    Raises:
        ValueError: if the scores are damaged.
    """
    before, folder = os.path.join(str(state.get("dirpath")), ""), str(callback.dirpath)

    def moved(path: Any) -> str:
        inside = str(path).removeprefix(before)
        plain = inside.isprintable() and not any(part in inside for part in ("::", "://", "\\"))
        known = plain and inside != path and inside.endswith(".ckpt") and ".." not in PurePath(inside).parts
        place = os.path.join(folder, inside)
        return place if known and not os.path.isabs(inside) and os.path.lexists(place) else ""

    models, largest = state.get("best_k_models"), callback.mode == "max"
    if not isinstance(models, dict) or not all(_score(value, largest) for value in models.values()):
        raise ValueError(f"best_k_models of a checkpoint callback is {models!r}")
    kept = {place: score for path, score in models.items() if (place := moved(path))}
    best = sorted(kept, key=lambda path: float(kept[path]), reverse=largest)
    if callback.save_top_k >= 0:
        best = best[: callback.save_top_k]
    worst = best[-1] if best and len(best) == callback.save_top_k else ""  # named once there are so many
    state["best_k_models"] = {path: kept[path] for path in kept if path in best}
    state["best_model_path"] = moved(state.get("best_model_path")) if callback.monitor is None else "".join(best[:1])
    state["best_model_score"] = kept.get(state["best_model_path"])
    state["kth_best_model_path"], state["kth_value"] = worst, kept.get(worst, callback.kth_value)
    state["last_model_path"], state["dirpath"] = moved(state.get("last_model_path")), folder


def _score(value: Any, largest: bool) -> bool:
    """Whether a value is a score that another could be better than."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        return False
    plain = value.layout == torch.strided and value.device.type != "meta"
    return plain and (float(value) < math.inf if largest else float(value) > -math.inf)
