"""Files of things derived from a data set, kept beside it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from datamodules.base import DataModule


def cache_path(data: DataModule, what: str, *keys: Any) -> Path:
    """A file under <data.root>/.cache for something derived from a data set, named by all it depends on."""
    digest = hashlib.sha256(json.dumps([data.fingerprint, *keys], default=str).encode()).hexdigest()[:12]
    return Path(data.root) / ".cache" / f"{data.name}-{what}-{digest}.pt"


def save_cached(value: Any, path: Path) -> None:
    """Write a cache file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(value, part)
    part.replace(path)


def load_cached(path: Path) -> Any:
    """Read a cache file; None if there is none or it is broken."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # a cache that cannot be read is a cache miss
        return None
