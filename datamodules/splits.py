"""Splits: rows in memory, what is refused of them, and the order and place that they are read in."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from bd_lightning.checks import UserError


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
        DataError: if samples or labels are no tensors, samples not finite, or there are not as many labels.
    """

    def __init__(self, x: Tensor, labels: Tensor | None = None) -> None:
        if not isinstance(x, Tensor):
            raise DataError(f"samples must be a tensor, got a {type(x).__name__}")
        if not isinstance(labels, (Tensor, NoneType)):
            raise DataError(f"labels must be a tensor, got a {type(labels).__name__}")
        if labels is not None and len(labels) != len(x):
            raise DataError(f"{len(x)} samples cannot have {len(labels)} labels")
        if x.is_floating_point() and x.dim() > 1:
            lost = (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
            if lost:
                raise DataError(f"{len(lost)} of {len(x)} samples are not finite, the first of them in row {lost[0]}")
        self.x = x
        self.labels = torch.zeros(len(x), dtype=torch.long) if labels is None else as_indices(labels)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices).to(self.x.device, non_blocking=True)
        return self.x[rows], self.labels[rows]


@singledispatch
def labels_of(split: Any) -> Tensor:
    """The labels of a split that are known before it is read, (N,); the first, (1,), of one that is not in memory."""
    return torch.as_tensor(split[0][1]).reshape(1)


@labels_of.register
def _(split: Rows) -> Tensor:
    return split.labels


@singledispatch
def samples_of(split: Any) -> Tensor:
    """All samples of a split, (N, *)."""
    return torch.stack([split[i][0] for i in range(len(split))])


@samples_of.register
def _(split: Rows) -> Tensor:
    return split.x


def as_indices(labels: Tensor) -> Tensor:
    """Labels of any type of whole numbers as the indices that layers take, int64; others as they are, to be refused."""
    return labels if labels.is_floating_point() or labels.is_complex() else labels.long()


def refuse_labels(place: str, labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class indices.

    Args:
        place: what they are of.
        labels: shape (B,).
        classes: number of classes; 0 stands for one that has no name.

    Raises:
        DataError: naming one that is none.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"{place} has labels of {labels.dtype} and the shape {list(labels.shape)}: a label is one whole number, "
            "the index of a class"
        )
    for one in labels[(labels < 0) | (labels >= max(1, classes))][:1].tolist():
        raise DataError(f"{place} has the label {one}, and there are {classes} class_names")


def stacked(place: str, shape: tuple[int, ...], classes: int, batch: Any) -> Any:
    """A batch (x, (B, *shape); label, (B,)): as it is if it was fetched whole, or of samples that came one by one.

    Raises:
        DataError: if one of them is not of the shape or type of the others, not finite, or of no class.
    """
    if isinstance(batch, tuple):
        return batch
    try:
        x, label = torch.utils.data.default_collate(batch)
        if not isinstance(x, Tensor) or not isinstance(label, Tensor):
            raise TypeError("a sample is a tensor and a label a number, one of them is something else")
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{place} has samples that make no batch ({' '.join(str(error).split())[:200]})") from error
    if x.shape[1:] != shape or x.dtype != torch.float32:
        raise DataError(
            f"{place} has samples of {x.dtype} and the shape {tuple(x.shape[1:])}, which must be torch.float32 and "
            f"{shape}"
        )
    if not x.isfinite().all():
        raise DataError(f"{place} has samples that are not finite")
    refuse_labels(place, label, classes)
    return x, as_indices(label)


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


def run_seed() -> int:
    """The run's seed, where Lightning's `seed_everything` leaves it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


class ShuffledShare(DistributedSampler):
    """A rank's share of a shuffled split, in an order that depends on the run's seed and the epoch alone.

    Batch k of all ranks together is the same set of samples on any number of ranks, for the same effective batch. The
    order is that of seed + epoch: runs of neighbouring seeds meet the same orders, an epoch apart.

    Args:
        dataset: the split.
        world_size: number of ranks.
        rank: this rank.
        seen: says how many samples of the epoch this rank has seen, which a run that is resumed passes over.
        step: samples of this rank in one step of the optimiser; what does not fill one is left out of the epoch.
    """

    def __init__(self, dataset: Dataset, world_size: int, rank: int, seen: Callable[[], int], step: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=run_seed(), drop_last=True)
        self.seen, self.step = seen, step

    def __len__(self) -> int:
        return super().__len__() // self.step * self.step

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.seen() : len(self)])


class Late(DataLoader):
    """Starts at the first batch that is asked for, when the epoch and the place in it are known."""

    def __iter__(self) -> Any:
        yield from super().__iter__()
