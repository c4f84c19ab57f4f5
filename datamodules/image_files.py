"""Image files of any kind: which there are under a folder, whether they can be opened, and their pixels as bytes."""

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from datamodules.splits import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""What a file of a format ends with."""
GRIDS = ("grid.png", "given.png")
"""Files of a folder of samples that show many of them at once."""
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip
_UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


def find(place: Path, seen: set[str]) -> Iterator[Path]:
    """Paths of the image files under a folder, in order of their names.

    Folders and files may be links. One that leads to a folder seen before, such as one around it, is passed over, so
    that no image is found twice. Hidden files are passed over: macOS puts `._name.png`, which is none, beside an image;
    and so are the grids that `predict` lays beside what it has drawn.

    Args:
        place: the folder.
        seen: real paths of folders that were visited before; those visited now are added.
    """
    for parent, folders, names in os.walk(place, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        grids = GRIDS if "settings.json" in names else ()
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".") and name not in grids:
                yield Path(parent, name)


def problem(path: Path) -> str | None:
    """What keeps a file from being opened as an image of bytes, in a few words; None if nothing does.

    Its header and its end are read, not its pixels: damage in between is only found out when it is decoded.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "a pipe or a device"
        if status.st_size == 0:
            return "empty"
        with Image.open(path) as image:
            if not _ends(path, ENDS.get(image.format or "", b"")):
                image.load()  # what follows the end, as in a photo with a film, is no damage
            return _refused(image)
    except FileNotFoundError:
        return "a link to nothing"
    except _UNREADABLE as error:
        return str(error).partition(" '")[0].partition(": ")[0] or type(error).__name__


def problems(paths: Iterable[Path]) -> dict[Path, str]:
    """Those files among `paths` that cannot be opened as images, with the reason of each."""
    paths = list(paths)
    with ThreadPoolExecutor(8) as pool:
        return {path: found for path, found in zip(paths, pool.map(problem, paths)) if found}


def _ends(path: Path, end: bytes) -> bool:
    """Whether a file has these bytes at its end."""
    with path.open("rb") as file:
        file.seek(-min(32, path.stat().st_size), os.SEEK_END)
        return end in file.read()


def _refused(image: Image.Image) -> str | None:
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":
        return f"pixels of {image.mode == 'F' and 'floating point' or '32 bits'}, whose black and white are not known"
    return None


def _upright(image: Image.Image) -> Image.Image:
    """An image, turned as its EXIF data say; as it is, if they cannot be read."""
    image.load()  # damaged pixels are an error, unlike damaged EXIF data
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever the reader raises
        turn = None
    return image if turn is None else image.transpose(turn)


def read(path: Path, channels: int) -> Image.Image:
    """An image of bytes, grey (1 channel) or colour (3), upright. Pixels of 16 bits keep their scale.

    Raises:
        DataError: naming the file, and the reason.
    """
    try:
        with Image.open(path) as file:
            reason = _refused(file)
            if reason:
                raise DataError(f"cannot read the image {path}: {reason}; save it with 8 or 16 bits")
            image = _upright(file)
            if image.mode.startswith("I"):  # 16 bits; convert() would clip them
                image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
            elif image.mode in ("P", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert({1: "L", 3: "RGB"}[channels])
    except _UNREADABLE as error:
        raise DataError(f"cannot read the image {path}: {error}; repair or delete it") from error
