"""Everything that is to be seen on one GPU, in one command that can be stopped and given again.

    python3 benchmarks/gpu.py --minutes M [--device cpu|cuda] [--data FOLDER] [--weights FILE] [--call SECONDS]
        [--eager] [--out FOLDER] [KEY=VALUE ...]

From a checkout, with torch, torchvision, lightning, torchmetrics, scikit-learn, matplotlib, pandas and tqdm, and the
wheels of omegaconf, torch-fidelity and safetensors on PYTHONPATH; no network, no W&B. In this order:

1. Losses and samplers of every GPU config on the real device, and, on CUDA, a training step that may not wait for it.
2. Time of a training step of `experiment=cifar10_h200`: float32 and bf16, each also compiled; of the share of the
   card's peak that is; a profile of a bf16 step in OUT/profile.txt.
3. Bellman Diffusion is trained for M minutes (as many steps as the faster of bf16 and bf16 compiled makes in them) by
   train.py, then 50,000 samples are compared with the training set, and the weights written to OUT/weights in bf16.
4. DDPM and score matching likewise, for the same minutes each.

A finished row is kept in OUT/rows.jsonl and not done again; a training that was stopped goes on where it was. After
every row OUT/report.md has the tables, OUT/NAME.png the samples. --call stops by itself after so many seconds, for
machines that are lent for a while. FOLDER is one of images with train and test inside, or one with cifar-10-batches-py.
FID is in features of a classifier of the training images, or, with --weights, in Inception's. On a CPU all sizes are
cut: a rehearsal, whose numbers mean nothing. KEY=VALUE are settings of train.py, the same at every call.
"""

import argparse
import json
import operator
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bd_lightning.checks import UserError, reason_of
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training
from benchmarks.gpu_report import report
from benchmarks.gpu_speed import MODES, flops, peak_of, profile, speed
from benchmarks.rows import Rows, sound
from callbacks import InceptionFeatures
from tests.gpu_steps import CASES, built, step_and_sample

AGAIN = 60.0
"""Seconds after which a call that goes on is asked to stop again; a training ends its step and writes in less."""
CONSTANT = "model.kernel._target_=bd_lightning.kernels.Constant"
MODELS = {
    "Bellman Diffusion": [],
    "DDPM": [
        CONSTANT, "model.parametrisation=noise", "model.objective={_target_: benchmarks.peers.NoiseError}",
        "model.noise={_target_: benchmarks.peers.LinearBetas, scale: 0.5}",
    ],
    "score matching": [CONSTANT],
}  # fmt: skip
READ = ("data", "data.", "model", "model.", "callbacks", "callbacks.", "trainer.", "seed")
INSTEAD = {
    "steps": "use --minutes", "eval_every": "it is a quarter of the training", "root": "use --out",
    "run_id": "it is the model's name", "logger": "there is none", "trainer.precision": "both are timed",
    "model.compile": "both are timed, or use --eager", "callbacks.progress": "there is none",
    "callbacks.trajectory": "there is none", "trainer.enable_progress_bar": "there is none",
    "trainer.accumulate_grad_batches": "use data.batch_size",
    "experiment": "it is cifar10_h200", "data.folder": "use --data", "data.root": "use --data, or --out",
}  # fmt: skip
REHEARSAL = [
    "trainer=cpu", "model.network.channels=[16,16,32,32]", "model.network.blocks=1", "data.batch_size=16",
    "data.num_workers=0", "data.pin_memory=false", "model.samplers.sde.levels=10", "model.samplers.ode.steps=5",
    "callbacks.metrics.n=32", "callbacks.metrics.n_test=64", "callbacks.metrics.batch_size=32", "callbacks.grid.n=16",
    "callbacks.metrics.kid_subset=16", "callbacks.memorisation=null", "model.warmup_steps=5",
]  # fmt: skip


