"""Every estimator on every low-dimensional target: field errors, distance of the samples, speed.

    uv run --group benchmarks benchmarks/fields.py [--steps 500] [--seeds 3] [--jobs 2] [--out runs/fields]

Equal networks (MLP, width 128, depth 2, 2 for a pair), steps, batches (256), optimiser and averaging. A row that is
finished is kept in OUT/rows.jsonl and not computed again, so that the command can be stopped and repeated. Prints
Markdown tables: mean ± sd over seeds of

- relative errors of s and g against the minimisers of the row's own losses, on held-out data and on a surrounding grid
  (single scale: σ = 0; multi-scale: mean over σ = 0.1, 0.3, 1, data with that noise);
- W2 of 2,000 samples to 2,000 held-out points as a ratio to that of 2,000 training points, and the share of chains that
  were lost. Single scale: 300 plain steps from a Gaussian start; multi-scale: `MultistepDynamics`, 30 calls;
- steps per second relative to the constant kernel (multi-scale, denoising): all rows take turns, step by step.

The peer is azula's KarrasDenoiser with the same network, trained with its own loss and sampled with its own Heun
sampler (18 steps).
"""

import argparse
import json
import math
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bd_lightning import build as builder
from bd_lightning import config as configs
from bd_lightning import dynamics, kernels
from bd_lightning.distances import relative_error, wasserstein2
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP
from callbacks.points import lattice
from datamodules import Synthetic

TARGETS = ("gaussians_1d", "uniform_1d", "gaussians_2d", "moons", "rings")
LEVELS = (0.1, 0.3, 1.0)
TRUTHS: dict[tuple, dict[str, torch.Tensor]] = {}
BATCH, POINTS = 256, 2000
EPSILON = 0.004
SINGLE = {"multi_scale": False, "parametrisation": "direct", "estimator": "divergence", "scalar_weight": 1.0}
EXACT, SLICES, SLICED, CONSTANT = (
    kernels.Exact(EPSILON),
    kernels.ClosedFormSlices(EPSILON),
    kernels.Sliced(EPSILON),
    kernels.Constant(),
)
PAPER = "paper: sliced, one pair"
BASE, PEER = "constant kernel (score matching)", "peer: azula, KarrasDenoiser"
ESTIMATORS = {
    f"single scale | {PAPER}": {"kernel": SLICED, "pairs": "single", "trace": "sliced", **SINGLE},
    "single scale | exact kernel, one pair": {"kernel": EXACT, "pairs": "single", "trace": "exact", **SINGLE},
    "single scale | exact kernel, all pairs": {"kernel": EXACT, "trace": "exact", **SINGLE},
    "single scale | exact kernel, all pairs, Hutchinson": {"kernel": EXACT, "trace": "hutchinson", **SINGLE},
    "single scale | closed-form slices": {"kernel": SLICES, "trace": "exact", **SINGLE},
    f"single scale | {BASE}": {"kernel": CONSTANT, "trace": "exact", **SINGLE},
    "single scale | regression, exact kernel": {"kernel": EXACT, **SINGLE, "estimator": "regression"},
    "multi-scale | denoising, closed-form slices (default)": {"kernel": SLICES},
    "multi-scale | denoising, drawn slices": {"kernel": SLICED},
    "multi-scale | denoising, exact kernel": {"kernel": EXACT},
    f"multi-scale | denoising, {BASE}": {"kernel": CONSTANT},
    "multi-scale | divergence, closed-form slices": {"kernel": SLICES, "estimator": "divergence", "trace": "exact"},
    "multi-scale | divergence, Hutchinson": {"kernel": SLICES, "estimator": "divergence", "trace": "hutchinson"},
    "multi-scale | divergence, Gaussian v": {"kernel": SLICES, "estimator": "divergence", "trace": "gaussian"},
    "multi-scale | regression, exact kernel": {"kernel": EXACT, "estimator": "regression", "parametrisation": "direct"},
    f"multi-scale | {PEER}": {},
}


