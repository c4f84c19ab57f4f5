"""MNIST and CIFAR-10 through torchvision, which downloads and verifies them where there is a network."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import VisionDataset

from bd_lightning.checks import in_range
from datamodules.images import SEEN, ByteImages, ImageDataModule
from datamodules.splits import DataError


class _Torchvision(ImageDataModule):
    """The official training set less `val_size` images (by a fixed shuffle), those images, and the official test set.

    Args:
        val_size: images of the training set that validation uses and training does not. 0 trains on all of them: losses
            are then validated on 5,000 training images, and samples compared with the whole training set, at tests too.
        download: fetch the files if they are not under `root`.
        options: arguments of `ImageDataModule`.
    """

    source: type[VisionDataset]
    layout: str

    def __init__(self, val_size: int = 5000, download: bool = True, **options: Any) -> None:
        super().__init__(**options)
        in_range(0, float("inf"), val_size=val_size)
        self.val_size, self.download = val_size, download
        if not val_size:
            self.train_on_all("data.val_size=0", "test")

    @property
    def fingerprint(self):
        return [*super().fingerprint, self.val_size]

    def _open(self, train: bool, download: bool = False) -> VisionDataset:
        try:
            return self.source(self.root, train=train, download=download)
        except Exception as error:  # missing, truncated or corrupt files; no network
            raise DataError(
                f"{self.name} cannot be read from {self.root!r}"
                f"{' nor downloaded' if download else ''}: {' '.join(str(error).split())}. "
                f"Put {self.layout} there, or set data.root to a folder that has it"
            ) from error

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this once per node."""
        for train in (True, False):
            try:
                self._open(train)
            except DataError:
                if not self.download:
                    raise
                self._open(train, download=True)

    @abstractmethod
    def tensors(self, dataset: VisionDataset) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) of bytes and labels (N,) of a torchvision data set."""

    def read_split(self, split):
        images, labels = self.tensors(self._open(train=split != "test"))
        if split != "test":
            if self.val_size >= len(images):
                raise DataError(f"data.val_size {self.val_size} leaves none of the {len(images)} images for training")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            rows = order[self.val_size :] if split == "train" else order[: self.val_size or SEEN]
            images, labels = images[rows], labels[rows]
        return ByteImages(images, labels)


class MNIST(_Torchvision):
    """MNIST, 28×28 grey images, 55,000 / 5,000 / 10,000 by default.

    References:
        | LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition, 1998
    """

    shape = (1, 28, 28)
    class_names = tuple("0123456789")
    sigma_data = 0.6162
    source = datasets.MNIST
    layout = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"

    def tensors(self, dataset):
        return dataset.data[:, None], dataset.targets


class CIFAR10(_Torchvision):
    """CIFAR-10, 32×32 colour images, 45,000 / 5,000 / 10,000 by default.

    References:
        | Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009
    """

    shape = (3, 32, 32)
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    sigma_data = 0.5009
    source = datasets.CIFAR10
    layout = "cifar-10-batches-py"

    def tensors(self, dataset):
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
