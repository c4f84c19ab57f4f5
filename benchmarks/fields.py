"""Every objective on every low-dimensional target: field errors, distance of the samples, speed.

    uv run --group benchmarks benchmarks/fields.py [--steps 500] [--seeds 3] [--targets moons …] [--out runs/fields]

Equal networks (MLP, width 128, depth 2, 2 for a pair), steps, batches (256), optimiser and averaging. A row that is
finished is kept in OUT/rows.jsonl and not computed again, so that the command can be stopped and repeated. Prints
Markdown tables: mean ± sd over seeds of

- relative errors of s and g against the minimisers of the row's own losses, on held-out data and on a surrounding grid
  (single scale: σ = 0; multi-scale: mean over σ = 0.1, 0.3, 1, data with that noise);
- W2 of 2,000 samples to 2,000 held-out points as a ratio to that of 2,000 training points, and the share of chains that
  were lost. Single scale: 300 plain steps from a Gaussian start; multi-scale: `MultistepDynamics`, 30 calls;
- steps per second relative to the constant kernel (multi-scale, trace by Stein): all rows take turns, step by step.

The peer is azula's KarrasDenoiser with the same network, trained with its own loss and sampled with its own Heun
sampler (18 steps).
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning import dynamics, kernels
from bd_lightning.distances import relative_error, wasserstein2
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP
from bd_lightning.objectives import FieldDivergence, KernelRegression, Partners
from bd_lightning.targets import Density
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training, Turns, optional
from benchmarks.rows import Rows, mean_sd, sound, table
from callbacks.points import lattice
from datamodules import Synthetic

TARGETS = ("gaussians_1d", "uniform_1d", "gaussians_2d", "moons", "rings")
TRUTHS: dict[tuple, dict[str, Tensor]] = {}
BATCH, POINTS = 256, 2000
EPSILON = 0.004
RATE = 2e-3


def single(kernel: kernels.Kernel, trace: str, pairs: str = "all") -> dict[str, Any]:
    """Arguments of a model of a single scale."""
    return {
        "kernel": kernel,
        "objective": FieldDivergence(scalar_weight=1.0, trace=trace),
        "noise": None,
        "partners": Partners(pairs),
        "parametrisation": "direct",
    }


def multi(kernel: kernels.Kernel, trace: str) -> dict[str, Any]:
    """Arguments of a multi-scale model."""
    return {"kernel": kernel, "objective": FieldDivergence(trace=trace)}


EXACT, SLICES, SLICED, CONSTANT = (
    kernels.Exact(EPSILON),
    kernels.ClosedFormSlices(EPSILON),
    kernels.Sliced(EPSILON),
    kernels.Constant(),
)
PAPER = "single scale | paper: sliced, one pair"
BASE = "multi-scale | trace by Stein, constant kernel (score matching)"
PEER = "multi-scale | peer: azula, KarrasDenoiser"
OURS: dict[str, dict[str, Any]] = {
    PAPER: single(SLICED, "sliced", "single"),
    "single scale | exact kernel, one pair": single(EXACT, "exact", "single"),
    "single scale | exact kernel, all pairs": single(EXACT, "exact"),
    "single scale | exact kernel, all pairs, Hutchinson": single(EXACT, "hutchinson"),
    "single scale | closed-form slices": single(SLICES, "exact"),
    "single scale | constant kernel (score matching)": single(CONSTANT, "exact"),
    "single scale | regression, exact kernel": {**single(EXACT, "exact"), "objective": KernelRegression(1.0)},
    "multi-scale | trace by Stein, closed-form slices (default)": multi(SLICES, "stein"),
    "multi-scale | trace by Stein, drawn slices": multi(SLICED, "stein"),
    "multi-scale | trace by Stein, exact kernel": multi(EXACT, "stein"),
    BASE: multi(CONSTANT, "stein"),
    "multi-scale | trace combined, closed-form slices": multi(SLICES, "combined"),
    "multi-scale | exact trace, closed-form slices": multi(SLICES, "exact"),
    "multi-scale | trace by Hutchinson": multi(SLICES, "hutchinson"),
    "multi-scale | trace by Gaussian v": multi(SLICES, "gaussian"),
    "multi-scale | regression, exact kernel": {
        "kernel": EXACT,
        "objective": KernelRegression(),
        "parametrisation": "direct",
    },
}
NAMES = [*OURS, PEER]
LEVELS = (0.1, 0.3, 1.0)


class Ours(nn.Module):
    """A model of this suite.

    Args:
        name: a row of `OURS`.
        data: the data module.

    Attributes:
        levels: noise levels at which its fields are judged.
        minimiser: what `truth` depends on beside the data.
    """

    def __init__(self, name: str, data: Synthetic) -> None:
        super().__init__()
        options = OURS[name]
        network = MLP(data.shape, width=128, depth=2)
        sampler: dynamics.Sampler = dynamics.MultistepDynamics(
            levels=30, sigma_max=10.0, sigma_min=0.01, exact_score=True
        )
        self.levels: tuple[float, ...] = LEVELS
        self.minimiser = f"{options['kernel']}, {type(options['objective']).__name__}"
        if name.startswith("single scale"):
            sampler, self.levels = dynamics.BellmanDynamics(steps=300, step_size=0.01), (0.0,)
        other = MLP(data.shape, width=128, depth=2) if name == PAPER else None
        self.model = BellmanDiffusion(
            network, shape=data.shape, num_classes=0, sigma_data=data.sigma_data, samplers={"sde": sampler},
            sampler="sde", scalar_network=other, **options,
        )  # fmt: skip

    def loss(self, x: Tensor) -> Tensor:
        """The losses of both fields."""
        return self.model.losses(x).total

    @torch.no_grad()
    def fields(self, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """What is learned, by name, at x (B, d) and noise levels sigma (B,)."""
        return dict(zip("sg", self.model.fields(x, sigma)))

    def truth(self, density: Density, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """What should have been learned there."""
        return dict(zip("sg", self.model.analytic(density)(x, sigma)))

    def sample(self, n: int, seed: int) -> Tensor:
        """Those of n samples whose chains are not lost."""
        try:
            return self.model.sample(range(n), seed=seed, finite_part=True)
        except dynamics.SamplingDiverged as error:
            return error.x[~error.lost]


class Peer(nn.Module):
    """A score-based model of azula around the same network, with the surface of `Ours`."""

    levels: tuple[float, ...] = LEVELS
    minimiser = "score"

    def __init__(self, data: Synthetic) -> None:
        super().__init__()
        self.dim = data.density.dim
        backbone, schedule = Backbone(self.dim), optional("azula.noise").VESchedule(0.01, 10.0)
        self.denoiser = optional("azula.denoise").KarrasDenoiser(backbone, schedule)

    def loss(self, x: Tensor) -> Tensor:
        """azula's weighted denoising loss, noise levels uniform in its time."""
        return self.denoiser.loss(x, torch.rand(len(x)))

    @torch.no_grad()
    def fields(self, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """½∇log p_σ, the gradient field of the constant kernel."""
        t = sigma.div(0.01).log() / torch.tensor(1000.0).log()
        return {"g": (self.denoiser(x, t).mean - x) / sigma[:, None] ** 2 / 2}

    def truth(self, density: Density, x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """The same in closed form."""
        return {"g": density.score(x, sigma) / 2}

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> Tensor:
        """n samples by azula's Heun sampler, from the global random numbers."""
        sampler = optional("azula.sample").HeunSampler(self.denoiser, steps=18, silent=True)
        return sampler(sampler.init((n, self.dim)))


class Backbone(nn.Module):
    """The network as azula calls it; its scalar field is not used."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.network = MLP((dim,), width=128, depth=2)
        self.network.scalar_head.requires_grad_(False)

    def forward(self, x: Tensor, c_time: Tensor) -> Tensor:
        """What azula's preconditioning asks for, at x (B, d)."""
        return self.network(x, c_time.expand(len(x)) / 4)[0]


def data_of(target: str) -> Synthetic:
    """The data module of a config."""
    return common.make_data(common.compose(f"data={target}", f"data.batch_size={BATCH}"))


def build(name: str, data: Synthetic, seed: int) -> Any:
    """An untrained model."""
    torch.manual_seed(seed)
    return Peer(data) if name == PEER else Ours(name, data)


def evaluate(model: Any, data: Synthetic, seed: int) -> dict[str, float]:
    """Field errors, W2 and lost chains of an averaged model."""
    held_out, train = data.split("val").x, data.split("train").x
    grid = lattice(data.density.dim, 3.0 if data.density.dim == 2 else 2.0 * data.sigma_data)
    assert grid is not None
    errors: dict[str, list[float]] = {}
    for level in model.levels:
        noise = torch.randn(POINTS, data.density.dim, generator=torch.Generator().manual_seed(0))
        for where, x in (("data", held_out[:POINTS] + level * noise), ("grid", grid[::3])):
            sigma = torch.full((len(x),), level, dtype=torch.float64)
            found, key = model.fields(x, sigma.float()), (data.name, model.minimiser, level, where)
            if key not in TRUTHS:
                TRUTHS[key] = model.truth(data.density, x.double(), sigma)
            for field, value in TRUTHS[key].items():
                known = value.reshape(len(x), -1).isfinite().all(1)
                if known.all() or where == "data":
                    errors.setdefault(f"{field}_{where}", []).append(relative_error(found[field][known], value[known]))
    torch.manual_seed(seed)
    x = model.sample(POINTS, seed)
    floor = wasserstein2(train[:POINTS], held_out[:POINTS])
    w2 = wasserstein2(x, held_out[:POINTS]) / floor if len(x) else float("inf")
    row = {field: statistics.mean(values) for field, values in errors.items()}
    return row | {"w2_ratio": w2, "lost": 1 - len(x) / POINTS}


def closure(model: Any, x: Tensor) -> Callable[[], Tensor]:
    """The loss on a batch, still to be computed."""
    return lambda: model.loss(x)


def one_row(task: tuple[str, str, int, int]) -> dict[str, Any]:
    """Train and evaluate one row on one target with one seed."""
    target, name, seed, steps = task
    torch.set_num_threads(1)
    data = data_of(target)
    training = Training(build(name, data, seed), Recipe(steps, RATE))
    for _, (x, _) in zip(range(steps), common.batches(data, seed)):
        training.step(closure(training.model, x))
    row = evaluate(training.averaged, data, seed)
    return {"target": target, "name": name, "seed": seed, "steps": steps, **row}


def speeds(steps: int = 60) -> dict[str, float]:
    """Seconds of a step of each row on gaussians_2d in one thread, in units of those of the constant kernel."""
    torch.set_num_threads(1)
    data = data_of("gaussians_2d")
    trainings = {name: Training(build(name, data, 0), Recipe(steps, RATE)) for name in NAMES}
    turns = Turns(NAMES, skip=5)
    for _, (x, _) in zip(range(steps), common.batches(data, 0)):
        for name in turns.next():
            with turns.clock(name):
                trainings[name].step(closure(trainings[name].model, x))
    return {name: turns.ratio(name, BASE) for name in NAMES}


def report(rows: list[dict[str, Any]], times: dict[str, float]) -> None:
    """Print a table for each target, and one of the speeds."""
    names = ["s_data", "g_data", "s_grid", "g_grid", "w2_ratio"]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines = []
        for name in NAMES:
            mine = [r for r in rows if r["target"] == target and r["name"] == name]
            lost = mean_sd((100 * r["lost"] for r in mine), 1) if any(r["lost"] for r in mine) else "0"
            lines.append([name, *(mean_sd(r[key] for r in mine if key in r) for key in names), lost])
        header = ["scale", "objective", "s, data", "g, data", "s, grid", "g, grid", "W2 / floor", "lost %"]
        print(f"\n### {target}\n{table(header, lines)}")
    header = ["scale", "objective", "steps per second, relative to the constant kernel"]
    print(table(header, [[name, f"{1 / times[name]:.2f}"] for name in NAMES]))


def main() -> None:
    """Run what is missing and print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=common.count, default=500)
    parser.add_argument("--seeds", type=common.count, default=3)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--jobs", type=common.count, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/fields"))
    options = parser.parse_args()
    optional("azula")
    kept, speed = Rows(options.out / "rows.jsonl"), {"kind": "speed", "names": NAMES}
    (timing,) = kept.where(**speed)[:1] or [kept.add(**speed, times=speeds())]
    tasks = [
        (target, name, seed, options.steps)
        for seed in range(options.seeds)
        for target in options.targets
        for name in NAMES
        if not kept.where(target=target, name=name, seed=seed, steps=options.steps)
    ]
    with common.workers(options.jobs) as do:
        for row in do(one_row, tasks):
            kept.add(**row)
            print(f"{len(kept)} rows, last: {row['target']} {row['name']} seed {row['seed']}", file=sys.stderr)
    rows = [
        row
        for target in options.targets
        for name in NAMES
        for row in kept.of_seeds(range(options.seeds), target=target, name=name, steps=options.steps)
    ]
    with sound(kept.path):
        report(rows, timing["times"])


if __name__ == "__main__":
    common.run(main)