class Bench:
    """What is measured, on what, and where it is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.device = options, options.out.resolve(), torch.device(options.device)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.out} ({reason_of(error)}): give another --out") from error
        torch.backends.cudnn.benchmark = True  # as trainer=gpu does
        self.rows = Rows(self.out / "rows.jsonl")
        cut = REHEARSAL if self.device.type == "cpu" else ["trainer=gpu", "trainer.devices=1"]
        self.words = ["experiment=cifar10_h200", *data_words(options.data, self.out), *cut, *inception(options.weights)]
        self.words += arguments.settings(options.words, READ, INSTEAD)
        settings = {"words": self.words, "minutes": options.minutes, "eager": options.eager}
        if self.rows and not self.rows.where(kind="settings", **settings):
            raise UserError(f"{options.out} holds rows of other settings: give another --out, or the command as it was")
        self.config = common.compose(*self.words)
        for name in ("grid", "metrics", "last"):
            if not (self.config["callbacks"] or {}).get(name):
                raise UserError(f"callbacks.{name}=null: what it leaves is reported here, leave that out")
        self.batch = self.config["data"]["batch_size"]
        self.modes = [mode for mode, (_, compiled) in MODES.items() if not (compiled and options.eager)]
        if not self.rows:
            self.rows.add(kind="settings", **settings)
        self.peak = peak_of(self.card)

    @property
    def card(self) -> str:
        """The name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or "CPU"

    def once(self, kind: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row, made unless it is there.

        Raises:
            UserError: if the card has not the memory for it.
        """
        found = self.rows.where(kind=kind, name=name)
        if not found:
            try:
                made = make()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.card} has too little memory for {kind} with batches of {self.batch}: give "
                    "data.batch_size=N, a smaller one, and another --out"
                ) from error
            found = [self.rows.add(kind=kind, name=name, **made)]
            self.report()
            print(json.dumps(found[-1]), flush=True)
        return found[-1]

    def report(self) -> str:
        """The tables of all rows, which are written to OUT/report.md too.

        Raises:
            UserError: if that cannot be, or a row has been damaged.
        """
        with sound(self.rows.path):
            text = report(self.rows, self.peak, self.device.type)
        try:
            (self.out / "report.md").write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {self.out / 'report.md'} ({reason_of(error)})") from error
        return text

    def training(self, name: str, bf16: bool, compiled: bool) -> tuple[Training, Callable[[], Tensor]]:
        """A model in training as train.py trains it, and its loss of a batch of noise."""
        words = [*self.words, *MODELS[name], *["model.compile=true"] * compiled]
        facts = {"shape": (3, 32, 32), "num_classes": 10, "sigma_data": 0.5}
        model = common.make_model(common.compose(*words), facts).to(self.device)
        training = Training(model, replace(Recipe.of(model, self.config, 100_000), bf16=bf16))
        x = torch.randn(self.batch, 3, 32, 32, device=self.device)
        return training, lambda: model.losses(x).total


def data_words(folder: Path | None, out: Path) -> list[str]:
    """The words that name the data; what is derived from them is cached in `out`.

    Raises:
        UserError: if nothing is found there.
    """
    if folder is None:
        return ["data.val_size=0"]
    if (folder / "cifar-10-batches-py").is_dir():
        return [f"data.root={folder}", "data.val_size=0", "data.download=false"]
    if (folder / "train").is_dir():
        return ["data=folder", f"data.folder={folder}", f"data.root={out / 'data'}", "data.val_fraction=0"]
    raise UserError(f"--data: {folder} has neither cifar-10-batches-py nor train and test with images in it")


def inception(weights: Path | None) -> list[str]:
    """The words that have FID in Inception's features.

    Raises:
        UserError: if the weights are not there, or are others.
    """
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights: file not found: {weights}")
    if weights is not None:
        InceptionFeatures(str(weights)).read()  # now, and not when the card has worked for half an hour
    features = "callbacks.metrics.features"
    target = f"{features}._target_=callbacks.InceptionFeatures"
    return [] if weights is None else [target, f"{features}.weights={weights}"]


# ---- 1 and 2: the device, and a step


def devices(bench: Bench) -> dict[str, Any]:
    """A step and the samplers of the GPU configs, and a step that may not wait: what went wrong, in words."""
    wrong = []
    for words in CASES:
        try:
            module, shape, config = built([word.replace("~", " ") for word in words.split(" ")])
            loss = step_and_sample(module.to(bench.device), shape, config, bench.device.type)
            if not loss.isfinite():
                wrong.append(f"{words}: the loss is {float(loss):g}")
        except (RuntimeError, AssertionError) as error:
            wrong.append(f"{words}: {' '.join(str(error).split())[:300]}")
    found = {"card": bench.card, "torch": torch.__version__, "configs": len(CASES), "wrong": wrong}
    if bench.device.type != "cuda":
        return found
    training, loss_of = bench.training("Bellman Diffusion", True, False)
    training.update(loss_of)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(loss_of)
        waits = ""
    except RuntimeError as error:
        waits = " ".join(str(error).split())[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found | {"waits": waits, "memory": torch.cuda.get_device_properties(bench.device).total_memory}


# ---- 3 and 4: training, FID, weights


def plan(bench: Bench, name: str) -> dict[str, Any]:
    """The mode that a model is trained in, which is one for all, and the steps that it makes in the minutes given.

    Raises:
        UserError: if no step can be taken.
    """
    modes = [row["mode"] for row in bench.rows.where(kind="plan")][:1] or [
        mode for mode in bench.modes if MODES[mode][0]
    ]
    rows = {mode: bench.once("speed", f"{name}: {mode}", lambda mode=mode: speed(bench, name, mode)) for mode in modes}
    taken = {mode: row["seconds"] for mode, row in rows.items() if "seconds" in row}
    if not taken:
        raise UserError(f"no step of {name} can be taken: {next(iter(rows.values()))['failed']}")
    with sound(bench.rows.path):
        mode = min(taken, key=taken.__getitem__)
        steps = 4 * max(1, round(60 * bench.options.minutes / taken[mode] / 4))
        return {"mode": mode, "steps": steps, "minutes": bench.options.minutes}


def run_words(bench: Bench, name: str, planned: dict[str, Any]) -> list[str]:
    """The words of a model's run."""
    words = [*bench.words, *MODELS[name], f"steps={planned['steps']}", f"eval_every={planned['steps'] // 4}"]
    bf16, compiled = MODES[planned["mode"]]
    words += [f"trainer.precision={'bf16-mixed' if bf16 else '32-true'}", f"model.compile={str(compiled).lower()}"]
    words += [f"root={bench.out / 'runs'}", "trust=true"]
    words += [
        "logger=none",
        "callbacks.progress=null",
        "trainer.enable_progress_bar=false",
        "callbacks.trajectory=null",
    ]
    return [*words, f"run_id={slug(name)}"]


def slug(name: str) -> str:
    """A name for files."""
    return name.lower().replace(" ", "-")


def run_dir(bench: Bench, name: str) -> Path:
    """The run folder of a model.

    Raises:
        UserError: if it is gone.
    """
    for folder in (bench.out / "runs").glob(f"*/{slug(name)}"):
        return folder
    raise UserError(
        f"{bench.out / 'runs'} has no run of {name}, which {bench.rows.path} says was trained: put it back, or delete "
        "its lines there to train it anew"
    )


@contextmanager
def left_whole(folder: Path) -> Iterator[None]:
    """What a run has left in its folder is read inside.

    Raises:
        UserError: if it is not all there.
    """
    try:
        yield
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder} lacks grids or numbers of its run, or they are damaged ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}): mend them; to train anew, delete it and "
            "its lines in OUT/rows.jsonl"
        ) from error


