"""Codes of images as data."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bd_lightning.latents import LatentSpace
from bd_lightning.progress import bar
from datamodules.base import DataModule
from datamodules.cache import cache_path, load_cached, sampled, save_cached
from datamodules.images import ImageDataModule
from datamodules.splits import Rows


class Latents(DataModule):
    """The codes of another data module's images; samples are decoded before they are shown or judged.

    Every split is encoded once and cached under <data.root>/.cache. With `flip` in the images, the training split holds
    the codes of mirrored images too.

    Args:
        images: the images.
        autoencoder: what encodes and decodes them.
        any_data: accept an autoencoder that was trained on another data set.
        options: arguments of `DataModule`.

    Raises:
        ValueError: if the autoencoder was trained on images of another shape, or on other data, or cannot halve them.
    """

    sigma_data = 1.0

    def __init__(
        self, images: ImageDataModule, autoencoder: LatentSpace, any_data: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        if autoencoder.image_shape not in (None, images.shape):
            raise ValueError(
                f"the autoencoder was trained on images of shape {autoencoder.image_shape}, "
                f"{images.name} has {images.shape}"
            )
        if autoencoder.data_name not in (None, images.name) and not any_data:
            raise ValueError(
                f"the autoencoder was trained on {autoencoder.data_name}, the images are {images.name}; "
                "if that is what you want, set data.any_data=true"
            )
        self.images, self.autoencoder = images, autoencoder
        self.name = f"{images.name}-latents"
        self.class_names, self.reference_split = images.class_names, images.reference_split
        self.trained_on = images.trained_on
        codes = autoencoder.encode(torch.zeros(1, *images.shape))
        self.shape = tuple(codes.shape[1:])
        if self.decode(codes).shape[1:] != images.shape:
            raise ValueError(
                f"the autoencoder does not give images of shape {images.shape} back; choose a size that it can halve"
            )

    @property
    def observed(self):
        return self.images

    @property
    def facts(self):
        return replace(super().facts, space=self.autoencoder.space)

    @property
    def fingerprint(self):
        return [*super().fingerprint, self.images.fingerprint, self.autoencoder.key]

    def prepare_data(self) -> None:
        """Download the images."""
        self.images.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Load the codes of a stage; say so if validation has seen its images.

        Raises:
            DataError: as for the images.
        """
        self.images.refuse_unheeded()
        super().setup(stage)
        if stage == "fit":
            self.images.say_seen(len(self.split("val")))

    def decode(self, x):
        images = self.autoencoder.decode(x)
        return images.mean(1, keepdim=True) if self.images.shape[0] == 1 else images

    def encode(self, x):
        return self.autoencoder.encode(x)

    def load_split(self, split):
        mirrored = split == "train" and self.images.flip
        path = cache_path(self, f"codes-{split}", mirrored, sampled(self.images, split))
        cached = load_cached(path, "codes", "labels")
        if cached is None:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            codes: list[Tensor] = []
            labels: list[Tensor] = []
            images = self.images.load_split(split)
            with bar(f"codes of {self.images.name}, {split} split", len(images) * (1 + mirrored)) as progress:
                for flip in (False, True)[: 1 + mirrored]:
                    for x, y in DataLoader(images, self.eval_batch_size, collate_fn=self.images.collate):
                        codes.append(self.autoencoder.encode((x.flip(-1) if flip else x).to(device)).cpu())
                        labels.append(y)
                        progress.update(len(x))
            cached = {"codes": torch.cat(codes), "labels": torch.cat(labels)}
            save_cached(cached, path)
        return Rows(cached["codes"], cached["labels"])
