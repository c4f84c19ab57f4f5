"""A training step and the samplers of a config on a device: fake in test_fake_gpu.py, real in benchmarks/gpu.py."""

import dataclasses

import torch

from bd_lightning.cli import build
from bd_lightning.cli import config as configs
from bd_lightning.dynamics import SampleNoise
from bd_lightning.facts import SampleFacts

SMALL = "model.network.blocks=1"
LEVELS = {"cifar10": 3, "cifar10_cond": 3, "cifar10_h200": 4, "mnist": 3, "ffhq64": 4, "imagenet64": 4}
OTHERS = [
    "model=mlp", "model=mlp model=paper", "model=mlp model.objective.trace=hutchinson",
    "model=mlp model.kernel={_target_:~bd_lightning.kernels.Sliced}",
]  # fmt: skip
CASES = [
    *(f"experiment={name} model.network.channels=[{','.join(['16'] * n)}] {SMALL}" for name, n in LEVELS.items()),
    f"experiment=mnist model.network.channels=[16,16,16] {SMALL} model.network.told=9 "
    "model.augment={_target_:~bd_lightning.augmentation.Geometric}",
    f"experiment=mnist model.network.channels=[16,16,16] {SMALL} model.parametrisation=velocity",
    *OTHERS,
]


def short(sampler):
    """A sampler of three steps."""
    few = {"levels", "steps", "steps_per_level"} & {field.name for field in dataclasses.fields(sampler)}
    return dataclasses.replace(sampler, **dict.fromkeys(few, 3))


def built(words):
    """The module of a config's words, the shape of its samples, and the config."""
    config = configs.compose(configs.parse(words))
    shape = (1, 28, 28) if "experiment=mnist" in words else (1, 8, 8) if "experiment" not in words[0] else (3, 32, 32)
    facts = SampleFacts("images", shape, 0.5, tuple("0123456789"))
    return build.instantiate(config["model"], "model", facts.arguments), shape, config


def step_and_sample(module, shape, config, device):
    """Losses and every sampler of a module on a device; where a tensor is elsewhere there is an error."""
    x, label = torch.randn(8, *shape, device=device), torch.zeros(8, dtype=torch.long, device=device)
    half = config["trainer"].get("precision") == "bf16-mixed"
    with torch.autocast(device, torch.bfloat16, enabled=half):
        values, vectors = module.train().compute((x, label), None)
    assert {v.device.type for v in (*values.values(), *vectors.values())} == {device}
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        fields = module.eval().fields.conditioned(label if module.conditional else None)
        for sampler in map(short, module.samplers.values()):
            for state in sampler.path(fields, SampleNoise(range(8), shape, device=device)):
                assert state.device.type == device and state.shape == x.shape
    return values["loss"]
