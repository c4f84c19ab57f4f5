"""A run that goes on from a checkpoint: what it may not do otherwise, and what it does otherwise."""

import inspect
from typing import Any

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
