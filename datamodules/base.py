"""What all data modules share: facts, splits and loaders."""

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from bd_lightning.checks import UserError, in_range, positive
from bd_lightning.facts import Facts, SampleFacts
from bd_lightning.targets import Density


class DataError(UserError):
    """Data that is missing or unusable, said in one sentence; also by a worker, to whose torch adds a traceback."""

    def __init__(self, text: str) -> None:
        _, worker, sentence = text.rpartition("DataError: ")
        super().__init__(sentence.strip() if worker else text)


SHARE = 0.2
"""A split is moved to the device that trains if it takes at most this share of what is free there."""


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; infinite on other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class Rows(Dataset):
    """A split held in memory: x (N, *) and labels (N,). It is indexed by lists, a batch at a time.

    Args:
        x: the samples.
        labels: class indices; zeros if None.

    Raises:
        DataError: if samples are no tensor, or not finite, or there are not as many labels.
    """

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        if not isinstance(x, Tensor):
            raise DataError(f"samples must be a tensor, got a {type(x).__name__}")
        if labels is not None and len(labels) != len(x):
            raise DataError(f"{len(x)} samples cannot have {len(labels)} labels")
        if x.is_floating_point() and x.dim() > 1:
            lost = (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
            if lost:
                raise DataError(f"{len(lost)} of {len(x)} samples are not finite, the first of them in row {lost[0]}")
        self.x = x
        self.labels = torch.zeros(len(x), dtype=torch.long) if labels is None else labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices).to(self.x.device, non_blocking=True)
        return self.x[rows], self.labels[rows]


@singledispatch
def moved(split: Any, device: torch.device) -> bool:
    """Move a split to the device that trains, if there is plenty of room; whether it lies on a device of its own now.

    Batches are then put together there. A split that is not held in memory stays where it is.
    """
    return False


@moved.register
def _(split: Rows, device: torch.device) -> bool:
    if split.x.nbytes > SHARE * free_memory(device):
        return False
    split.x, split.labels = split.x.to(device), split.labels.to(device)
    return device.type != "cpu"


class ShuffledShare(DistributedSampler):
    """A rank's share of a shuffled split, in an order that depends on the run's seed and the epoch alone.

    Batch k of all ranks together is the same set of samples on any number of ranks, for the same effective batch.

    Args:
        dataset: the split.
        world_size: number of ranks.
        rank: this rank.
        seen: says how many samples of the epoch this rank has seen, which a run that is resumed passes over.
    """

    def __init__(self, dataset: Dataset, world_size: int, rank: int, seen: Callable[[], int]) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.seen = seen

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.seen() :])


class _Late(DataLoader):
    """Starts at the first batch that is asked for, when the epoch and the place in it are known."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


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
            DataError: if it cannot be cut into so many of two samples at least.
        """
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
        return SampleFacts(self.name, tuple(self.shape), self.sigma_data, tuple(self.class_names))

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

    @property
    def fingerprint(self) -> list[Any]:
        """All that the splits depend on, as plain values: what is derived from the data is cached under it."""
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
            if split == "train":
                self._refuse_few(len(rows), 1)
        return self.splits[split]

    def _refuse_unsound(self, split: str, rows: Any) -> None:
        """Refuse a split whose first sample no model could learn from.

        Raises:
            DataError: saying what it has to be.
        """
        place = f"{self.name}: the {split} split"
        try:
            if not len(rows):
                return
            if isinstance(rows, Tensor):
                raise TypeError("no labels")
            x, label = rows[0]
            shape, dtype, number = tuple(x.shape), x.dtype, int(label)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise DataError(
                f"{place} must be a data set of pairs, x a tensor and a label, such as datamodules.base.Rows(x, labels)"
                f"; its first is not ({error!r})"
            ) from error
        if shape != tuple(self.shape):
            raise DataError(
                f"{place} has samples of the shape {shape}, and its shape is said to be {tuple(self.shape)}"
            )
        if dtype != torch.float32:
            raise DataError(f"{place} has samples of {dtype}, and models take torch.float32: return x.float()")
        if not 0 <= number < max(1, len(self.class_names)):
            raise DataError(f"{place} has the label {number}, and there are {len(self.class_names)} class_names")

    def _refuse_few(self, size: int, world: int) -> None:
        """Refuse a training split that does not fill one batch on each of so many devices.

        Raises:
            DataError: with the batch size that it would fill, if there is one.
        """
        most = size // world
        if most >= self.batch_size:
            return
        each = f" on each of {world} devices" if world > 1 else ""
        few = f"{self.name}: the training split has {size} samples, fewer than one batch{each}"
        if most < 2:
            raise DataError(f"{few} of two samples, the least there is: hold out fewer, or take more data")
        if self.total_batch_size is not None:
            raise DataError(f"{few}; set data.total_batch_size to {most * (self.total_batch_size // self.batch_size)}")
        raise DataError(f"{few}; set data.batch_size to {most} or less")

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage."""
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", ()):
            self.split(split)

    @staticmethod
    def collate(batch: Any) -> Any:
        """Pass a batch that was fetched whole; stack one that came image by image."""
        return batch if isinstance(batch, tuple) else torch.utils.data.default_collate(batch)

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
        """Shuffled batches (x, (B, *shape); label, (B,)) of this rank's share; a last short batch is dropped.

        The epoch has begun where the trainer says: a resumed run goes on with the batch that would have come next.
        """
        split, trainer = self.split("train"), self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        self._refuse_few(len(split), world)

        def seen() -> int:
            return trainer.fit_loop.epoch_loop.batch_progress.current.ready * self.batch_size if trainer else 0

        sampler = ShuffledShare(split, world, rank, seen)
        there = trainer is not None and moved(split, trainer.strategy.root_device)
        return self._loader(split, _Late, there, batch_size=self.batch_size, sampler=sampler, drop_last=True)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Batches of a split in order."""
        return self._loader(self.split(split), batch_size=self.eval_batch_size)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split."""
        return self.eval_dataloader("test")
