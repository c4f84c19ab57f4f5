"""What the benchmarks share: building, training as train.py trains, and timing in turns."""

import argparse
import importlib
import itertools
import operator
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import train
from bd_lightning import checkpoints
from bd_lightning.addresses import digest, weights_of
from bd_lightning.checks import UserError, regular_file
from bd_lightning.cli import build
from bd_lightning.cli import config as configs
from bd_lightning.modules.base import Module, Schedule
from bd_lightning.optimizers import AdamW, Optimizer

# ---- the command line


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's own text."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(low: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `low` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}, got {text!r}")
        return value

    return read


count = at_least(1)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake of the user is one sentence and the exit status 2, Ctrl-C or SIGTERM one and 130."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\nstopped{f': {stop}' if stop.args else ''}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, usual)


Work = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Maps jobs to what they give, in any order."""


@contextmanager
def workers(count: int) -> Iterator[Work]:
    """What carries out jobs: this process for one, else as many others, which leave Ctrl-C to this one.

    Raises:
        UserError: if one of the others was killed, by a system that ran out of memory, say.
    """
    if count == 1:
        yield map
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"))

    def do(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the processes that begin here
        try:
            futures = [pool.submit(function, job) for job in jobs]
        finally:
            signal.signal(signal.SIGINT, usual)
        for future in as_completed(futures):
            yield future.result()

    try:
        yield do
    except BrokenProcessPool as error:
        raise UserError(
            "a process of this benchmark was killed, for want of memory perhaps: what was finished is kept; repeat the "
            "command, with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.terminate()


def train_py(*words: str) -> None:
    """`train.py words`, here.

    Raises:
        UserError: if it fails; its own sentence stands above.
        KeyboardInterrupt: if it was stopped by Ctrl-C or SIGTERM.
    """
    status = train.main(list(words))
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt("what was trained so far is kept; the same command goes on from there")
    if status:
        raise UserError("train.py failed: see above")


def optional(package: str) -> Any:
    """A module of a package that is for comparisons alone.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this benchmark compares with {package.partition('.')[0]}, and '{error.name}' is not installed: "
            "run it with uv run --group benchmarks"
        ) from error


# ---- data and models from the words of a command line


def compose(*words: str) -> dict[str, Any]:
    """The config of `train.py words`, checked."""
    config = configs.compose(configs.parse(list(words)))
    build.check(config)
    return config


def contents(words: Iterable[str]) -> list[str]:
    """Words as rows are known by: with what the autoencoder's file holds, which its path does not tell.

    Raises:
        UserError: if there is no such file.
    """
    key, known = "data.autoencoder.ckpt_path=", []
    for word in words:
        if word.startswith(key):
            regular_file(path := weights_of(word.removeprefix(key)), "autoencoder")
            word = f"{word} ({digest(path)[:8]})"
        known.append(word)
    return known


def make_data(config: Mapping[str, Any]) -> Any:
    """The data module of a config."""
    return build.instantiate(config["data"], "data")


def make_model(config: Mapping[str, Any], facts: Mapping[str, Any], seed: int = 0) -> Any:
    """The untrained model of a config, from the initial weights of a seed, for data with `facts.arguments`."""
    torch.manual_seed(seed)
    return build.instantiate(config["model"], "model", facts)


