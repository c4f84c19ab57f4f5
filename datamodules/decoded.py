"""Images that are decoded and resized once: their bytes in a file, which is mapped into memory."""

import contextlib
import glob
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bd_lightning.progress import bar
from datamodules.cache import keep
from datamodules.images import ByteImages

CHUNK = 1024
"""Images that are decoded before they are written."""
STALE = 3600
"""Seconds after which a file that nobody has written to is what a killed process has left."""


def write_decoded(path: Path, decode: Callable[[int], tuple[Tensor, int]], n: int, what: str) -> bool:
    """Write images and labels to a file, whole or not at all.

    Args:
        path: the file.
        decode: gives image i, bytes (C, H, W), and its label.
        n: number of images.
        what: what they are, for the progress bar.

    Returns:
        Whether it could be written; if not, there was a warning.

    Raises:
        DataError: from `decode`.
    """

    def write(file) -> None:
        labels: list[int] = []
        with ThreadPoolExecutor(_cores()) as pool, bar(what, n) as progress:
            for start in range(0, n, CHUNK):
                found = list(pool.map(decode, range(start, min(n, start + CHUNK))))
                file.write(torch.stack([x for x, _ in found]).numpy().tobytes())
                labels += [label for _, label in found]
                progress.update(len(found))
        file.write(np.asarray(labels, np.int64).tobytes())
        file.flush()
        os.fsync(file.fileno())

    return keep(path, write)


def read_decoded(path: Path, n: int, shape: Sequence[int]) -> ByteImages | None:
    """The n images of a shape (C, H, W) in a file of `write_decoded`, mapped; None if it is not there, or another's.

    What killed processes have left beside it is removed.
    """
    for part in path.parent.glob(f"{glob.escape(path.stem)}.*.part"):
        with contextlib.suppress(OSError):  # another process has moved it to its place
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink()
    size = n * int(np.prod(shape))
    try:
        if path.stat().st_size != size + 8 * n:
            return None
        pixels = np.memmap(path, np.uint8, mode="c", shape=(n, *shape))
        labels = np.fromfile(path, np.int64, offset=size)
    except OSError:
        return None
    return ByteImages(torch.from_numpy(pixels), torch.from_numpy(labels))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
