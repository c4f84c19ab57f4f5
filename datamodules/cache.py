"""Files of things derived from a data set, kept beside it."""

import contextlib
import hashlib
import json
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bd_lightning.checks import reason_of
from datamodules.base import DataModule
from datamodules.subsets import random_subset

warned: set[str] = set()
"""Folders that were warned of."""


def cache_path(data: DataModule, what: str, *keys: Any) -> Path:
    """A file under <data.root>/.cache for something derived from a data set, named by all it depends on."""
    digest = hashlib.sha256(json.dumps([data.fingerprint, *keys], default=str).encode()).hexdigest()[:12]
    return Path(data.root) / ".cache" / f"{data.name}-{what}-{digest}.pt"


def sampled(data: DataModule, split: str) -> str:
    """A digest of how many samples a split has, and of 256 of them at random with their labels."""
    rows = data.split(split)
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in random_subset(len(rows), 256):
        x, label = rows[i]
        digest.update(x.detach().cpu().contiguous().numpy().tobytes() + str(int(label)).encode())
    return digest.hexdigest()[:12]


def keep(path: Path, write: Callable[[BinaryIO], Any]) -> bool:
    """Have a file written beside its place and moved there, so that it is whole or not there.

    Args:
        path: the file.
        write: writes to an opened file.

    Returns:
        Whether it is there now. Where that is not possible there is a warning, once for a folder.
    """
    part = path.with_suffix(f".{secrets.token_hex(6)}.part")  # process numbers are shared between containers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
        part.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch turns some failures to write into a RuntimeError
        if str(path.parent) not in warned:
            warned.add(str(path.parent))
            warnings.warn(
                f"nothing can be kept in {path.parent} ({reason_of(error)}): what is derived from the data is made "
                "anew by every run; set data.root to a place that can be written",
                stacklevel=3,
            )
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def save_cached(value: Any, path: Path) -> None:
    """Write a cache file, whole or not at all; where that is not possible, warn once and go on without."""
    keep(path, lambda file: torch.save(value, file))


def load_cached(path: Path, *keys: str) -> dict[str, Any] | None:
    """Read a cache file, a mapping with at least these keys; None if there is none or it is something else."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # a cache that cannot be read is a cache miss
        return None
    return found if isinstance(found, dict) and found.keys() >= set(keys) else None
