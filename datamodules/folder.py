"""Any folder of images."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bd_lightning.checks import in_range, positive
from datamodules.base import DataError
from datamodules.images import ImageDataModule, to_unit
from datamodules.subsets import random_subset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


class FolderImages(Dataset):
    """Images decoded as they are asked for.

    Args:
        files: (path, label) of each image.
        channels: 1 for grey, 3 for colour.
        size: height and width after resizing the shorter side and cropping the centre.
    """

    def __init__(self, files: list[tuple[Path, int]], channels: int, size: int) -> None:
        self.files, self.channels, self.size = files, channels, size
        self.labels = torch.tensor([label for _, label in files])
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def take(self, rows: torch.Tensor) -> "FolderImages":
        """Some of the images."""
        return FolderImages([self.files[i] for i in rows.tolist()], self.channels, self.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.files[index][0]
        try:
            with Image.open(path) as image:
                pixels = v2.functional.pil_to_tensor(image.convert(self.mode))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {path}: {error}; repair or delete it") from error
        pixels = self.resize(pixels)
        return to_unit(pixels), int(self.labels[index])


class ImageFolder(ImageDataModule):
    """Images of a folder, resized and cropped to squares; sub-folders are classes.

    If the folder has `train` and `test` (or `val`) inside, these are the splits, and a missing one is cut from `train`
    (for validation) or is the other held-out one. Otherwise `val_fraction` of all images is held out, for validation
    and test alike. Splits depend on file names only.

    Args:
        folder: the folder.
        size: height and width of the images, in pixels.
        channels: 1 for grey, 3 for colour.
        val_fraction: share held out where the folder has no split for it.
        sigma_data: standard deviation of the images in [−1, 1]; None measures it on 500 training images at random.
        options: arguments of `ImageDataModule`.

    Raises:
        DataError: if the folder is missing or has too few images.
    """

    def __init__(
        self,
        folder: str,
        size: int = 32,
        channels: int = 3,
        val_fraction: float = 0.1,
        sigma_data: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        positive(size=size)
        in_range(0.001, 0.9, val_fraction=val_fraction)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        self.folder, self.shape = Path(folder), (channels, size, size)
        self.name = f"ImageFolder-{self.folder.resolve().name}-{size}x{channels}"
        if not self.folder.is_dir():
            raise DataError(f"image folder not found: {folder}; set data.folder")
        places = {
            split: next((self.folder / n for n in options if (self.folder / n).is_dir()), None)
            for split, options in _SPLITS.items()
        }
        train = places["train"] or self.folder
        classes = sorted(p.name for p in train.iterdir() if p.is_dir())
        self.class_names = tuple(classes)
        held_out = {
            split: self._scan(place)
            for split, place in places.items()
            if split != "train" and places["train"] and place
        }
        files = self._scan(train)
        self.files = {"train": files, **held_out}
        if "val" not in held_out:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
            cut = max(1, round(val_fraction * len(files)))
            self.files["val"] = [files[i] for i in sorted(order[:cut])]
            self.files["train"] = [files[i] for i in sorted(order[cut:])]
        self.files.setdefault("test", self.files["val"])
        for split, found in self.files.items():
            if not found:
                raise DataError(
                    f"no images for the {split} split under {folder}: expected files ending in {', '.join(EXTENSIONS)}"
                )
        self.sigma_data = self._measure() if sigma_data is None else sigma_data
        positive(sigma_data=self.sigma_data)
        if classes:
            self._choose_classes()

    @property
    def fingerprint(self) -> list[Any]:
        files = [(split, str(path), path.stat().st_size) for split, f in self.files.items() for path, _ in f]
        return [*super().fingerprint, hashlib.sha256(repr(files).encode()).hexdigest()]

    def _scan(self, place: Path) -> list[tuple[Path, int]]:
        files = []
        for parent, folders, names in os.walk(place, followlinks=True):
            folders.sort()
            relative = Path(parent).relative_to(place).parts
            label = self.class_names.index(relative[0]) if relative and relative[0] in self.class_names else 0
            files += [(Path(parent) / n, label) for n in sorted(names) if n.lower().endswith(EXTENSIONS)]
        return files

    def _measure(self) -> float:
        files = self.files["train"]
        some = FolderImages([files[i] for i in random_subset(len(files), 500)], self.shape[0], self.shape[1])
        return round(float(torch.stack([some[i][0] for i in range(len(some))]).std()), 4)

    def read_split(self, split: str) -> Any:
        return FolderImages(self.files[split], self.shape[0], self.shape[1])
