"""fit, validate and test."""

import contextlib
import math
import os
import signal
import threading
import traceback
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from bd_lightning.checkpoints import WholeCheckpoints
from bd_lightning.checks import UserError
from bd_lightning.cli import build, objects, resumed
from bd_lightning.cli.folders import claimed, evaluating, first_process, folder_for, in_use, short
from bd_lightning.cli.plan import Plan, settings_of
from bd_lightning.facts import Facts
from bd_lightning.loggers import MetricsCSV, WandB
from callbacks import AveragedWeights, CallsCurve, Evaluation, FieldLikelihood, FlowLikelihood, Report
from callbacks.likelihood import Likelihood
from callbacks.records import read_record


def run(plan: Plan) -> None:
    """Train, or evaluate a checkpoint.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    if plan.done:
        path = short(plan.run_dir)
        print(f"nothing is left to train: {path} has done its {plan.config['steps']} steps; give more steps to go on")
        return
    objects.prepare(plan.config)
    if plan.command == "fit":
        with claimed(plan.run_dir, plan.new):
            _run(plan, plan.run_dir)
        return
    settings = settings_of(plan, "callbacks", "trainer", "calls", "likelihood", "export")
    folder = folder_for(settings, plan.run_dir, f"{plan.command}-{Path(plan.config['ckpt_path']).stem}-{plan.step:07d}")
    with evaluating(folder, settings):
        _run(replace(plan, run_dir=folder), plan.run_dir)
    if first_process():
        refresh(plan)


def refresh(plan: Plan) -> None:
    """Put an evaluation on the page of its run; one that trains does so itself at its next validation."""
    if (plan.run_dir / "report.html").is_file():
        with contextlib.suppress(UserError), claimed(plan.run_dir, False):
            Report.page(plan.run_dir, objects.model(plan, cast(Facts, plan.facts)))


def _run(plan: Plan, run_dir: Path) -> None:
    """Train or evaluate.

    Args:
        plan: the plan, whose run folder is what is written to.
        run_dir: the run folder, which is another one for evaluations.
    """
    data = build.instantiate(plan.config["data"], "data")
    if plan.facts is not None:
        resumed.refuse_other_data(plan.facts, data.facts)
    if plan.command == "fit":
        resumed.refuse_other_beginning(plan)
        resumed.refuse_other_accumulation(plan)
        resumed.refuse_other_choice(plan)
    else:
        data.remark = resumed.other_data(plan)
    model = objects.model(plan, data.facts)
    if plan.command == "fit":
        resumed.refuse_other_optimizer(plan, model)
        model.prepare(plan.checkpoint is None, data.facts)
    model.save_hyperparameters({**plan.record, "facts": data.facts.plain()})
    begin = Begin(plan)
    callbacks = [begin, resumed.SoundStates(), *objects.callbacks(plan)]
    if plan.command == "fit":
        refuse_no_average(model, callbacks)
    if plan.config["calls"]:
        callbacks.append(calls_curve(plan, callbacks, model))
    if plan.config["likelihood"]:
        refuse_two(callbacks)
        callbacks.append(likelihood(plan, model))
    loggers = build_loggers(plan, callbacks, run_dir)
    trainer = build_trainer(plan, loggers, callbacks)
    data.share(trainer.world_size * trainer.accumulate_grad_batches)
    if plan.command == "fit" and data.total_batch_size is not None and model.lr_scaling != "none":
        raise UserError(
            f"'model.lr_scaling' {model.lr_scaling} follows the number of batches that make the effective one, which "
            "data.total_batch_size keeps as it is: leave one of them out"
        )
    if plan.command == "fit" and trainer.is_global_zero:
        announce(plan, trainer, data, model)
    carry_out(plan, trainer, data, model)
    diverged = begin.diverged(trainer)
    if trainer.is_global_zero:
        finish(plan, callbacks, model, diverged)
    if diverged:
        raise UserError(diverged)


class Begin(L.Callback):
    """Writes config.yaml when the first loss is there: a run that is refused before changes nothing.

    Args:
        plan: the plan of the run.

    Attributes:
        loss: the first loss.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.loss: float | None = None

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        """Check what checkpoints are chosen by, now that the names of the losses are known; write the config."""
        if self.loss is not None:
            return
        objects.check_monitors(trainer)
        self.loss = float(loss)
        if trainer.is_global_zero:
            path = self.plan.run_dir / "config.yaml"
            part = path.with_name("config.yaml.part")
            OmegaConf.save(OmegaConf.create(self.plan.record), part)
            part.replace(path)

    def diverged(self, trainer: L.Trainer) -> str:
        """That the loss has become far larger than it began, in a sentence; empty if it has not."""
        last = float(trainer.callback_metrics.get("val/loss", 0.0))
        finite = self.loss is not None and math.isfinite(self.loss)
        if self.loss is None or last <= 1000 * max(1.0, abs(self.loss) if finite else 0.0):
            return ""
        if not finite:
            return f"the loss was {self.loss} at the first step: the data, or the weights to begin with, are not finite"
        first = f"{self.loss:.3g} at its first step"
        return f"training has diverged (val/loss {last:.3g}, {first}): lower model.lr, and begin again"


