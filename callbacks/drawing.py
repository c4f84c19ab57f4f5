"""Drawing samples on all ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.dynamics import SamplingDiverged
from bd_lightning.progress import bar
from datamodules.base import DataModule


class SampleModule(Protocol):
    """What callbacks use of a LightningModule that draws samples (see `bd_lightning.modules`).

    The last four have a meaning where samples are vectors.

    Attributes:
        device: where it computes.
        samplers: samplers by name, each with `calls`, its number of network calls.
        sampler: name of the default one.
        conditional: whether classes have to be asked for.
        drawn_classes: indices of the classes that samples are of where none are asked for.
        sample: draws samples of given indices.
        available: how many different samples there are, at a stage, of a number that is asked for.
        all_gather: the tensors of all ranks, one above the other.
        log_dict: logs numbers.
        describe: how the model is guided, and the like.
        drawing: all that samples by a sampler depend on beside weights and noise, as text.
        dim: number of data dimensions.
        multi_scale: fields at every noise level, or at σ = 0 alone.
        fields: the learned fields, a function of points and noise levels.
        analytic: the fields that the losses are minimised by for a density in closed form.
    """

    device: torch.device
    samplers: Mapping[str, Any]
    sampler: str
    conditional: bool
    drawn_classes: list[int]
    sample: Any
    available: Any
    all_gather: Any
    log_dict: Any
    describe: Any
    drawing: Any
    dim: int
    multi_scale: bool
    fields: Any
    analytic: Any


def manner(pl_module: SampleModule, sampler: str, batch_size: int) -> str:
    """How samples are drawn, for protocols: the sampler, its network calls, guidance, chains that depend on others."""
    by = pl_module.samplers[sampler]
    among = f", {batch_size} chains resampled together" if by.interacting else ""
    return f"{sampler}, {by.calls} network calls{pl_module.describe()}{among}"


SHAPES = {"images": (3, "points"), "vectors": (1, "images")}
"""Kinds of samples: number of axes, and the callbacks to choose instead."""


def check(trainer: L.Trainer, pl_module: Any, owner: str, kind: str, samplers: Iterable[str | None]) -> None:
    """Refuse samples of another kind, and samplers that the module does not have.

    Args:
        trainer: the trainer, with its data module.
        pl_module: the module.
        owner: name of the callback.
        kind: "images" or "vectors".
        samplers: names of samplers; None stands for the module's own choice.

    Raises:
        UserError: naming the callback, and what there is to choose.
    """
    data, (axes, others) = data_of(trainer), SHAPES[kind]
    shape = data.sample_shape
    if shape is None:
        raise UserError(f"{owner} is for {kind}, and {data.name} is an environment: choose callbacks=returns")
    if len(shape) != axes:
        raise UserError(f"{owner} is for {kind}, and a sample has shape {shape}: choose callbacks={others}")
    for name in samplers:
        if name is not None and name not in pl_module.samplers:
            raise UserError(
                f"{owner}: no sampler named '{name}'; the model has {', '.join(pl_module.samplers)}: name one of them, "
                "or leave the callback out by callbacks.NAME=null"
            )


def data_of(trainer: L.Trainer) -> DataModule:
    """The data module of a trainer."""
    return trainer.datamodule  # type: ignore[attr-defined]


def precision_of(trainer: L.Trainer) -> AbstractContextManager[Any]:
    """The precision that `predict` draws in, so that samples are judged and shown as they are written."""
    return trainer.precision_plugin.predict_step_context()


@contextmanager
def all_or_none(trainer: L.Trainer) -> Iterator[None]:
    """Fail on every rank if sampling fails on one, so that no rank waits for the others in what follows."""
    lost: UserError | None = None
    try:
        yield
    except SamplingDiverged as error:
        lost = error
    if not trainer.strategy.reduce_boolean_decision(lost is None, all=True):
        raise lost or UserError("samples were lost on another rank")


def classes_of(pl_module: SampleModule, indices: Sequence[int]) -> Tensor | None:
    """The classes that a model draws, in turn, for samples i, (B,); None where no class has to be asked for."""
    if not pl_module.conditional:
        return None
    known = pl_module.drawn_classes
    return torch.tensor([known[i % len(known)] for i in indices], device=pl_module.device)


def heed(trainer: L.Trainer) -> None:
    """End what takes long, in a run of one process, after SIGTERM; several would wait for each other.

    Raises:
        SIGTERMException: if it has arrived.
    """
    if trainer.received_sigterm and trainer.world_size == 1:
        raise SIGTERMException


def draw(
    trainer: L.Trainer, pl_module: SampleModule, n: int, batch_size: int, seed: int, sampler: str | None
) -> Iterator[Tensor]:
    """This rank's share of n samples, decoded by the data module, a batch at a time.

    Sample i depends on the seed and on i alone, unless the sampler lets the chains of a batch interact, and goes to
    rank i modulo the number of ranks. A class-conditional module is asked for class i modulo the number of classes.

    Raises:
        SIGTERMException: at the next step after SIGTERM has arrived, in a run of one process.
    """
    mine = range(trainer.global_rank, n, trainer.world_size)
    name = sampler or pl_module.sampler
    with bar(f"samples ({name})", len(mine)) as progress:

        def watched(start: int, count: int, step: int, x: Tensor | None = None) -> None:
            heed(trainer)
            _move(progress, start, count, pl_module.samplers[name].calls, step, x)

        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            label = classes_of(pl_module, indices)
            watch = partial(watched, start, len(indices))
            with precision_of(trainer):
                x = pl_module.sample(indices, sampler=sampler, seed=seed, label=label, watch=watch)
            _move(progress, start, len(indices), 1, 1)
            yield data_of(trainer).decode(x)


def _move(progress: Any, start: int, count: int, calls: int, step: int, x: Tensor | None = None) -> None:
    """Move a bar to the share of a batch that is drawn after a step; a step takes at least one call."""
    progress.update(start + count * min(step, calls) // calls - progress.n)


def draw_together(
    trainer: L.Trainer, pl_module: SampleModule, n: int, batch_size: int, seed: int, sampler: str | None
) -> Tensor:
    """All n samples on every rank, in order and decoded, shape (n, *shape), on the CPU.

    Raises:
        UserError: on every rank, if chains were lost on any.
    """
    world = trainer.world_size
    padded = -(-n // world) * world  # equal shares; the few too many are cut off
    with all_or_none(trainer):
        mine = torch.cat(list(draw(trainer, pl_module, padded, batch_size, seed, sampler)))
    if world == 1:
        return mine[:n].cpu()
    shares: Tensor = pl_module.all_gather(mine)  # (world, n / world, *shape)
    return shares.transpose(0, 1).flatten(0, 1)[:n].cpu()
