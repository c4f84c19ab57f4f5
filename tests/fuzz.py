"""Every shipped config with a mistake in it: refused by one sentence that names the key, or good enough to train.

    uv run python -m tests.fuzz [-n 200] [config …]        e.g. experiment=mnist_small data=wine

Mutations are drawn from a seed that is the config's name. Each goes through `train.main`, with `Trainer.fit` replaced
by one that loads the data, sets the callbacks up (all but features, which would be trained or downloaded) and computes
the loss of a few samples.
"""

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import torch

import train
from bd_lightning.cli import build
from bd_lightning.cli import config as configs
from tests.tiny_data import write_autoencoder, write_cifar, write_folder, write_mnist

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model=mlp", "model.network.width=16", "model.network.depth=1"]
WRONG = ["banana", "[1, 2]", "{a: 1}", "true", "null", "1.5", "''"]
OUTSIDE = ["-1", "0", "-7.5", ".nan", ".inf", "1.0e30"]
ENVIRONMENTS = (
    "returns", "c51", "qr_dqn", "rl_", "frozen_", "cart_pole", "minatar", "acrobot", "lunar_lander", "cliff_slippery",
)  # fmt: skip
"""How the names of configs of environments begin."""
PATHS = ("folder", "file", "ckpt_path", "weights", "source")
CONFLICTS = [
    "model.noise=null", "model.objective.trace=hutchinson", "model.objective.trace=sliced", "model.objective=null",
    "model.objective._target_=bd_lightning.objectives.KernelRegression", "model.partners.pairs=single",
    "model.objective._target_=bd_lightning.objectives.DensityRatio", "model.objective.trace=stien", "model=relative",
    "model.parametrisation=direct", "model.sampler=ode", "model.samplers=null", "model.estimator=divergence",
    "model.kernel={_target_: bd_lightning.kernels.Exact}", "data.keep={_target_: os.system}",
    "trainer.plugins={_target_: os.system, command: 'true'}", "callbacks.mine={_target_: os.system}",
    "model.network.conditional=true", "model.network.per_class=true", "callbacks.metrics=null", "callbacks=images",
    "callbacks=points", "callbacks=autoencoder", "callbacks.best.monitor=val/nothing", "data=wine", "data=digits",
    "steps=7 eval_every=3", "trainer.max_steps=3", "trainer.devices=0", "trainer.strategy=nothing", "model=autoencoder",
    "trainer.accumulate_grad_batches=0", "trainer.precision=8", "model.partners.gather=true model=relative",
    "callbacks.last.dirpath=/proc/nowhere",
]  # fmt: skip


def shipped() -> list[str]:
    """Every config, as a word of the command line."""
    return [f"{group}={name}" for group in ("experiment", *configs.GROUPS) for name in configs.names(group)]


def prepare(place: Path) -> None:
    """Tiny data sets in the real formats."""
    write_mnist(place, n=300)
    write_cifar(place, n=60)
    write_folder(place / "pictures", n=40)
    (place / "table.csv").write_text("a,b\n" + "\n".join(f"{i % 7},{i % 11}" for i in range(300)))
    write_autoencoder(place / "digits.ckpt", (1, 8, 8), "Digits")
    write_autoencoder(place / "mnist.ckpt", (1, 28, 28), "MNIST")
    write_autoencoder(place / "cifar10.ckpt", (3, 32, 32), "CIFAR10", (8, 8, 8), (8, 8))