def batches(data: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches (x, label) without end, shuffled anew in each epoch, in the order that train.py has them in."""
    for epoch in itertools.count():
        loader = data.train_dataloader()
        loader.sampler.seed = seed
        loader.sampler.set_epoch(epoch)
        yield from loader


# ---- training


def averaging(config: Mapping[str, Any]) -> float:
    """Weight of the past in the moving average of a config.

    Raises:
        UserError: if it has no such average.
    """
    average = (config["callbacks"] or {}).get("ema") or {}
    if "decay" not in average:
        raise UserError("the benchmarks average with a constant decay, which callbacks.ema of this config does not say")
    build.instantiate(average, "callbacks.ema")  # refuses a decay out of range
    return average["decay"]


@dataclass(frozen=True)
class Recipe:
    """How train.py trains: the arguments of `modules.base.Module`, with clipping and averaging.

    Args:
        steps: optimiser steps, over which the rate decays.
        lr: learning rate.
        optimizer: the optimiser.
        warmup_steps: steps over which the rate rises linearly.
        decay: whether it falls to zero by a cosine.
        clip: largest norm of the gradient; None does not clip.
        averaging: weight of the past in the moving average of the weights.
        bf16: forward and backward pass in bfloat16.
    """

    steps: int
    lr: float
    optimizer: Optimizer = AdamW()
    warmup_steps: int = 100
    decay: bool = True
    clip: float | None = 1.0
    averaging: float = 0.995
    bf16: bool = False

    @classmethod
    def of(cls, model: Module, config: Mapping[str, Any], steps: int, bf16: bool = False) -> "Recipe":
        """The recipe of a config, whose model is built already."""
        return cls(
            steps=steps,
            lr=model.lr,
            optimizer=model.optimizer,
            warmup_steps=model.warmup_steps,
            decay=model.lr_decay == "cosine",
            clip=config["trainer"].get("gradient_clip_val"),
            averaging=averaging(config),
            bf16=bf16,
        )


Batch = tuple[Tensor, Tensor]
KEEP = 300.0
"""Seconds between two states of a training that are kept."""


class Training:
    """One model in training, a step at a time.

    Args:
        model: any module with parameters; it is put in training mode.
        recipe: how it is trained.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model: Any = model.train()
        self.recipe = recipe
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.averaging), use_buffers=True)
        self.optimizer = recipe.optimizer(model, recipe.lr)
        self.schedule = Schedule(self.optimizer, recipe.warmup_steps, recipe.steps if recipe.decay else None)

    @property
    def averaged(self) -> Any:
        """The model with averaged weights, in evaluation mode."""
        own = self.recipe.optimizer.averaged(self.optimizer) or {}
        for mean, p in zip(self.average.module.parameters(), self.model.parameters()):
            if p in own:
                mean.data.copy_(own[p])
        return self.average.module.eval()

    def update(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward pass of a loss, clipping and the optimiser: what timings of a step are of."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.bf16):
            value = loss()
        self.optimizer.zero_grad()
        value.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()

    def follow(self) -> None:
        """The rest of a step: the rate and the average."""
        self.schedule.step()
        self.average.update_parameters(self.model)

    def step(self, loss: Callable[[], Tensor]) -> None:
        """One whole step."""
        self.update(loss)
        self.follow()

    def onward(self, source: Iterator[Batch], steps: int, path: Path) -> Iterator[tuple[int, Batch]]:
        """Numbers and batches of the steps that are left of a training that may have been stopped.

        Args:
            source: all batches, from the first.
            steps: of the whole training.
            path: where all that later steps depend on is kept every `KEEP` seconds. Delete it when what came of the
                training is kept.

        Raises:
            UserError: if the file is damaged, or of another training.
        """
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer, "schedule": self.schedule}
        begun, random, clock = 0, chance(), time.monotonic()
        if path.exists():
            begun, random = _go_on(parts, path, steps)
        for done, batch in zip(range(1, steps + 1), source):
            if done == begun:
                set_chance(random)
            if done <= begun:
                continue
            yield done, batch
            if time.monotonic() > clock + KEEP and done < steps:
                states = {name: part.state_dict() for name, part in parts.items()}
                save({"done": done, "chance": chance(), **states}, path)
                clock = time.monotonic()


def _go_on(parts: Mapping[str, Any], path: Path, steps: int) -> tuple[int, dict[str, Tensor]]:
    regular_file(path, "training to go on with")
    state_before = chance()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_chance(state["chance"])
        if not 0 < operator.index(state["done"]) < steps:
            raise ValueError("not so many steps")
        if not all(p.isfinite().all() for p in parts["model"].parameters()):
            raise ValueError("weights that are not finite")
        return state["done"], state["chance"]
    except Exception as error:  # whatever the reader raises, the file is at fault
        raise UserError(f"{path} is damaged, or of another training: delete it to train anew") from error
    finally:
        set_chance(state_before)


def chance() -> dict[str, Tensor]:
    """The states of the random numbers of all devices, by name."""
    devices = {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {"cpu": torch.get_rng_state(), **devices}


def set_chance(states: Mapping[str, Tensor]) -> None:
    """Go on with random numbers where they were."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state_all([state for name, state in states.items() if name != "cpu"])


# ---- time and memory


def now(device: torch.device | str = "cpu") -> float:
    """Seconds on a clock, once the device has finished what it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Turns:
    """Seconds of several things that take turns, so that what else the machine does falls on all of them.

    Args:
        names: what they are called.
        device: where they compute.
        skip: first turns that are not counted.
    """

    def __init__(self, names: Iterable[str], device: torch.device | str = "cpu", skip: int = 0) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.device, self.skip, self.turn = device, skip, 0

    def next(self) -> list[str]:
        """The names in the order of the next turn, which is reversed every other time."""
        self.turn += 1
        return list(self.seconds) if self.turn % 2 else list(reversed(self.seconds))

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Take the time of what is done inside."""
        start = now(self.device)
        yield
        self.seconds[name].append(now(self.device) - start)

    def median(self, name: str) -> float:
        """Median seconds of one of them."""
        return statistics.median(self.seconds[name][self.skip :])

    def ratio(self, name: str, base: str) -> float:
        """Median over the turns of the time of one in units of that of another in the same turn."""
        pairs = list(zip(self.seconds[name], self.seconds[base]))[self.skip :]
        return statistics.median(a / b for a, b in pairs)


# ---- weights


def save(weights: Mapping[str, Any], path: Path) -> None:
    """Write weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    torch.save(weights, part)
    part.replace(path)


def restore(module: nn.Module, path: Path, device: torch.device | str = "cpu") -> None:
    """Give a module the weights of a file.

    Raises:
        UserError: if they are not there, not whole, not finite, or another module's.
    """
    regular_file(path, "file of weights")
    try:
        weights = torch.load(path, map_location=device, weights_only=True)
        checkpoints.refuse_not_finite(weights)
        module.load_state_dict(weights)
    except Exception as error:  # whatever the reader raises, the file is at fault
        raise UserError(f"{path} is damaged, or the weights of another model: delete it to train anew") from error
