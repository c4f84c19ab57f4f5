"""Training and sampling speed: one process and two, what a step is spent on, memory; on a GPU, bf16 and compilation.

    uv run benchmarks/scaling.py [--steps 100] [--repetitions 3] [--data-root data] [digits] [mnist]

Every process has one thread. Runs of `train.py` on one and two processes (`trainer=ddp_cpu`) take turns; each process
has the config's batch. Two runs of one process at once, which do not communicate, show what the machine itself allows.
The first fifth of the steps is not counted. "Outside" is the share of a step that is not spent in forward, backward and
optimiser, measured around `compute`, `Tensor.backward` (with DDP's communication) and the updates of Adam and Muon.
Prints Markdown tables; figures are medians over repetitions, ratios are medians of ratios of neighbours. Without a GPU
the last part is left out.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

import train
from bd_lightning.checks import UserError, suggest
from bd_lightning.modules import BellmanDiffusion
from benchmarks import common
from benchmarks.common import now
from benchmarks.rows import table

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {"digits": [], "mnist": ["experiment=mnist_small"]}
FACTS = {
    "digits": {"shape": (1, 8, 8), "num_classes": 10, "sigma_data": 0.7514},
    "mnist": {"shape": (1, 28, 28), "num_classes": 10, "sigma_data": 0.6162},
}
PLAIN = [
    "callbacks.metrics=null", "callbacks.best=null", "callbacks.grid=null", "callbacks.trajectory=null",
    "callbacks.progress=null", "trainer.enable_progress_bar=false", "logger=wandb", "run_id=scaling",
]  # fmt: skip


class Clock(L.Callback):
    """Measures what the steps after the first fifth are spent on; rank 0 writes it as JSON.

    Args:
        out: the file.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.spent = dict.fromkeys(("forward", "backward", "optimiser"), 0.0)

    def _around(self, owner: Any, name: str, part: str) -> None:
        plain, spent = getattr(owner, name), self.spent

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                spent[part] += time.perf_counter() - begun

        setattr(owner, name, timed)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the clocks in."""
        self._around(BellmanDiffusion, "compute", "forward")
        self._around(torch.Tensor, "backward", "backward")
        self._around(importlib.import_module("torch.optim.adam"), "adam", "optimiser")
        self._around(importlib.import_module("torch.optim._muon"), "muon", "optimiser")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start to count after the first fifth."""
        if trainer.global_step == trainer.max_steps // 5:
            self.begun = time.perf_counter()
            self.spent.update(dict.fromkeys(self.spent, 0.0))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop before the validation that ends the run."""
        if trainer.global_step == trainer.max_steps and trainer.is_global_zero:
            wall, steps = time.perf_counter() - self.begun, trainer.max_steps - trainer.max_steps // 5
            images = steps * trainer.datamodule.batch_size * trainer.world_size  # type: ignore[attr-defined]
            row = {"rate": images / wall, "outside": 1 - sum(self.spent.values()) / wall}
            row |= {part: seconds / wall for part, seconds in self.spent.items()}
            Path(self.out).write_text(json.dumps(row))


def build(name: str, *words: str) -> BellmanDiffusion:
    """The untrained model of an experiment."""
    return common.make_model(common.compose(*EXPERIMENTS[name], *words), FACTS[name])


def child(*words: str, at_once: int = 1) -> None:
    """This script again, as a process of its own with one thread, or as several that know nothing of each other.

    "{k}" in a word is the number of the process.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *(w.replace("{k}", str(k)) for w in words)], cwd=ROOT, env=environment, **options
        )
        for k in range(at_once)
    ]
    for process in started:
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(printed)


RUNS = {"1 process": ("cpu", 1), "2 processes": ("ddp_cpu", 1), "2 runs at once": ("cpu", 2)}


