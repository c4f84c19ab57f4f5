"""Pictures and animations: made of tensors and figures, written to the run folder, handed to the loggers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from callbacks.records import run_folder, step_of

IMAGE_WIDTH, GRID_WIDTH = 64, 600
"""Small images in a grid are enlarged to about so many pixels each, as long as the grid is no wider than this."""


def grid_image(images: Tensor, columns: int = 8, zoom: int | None = None) -> Image.Image:
    """A picture of images, bytes of shape (n, C, H, W), side by side.

    Args:
        images: the images.
        columns: images in a row.
        zoom: whole factor that they are enlarged by, without smoothing; None makes small ones large enough to look at.
    """
    width = images.shape[-1]
    zoom = zoom or max(1, min(IMAGE_WIDTH // width, GRID_WIDTH // (columns * width)))
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return Image.fromarray(make_grid(images, nrow=columns, padding=2).permute(1, 2, 0).numpy())


def figure_image(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _loggers(trainer: L.Trainer, method: str) -> list[Any]:
    """The loggers that have a method. Lightning has no base class of those that take pictures or videos."""
    return [logger for logger in trainer.loggers if hasattr(logger, method)]


def publish_image(trainer: L.Trainer, key: str, path: Path, caption: str) -> None:
    """Log a picture that lies at `path` with every logger that takes pictures. Call on rank 0."""
    for logger in _loggers(trainer, "log_image"):
        logger.log_image(key, [str(path)], step=step_of(trainer), caption=[caption])


def publish_lines(
    trainer: L.Trainer, key: str, lines: Mapping[str, Sequence[tuple[float, float]]], x_name: str
) -> None:
    """Log lines by name, each of points (x, y), with every logger that takes them. Call on rank 0."""
    for logger in _loggers(trainer, "log_lines"):
        logger.log_lines(key, lines, x_name)


def publish_picture(
    trainer: L.Trainer, place: str, write: Callable[[Path], Any], caption: str, key: str | None = None
) -> None:
    """Write <run folder>/<place>-<step>.png and log it. Call on rank 0.

    Args:
        trainer: the trainer.
        place: where in the run folder, e.g. "figures/fields".
        write: writes the picture to a path.
        caption: a line beside it.
        key: the name it is logged under; None takes `place`.
    """
    path = run_folder(trainer) / f"{place}-{step_of(trainer):07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    publish_image(trainer, key or place, path, caption)


def publish_animation(
    trainer: L.Trainer, name: str, pictures: list[Image.Image], seconds: float, hold: float = 1.0
) -> None:
    """Write pictures as <run folder>/samples/trajectory-<name>.gif, the last one held, and log them as a video."""
    path = run_folder(trainer) / "samples" / f"trajectory-{name}.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [round(1000 * seconds / len(pictures))] * (len(pictures) - 1) + [round(1000 * hold)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
    for logger in _loggers(trainer, "log_video"):
        logger.log_video(f"trajectory/{name}", [str(path)], step=trainer.global_step, format=["gif"])
