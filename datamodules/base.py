"""What all data modules share: facts, splits and loaders."""

import math
import operator
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bd_lightning.checks import in_range, positive
from bd_lightning.facts import Facts, SampleFacts
from bd_lightning.targets import Density
from datamodules.splits import DataError, Late, ShuffledShare, labels_of, moved, refuse_labels, stacked
from datamodules.splits import Rows as Rows  # where modules of the user's own look for it


class Data(L.LightningDataModule):
    """Base of all that a run may learn from.

    Attributes:
        name: what caches and protocols call it.
        root: folder of data sets; also holds what is derived from them.
        batch_size: batch size of one device.
        total_batch_size: effective batch that `batch_size` follows from; None where it is given itself.
    """

    name: str
    root: str
    batch_size: int
    total_batch_size: int | None = None

    def share(self, parts: int) -> None:
        """Cut `total_batch_size`, if there is one, into the batches of devices and of accumulated steps.

        Args:
            parts: devices × nodes × accumulated batches.

        Raises:
            DataError: if it cannot be cut into so many of two samples at least, and without a batch size.
        """
        if "batch_size" not in vars(self):
            raise DataError(
                f"{type(self).__name__}.__init__ has to call super().__init__(batch_size), which sets what all have"
            )
        total = self.total_batch_size
        if total is not None:
            if total % parts or total < 2 * parts:
                raise DataError(
                    f"data.total_batch_size {total} cannot be cut into {parts} equal batches of at least 2, one for "
                    "each device and accumulated step: choose a multiple, or set data.batch_size alone"
                )
            self.batch_size = total // parts

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What a model has to know of it."""

    remark: str = ""
    """What protocols of evaluations say of it besides."""

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of a sample as it is shown and judged; None where a model draws no samples of the data."""
        return None


