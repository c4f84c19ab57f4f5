"""Any folder of images."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bd_lightning.checks import in_range, positive
from datamodules.cache import load_cached, save_cached
from datamodules.decoded import read_decoded, write_decoded
from datamodules.image_files import EXTENSIONS, find, problems, read
from datamodules.images import SEEN, ByteImages, ImageDataModule, to_unit
from datamodules.splits import DataError
from datamodules.subsets import random_subset

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


class FolderImages(Dataset):
    """Images decoded as they are asked for.

    Args:
        files: (path, label) of each image.
        channels: 1 for grey, 3 for colour.
        size: height and width after resizing the shorter side and cropping the centre.
        most: share of the files that may turn out to be damaged when they are decoded; the next one takes the place of
            each. With more of them there is an error.
    """

    def __init__(self, files: list[tuple[Path, int]], channels: int, size: int, most: float = 0.0) -> None:
        self.files, self.channels, self.size, self.most = files, channels, size, most
        self.damaged: dict[Path, str] = {}
        self.labels = torch.tensor([label for _, label in files])
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])

    def take(self, rows: torch.Tensor) -> "FolderImages":
        """Some of the images."""
        return FolderImages([self.files[i] for i in rows.tolist()], self.channels, self.size, self.most)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels, label = self.decode(index)
        return to_unit(pixels), label

    def decode(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as bytes (channels, size, size), and its label; the next one's, if it is damaged.

        Raises:
            DataError: if too many files are damaged.
        """
        for row in (i % len(self) for i in range(index, index + len(self))):
            path, _ = self.files[row]
            if path in self.damaged:
                continue
            try:
                return self.resize(v2.functional.pil_to_tensor(read(path, self.channels))), int(self.labels[row])
            except DataError as error:
                self._note(path, error)
        raise DataError(f"none of the {len(self)} images can be decoded, the first of them {self.files[0][0]}")

    def _note(self, path: Path, error: DataError) -> None:
        self.damaged[path] = str(error)
        if len(self.damaged) > self.most * len(self.files):
            share = math.ceil(100 * len(self.damaged) / len(self.files)) / 100
            more = f" ({len(self.damaged)} such files in all)" if len(self.damaged) > 1 else ""
            raise DataError(f"{error}{more}, or raise data.max_broken to {share:g} or above") from error
        rank_zero_info(f"{error}; the next one takes its place")


