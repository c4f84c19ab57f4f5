"""Latent spaces: frozen autoencoders whose standardised codes are data, and whose decoder makes images of samples.

A `LatentSpace` is not part of the model that learns in it: neither its averages nor its checkpoints hold the
autoencoder's weights.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bd_lightning import addresses, checkpoints, facts
from bd_lightning.checks import UserError, positive
from bd_lightning.modules import Autoencoder


class LatentSpace(ABC):
    """Base of the latent spaces.

    Attributes:
        image_shape: (channels, height, width) of an image; None takes any that it can reduce.
        data_name: name of the data set that it was trained on, if it is known.
        key: what identifies it in caches, plain values.
        space: what its codes are known by in the facts of data; that of its copies in another precision too.
    """

    image_shape: tuple[int, ...] | None = None
    data_name: str | None = None
    key: list

    @property
    def space(self) -> str:
        return str(self.key)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, *latent), of mean about zero and variance about one, of images (B, C, H, W) in [−1, 1]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), in [−1, 1] up to overshoot, of codes (B, *latent)."""

    def decoded(self, z: Tensor) -> Tensor:
        """The same with a derivative, which inverse problems need; those of `decode` if it has one."""
        return self.decode(z)


def check_codes(latents: LatentSpace, shape: Sequence[int], space: str | None) -> None:
    """Refuse an autoencoder of other codes than a model learned in, and warn of one that may be another.

    Args:
        latents: the autoencoder.
        shape: shape of the model's samples.
        space: what the samples are codes of, as the facts of the model's data have it; None if that is not known.

    Raises:
        UserError: if the codes have another shape.
    """
    if latents.image_shape is None:
        return
    found = tuple(latents.encode(torch.zeros(1, *latents.image_shape)).shape[1:])
    if found != tuple(shape):
        raise UserError(
            f"this autoencoder has codes of shape {list(found)}, and the model's samples have {list(shape)}: give "
            "data.autoencoder the one that it learned in, or leave it out"
        )
    if space is not None and space != latents.space:
        warnings.warn(
            "this autoencoder is not the file that the model learned in: unless its weights are the same, what it "
            "decodes are no images",
            stacklevel=2,
        )


class TrainedLatents(LatentSpace):
    """The codes of an `Autoencoder` run.

    Args:
        ckpt_path: its checkpoint, or an exported one (see `checkpoints.read`).

    Raises:
        ValueError: if the file is missing, damaged, or a checkpoint of something else.
    """

    def __init__(self, ckpt_path: str) -> None:
        try:
            self.module, stored = checkpoints.load(ckpt_path, Autoencoder)
        except UserError as error:
            first = "" if Path(ckpt_path).exists() else "; train an autoencoder first, with experiment=autoencoder"
            raise ValueError(f"{error}{first}") from error
        self.image_shape = tuple(stored["facts"]["shape"])
        self.data_name = stored["facts"].get("name")
        self.key, self.codes = ["trained", addresses.digest(ckpt_path)], self.module.codes_of(ckpt_path)

    @property
    def space(self):
        return self.codes

    @torch.no_grad()
    def encode(self, x):
        return self.module.to(x.device).encode(x)

    @torch.no_grad()
    def decode(self, z):
        return self.decoded(z)

    def decoded(self, z):
        return self.module.to(z.device).decode(z)


class DiffusersLatents(LatentSpace):
    """The codes of a frozen `diffusers.AutoencoderKL`, scaled as its config says.

    Args:
        source: a local folder, or the id of a model on the hub, which is downloaded.
        subfolder: folder inside it, e.g. "vae".
        batch_size: images at a time.

    Raises:
        ValueError: if diffusers is not installed or the model cannot be had.
    """

    def __init__(self, source: str, subfolder: str | None = None, batch_size: int = 64) -> None:
        positive(batch_size=batch_size)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError("diffusers is not installed: uv sync --group diffusers") from error
        try:
            self.module = AutoencoderKL.from_pretrained(source, subfolder=subfolder, use_safetensors=True)
            self.module.requires_grad_(False).eval()
        except Exception as error:  # no such folder, no network, weights of another class
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"no AutoencoderKL could be loaded from {source!r} ({reason})") from error
        self.batch_size = batch_size
        self.scale = float(self.module.config.scaling_factor)
        self.shift = float(getattr(self.module.config, "shift_factor", None) or 0.0)
        self.channels = int(self.module.config.in_channels)
        total = sum(float(p.double().sum()) for p in self.module.parameters())
        self.key = ["diffusers", source, subfolder, facts.rounded(total)]

    @torch.no_grad()
    def encode(self, x):
        model = self.module.to(x.device)
        x = x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x
        codes = [model.encode(rows).latent_dist.mean for rows in x.split(self.batch_size)]
        return (torch.cat(codes) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z):
        return self.decoded(z)

    def decoded(self, z):
        model = self.module.to(z.device)
        z = z / self.scale + self.shift
        return torch.cat([model.decode(rows).sample for rows in z.split(self.batch_size)])