def training(name: str, options: argparse.Namespace, place: str) -> None:
    """Print images per second and shares of a step on one and two processes, and on two that share nothing."""
    rows: dict[str, list[dict[str, float]]] = {run: [] for run in RUNS}
    for turn in range(options.repetitions):
        for run, (trainer, at_once) in RUNS.items():
            child(
                "--worker", *EXPERIMENTS[name], f"trainer={trainer}", *PLAIN, f"steps={options.steps}",
                f"eval_every={options.steps}", f"root={place}/{name}/{turn}/{run}/{{k}}",
                f"data.root={options.data_root}",
                f"callbacks.clock={{_target_: benchmarks.scaling.Clock, out: '{place}/clock{{k}}.json'}}",
                at_once=at_once,
            )  # fmt: skip
            found = [json.loads(Path(f"{place}/clock{k}.json").read_text()) for k in range(at_once)]
            row = {key: statistics.mean(one[key] for one in found) for key in found[0]}
            rows[run].append(row | {"rate": sum(one["rate"] for one in found)})
    lines, parts = [], ("forward", "backward", "optimiser", "outside")
    for run, found in rows.items():
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        ratios = [row["rate"] / one["rate"] for row, one in zip(found, rows["1 process"])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append([run, f"{middle['rate']:.0f}", *(f"{middle[part]:.1%}" for part in parts), spread])
    print(table([name, "images/s", *parts, "against 1 process"], lines))


def sampling(name: str) -> None:
    """Print samples per second of each sampler."""
    torch.set_num_threads(1)
    module = build(name).eval()
    lines = []
    for sampler in module.samplers:
        for batch in (16, 64):
            begun = now()
            module.sample(range(batch), sampler)
            lines.append([sampler, module.samplers[sampler].calls, batch, f"{batch / (now() - begun):.1f}"])
    print(table([f"{name}, sampler", "network calls", "batch", "samples/s"], lines))


def step(module: BellmanDiffusion, batch: int, device: str = "cpu") -> None:
    """Forward and backward of one batch of noise."""
    x = torch.randn(batch, *module.shape, device=device)
    module.compute((x, torch.zeros(batch, dtype=torch.long, device=device)), None)[0]["loss"].backward()


def memory(name: str, place: str) -> None:
    """Print the peak of resident memory against the batch size, each in a process of its own."""
    lines = []
    for batch in (16, 64, 256):
        child("--memory", name, str(batch), f"{place}/memory")
        lines.append([batch, f"{float(Path(f'{place}/memory').read_text()):.0f}"])
    print(table([f"{name}, batch", "peak resident memory, MiB"], lines), flush=True)


def gpu(name: str, batch: int = 512, steps: int = 50) -> None:
    """Print training speed with and without bf16 and compilation, taking turns, and a profile of a step."""
    kinds = [(bf16, compiled) for bf16 in (False, True) for compiled in (False, True)]
    runs = {}
    for bf16, compiled in kinds:
        module = build(name).cuda().train()
        optimiser = torch.optim.AdamW(module.parameters(), fused=True)
        if compiled:
            module.fields.network.compile()

        def one(module: Any = module, optimiser: Any = optimiser, bf16: bool = bf16) -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                step(module, batch, "cuda")
            optimiser.step()
            optimiser.zero_grad()

        for _ in range(5):
            one()
        runs[bf16, compiled] = one
    rates: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(3):
        for kind in kinds:
            begun = now("cuda")
            for _ in range(steps):
                runs[kind]()
            rates[kind].append(batch * steps / (now("cuda") - begun))
    words = {(bf16, compiled): f"{'bf16' if bf16 else 'float32'}{', compiled' * compiled}" for bf16, compiled in kinds}
    lines = [[words[kind], f"{statistics.median(rates[kind]):.0f}"] for kind in kinds]
    print(table([f"{name} on {torch.cuda.get_device_name()}, batch {batch}", "images/s"], lines))
    with torch.profiler.profile() as profile:
        runs[True, False]()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=15))


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(train.main(sys.argv[2:]))
    if sys.argv[1:2] == ["--memory"]:
        name, batch, out = sys.argv[2:]
        step(build(name).train(), int(batch))
        Path(out).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=common.count, default=100)
    parser.add_argument("--repetitions", type=common.count, default=3)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS))
    options = parser.parse_args()
    for name in options.experiments:
        if name not in EXPERIMENTS:
            raise UserError(f"there is no experiment {name!r} here.{suggest(name, EXPERIMENTS)}")
    options.data_root = str(Path(options.data_root).resolve())
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {load}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as place:
        for name in options.experiments:
            training(name, options, place)
            sampling(name)
            memory(name, place)
            if torch.cuda.is_available():
                gpu(name)
    print(f"\nload at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    common.run(main)
