"""Drawing samples on all ranks, and putting pictures and records where people look for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from bd_lightning.checks import UserError
from bd_lightning.dynamics import SamplingDiverged


def check_sampler(pl_module: L.LightningModule, name: str | None, owner: str) -> None:
    """Refuse a sampler that the module does not have.

    Raises:
        UserError: naming the callback and the samplers that exist.
    """
    if name is not None and name not in pl_module.samplers:
        raise UserError(f"{owner}: no sampler named '{name}'; the model has {', '.join(pl_module.samplers)}")


def need_images(trainer: L.Trainer, owner: str) -> None:
    """Refuse data that is not images.

    Raises:
        UserError: naming the callback and what to choose instead.
    """
    shape = trainer.datamodule.observed.shape  # type: ignore[attr-defined]
    if len(shape) != 3:
        raise UserError(f"{owner} is for images, and a sample has shape {shape}: choose callbacks=points")


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


def draw(
    trainer: L.Trainer, pl_module: L.LightningModule, n: int, batch_size: int, seed: int, sampler: str | None
) -> Iterator[Tensor]:
    """This rank's share of n samples, decoded by the data module, a batch at a time.

    Sample i depends on the seed and on i alone, and goes to rank i modulo the number of ranks. A class-conditional
    module is asked for class i modulo the number of classes.
    """
    mine = range(trainer.global_rank, n, trainer.world_size)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        label = None
        if pl_module.conditional:
            label = torch.tensor([i % pl_module.num_classes for i in indices], device=pl_module.device)
        x = pl_module.sample(indices, sampler=sampler, seed=seed, label=label)
        yield trainer.datamodule.decode(x)  # type: ignore[attr-defined]


def draw_together(
    trainer: L.Trainer, pl_module: L.LightningModule, n: int, batch_size: int, seed: int, sampler: str | None
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
    shares = pl_module.all_gather(mine)  # (world, n / world, *shape)
    return shares.transpose(0, 1).flatten(0, 1)[:n].cpu()


def grid_image(images: Tensor, columns: int = 8, zoom: int | None = None) -> Image.Image:
    """A picture of images, bytes of shape (n, C, H, W), enlarged without smoothing to at least 32 pixels each."""
    zoom = zoom or max(1, 32 // images.shape[-1])
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return Image.fromarray(make_grid(images, nrow=columns, padding=2).permute(1, 2, 0).numpy())


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder."""
    return Path(trainer.default_root_dir)


def step_of(trainer: L.Trainer) -> int:
    """The optimiser step that the module's weights come from, also when they were loaded to be evaluated."""
    return max(trainer.global_step, trainer.lightning_module.loaded_step)


def publish_image(trainer: L.Trainer, key: str, path: Path, caption: str) -> None:
    """Log a picture that lies at `path` with every logger that takes pictures. Call on rank 0."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [str(path)], step=step_of(trainer), caption=[caption])


def publish_animation(
    trainer: L.Trainer, name: str, pictures: list[Image.Image], seconds: float, hold: float = 1.0
) -> None:
    """Write pictures as <run folder>/samples/trajectory-<name>.gif, the last one held, and log them as a video."""
    path = run_folder(trainer) / "samples" / f"trajectory-{name}.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [round(1000 * seconds / len(pictures))] * (len(pictures) - 1) + [round(1000 * hold)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
    for logger in trainer.loggers:
        if hasattr(logger, "log_video"):
            logger.log_video(f"trajectory/{name}", [str(path)], step=trainer.global_step, format=["gif"])


def append_record(trainer: L.Trainer, name: str, row: dict[str, Any]) -> None:
    """Append a row to <run folder>/<name>, a JSON list; "summary" of the last row is printed when the run ends.

    It takes the place of a row of the same step and protocol, which a run that was killed had written before.
    """
    path = run_folder(trainer) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.is_file() else []

    def place(one: dict[str, Any]) -> tuple:
        return one["step"], one.get("protocol"), set(one)

    rows = [old for old in rows if place(old) != place(row)]
    part = Path(f"{path}.part")
    part.write_text(json.dumps([*rows, row], indent=1))
    part.replace(path)