class Waiting(L.Callback):
    """Says what a run waits for, if other nodes do not come.

    Args:
        nodes: their number.
        seconds: after how long.
    """

    def __init__(self, nodes: int, seconds: float = 10.0) -> None:
        where = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', 'a port of its own')}"
        text = (
            f"waiting for the processes of all {nodes} nodes at {where}: start the same command on each, with the same "
            "MASTER_ADDR and MASTER_PORT, and with NODE_RANK from 0 on (torchrun and SLURM set them)"
        )
        self.timer = threading.Timer(seconds, lambda: print(text, flush=True))
        self.timer.daemon = True
        if nodes > 1:
            self.timer.start()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """They are there."""
        self.timer.cancel()


def calls_curve(plan: Plan, callbacks: list[Any], model: Any) -> CallsCurve:
    """Judges the model's samplers at the numbers of network calls that are asked for.

    Raises:
        UserError: if there is nothing to judge by.
    """
    model.check_calls()
    known = [one for one in objects.evaluations(callbacks) if not isinstance(one, Likelihood)]  # it draws nothing
    judges = [one for one in known if one.record is not None and one.metrics]
    if not judges:
        raise UserError("calls needs callbacks.metrics, which judges samples")
    return CallsCurve(plan.config["calls"], judges[0])


def likelihood(plan: Plan, model: Any) -> Evaluation:
    """Says how likely the test split is, by the probability flow or in one call.

    Raises:
        UserError: for a model without a density.
    """
    model.check_likelihood()
    return FlowLikelihood() if plan.config["likelihood"] == "ode" else FieldLikelihood()


def refuse_two(callbacks: list[Any]) -> None:
    """Refuse a likelihood beside another one: both would log numbers of one name.

    Raises:
        UserError: saying which to leave out.
    """
    if any(isinstance(one, Likelihood) for one in callbacks):
        raise UserError("a callback of this config says how likely the data is: leave likelihood= or that callback out")


def refuse_no_average(model: Any, callbacks: list[Any]) -> None:
    """Refuse an optimiser that is judged by its own average where nothing would put that in.

    Raises:
        UserError: naming the callback.
    """
    if not model.optimizer.decays and not any(isinstance(one, AveragedWeights) for one in callbacks):
        raise UserError(
            f"{type(model.optimizer).__name__} is judged by its own average, which callbacks.ema puts in: leave "
            "callbacks.ema as it is"
        )


def build_loggers(plan: Plan, callbacks: list[Any], run_dir: Path) -> list[Any]:
    """metrics.csv, and the logger of the config, which knows a run by its own folder."""
    every = plan.config["trainer"].get("log_every_n_steps") or 50
    loggers: list[Any] = [MetricsCSV(plan.run_dir, every, plan.resumed_at)]
    if plan.config["logger"] and run_dir != plan.run_dir and in_use(run_dir):
        rank_zero_info("the run is training, and logs alone: this evaluation is in its folder, not at the logger")
    elif plan.config["logger"]:
        known = {"run_dir": run_dir, "resumed_at": plan.resumed_at}
        known["summaries"] = objects.metrics(objects.evaluations(callbacks))
        loggers.append(build.instantiate(plan.config["logger"], "logger", known))
    return loggers