def trained(bench: Bench, name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on with it; the samples of its last step go to OUT."""
    common.train_py(*run_words(bench, name, planned), "ckpt_path=last")
    folder = run_dir(bench, name)
    with left_whole(folder):
        grid = sorted((folder / "samples").glob(f"{bench.config['model']['sampler']}-*.png"))[-1]
        curve = [[row["step"], row.get("val/fid")] for row in json.loads((folder / "fid.json").read_text())]
    try:
        shutil.copy(grid, bench.out / f"{slug(name)}.png")
    except OSError as error:
        raise UserError(f"cannot write {bench.out / slug(name)}.png ({reason_of(error)}): make room") from error
    return {**planned, "images": planned["steps"] * bench.batch, "curve": curve}


def judged(bench: Bench, name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """FID and its like of the last weights, by `train.py test`."""
    folder = run_dir(bench, name)
    common.train_py("test", f"ckpt_path={folder}/checkpoints/last.ckpt", *run_words(bench, name, planned)[1:-1])
    with left_whole(folder):
        found = max(folder.glob("test-*/fid.json"), key=lambda path: path.stat().st_mtime)
        return dict(json.loads(found.read_text())[-1])


def weights(bench: Bench, name: str) -> dict[str, Any]:
    """The averaged weights in bf16, as `train.py export` writes them.

    Raises:
        UserError: if something else lies in their place.
    """
    target, last = bench.out / "weights", run_dir(bench, name) / "checkpoints" / "last.ckpt"
    if (target / "model.safetensors").is_file():  # of a command that was stopped before its row was kept
        shutil.rmtree(target, ignore_errors=True)
    common.train_py("export", f"ckpt_path={last}", f"to={target}", "precision=bf16")
    return {"bytes": sum(path.stat().st_size for path in target.iterdir()), "folder": target.name}


# ---- the command


def everything(bench: Bench) -> None:
    """All rows in order."""
    bench.once("devices", "all", lambda: devices(bench))
    bench.once("flops", "Bellman Diffusion", lambda: flops(bench))
    for mode in bench.modes:
        name = f"Bellman Diffusion: {mode}"
        bench.once("speed", name, lambda mode=mode: speed(bench, "Bellman Diffusion", mode))
    bench.once("profile", "Bellman Diffusion", lambda: profile(bench))
    for name in MODELS:
        planned = bench.once("plan", name, lambda name=name: plan(bench, name))
        with sound(bench.rows.path):
            MODES[planned["mode"]]
            planned = {
                "mode": planned["mode"],
                "steps": operator.index(planned["steps"]),
                "minutes": planned["minutes"],
            }
        bench.once("trained", name, lambda name=name, planned=planned: trained(bench, name, planned))
        bench.once("judged", name, lambda name=name, planned=planned: judged(bench, name, planned))
        if name == "Bellman Diffusion":
            bench.once("weights", name, lambda name=name: weights(bench, name))


@contextmanager
def stopped_after(seconds: float | None) -> Iterator[None]:
    """Ctrl-C after so many seconds, and again while that is not heard: what compiles may swallow it."""
    ended = threading.Event()

    def ask() -> None:
        late = ended.wait(seconds)
        while not late:
            os.kill(os.getpid(), signal.SIGINT)
            late = ended.wait(AGAIN)

    if seconds is None:
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    threading.Thread(target=ask, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGINT, usual)


def main() -> None:
    """Do what is left to do."""
    parser = common.parser(__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--call", type=float, help="stop after so many seconds; the same command goes on")
    parser.add_argument("--eager", action="store_true", help="leave compilation out")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/gpu"))
    parser.add_argument("words", nargs="*", help="settings of the config, as in train.py")
    options = parser.parse_intermixed_args()
    if not 0 < options.minutes < 1e6 or (options.call is not None and not 0 < options.call < 1e6):
        parser.error("--minutes and --call must be positive, and below a million")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, and PyTorch finds no GPU here: give --device cpu for a rehearsal")
    bench = Bench(options)
    try:
        with stopped_after(options.call):
            everything(bench)
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command goes on", flush=True)
        sys.exit(130)
    print(bench.report())


if __name__ == "__main__":
    common.run(main)
