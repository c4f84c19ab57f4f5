"""Tiny data sets in the real formats."""

import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bd_lightning.modules import Autoencoder


def write_folder(root: Path, classes=("cat", "dog"), n=12, size=(20, 16), splits=()):
    generator = np.random.default_rng(0)
    for split in splits or ("",):
        for label, name in enumerate(classes):
            place = root / split / name
            place.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = generator.integers(0, 100, (*size, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def write_mnist(root: Path, n=40):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return root


def write_cifar(root: Path, n=8):
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(n)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return root


def write_autoencoder(path: Path, shape, name, latent=(4,), channels=(8,)) -> Path:
    """The checkpoint of an untrained autoencoder of a data set."""
    node = {"_target_": "bd_lightning.modules.Autoencoder", "latent": [*latent], "channels": [*channels]}
    module = Autoencoder(shape, latent, channels)
    facts = {"shape": list(shape), "num_classes": 10, "sigma_data": 1.0, "name": name}
    path.parent.mkdir(parents=True, exist_ok=True)
    hyper_parameters = {"data": {}, "model": node, "facts": facts}
    torch.save({"hyper_parameters": hyper_parameters, "state_dict": module.state_dict(), "global_step": 1}, path)
    return path
