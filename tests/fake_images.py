"""Images, features and a trainer that cost nothing, for tests of what judges samples."""

import json
from types import SimpleNamespace

import torch
from lightning.pytorch.plugins import Precision

from callbacks import ImageMetrics
from callbacks.features import ImageFeatures
from datamodules.images import ByteImages, ImageDataModule


class Drawn:
    """What ImageMetrics needs of a model: uniform noise stands for its samples."""

    device, sampler, loaded_step = torch.device("cpu"), "noise", 0
    samplers = {"noise": SimpleNamespace(calls=1, interacting=False)}

    def __init__(self):
        self.logged = {}

    def describe(self):
        return ""

    def drawing(self, sampler):
        return sampler

    def available(self, n, stage):
        return n

    def log_dict(self, values, sync_dist):
        self.logged |= {key: float(value) for key, value in values.items()}

    def all_gather(self, x):
        return x[None]


def fake_trainer(data, model, folder):
    """A trainer of one process, as far as evaluations look at it."""
    strategy = SimpleNamespace(
        barrier=lambda name: None, reduce_boolean_decision=lambda done, all: done, broadcast=lambda found: found
    )
    return SimpleNamespace(
        datamodule=data, lightning_module=model, global_rank=0, world_size=1, precision_plugin=Precision(),
        global_step=0, is_global_zero=True, received_sigterm=False,
        strategy=strategy, sanity_checking=False, default_root_dir=str(folder), loggers=[],
    )  # fmt: skip


class Shades(ImageDataModule):
    """Images of ten classes, told apart by their brightness, either class by class or in random order."""

    class_names = tuple("0123456789")
    shape, sigma_data, sizes = (1, 8, 8), 0.5, {"train": 6000, "val": 1500, "test": 1500}

    def __init__(self, shuffled, **options):
        super().__init__(**options)
        self.name = f"Shades-{shuffled}"
        self.shuffled = shuffled

    def read_split(self, split):
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(self.sizes[split]) * 10 // self.sizes[split]
        noise = torch.randint(0, 30, (len(labels), *self.shape), generator=generator)
        rows = ByteImages((20 * labels[:, None, None, None] + noise).to(torch.uint8), labels)
        return rows.take(torch.randperm(len(labels), generator=generator)) if self.shuffled else rows


class Halves(ImageFeatures):
    """Brightness of the halves of an image."""

    num_features, description, key, kid_scale = 2, "brightness of both halves", ("halves",), 100.0

    def prepare(self, data):
        pass

    def forward(self, images):
        return images.float().flatten(2).unflatten(2, (2, -1)).mean((1, 3))


def evaluated(data, folder, monkeypatch, samples, stage="validate", kept=400, **options):
    """The record of a validation, or of a test, of given samples, with `kept` real images for precision and recall."""

    def given(trainer, model, n, batch_size, seed, sampler):
        yield from samples[:n].split(batch_size)

    monkeypatch.setattr("callbacks.metrics.draw", given)
    monkeypatch.setattr("callbacks.references.KEPT", kept)
    trainer, model = fake_trainer(data, Drawn(), folder), Drawn()
    metrics = ImageMetrics(Halves(), n=min(400, len(samples)), kid_subset=100, **options)
    metrics.setup(trainer, model, stage)
    {"validate": metrics.on_validation_epoch_end, "test": metrics.on_test_epoch_end}[stage](trainer, model)
    return json.loads((folder / "fid.json").read_text())[-1]