def build_trainer(plan: Plan, loggers: list[Any], callbacks: list[Any]) -> L.Trainer:
    """The trainer, which counts in optimiser steps."""
    config = plan.config
    trainer = objects.trainer(
        plan,
        logger=loggers,
        callbacks=[Waiting(config["trainer"].get("num_nodes", 1)), *callbacks],
        plugins=[WholeCheckpoints()],
        max_steps=config["steps"],
        max_epochs=-1,
        fast_dev_run=False,  # steps says how long
        val_check_interval=config["eval_every"] * config["trainer"].get("accumulate_grad_batches", 1),  # in batches
        check_val_every_n_epoch=None,
    )
    resumed.WholeFit.instead(trainer)
    return trainer


def announce(plan: Plan, trainer: L.Trainer, data: Any, model: Any) -> None:
    """Say where the run folder is, and what a step is made of."""
    print(f"run folder: {short(plan.run_dir)}", flush=True)
    for remark in filter(None, (plan.remark, resumed.changed(plan))):
        print(remark, flush=True)
    batch, devices, accumulated = data.batch_size, trainer.world_size, trainer.accumulate_grad_batches
    effective = f"{batch} × {devices} devices × {accumulated} accumulated = {batch * devices * accumulated}"
    print(f"effective batch: {effective}; lr_scaling={model.lr_scaling}", flush=True)


def carry_out(plan: Plan, trainer: L.Trainer, data: Any, model: Any) -> None:
    """Run the trainer; close the loggers and say how to go on however it ends."""
    failed, damaged = True, False
    try:
        if plan.command == "fit":  # given the path, Lightning restores callbacks, loops and optimisers too
            trainer.fit(model, datamodule=data, ckpt_path=plan.config["ckpt_path"], weights_only=True)
        else:  # the model has its weights; the file may be another one by now
            trainer.fit_loop.epoch_loop._batches_that_stepped = plan.step  # which Lightning logs at
            {"validate": trainer.validate, "test": trainer.test}[plan.command](model, datamodule=data)
        failed = False
    except SIGTERMException as stop:
        stop.code = 128 + signal.SIGTERM  # not the 0 of a run that is finished
        raise
    except MisconfigurationException as error:  # e.g. a monitor that is never logged
        raise UserError(" ".join(str(error).split())) from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        damaged = restoring(error)
        if not damaged:
            raise
        raise UserError(
            f"training cannot go on from {plan.config['ckpt_path']}: its states are damaged, or are not those of this "
            f"model and these callbacks ({' '.join(str(error).split())[:200] or type(error).__name__})"
        ) from error
    finally:
        last = plan.run_dir / "checkpoints" / "last.ckpt"
        begun = (plan.run_dir / "config.yaml").is_file()
        if failed and not damaged and trainer.is_global_zero and last.is_file() and begun:
            again = f"train.py ckpt_path={quote(short(last))}{build.trust(plan.config)}"
            print(f"stopped at step {trainer.global_step}; to resume: {again}", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.close(failed)


def restoring(error: BaseException) -> bool:
    """Whether an exception came while Lightning took states over from a checkpoint."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(Path(frame.f_code.co_filename).name == "checkpoint_connector.py" for frame, _ in frames)


def finish(plan: Plan, callbacks: list[Any], model: Any, diverged: str) -> None:
    """Say how good it is, where everything is and, unless training has diverged, how to go on with it."""
    for callback in objects.evaluations(callbacks):
        rows = read_record(plan.run_dir / callback.record) if callback.record else None
        if rows and "summary" in rows[-1]:
            print(rows[-1]["summary"])
    names = [plan.run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    given = [Path(plan.config["ckpt_path"])] if plan.command != "fit" else []
    found = next((path for path in (*given, *names) if path.exists()), None)
    page = " (open report.html)" if (plan.run_dir / "report.html").is_file() else ""
    then = model.next_step(quote(short(found)) + build.trust(plan.config)) if found else "no checkpoint was kept"
    print(f"everything is in {short(plan.run_dir)}{page}{'' if diverged else f'; {then}'}")
