"""What `train.py predict` asks a model for."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SampleRequests(Dataset):
    """Requests for n samples.

    Args:
        n: number of samples.
        seed: seed of the whole set.
        labels: class indices, repeated in turn over the samples; empty to ask for no class.
    """

    def __init__(self, n: int, seed: int = 0, labels: Sequence[int] = ()) -> None:
        self.n, self.seed, self.labels = n, seed, tuple(labels)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        request = {"index": torch.tensor(index), "seed": torch.tensor(self.seed)}
        if self.labels:
            request["label"] = torch.tensor(self.labels[index % len(self.labels)])
        return request