class Peer(nn.Module):
    """A score-based model of azula around the same network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        from azula.denoise import KarrasDenoiser
        from azula.noise import VESchedule

        class Backbone(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = MLP((dim,), width=128, depth=2)
                self.network.scalar_head.requires_grad_(False)

            def forward(self, x, c_time):
                return self.network(x, c_time.expand(len(x)) / 4)[0]

        self.denoiser = KarrasDenoiser(Backbone(), VESchedule(0.01, 10.0))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """azula's weighted denoising loss, noise levels uniform in its time."""
        return self.denoiser.loss(x, torch.rand(len(x)))

    @torch.no_grad()
    def score(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """∇log p_σ."""
        t = torch.tensor(sigma / 0.01).log() / torch.tensor(1000.0).log()
        return (self.denoiser(x, t.expand(len(x))).mean - x) / sigma**2

    def sample(self, n: int, dim: int) -> torch.Tensor:
        """n samples by azula's Heun sampler."""
        from azula.sample import HeunSampler

        sampler = HeunSampler(self.denoiser, steps=18, silent=True)
        return sampler(sampler.init((n, dim)))


def data_of(target: str) -> Synthetic:
    """The data module of a config."""
    request = configs.parse([f"data={target}", f"data.batch_size={BATCH}"])
    return builder.instantiate(configs.compose(request)["data"], "data")


def build(estimator: str, data: Synthetic, seed: int) -> nn.Module:
    """An untrained model."""
    torch.manual_seed(seed)
    if PEER in estimator:
        return Peer(data.density.dim)
    options = ESTIMATORS[estimator]
    network = MLP(data.shape, width=128, depth=2)
    if options.get("multi_scale", True):
        sampler = dynamics.MultistepDynamics(levels=30, sigma_max=10.0, sigma_min=0.01, exact_score=True)
    else:
        sampler = dynamics.BellmanDynamics(steps=300, step_size=0.01)
    other = MLP(data.shape, width=128, depth=2) if PAPER in estimator else None
    return BellmanDiffusion(
        network, shape=data.shape, num_classes=0, sigma_data=data.sigma_data, samplers={"sde": sampler}, sampler="sde",
        scalar_network=other, **options,
    )  # fmt: skip


class Training:
    """One model in training, a step at a time."""

    def __init__(self, model: nn.Module, steps: int, lr: float = 2e-3) -> None:
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )

    def step(self, x: torch.Tensor) -> None:
        """One optimiser step on a batch."""
        if isinstance(self.model, Peer):
            loss = self.model.loss(x)
        else:
            terms = self.model.losses(x)
            loss = (terms["gradient"] + terms["scalar"]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)


def evaluate(model: nn.Module, data: Synthetic, seed: int) -> dict[str, float]:
    """Field errors, W2 and lost chains of an averaged model."""
    held_out, train = data.split("val").x, data.split("train").x
    levels = LEVELS if getattr(model, "multi_scale", True) else (0.0,)
    grid = lattice(data.density.dim, 3.0 if data.density.dim == 2 else 2.0 * data.sigma_data)[::3]
    errors: dict[str, list[float]] = {}
    for level in levels:
        noise = torch.randn(POINTS, data.density.dim, generator=torch.Generator().manual_seed(0))
        for where, x in (("data", held_out[:POINTS] + level * noise), ("grid", grid)):
            point, sigma = x.double(), torch.full((len(x),), level, dtype=torch.float64)
            if isinstance(model, Peer):
                found = {"g": model.score(x, level) / 2}
            else:
                with torch.no_grad():
                    found = dict(zip("sg", model.fields(x, sigma.float())))
            key = (data.name, str(getattr(model, "kernel", "")), getattr(model, "estimator", ""), level, where)
            if key not in TRUTHS:
                density = data.density
                peer = isinstance(model, Peer)
                fields = ("", density.score(point, sigma) / 2) if peer else model.analytic(density)(point, sigma)
                TRUTHS[key] = {name: field for name, field in zip("sg", fields) if name in found}
            truth = TRUTHS[key]
            for name, value in truth.items():
                known = value.reshape(len(x), -1).isfinite().all(1)
                if known.all() or where == "data":
                    errors.setdefault(f"{name}_{where}", []).append(relative_error(found[name][known], value[known]))
    row = {name: statistics.mean(values) for name, values in errors.items()}
    lost = 0.0
    torch.manual_seed(seed)
    if isinstance(model, Peer):
        x = model.sample(POINTS, data.density.dim)
    else:
        try:
            x = model.sample(range(POINTS), seed=seed, finite_part=True)
        except dynamics.SamplingDiverged as error:
            x = error.x[~error.lost]
        lost = 1 - len(x) / POINTS
    floor = wasserstein2(train[:POINTS], held_out[:POINTS])
    w2 = wasserstein2(x, held_out[:POINTS]) / floor if len(x) else float("inf")
    return row | {"w2_ratio": w2, "lost": lost}


