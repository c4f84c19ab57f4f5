"""fit, validate and test."""

import json
import signal
from shlex import quote
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from bd_lightning.checkpoints import WholeCheckpoints
from bd_lightning.checks import UserError
from bd_lightning.cli import build, objects
from bd_lightning.cli.folders import claimed, short
from bd_lightning.cli.plan import Plan
from bd_lightning.facts import Facts
from bd_lightning.loggers import MetricsCSV, WandB
from callbacks import CallsCurve


def run(plan: Plan) -> None:
    """Train, or evaluate a checkpoint.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    objects.prepare(plan.config)
    with claimed(plan.run_dir, plan.new):
        _run(plan)


def _run(plan: Plan) -> None:
    data = build.instantiate(plan.config["data"], "data")
    if plan.facts is not None:
        refuse_other_data(plan.facts, data.facts)
    model = objects.model(plan, data.facts)
    if plan.command == "fit":
        model.prepare(fresh=plan.checkpoint is None)
    model.save_hyperparameters({**plan.record, "facts": data.facts.plain()})
    callbacks = objects.callbacks(plan)
    if plan.config["calls"]:
        callbacks.append(calls_curve(plan, callbacks, model))
    loggers = build_loggers(plan, callbacks)
    trainer = build_trainer(plan, loggers, callbacks)
    if plan.command == "fit" and trainer.is_global_zero:
        announce(plan, trainer, data, model)
    carry_out(plan, trainer, data, model)
    if trainer.is_global_zero:
        finish(plan, callbacks, model)


class Record(L.Callback):
    """Writes config.yaml when training begins: a run that is refused before changes nothing.

    Args:
        plan: the plan of the run.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it, whole or not at all."""
        if trainer.is_global_zero:
            path = self.plan.run_dir / "config.yaml"
            part = path.with_name("config.yaml.part")
            OmegaConf.save(OmegaConf.create(self.plan.record), part)
            part.replace(path)


def calls_curve(plan: Plan, callbacks: list[Any], model: Any) -> CallsCurve:
    """Judges the model's samplers at the numbers of network calls that are asked for.

    Raises:
        UserError: if there is nothing to judge by, or the command is another one than test.
    """
    if plan.command != "test":
        raise UserError("calls is for test: train.py test ckpt_path=… calls=[5, 10, 20]")
    model.check_predict()
    judges = [one for one in objects.evaluations(callbacks) if one.record is not None and one.metrics]
    if not judges:
        raise UserError("calls needs callbacks.metrics, which judges samples")
    return CallsCurve(plan.config["calls"], judges[0])


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


def build_loggers(plan: Plan, callbacks: list[Any]) -> list[Any]:
    """metrics.csv, and the logger of the config."""
    every = plan.config["trainer"].get("log_every_n_steps") or 50
    loggers: list[Any] = [MetricsCSV(plan.run_dir, every, plan.resumed_at)]
    if plan.config["logger"]:
        known = {"run_dir": plan.run_dir, "summaries": objects.metrics(objects.evaluations(callbacks))}
        loggers.append(build.instantiate(plan.config["logger"], "logger", known))
    return loggers


def build_trainer(plan: Plan, loggers: list[Any], callbacks: list[Any]) -> L.Trainer:
    """The trainer, which counts in optimiser steps."""
    config = plan.config
    return objects.trainer(
        plan,
        logger=loggers,
        callbacks=[Record(plan), *callbacks],
        plugins=[WholeCheckpoints()],
        max_steps=config["steps"],
        max_epochs=-1,
        val_check_interval=config["eval_every"] * config["trainer"].get("accumulate_grad_batches", 1),  # in batches
        check_val_every_n_epoch=None,
    )


def announce(plan: Plan, trainer: L.Trainer, data: Any, model: Any) -> None:
    """Say where the run folder is, and what a step is made of."""
    print(f"run folder: {short(plan.run_dir)}", flush=True)
    batch, devices, accumulated = data.batch_size, trainer.world_size, trainer.accumulate_grad_batches
    effective = f"{batch} × {devices} devices × {accumulated} accumulated = {batch * devices * accumulated}"
    print(f"effective batch: {effective}; lr_scaling={model.lr_scaling}", flush=True)


def carry_out(plan: Plan, trainer: L.Trainer, data: Any, model: Any) -> None:
    """Run the trainer; close the loggers and say how to go on however it ends."""
    loop: Any = {"fit": trainer.fit, "validate": trainer.validate, "test": trainer.test}[plan.command]
    failed = True
    try:  # given the path, Lightning restores the states of callbacks, loops and optimisers too
        loop(model, datamodule=data, ckpt_path=plan.config["ckpt_path"], weights_only=True)
        failed = False
    except SIGTERMException as stop:
        stop.code = 128 + signal.SIGTERM  # not the 0 of a run that is finished
        raise
    except MisconfigurationException as error:  # e.g. a monitor that is never logged
        raise UserError(" ".join(str(error).split())) from error
    finally:
        last = plan.run_dir / "checkpoints" / "last.ckpt"
        if failed and trainer.is_global_zero and last.is_file():
            again = f"train.py ckpt_path={quote(short(last))}"
            print(f"stopped at step {trainer.global_step}; to resume: {again}", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.close(failed)


def finish(plan: Plan, callbacks: list[Any], model: Any) -> None:
    """Say how good it is, where everything is and how to go on with it."""
    for callback in objects.evaluations(callbacks):
        if callback.record and (plan.run_dir / callback.record).is_file():
            print(json.loads((plan.run_dir / callback.record).read_text())[-1]["summary"])
    best, last = (plan.run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    checkpoint = best if best.is_file() else last
    page = " (open report.html)" if (plan.run_dir / "report.html").is_file() else ""
    print(f"everything is in {short(plan.run_dir)}{page}; {model.next_step(quote(short(checkpoint)))}")
