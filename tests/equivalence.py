"""Losses of three steps and eight samples of every shipped config, against those of another version of the code.

    uv run python -m tests.equivalence [--write] [config …]        e.g. experiment=mnist_small data=wine

`tests/equivalence.json` was written at commit e4eb2af (one thread, torch 2.15), when factored fields got their present
weights; to compare with the code before its parts moved into rooms of their own, take that of commit c9f85d2.
`--write` replaces it, row by row. Every config is cut to two cores as in `fuzz.needed`; parameters get seeded noise,
since heads start at zero; steps are AdamW's on three batches of up to 96; samples are drawn from the noise of then
(`earlier_noise`). Prints the largest relative difference of each config, in losses, parameters and samples.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.cli import config as configs
from tests import fuzz
from tests.earlier_noise import earlier_noise

KEPT = Path(__file__).with_suffix(".json")
ROOT = KEPT.parent.parent
LIMIT = 1e-6
LARGE = {
    "model=unet_large", "model=unet_64",
    *(f"experiment={name}" for name in ("cifar10", "cifar10_cond", "cifar10_h200", "ffhq64", "celeba64", "imagenet64")),
}  # fmt: skip


def excite(module: torch.nn.Module) -> None:
    """Add seeded noise to every parameter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, p in sorted(module.named_parameters()):
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=generator))


def batches(data: Any) -> list[Any]:
    """Three batches of training data; of an environment, transitions under random actions."""
    if "actions" in data.facts.arguments:
        rows = data.held_out_transitions("val")
        return [rows[torch.arange(64 * k, 64 * k + 64).numpy() % len(rows)] for k in range(3)]
    split = data.load_split("train")
    torch.manual_seed(2)
    size, found = min(len(split), data.batch_size, 96), []
    for _ in range(3):
        index = torch.randperm(len(split))[:size].tolist()
        whole = hasattr(split, "__getitems__")
        found.append(data.collate(split.__getitems__(index) if whole else [split[i] for i in index]))
    return found


def draw(data: Any, module: torch.nn.Module) -> dict[str, Any]:
    """Norms of eight samples and their first entries, of every sampler."""
    samples: dict[str, Any] = {}
    if "actions" in data.facts.arguments:
        w = module.weights(data.probes[:1])[0]
        for name in ("inverse_cdf", "sde"):
            samples[name] = attempt(lambda name=name: module.sample(w, range(8), 3, name).flatten()[:8].tolist())
        return samples
    if "Autoencoder" in type(module).__name__:
        x = torch.stack([data.load_split("val")[i][0] for i in range(8)])
        return {"reconstruction": module.decode(module.encode(x)).flatten(1).norm(dim=1).tolist()}
    label = torch.arange(8) % data.facts.num_classes if module.conditional else None
    for name in module.samplers:

        def norms(name: str = name) -> list[float]:
            x = module.sample(range(8), name, seed=3, label=label, finite_part=True)
            return x.flatten(1).double().norm(dim=1).tolist() + x.flatten()[:8].tolist()

        samples[name] = attempt(norms)
    return samples


def attempt(function: Any) -> Any:
    """What a function returns, or the name of what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except Exception as error:
            return type(error).__name__


def measure(config: str, place: Path) -> dict[str, Any]:
    """Losses of three steps, the norm of the parameters after them, and samples."""
    torch.manual_seed(0)
    argv = fuzz.needed(config, place)
    if config in LARGE:
        argv += ["model.network.blocks=1", "model.samplers.sde.levels=8"]
    full = configs.compose(configs.parse(argv))
    build.check(full)
    data = build.instantiate(full["data"], "data")
    data.prepare_data()
    torch.manual_seed(1)
    module = build.instantiate(full["model"], "model", data.facts.arguments)
    module.prepare(False, data.facts)  # its teacher, if it has one
    excite(module)
    for name, target in module.named_children():
        if name == "target_network":
            target.load_state_dict(module.network.state_dict())
    rows = batches(data)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=full["model"].get("lr", 1e-3))
    losses = []
    module.train()
    for k, batch in enumerate(rows):
        torch.manual_seed(100 + k)
        values, _ = module.compute(batch, None)
        losses.append({name: float(v.detach()) for name, v in values.items()})
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
    squares = torch.stack([p.detach().double().square().sum() for p in module.parameters()])
    with torch.no_grad(), earlier_noise():
        return {"losses": losses, "parameters": float(squares.sum().sqrt()), "samples": draw(data, module.eval())}


def numbers(value: Any) -> Iterator[float | str]:
    """The leaves of nested lists and mappings."""
    if isinstance(value, (dict, list)):
        for one in [value[k] for k in sorted(value)] if isinstance(value, dict) else value:
            yield from numbers(one)
    else:
        yield value


def difference(before: Any, after: Any) -> float:
    """Largest relative difference of the leaves; infinite if their number, or a name, differs."""
    if before is None:
        return math.inf
    pairs = list(numbers(before)), list(numbers(after))
    if len(pairs[0]) != len(pairs[1]):
        return math.inf
    worst, size = 0.0, max([abs(a) for a in pairs[0] if isinstance(a, float)], default=1.0)
    for a, b in zip(*pairs):
        if isinstance(a, str) or isinstance(b, str):
            worst = max(worst, 0.0 if a == b else math.inf)
        else:
            worst = max(worst, abs(a - b) / max(abs(a), 1e-3 * size))
    return worst


def main() -> int:
    """Measure and compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep what is measured")
    parser.add_argument("configs", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    before = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    failed, count = 0, 0
    for check in ("torchvision.datasets.CIFAR10._check_integrity", "torchvision.datasets.cifar.check_integrity"):
        mock.patch(check, lambda *args: True).start()  # the tiny files are not the official ones
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(5)
        fuzz.prepare(Path(folder))
        for config in options.configs or fuzz.shipped():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    after = measure(config, Path(folder))
            except UserError as error:
                # a game's package is missing, or data need another model than the default
                print(f"{config} not measured: {error}", flush=True)
                failed += config in before  # it was measured
                continue
            if options.write:
                before[config] = after
                KEPT.write_text(json.dumps(before, indent=0))
                continue
            parts = {k: difference(before.get(config, {}).get(k), v) for k, v in after.items()}
            failed, count = failed + (max(parts.values()) > LIMIT), count + 1
            print(config, " ".join(f"{k} {v:.1e}" for k, v in parts.items()), flush=True)
    print(f"{count} configs, {failed} differ by more than {LIMIT:g}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