def one_row(task: tuple[str, str, int, int]) -> dict:
    """Train and evaluate one estimator on one target with one seed."""
    target, estimator, seed, steps = task
    torch.set_num_threads(1)
    data = data_of(target)
    training = Training(build(estimator, data, seed), steps)
    batches = iter(data.train_dataloader())
    for _ in range(steps):
        training.step(next(batches)[0])
    row = evaluate(training.average.module.eval(), data, seed)
    return {"target": target, "estimator": estimator, "seed": seed, "steps": steps, **row}


def speeds(steps: int = 60) -> dict[str, float]:
    """Median seconds of a step of each estimator on gaussians_2d, taking turns in one thread."""
    torch.set_num_threads(1)
    data = data_of("gaussians_2d")
    trainings = {name: Training(build(name, data, 0), steps) for name in ESTIMATORS}
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    batches = iter(data.train_dataloader())
    for k in range(steps):
        x = next(batches)[0]
        for name in sorted(trainings, reverse=bool(k % 2)):
            start = time.perf_counter()
            trainings[name].step(x)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[5:]) for name, values in seconds.items()}


def cell(values: list[float], digits: int = 2) -> str:
    """Mean ± sd, over as many seeds as there are."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "not finite"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def report(rows: list[dict], seconds: dict[str, float]) -> None:
    """Print a table for each target, and one of the speeds."""
    for target in TARGETS:
        print(f"\n### {target}\n")
        print("| scale | estimator | s, data | g, data | s, grid | g, grid | W2 / floor | lost % |")
        print("|---|---|---|---|---|---|---|---|")
        for estimator in ESTIMATORS:
            mine = [r for r in rows if r["target"] == target and r["estimator"] == estimator]
            cells = [cell([r[k] for r in mine if k in r]) for k in ("s_data", "g_data", "s_grid", "g_grid", "w2_ratio")]
            lost = cell([100 * r["lost"] for r in mine], 1) if any(r["lost"] for r in mine) else "0"
            print(f"| {estimator} | {' | '.join(cells)} | {lost} |")
    base = seconds[f"multi-scale | denoising, {BASE}"]
    print("\n| scale | estimator | steps per second, relative to the constant kernel |\n|---|---|---|")
    for estimator, value in seconds.items():
        print(f"| {estimator} | {base / value:.2f} |")


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/fields"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path, timing = options.out / "rows.jsonl", options.out / "speeds.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in rows if row["steps"] == options.steps and row["seed"] < options.seeds]
    done = {(row["target"], row["estimator"], row["seed"]) for row in rows}
    if not timing.is_file():
        timing.write_text(json.dumps(speeds()))
    tasks = [
        (target, estimator, seed, options.steps)
        for seed in range(options.seeds)
        for target in TARGETS
        for estimator in ESTIMATORS
        if (target, estimator, seed) not in done
    ]
    with get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(one_row, tasks):
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(rows)} rows, last: {row['target']} {row['estimator']} seed {row['seed']}", file=sys.stderr)
    report(rows, json.loads(timing.read_text()))


if __name__ == "__main__":
    main()
