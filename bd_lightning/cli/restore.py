"""predict … images=FOLDER with inpaint=MASK or upscale=K: what is missing of images, drawn from a posterior."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from bd_lightning.checks import UserError, regular_file
from bd_lightning.inverse import Operator, Outside, PosteriorFields, Shrunk, nearest_filled
from callbacks.pictures import grid_image
from datamodules.image_files import find, read
from datamodules.images import to_uint8, to_unit


class Task(ABC):
    """Base of what can be done to images.

    Attributes:
        operator: what is known of images (B, C, H, W), as (B, D).
        shape: shape (C, H, W) of the model's images.
        shapes: shapes that images which are read may have, all of them the same.
        pixel_noise: standard deviation of what is given, in the units of images, for a model of images.
        decoder_noise: the same for a model of codes, whose decoder errs more.
        mask: what the result depends on besides, as bytes.
    """

    pixel_noise: float = 0.05
    decoder_noise: float = 0.1
    mask: bytes = b""

    operator: Operator
    shape: tuple[int, int, int]
    shapes: tuple[tuple[int, int, int], ...]

    def finished(self, images: Tensor, given: Tensor) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] of drawn ones and of those that were given."""
        return images

    @abstractmethod
    def baseline(self, given: Tensor) -> Tensor:
        """What the nearest pixels give, (B, C, H, W)."""

    @abstractmethod
    def measured(self, given: Tensor) -> Tensor:
        """What is known of the images that were given, (B, D)."""

    @abstractmethod
    def shown(self, given: Tensor) -> Tensor:
        """What is known as pictures of the size of the result."""

    def errors(self, drawn: Tensor, given: Tensor) -> dict[str, float]:
        """Root mean square errors of drawn images, black to white 1, where the truth was given; empty elsewhere."""
        return {}


class Inpaint(Task):
    """Fills the white pixels of a mask.

    Args:
        path: file of the mask.
        shape: (C, H, W) of the model's images.

    Raises:
        UserError: if it is missing, of another size, or all of one colour.
    """

    def __init__(self, path: str, shape: tuple[int, int, int]) -> None:
        regular_file(path, "mask")
        pixels = pil_to_tensor(read(Path(path), 1))[0]
        if tuple(pixels.shape) != shape[1:]:
            size, wanted = (" × ".join(map(str, one)) for one in (pixels.shape, shape[1:]))
            raise UserError(f"the mask {path} has {size} pixels, and this model's images {wanted}: give it that size")
        self.hole, self.shape, self.shapes = pixels >= 128, shape, (shape,)
        self.mask = self.hole.numpy().tobytes()
        try:
            self.operator = Outside(self.hole)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def finished(self, images: Tensor, given: Tensor) -> Tensor:
        return torch.where(self.hole.to(images.device), images, given)

    def baseline(self, given: Tensor) -> Tensor:
        return nearest_filled(given, self.hole)

    def measured(self, given: Tensor) -> Tensor:
        return self.operator(given)

    def shown(self, given: Tensor) -> Tensor:
        return given.masked_fill(self.hole.to(given.device), 0.0)

    def errors(self, drawn: Tensor, given: Tensor) -> dict[str, float]:
        images = {"drawn": drawn, "nearest pixel": self.baseline(given)}
        return {name: error((one - given)[..., self.hole]) for name, one in images.items()}