def needed(config: str, place: Path) -> list[str]:
    """What makes a config buildable here, and quick."""
    group, name = config.split("=")
    words = [f"data.root={place}", f"root={place / 'runs'}", "trainer.accelerator=cpu", "trainer.devices=1"]
    if group not in ("experiment", "model"):
        words = SMALL + words
    if group != "logger":
        words.append("logger=none")
    if "latent" in name:
        of = next(images for images in ("mnist", "cifar10", "digits") if images in name or images == "digits")
        words.append(f"data.autoencoder.ckpt_path={place / of}.ckpt")
    if "mnist" in name or "cifar" in name or name == "autoencoder" and group == "experiment":
        words += ["data.val_size=50"] if "latent" not in name else ["data.images.val_size=50"]
        words += ["data.batch_size=20", "data.num_workers=0"]
    three = name in ("unet_patch", "unet_large", "mnist", "mnist_small", "cifar10", "cifar10_cond", "cifar10_small")
    four = name.endswith("64") or name == "unet_64"
    if (three or four or name in ("unet", "score_matching") or name.startswith("cifar10_latent")) and group in (
        "model",
        "experiment",
    ):
        words.append(f"model.network.channels={[8] * (4 if four else 3 if three else 2)}")
    if name == "cifar10_autoencoder":
        words += ["callbacks.metrics.n=50"]
    if name == "relative" or name == "autoencoder" and group in ("model", "callbacks"):
        words += ["callbacks.metrics.n=50"]
    if group == "callbacks" and name == "autoencoder":
        words = [w for w in words if not w.startswith("model")] + ["model=autoencoder"]
    if group == "model" and name == "autoencoder":
        words += ["callbacks=autoencoder"]
    if group == "callbacks" and name == "points" or group == "data" and name not in (
        "digits", "mnist", "cifar10", "folder", "digits_latent", "mnist_latent", "cifar10_latent"
    ):  # fmt: skip
        words += ["callbacks=points"] if group == "data" else ["data=wine"]
    if group == "model" and name in ("consistency", "distilled"):
        words += ["callbacks.trajectory=null"]
    if name == "distilled":
        words += [f"model.teacher={ROOT / 'tests/checkpoints/v1/relative.ckpt'}", "model.chains=40"]
    if name == "cifar10_h200":
        words.append("model.network.channels=[8, 8, 8, 8]")
    if group == "model" and name in ("points", "regression"):
        words += ["data=gaussians_2d", "callbacks=points"]
    if name.startswith(ENVIRONMENTS):
        words = [w for w in words if not w.startswith(("model", "callbacks", "data=", "data.val_size"))]
        if group != "experiment":
            words += {"model": [], "data": ["model=returns"], "callbacks": ["model=returns"]}[group]
            several = "_lambda" if name == "returns_lambda" else ""
            words += [] if group == "data" else [f"data=frozen_lake{several}"]
            words += [] if group == "callbacks" else ["callbacks=returns"]
    if name == "folder":
        words += [f"data.folder={place / 'pictures'}", "data.batch_size=20"]
    if name.endswith("64") and group == "experiment":
        words += [f"data.folder={place / 'pictures'}", "data.total_batch_size=20", "data.num_workers=0"]
        words += ["callbacks=images", "data.size=16"]
    if name == "table":
        words += [f"data.file={place / 'table.csv'}"]
    return [config, *words]


def leaves(node: Any, key: str = "") -> list[str]:
    """Keys of all values of a config, nodes among them, and of the arguments that its classes have besides."""
    found = [key] if key else []
    if isinstance(node, dict):
        more = build.signature_of(build.locate(node["_target_"], key)) if "_target_" in node else {}
        for name in dict.fromkeys((*node, *more)):
            if name in node or name not in build.FACTS:
                found += leaves(node.get(name), f"{key}.{name}" if key else str(name))
    return found


def misspell(word: str, draw: random.Random) -> str:
    """A word with two letters exchanged, or one twice, or one missing."""
    i = draw.randrange(len(word))
    return draw.choice([word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[: i + 1][::-1] + word[i + 1 :]])


def mutations(config: str, place: Path, n: int) -> list[list[str]]:
    """Words to add to a config, different ones, drawn from the seed that is its name."""
    draw, group = random.Random(config), config.split("=")[0]
    composed = configs.compose(configs.parse(needed(config, place)))
    keys = [key for key in leaves(composed) if group == "experiment" or key.split(".")[0] == group]
    keys = [key for key in keys if key not in ("data.root", "root", "run_id", "ckpt_path", group)]
    keys = keys or ["steps", "seed"]
    found: dict[tuple[str, ...], None] = {}
    for _ in range(100 * n):
        if len(found) == n:
            break
        key = draw.choice(keys)
        head, _, leaf = key.rpartition(".")
        kind = draw.choice(("misspelt", "type", "range", "file", "class", "conflict", "pair"))
        if kind == "misspelt":
            wrong = misspell(leaf, draw)
            if wrong == leaf or not wrong:
                continue
            words = [f"{head}.{wrong}=1" if head else f"{wrong}=1"]
        elif kind == "type":
            words = [f"{key}={draw.choice(WRONG)}"]
        elif kind == "range":
            words = [f"{key}={draw.choice(OUTSIDE)}"]
        elif kind == "file":
            files = [k for k in keys if k.rpartition(".")[2] in PATHS]
            where = draw.choice([f"nowhere-{draw.randrange(1000)}", str(place), "/dev/null"])
            words = [f"{draw.choice(files)}={where}"] if files else [f"--config={where}"]
        elif kind == "class":
            nodes = [k for k in keys if k.endswith("_target_")]
            if not nodes:
                continue
            target = draw.choice(nodes)
            old = configs.OmegaConf.select(configs.OmegaConf.create(composed), target)
            others = ["builtins.int", "torch.nn.Linear", "os.path", "os.system"]
            words = [f"{target}={draw.choice([misspell(old, draw), *others])}"]
        elif kind == "conflict":
            words = draw.choice(CONFLICTS).split(" ") if draw.random() < 0.5 else [draw.choice(CONFLICTS)]
            words = [w for w in words if "=" in w]
        else:
            other = draw.choice(keys)
            words = [f"{key}={draw.choice(OUTSIDE)}", f"{other}={draw.choice(WRONG)}"]
        found[tuple(words)] = None
    return [list(words) for words in found]


