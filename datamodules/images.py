"""What all image data modules share: scaling and augmentation.

Images travel as bytes and are scaled to [−1, 1] a batch at a time. Augmentation touches the training split only.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bd_lightning.checks import in_range
from bd_lightning.modules.base import batch_seed
from datamodules.base import DataModule
from datamodules.splits import DataError, Rows, run_seed
from datamodules.subsets import random_subset

FLIPS = 1_000_003  # keeps mirroring apart from the noise of the fields
SEEN = 5000
"""Training images that losses are validated on if no image is held out."""


def to_uint8(x: Tensor) -> Tensor:
    """Images from [−1, 1] (clipped) to bytes, the same shape."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_unit(x: Tensor) -> Tensor:
    """Images from bytes to [−1, 1], float32, the same shape."""
    return x.float() / 127.5 - 1


class ByteImages(Rows):
    """A split of images held in memory: x (N, C, H, W) of bytes and labels (N,).

    Raises:
        DataError: as `Rows`, and if they are no bytes.
    """

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        super().__init__(x, labels)
        if x.dtype != torch.uint8:
            raise DataError(f"ByteImages are of torch.uint8, 0 to 255, got {x.dtype}: convert them, or give Rows")

    def take(self, rows: Tensor) -> "ByteImages":
        """Some of the rows."""
        return ByteImages(self.x[rows], self.labels[rows])

    def __getitems__(self, indices):
        x, labels = super().__getitems__(indices)
        return to_unit(x), labels


class ImageDataModule(DataModule):
    """Base of the image data modules: `shape` is (channels, height, width), and samples lie in [−1, 1].

    Sub-classes return the splits from `read_split`, with `labels` (N,) and a method `take(rows)` that returns some of
    the rows.

    Args:
        flip: mirror training images left to right at random.
        keep: names of the only classes to keep; or the share, in [0, 1], of the training images of some classes that is
            kept (a random subset), where a share of zero takes the class out of every split.
        options: arguments of `DataModule`.

    Attributes:
        all_by: the setting by which no image is held out of training; empty if some are.
    """

    shape: tuple[int, int, int]
    cell = 1 / 127.5
    all_by: str = ""

    def __init__(
        self, flip: bool = False, keep: list[str | int] | dict[str | int, float] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.flip, self.keep = flip, keep
        self.shares: dict[int, float] = {}
        if self.class_names:
            self.choose_classes()

    def choose_classes(self) -> None:
        """Work out the share of each class; call it once `class_names` is known."""
        names = list(self.class_names)
        chosen = names if self.keep is None else self.keep
        keep = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, 1.0)
        wanted = {str(name): share for name, share in keep.items()}
        for name, share in wanted.items():
            if name not in names:
                raise ValueError(f"keep: no class '{name}'; the classes are {', '.join(names)}")
            in_range(0, 1, **{f"keep['{name}']": share})
        others = 1.0 if isinstance(self.keep, dict) else 0.0
        self.shares = {label: wanted.get(name, others) for label, name in enumerate(names)}
        self.class_names = tuple(name for label, name in enumerate(names) if self.shares[label] > 0)
        if not self.class_names:
            raise ValueError("keep leaves no class")

    @property
    def fingerprint(self):
        return [*super().fingerprint, sorted(self.shares.items()), "random shares"]

    def train_on_all(self, setting: str, *held_out: str) -> None:
        """Hold no image of the training set out: samples are compared with all of it.

        Args:
            setting: what says so, e.g. "data.val_size=0".
            held_out: the splits that are not trained on all the same, if there are any.
        """
        self.all_by, self.reference_split, self.unseen = setting, "train", (*held_out, "val")[0]
        self.trained_on = frozenset({"train", "val", "test"}) - set(held_out)

    def refuse_unheeded(self) -> None:
        """Refuse `keep` of classes that were not known when it was read.

        Raises:
            DataError: saying what to call.
        """
        if self.keep is not None and not self.shares:
            raise DataError(
                f"keep={self.keep} was not obeyed: {type(self).__name__} has no classes, or names them after "
                "ImageDataModule.__init__; set class_names before it, or call choose_classes() after"
            )

    def say_seen(self, count: int) -> None:
        """Say so if losses are validated on `count` training images."""
        if self.all_by:
            rank_zero_info(
                f"{self.all_by}: all images are trained on; validation takes {count} of them, and FID compares with "
                "the training set"
            )

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage; say so if validation has seen its images.

        Raises:
            DataError: if `keep` asks for classes that were not known when it was read.
        """
        self.refuse_unheeded()
        super().setup(stage)
        if stage == "fit":
            self.say_seen(len(self.split("val")))

    @abstractmethod
    def read_split(self, split: str) -> Any:
        """The whole of a split, with labels that count all classes.

        Raises:
            DataError: if files are missing or broken.
        """

    def load_split(self, split):
        thinned = any(share != 1 for share in self.shares.values())
        if thinned and split == "val" and self.called(split) == "train":  # some of those that are trained on
            whole = self.split("train")
            return whole.take(torch.tensor(random_subset(len(whole), SEEN)))
        rows = self.read_split(split)
        if not thinned:
            return rows
        try:
            chosen, labels, take = [], rows.labels, rows.take
        except AttributeError as error:
            raise DataError(
                f"{self.name}: data.keep chooses rows by their labels, and read_split gives a {type(rows).__name__} "
                "without `labels` (N,) or `take(rows)`: return datamodules.Rows, or write both"
            ) from error
        for label, share in self.shares.items():
            found = (labels == label).nonzero()[:, 0]
            part = share if split == "train" else math.ceil(share)
            chosen.append(found[random_subset(len(found), math.ceil(part * len(found)))])
        left = take(torch.cat(chosen).sort().values)
        number = torch.zeros(len(self.shares), dtype=torch.long)
        number[[label for label, share in self.shares.items() if share > 0]] = torch.arange(len(self.class_names))
        left.labels = number[left.labels]
        return left

    def on_before_batch_transfer(self, batch, dataloader_idx):
        """Mirror training images; which ones depends on the run's seed and the place of the batch in the run."""
        if not (self.flip and self.trainer and self.trainer.training):
            return batch
        x, labels = batch
        generator = torch.Generator().manual_seed(batch_seed(self.trainer, FLIPS, run_seed()))
        mirrored = (torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5).to(x.device, non_blocking=True)
        return torch.where(mirrored, x.flip(-1), x), labels