class ImageFolder(ImageDataModule):
    """Images of a folder, resized and cropped to squares; sub-folders are classes.

    If the folder has `train` and `test` (or `val`) inside, these are the splits, and a missing one is cut from `train`
    (for validation) or is the other held-out one. Otherwise `val_fraction` of all images is held out, for validation
    and test alike. Splits depend on the names of all files alone, of broken ones too. Hidden files are passed over;
    links are followed, every folder once; photographs are turned upright as their EXIF data say.

    The images of a split are decoded and resized once, to a file under <data.root>/.cache that is named by the files,
    their sizes and times, and the size of the images; every process maps it into its memory.

    Args:
        folder: the folder.
        size: height and width of the images, in pixels.
        channels: 1 for grey, 3 for colour.
        val_fraction: share held out where the folder has no split for it. 0 trains on all: losses are then validated on
            5,000 training images, and samples compared with the whole training set, at tests too.
        max_broken: share of the files that may be unreadable (empty, cut off, dead links, no images); they are named
            and left out. With more of them the folder is refused. What is found out only in decoding counts again, for
            each split and each worker.
        sigma_data: standard deviation of the images in [−1, 1]; None measures it on 500 training images at random.
        cache: keep decoded images; if false every image is decoded whenever it is asked for.
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
        max_broken: float = 0.01,
        sigma_data: float | None = None,
        cache: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.cache = cache
        positive(size=size)
        in_range(0, 0.9, val_fraction=val_fraction)
        in_range(0, 1, max_broken=max_broken)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        self.folder, self.shape = Path(folder).expanduser(), (channels, size, size)
        self.name = f"ImageFolder-{self.folder.resolve().name}-{size}x{channels}"
        if not self.folder.is_dir():
            raise DataError(f"image folder not found: {folder}; set data.folder")
        places = {
            split: next((self.folder / n for n in options if (self.folder / n).is_dir()), None)
            for split, options in _SPLITS.items()
        }
        train = places["train"] or self.folder
        classes = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.class_names = tuple(classes)
        seen: set[str] = set()  # held-out folders first: a link to them among the training images is passed over
        held_out = [split for split in ("val", "test") if places["train"] and places[split]]
        scanned = {split: self._scan(places[split] or train, seen) for split in (*held_out, "train")}
        self.max_broken = max_broken
        files = scanned["train"]
        # cut before broken files are left out, of which one more does not change the rest
        if "val" not in held_out and val_fraction:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
            if 0 < len(files) < 4:
                raise DataError(
                    f"{len(files)} images in {folder} are not enough: two to learn from and two to hold out for "
                    "validation are the least"
                )
            cut = max(2, round(val_fraction * len(files)))
            scanned["val"] = [files[i] for i in sorted(order[:cut])]
            scanned["train"] = [files[i] for i in sorted(order[cut:])]
        self.files = self._readable(scanned, max_broken)
        if "val" not in self.files:
            whole = self.files["train"]
            self.files["val"] = [whole[i] for i in random_subset(len(whole), SEEN)]
            self.train_on_all("data.val_fraction=0", *held_out)
        self.files.setdefault("test", self.files["val"])
        for split, found in self.files.items():
            if not found:
                raise DataError(
                    f"no images for the {split} split under {folder}: expected files ending in {', '.join(EXTENSIONS)}"
                )
        self.sigma_data = self._measure() if sigma_data is None else sigma_data
        positive(sigma_data=self.sigma_data)
        if classes:
            self.choose_classes()
        labels = {label for _, label in files}
        if empty := [name for i, name in enumerate(classes) if i not in labels]:
            rank_zero_info(f"no images of their own for {', '.join(empty[:10])}: empty folders, or links to others")

    @property
    def fingerprint(self) -> list[Any]:
        files = [(split, str(path), *_size_and_time(path)) for split, f in self.files.items() for path, _ in f]
        return [*super().fingerprint, hashlib.sha256(repr(files).encode()).hexdigest()]

    def _scan(self, place: Path, seen: set[str]) -> list[tuple[Path, int]]:
        files, strays = [], []
        for path in find(place, seen):
            first = path.relative_to(place).parts[0]
            if self.class_names and first not in self.class_names:
                strays.append(path)
                continue
            files.append((path, self.class_names.index(first) if self.class_names else 0))
        if strays:
            raise DataError(
                f"{len(strays)} images under {place} are in none of the class folders "
                f"{', '.join(self.class_names[:10])}, the first of them {strays[0]}: move or delete them"
            )
        return files

    def _readable(self, found: dict[str, list[tuple[Path, int]]], most: float) -> dict[str, list[tuple[Path, int]]]:
        """The files that can be opened; what was found out is kept in the cache."""
        paths = [path for files in found.values() for path, _ in files]
        state = [(str(path), *_size_and_time(path)) for path in paths]
        digest = hashlib.sha256(repr(state).encode()).hexdigest()[:12]
        cache = Path(self.root) / ".cache" / f"{self.name}-broken-{digest}.pt"
        broken = load_cached(cache)
        if broken is None:
            broken = {str(path): why for path, why in problems(paths).items()}
            save_cached(broken, cache)
        if broken:
            named = "; ".join(f"{path} ({why})" for path, why in list(broken.items())[:20])
            named += "; …" if len(broken) > 20 else ""
            count = f"{len(broken)} of {len(paths)} image files cannot be read: {named}"
            if len(broken) > most * len(paths):
                share = math.ceil(100 * len(broken) / len(paths)) / 100
                raise DataError(f"{count}. Repair or delete them, or set data.max_broken={share:g} to leave them out")
            rank_zero_info(f"{count}; they are left out")
        return {split: [row for row in files if str(row[0]) not in broken] for split, files in found.items()}

    def _measure(self) -> float:
        files = self.files["train"]
        chosen = [files[i] for i in random_subset(len(files), 500)]
        some = FolderImages(chosen, self.shape[0], self.shape[1], self.max_broken)
        return round(float(torch.stack([some[i][0] for i in range(len(some))]).std()), 4)

    def prepare_data(self) -> None:
        """Decode what is not in the cache; Lightning calls this once per node."""
        for split in self.files if self.cache else ():
            if self._decoded(split) is None:
                self._decode(split)

    def read_split(self, split: str) -> Any:
        if not self.cache:
            return self._images(split)
        found = self._decoded(split)
        if found is None and self._decode(split):
            found = self._decoded(split)
        return self._images(split) if found is None else found

    def _images(self, split: str) -> FolderImages:
        return FolderImages(self.files[split], self.shape[0], self.shape[1], self.max_broken)

    def _place(self, split: str) -> Path:
        state = [(str(path), label, *_size_and_time(path)) for path, label in self.files[split]]
        digest = hashlib.sha256(repr([state, self.max_broken, "upright"]).encode()).hexdigest()[:12]
        return Path(self.root) / ".cache" / f"{self.name}-decoded-{digest}.bytes"

    def _decoded(self, split: str) -> ByteImages | None:
        found = read_decoded(self._place(split), len(self.files[split]), self.shape)
        if found is None or not set(found.labels.unique().tolist()) <= {label for _, label in self.files[split]}:
            return None
        return found

    def _decode(self, split: str) -> bool:
        """Write the cache file of a split."""
        what = f"decoding the {split} split of {self.name}"
        return write_decoded(self._place(split), self._images(split).decode, len(self.files[split]), what)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros for a link to nothing."""
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return 0, 0