class DataModule(Data):
    """Base of the data sets.

    Sub-classes set the attributes below, download in `prepare_data` (which Lightning calls once per node), and return
    the splits from `load_split`.

    Attributes:
        shape: shape of one sample.
        name: what caches and protocols call the data.
        class_names: names of the classes, in label order; empty if there are none.
        sigma_data: standard deviation of the training samples in the model's units.
        reference_split: split that samples are compared with: "stage" is the held-out split of the running stage.
        unseen: the split to judge by what is not trained on.
        trained_on: names of the splits whose samples are trained on.
        density: the density that the samples are from, where it is known in closed form.
        cell: width of the cells that values were rounded to, in the model's units; None for real numbers.
        log_volume: log of the volume of a sample's units, as they are shown, over that of the model's.

    Args:
        root: folder of data sets; also holds what is derived from them.
        batch_size: batch size of one device. The effective batch is batch_size × devices × nodes ×
            trainer.accumulate_grad_batches.
        total_batch_size: the effective batch itself; with it, batch_size is what is left for one device.
        eval_batch_size: batch size of validation and test.
        num_workers: worker processes of each loader; each is seeded from the run's seed. A training split that lies
            on the device as a whole (see `moved`) needs none.
        pin_memory: copy batches to page-locked memory, for GPUs; likewise.
    """

    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    sigma_data: float
    reference_split: str = "stage"
    unseen: str = "val"
    trained_on: frozenset[str] = frozenset({"train"})
    density: Density | None = None
    cell: float | None = None
    log_volume: float = 0.0

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        total_batch_size: int | None = None,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        positive(batch_size=batch_size, eval_batch_size=eval_batch_size, total_batch_size=total_batch_size or 1)
        if batch_size < 2:
            raise ValueError("batch_size must be at least 2: the kernel estimate averages over pairs")
        if eval_batch_size < 2:
            raise ValueError("eval_batch_size must be at least 2: losses on other splits average over pairs too")
        in_range(0, 256, num_workers=num_workers)
        self.root = root
        self.batch_size, self.eval_batch_size, self.total_batch_size = batch_size, eval_batch_size, total_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.splits: dict[str, Any] = {}

    @property
    def facts(self) -> SampleFacts:
        """What models are built from and told apart by.

        Raises:
            DataError: if the class does not say what it has to.
        """
        for name in ("shape", "sigma_data"):
            if getattr(self, name, None) is None:
                raise DataError(f"{self.name} must say its {name}: it has no such attribute")
        try:
            shape, scale = tuple(map(operator.index, self.shape)), float(self.sigma_data)
            count = len(self.class_names)
            names = tuple(map(str, () if isinstance(self.class_names, str) else self.class_names))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.name}: shape must be whole numbers, sigma_data a number and class_names a list of names; got "
                f"{self.shape!r}, {self.sigma_data!r} and {self.class_names!r}"
            ) from error
        if not (0 < scale < math.inf and all(size > 0 for size in shape) and len(names) == count):
            raise DataError(
                f"{self.name}: sizes of shape and sigma_data must be positive, and class_names a list of names; got "
                f"{shape}, {scale:g} and {self.class_names!r}"
            )
        return SampleFacts(self.name, shape, scale, names)

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of what `decode` returns."""
        return tuple(self.observed.shape)

    @property
    def observed(self) -> "DataModule":
        """The data module of what `decode` returns: this one, unless it holds codes of something else."""
        return self

    def decode(self, x: Tensor) -> Tensor:
        """Samples of the model, (B, *shape), as they are shown and judged: images in [−1, 1], or vectors unchanged."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        """What a model learns, (B, *shape), of what is shown and judged: the inverse of `decode`."""
        return x

    def called(self, split: str) -> str:
        """What protocols call a split: "train" for all that is trained on."""
        return "train" if split in self.trained_on else split

    @property
    def fingerprint(self) -> list[Any]:
        """What the splits depend on, as plain values: what is derived from the data is cached under it.

        What it leaves out, such as arguments of a sub-class, is told by samples (see `cache.sampled`).
        """
        return [self.name, self.shape, self.class_names]

    @abstractmethod
    def load_split(self, split: str) -> Any:
        """The "train", "val" or "test" split as a data set of (x, label), without augmentation.

        Raises:
            DataError: if files are missing or broken.
        """

    def split(self, split: str) -> Any:
        """A split, loaded at its first use."""
        if split not in self.splits:
            rows = self.load_split(split)
            self._refuse_unsound(split, rows)
            self.splits[split] = rows
        return self.splits[split]

    def _refuse_unsound(self, split: str, rows: Any) -> None:
        """Refuse a split that is empty, whose first sample no model could learn from, or whose labels are no classes.

        Raises:
            DataError: saying what it has to be.
        """
        place = f"{self.name}: the {split} split"
        try:
            if not len(rows) and split == "train":  # said with what fills a batch
                return
            if len(rows) < 2 and split != "train":  # losses compare samples with each other
                count = len(rows) or "no"
                raise DataError(f"{place} has {count} sample{'s' * (not len(rows))}: give it two at least")
            if isinstance(rows, Tensor):
                raise TypeError("no labels")
            x, label = rows[0]
            shape, dtype, labels = tuple(x.shape), x.dtype, labels_of(rows)
            int(label)
            if not isinstance(x, Tensor):
                raise TypeError(f"a sample is a {type(x).__name__}; torch.as_tensor(x).float() makes a tensor of it")
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{place} must be a data set of pairs, x a tensor and a label, such as datamodules.Rows(x, labels)"
                f"; its first is not ({error!r})"
            ) from error
        if shape != tuple(self.shape):
            raise DataError(
                f"{place} has samples of the shape {shape}, and its shape is said to be {tuple(self.shape)}"
            )
        if dtype != torch.float32:
            raise DataError(f"{place} has samples of {dtype}, and models take torch.float32: return x.float()")
        refuse_labels(place, labels, len(self.class_names))

    def _refuse_few(self, size: int, world: int, accumulated: int = 1) -> None:
        """Refuse a training split that does not fill one step: a number of batches on each of so many devices.

        Raises:
            DataError: with the batch size that it would fill, if there is one.
        """
        most = size // (world * accumulated)
        if most >= self.batch_size:
            return
        each = (f" on each of {world} devices" if world > 1 else "") + (
            f" for each of {accumulated} that are accumulated" if accumulated > 1 else ""
        )
        few = f"{self.name}: the training split has {size} samples, fewer than one batch{each}"
        if most < 2:
            raise DataError(
                f"{few} of two samples, the least there is: hold out or accumulate fewer, or take more data"
            )
        if self.total_batch_size is not None:
            raise DataError(f"{few}; set data.total_batch_size to {most * (self.total_batch_size // self.batch_size)}")
        raise DataError(f"{few}; set data.batch_size to {most} or less")

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage."""
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", ()):
            rows = self.split(split)
            if split == "train":
                self._refuse_few(len(rows), 1)

    @property
    def collate(self) -> Callable[[Any], Any]:
        """Passes a batch that was fetched whole; stacks one that came sample by sample, which is looked at."""
        return partial(stacked, self.name, tuple(self.shape), len(self.class_names))

    def _loader(
        self, dataset: Any, kind: type[DataLoader] = DataLoader, there: bool = False, **options: Any
    ) -> DataLoader:
        workers = 0 if there else self.num_workers
        return kind(
            dataset,
            collate_fn=self.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.pin_memory and not there,
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches (x, (B, *shape); label, (B,)) of this rank's share; what fills no step is dropped.

        The epoch has begun where the trainer says: a resumed run goes on with the batch that would have come next.
        """
        split, trainer = self.split("train"), self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        accumulated = trainer.accumulate_grad_batches if trainer else 1
        self._refuse_few(len(split), world, accumulated)

        def seen() -> int:
            return trainer.fit_loop.epoch_loop.batch_progress.current.ready * self.batch_size if trainer else 0

        sampler = ShuffledShare(split, world, rank, seen, self.batch_size * accumulated)
        there = trainer is not None and moved(split, trainer.strategy.root_device)
        return self._loader(split, Late, there, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Batches of a split in order."""
        return self._loader(self.split(split), batch_size=self.eval_batch_size)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split."""
        return self.eval_dataloader("test")