def fit(trainer: L.Trainer, model: Any, datamodule: Any, **_: Any) -> None:
    """Stands for Trainer.fit: everything up to the loss of a few samples."""
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer._data_connector.attach_datamodule(model, datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    for callback in trainer.callbacks:
        if not hasattr(callback, "features") and type(callback).__module__.startswith("callbacks."):
            with mock.patch.object(trainer.strategy, "broadcast", lambda value, src=0: value):
                callback.setup(trainer, model, "fit")
    batch = next(iter(datamodule.train_dataloader()))
    if len(batch) == 2:
        batch = tuple(part[:8] for part in batch)
    model.train()
    values, _vectors = model.compute(batch, None)
    values["loss"].backward()
    raise SystemExit(0)


def attempt(argv: list[str]) -> SimpleNamespace:
    """One command line: its outcome ("refused", "runs" or "FAULT"), its words and the seconds it took."""
    out, begun = io.StringIO(), time.perf_counter()
    note, status = "", None
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
        try:
            with (
                mock.patch.object(L.Trainer, "fit", fit),
                mock.patch("torchvision.datasets.CIFAR10._check_integrity", lambda self: True),
                mock.patch("torchvision.datasets.cifar.check_integrity", lambda *args: True),
            ):
                status = train.main(argv)
        except SystemExit as error:
            status = error.code
        except BaseException:
            note = traceback.format_exc()
    os.environ.pop("BD_RUN_ID", None)
    seconds, said = time.perf_counter() - begun, out.getvalue().strip()
    if status == 0 and not note:
        return SimpleNamespace(outcome="runs", note="", seconds=seconds)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if note or status != 2 or len(errors) != 1:
        return SimpleNamespace(outcome="FAULT", note=note or f"status {status}: {said}", seconds=seconds)
    return SimpleNamespace(outcome="refused", note=errors[0], seconds=seconds)


def names_key(words: list[str], sentence: str) -> bool:
    """Whether a refusal names a key, a value or a file of the command line; with a chosen file any will do."""
    if any(word.partition("=")[0] in configs.GROUPS for word in words):
        return True
    parts = [part for word in words for part in (word.partition("=")[0].rpartition(".")[2], word.partition("=")[2])]
    parts += [word.partition("=")[0].rpartition(".")[0].rpartition(".")[2] for word in words]
    return any(part and part.strip("-{}[]'") in sentence for part in parts)


def check(config: str, place: Path, n: int) -> list[tuple[list[str], SimpleNamespace]]:
    """Outcomes of n mutations of a config; a refusal that names nothing, or takes ten seconds, is a fault."""
    results = []
    for words in mutations(config, place, n):
        result = attempt([*needed(config, place), *words])
        if result.outcome == "refused" and not names_key(words, result.note):
            result.outcome = "FAULT"
        if result.seconds > 30:
            result.outcome, result.note = "FAULT", f"took {result.seconds:.0f} s: {result.note}"
        results.append((words, result))
    return results


def main() -> int:
    """Fuzz, count, and print every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="mutations of each config")
    parser.add_argument("configs", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for config in options.configs or shipped():
            plain = attempt(needed(config, Path(folder)))
            if plain.outcome != "runs":
                print(f"{config} itself: {plain.note}", flush=True)
            count: Counter[str] = Counter()
            for words, result in check(config, Path(folder), options.n):
                count[result.outcome] += 1
                if result.outcome == "FAULT":
                    print(f"FAULT {config} {' '.join(words)}: {result.note}", flush=True)
            total += count
            print(f"{config}: {dict(count)}", flush=True)
    print(f"all: {dict(total)}")
    return int(total["FAULT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