class Upscale(Task):
    """Enlarges images. Images that are large already are shrunk first, and show how good the result is.

    Args:
        factor: by how much.
        shape: (C, H, W) of the model's images.

    Raises:
        UserError: for a factor that does not divide their size.
    """

    decoder_noise = 0.03  # the mean of a block errs less than its pixels

    def __init__(self, factor: int, shape: tuple[int, int, int]) -> None:
        if shape[1] % factor or shape[2] % factor:
            size = f"{shape[1]} × {shape[2]}"
            raise UserError(f"upscale must divide {size}, the size of this model's images; got {factor}")
        self.factor, self.operator = factor, Shrunk(factor)
        self.shape = shape
        self.shapes = ((shape[0], shape[1] // factor, shape[2] // factor), shape)

    def small(self, given: Tensor) -> Tensor:
        """Small images of those that were given."""
        return given if given.shape[1:] == self.shapes[0] else F.avg_pool2d(given, self.factor)

    def baseline(self, given: Tensor) -> Tensor:
        return self.small(given).repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def measured(self, given: Tensor) -> Tensor:
        return self.small(given).flatten(1)

    def shown(self, given: Tensor) -> Tensor:
        return self.baseline(given)

    def errors(self, drawn: Tensor, given: Tensor) -> dict[str, float]:
        if given.shape[1:] != self.shape:
            return {}
        images = {"drawn": drawn, "repeated pixels": self.baseline(given)}
        return {name: error(one - given) for name, one in images.items()}


def error(difference: Tensor) -> float:
    """Root mean square of a difference of images in [−1, 1], black to white 1."""
    return float((difference / 2).square().mean().sqrt())


def task_of(config: Any, shape: tuple[int, ...] | None) -> Task:
    """What is asked for.

    Raises:
        UserError: for two tasks at once, without images, and for models that draw none.
    """
    if config["inpaint"] and config["upscale"]:
        raise UserError("inpaint and upscale are two tasks: give one of them")
    if not config["images"]:
        raise UserError("inpaint and upscale need images=FOLDER, of which something is missing")
    if not (config["inpaint"] or config["upscale"]):
        raise UserError("images=FOLDER needs a task: inpaint=MASK, whose white pixels are filled, or upscale=4")
    if shape is None or len(shape) != 3:
        raise UserError("inpaint and upscale are for models of images")
    size = (shape[0], shape[1], shape[2])
    return Inpaint(config["inpaint"], size) if config["inpaint"] else Upscale(config["upscale"], size)


def read_images(folder: str, n: int, shapes: tuple[tuple[int, int, int], ...]) -> Tensor:
    """At most n images of a folder, in order of their names, (N, C, H, W) in [−1, 1]. All have the shape of the first.

    Raises:
        UserError: if there are none, or one is of another size than these.
    """
    paths = list(find(Path(folder), set()))[:n]
    if not paths:
        raise UserError(f"no images in {folder}: give images=FOLDER with PNG or JPEG files in it")
    found = []
    for path in paths:
        pixels = pil_to_tensor(read(path, shapes[0][0]))
        if tuple(pixels.shape) not in shapes:
            size, *wanted = (" × ".join(map(str, one[1:])) for one in (pixels.shape, *shapes))
            takes = " or ".join(wanted)
            raise UserError(f"{path} has {size} pixels, and what is asked for takes {takes}: give it that size")
        shapes = (tuple(pixels.shape),)
        found.append(to_unit(pixels))
    return torch.stack(found)


class Restoring(L.LightningModule):
    """Draws images that agree with what is given, by the sampler of a model: one for each, or the mean of several.

    A draw is one possible image; the mean of many, near that of the posterior, is nearer to the truth by squares, and
    blurred where draws differ.

    Args:
        model: the model.
        task: what is to be done.
        given: the images, (N, *shape of the task), in [−1, 1].
        latents: decodes what the model draws; None if it draws images.
        draws: draws of each image; draw k of image i has the noise of sample i + 2³² k, so that no other image or seed
            shares it.
    """

    def __init__(self, model: Any, task: Task, given: Tensor, latents: Any, draws: int = 1) -> None:
        super().__init__()
        self.model, self.task, self.given, self.latents, self.draws = model, task, given, latents, draws

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of what the model draws."""
        if self.latents is None:
            return x
        images = self.latents.decoded(x)
        return images.mean(1, keepdim=True) if self.task.shape[0] == 1 else images

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] for requests "index", "seed" and, if classes are asked for, "label", (B,)."""
        given = self.given[batch["index"].cpu()].to(self.device)
        label = batch.get("label")
        with torch.inference_mode(False):  # clones of what was made in it are ordinary, and can be differentiated
            y = self.task.measured(given.clone())
            fields = self.model.asked(None if label is None else label.clone())
            noise = self.task.pixel_noise if self.latents is None else self.task.decoder_noise
            posterior = PosteriorFields(fields, y, lambda x: self.task.operator(self.decode(x)), noise)
        indices, seed = batch["index"].tolist(), int(batch["seed"][0])
        total = torch.zeros(len(indices), *self.task.shape, device=self.device)
        for k in range(self.draws):
            x = self.model.sample([i + (k << 32) for i in indices], seed=seed, fields=posterior)
            with torch.no_grad():
                total += self.decode(x).clamp(-1, 1)
        return self.task.finished(total / self.draws, given)


def write_beside(folder: Path, task: Task, given: Tensor) -> str:
    """Write given.png, a grid of what was known, and, where the truth was given too, errors.json; a line that says so.

    Args:
        folder: where the results lie.
        task: what was done.
        given: the images that were given.
    """
    grid_image(to_uint8(task.shown(given[:64]))).save(folder / "given.png")
    drawn = torch.stack([pil_to_tensor(Image.open(folder / f"{i:06d}.png")) for i in range(len(given))])
    errors = task.errors(to_unit(drawn), given)
    if not errors:
        return ""
    (folder / "errors.json").write_text(json.dumps({**errors, "images": len(given)}, indent=1))
    words = ", ".join(f"{value:.4f} ({name})" for name, value in errors.items())
    return f"; root mean square error of what was missing, black to white 1: {words}"
