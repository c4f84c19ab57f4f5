"""How noisy the gradient of the parameters is by each way of taking the trace, against the noise level.

    uv run --group benchmarks benchmarks/trace.py [--seeds 3] [--steps 500] [--draws 200] [--problems mixture_2d …]
        [--out runs/trace] [--figure FILE] [KEY=VALUE …]

Problems: a mixture of four Gaussians in the plane, a mixture of ten in 32 dimensions, MNIST's codes (with
data.autoencoder.ckpt_path=…) and MNIST in pixels (with data.root=…). A model of each is trained for some steps by
Stein's identity; then, at each noise level, gradients of the gradient field's loss in independent batches are taken by
each way, and the sum of their variances over all parameters is given in units of that by Stein's identity. Batches have
64 rows, antithetic pairs among them 32 points. Both kernels: the default's closed-form slices, and the constant one, so
that what is due to the trace and what to the kernel can be told apart.

The gradient of a combined trace is that by Stein's identity plus (1 − a) times another of mean zero, so that its
variance is a parabola in a; "best a" is its minimum, and the crossover c that it stands for, a = σ²/(σ² + c²), in units
of the data's standard deviation. A finished row is kept in OUT/rows.jsonl and not computed again. Prints Markdown
tables.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd_lightning import kernels
from bd_lightning.objectives import FieldDivergence, NoiseLevels
from bd_lightning.targets import GaussianMixture
from benchmarks import common
from benchmarks.common import Recipe, Rows, Training, mean_sd, table

BATCH, LEVELS = 64, (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0)
KERNELS = {"closed-form slices": kernels.ClosedFormSlices(), "constant": kernels.Constant()}
PAIRED = math.inf
WAYS: dict[str, tuple[str, float]] = {
    "Stein": ("stein", 0.0),
    "Hutchinson": ("hutchinson", 0.0),
    "exact": ("exact", 0.0),
    "combined": ("combined", 0.0),
    "antithetic": ("stein", PAIRED),
    "combined, antithetic": ("combined", PAIRED),
}


def mixture(dim: int, modes: int) -> GaussianMixture:
    """Modes at random on a sphere of radius √d, a third as wide as that sphere's coordinates."""
    means = torch.randn(modes, dim, generator=torch.Generator().manual_seed(dim))
    return GaussianMixture((means / means.norm(dim=1, keepdim=True) * math.sqrt(dim)).tolist(), sd=0.3)


PROBLEMS: dict[str, list[str]] = {
    "mixture_2d": ["data=gaussians_2d", "model=points", "callbacks=points"],
    "mixture_32d": ["data=gaussians_2d", "model=mlp", "callbacks=points"],
    "mnist_codes": ["experiment=mnist_latent"],
    "mnist_pixels": ["experiment=mnist_small"],
}


class Problem:
    """Data, and a model of it that was trained for some steps.

    Args:
        name: one of `PROBLEMS`.
        words: settings of the data.
        seed: of the weights and of the training.
        steps: of the training.
    """

    def __init__(self, name: str, words: list[str], seed: int, steps: int) -> None:
        config = common.compose(*PROBLEMS[name], *(words if name.startswith("mnist") else ()))
        data = common.make_data(config)
        if name == "mixture_32d":
            data = type(data)(density=mixture(32, 10))
        data.prepare_data()
        data.setup("fit")
        self.name, self.source = name, self._batches(data)
        self.model = common.make_model(config, data.facts.arguments, seed)
        self.sigma_data: float = data.facts.sigma_data
        training = Training(self.model, replace(Recipe.of(self.model, config, steps), warmup_steps=steps // 10))
        torch.manual_seed(seed)
        for _ in range(steps):
            x, label = next(self.source)
            training.step(lambda x=x, label=label: self.model.losses(x, label).total)

    @staticmethod
    def _batches(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for x, label in common.batches(data):
            for start in range(0, len(x) - BATCH + 1, BATCH):
                yield x[start : start + BATCH], label[start : start + BATCH]

    def gradients(self, way: str, level: float, draws: int) -> Tensor:
        """Gradients of the gradient field's loss at a noise level in units of the data's, (draws, parameters)."""
        trace, antithetic = WAYS[way]
        self.model.objective = FieldDivergence(0.0, trace, probed=1.0 if trace == "combined" else None)
        self.model.noise = NoiseLevels(math.log(level * self.sigma_data), 1e-4, antithetic=antithetic)
        return self._draw(lambda x, g: self.model.losses(x, generator=g).gradient.mean(), draws)

    def _draw(self, loss: Callable[[Tensor, torch.Generator], Tensor], draws: int) -> Tensor:
        found = []
        parameters = [p for p in self.model.fields.network.parameters() if p.requires_grad]
        for seed in range(draws):
            x, _ = next(self.source)
            value = loss(x, torch.Generator().manual_seed(seed))
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
            found.append(torch.cat([g.flatten() for g in grads if g is not None]))
        return torch.stack(found)

    def parts(self, level: float, draws: int) -> tuple[Tensor, Tensor]:
        """Gradients by Stein's identity and by a probe in the same weights, of the same batches."""
        self.model.noise = NoiseLevels(math.log(level * self.sigma_data), 1e-4)
        state = self.source
        self.model.objective = FieldDivergence(0.0, "combined", crossover=1e6, probed=1.0)  # a = 0
        batches = [next(state) for _ in range(draws)]
        self.source = iter(batches)
        probe = self._draw(lambda x, g: self.model.losses(x, generator=g).gradient.mean(), draws)
        self.model.objective = FieldDivergence(0.0, "combined", crossover=1e-6, probed=1.0)  # a = 1
        self.source = iter(batches)
        stein = self._draw(lambda x, g: self.model.losses(x, generator=g).gradient.mean(), draws)
        self.source = state
        return stein, probe


def spread(gradients: Tensor) -> float:
    """Sum of the variances over all parameters."""
    return float(gradients.var(0).sum())


def best(stein: Tensor, probe: Tensor) -> float:
    """The a at which a·stein + (1 − a)·probe has the least variance."""
    both = probe - stein
    centred = both - both.mean(0)
    return 1 + float((centred * (stein - stein.mean(0))).sum() / centred.square().sum())


def measure(problem: Problem, kernel: str, level: float, draws: int) -> dict[str, float]:
    """Variances relative to Stein's, and the best weight of it."""
    problem.model.fields.kernel = problem.model.kernel = KERNELS[kernel]
    base = spread(problem.gradients("Stein", level, draws))
    found = {"Stein": 1.0}
    for way in list(WAYS)[1:]:
        if way == "exact" and problem.model.dim > 32:
            continue
        fewer = max(20, draws // 8) if way == "exact" and problem.model.dim > 8 else draws
        found[way] = spread(problem.gradients(way, level, fewer)) / base
    a = best(*problem.parts(level, draws))
    c = level * math.sqrt(1 / a - 1) if 0 < a < 1 else math.nan
    return {**found, "a": a, "c": c}


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--out", type=Path, default=Path("runs/trace"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("words", nargs="*", help="settings of the data, as in train.py")
    options = parser.parse_args()
    rows = Rows(options.out / "rows.jsonl")
    for seed in range(options.seeds):
        for name in options.problems:
            kept = {"problem": name, "seed": seed, "steps": options.steps, "draws": options.draws}
            missing = [(k, s) for k in KERNELS for s in LEVELS if not rows.where(**kept, kernel=k, level=s)]
            problem = Problem(name, options.words, seed, options.steps) if missing else None
            for kernel, level in missing:
                row = rows.add(**kept, kernel=kernel, level=level, **measure(problem, kernel, level, options.draws))
                print(row, file=sys.stderr, flush=True)
    report(rows)
    if options.figure:
        draw(rows, options.figure)


def report(rows: Rows) -> None:
    """Print a table for each problem and kernel."""
    for name in dict.fromkeys(row["problem"] for row in rows):
        for kernel in KERNELS:
            lines = []
            for level in LEVELS:
                part = rows.where(problem=name, kernel=kernel, level=level)
                ways = [mean_sd((row[way] for row in part if way in row), 3) for way in list(WAYS)[1:]]
                lines.append([level, *ways, *(mean_sd(row[key] for row in part) for key in ("a", "c"))])
            print(f"\n{name}, {kernel}: variance of the gradient in units of that by Stein's identity")
            print(table(["σ/σ_data", *list(WAYS)[1:], "best a", "its c"], lines))


def draw(rows: Rows, path: Path) -> None:
    """All problems in one figure, kernels below each other."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 6), layout="constrained")
    axes = figure.subplots(len(KERNELS), len(names), sharex=True, sharey=True, squeeze=False)
    for i, kernel in enumerate(KERNELS):
        for j, name in enumerate(names):
            for way in WAYS:
                points = {
                    level: [row[way] for row in rows.where(problem=name, kernel=kernel, level=level) if way in row]
                    for level in LEVELS
                }
                seen = {level: sum(values) / len(values) for level, values in points.items() if values}
                axes[i, j].plot(list(seen), list(seen.values()), "o-", ms=3, label=way)
            axes[i, j].set(xscale="log", yscale="log", title=f"{name.replace('_', ' ')}, {kernel}")
            axes[i, j].title.set_fontsize(8)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("noise level, in units of the data's standard deviation")
    figure.supylabel("variance of the gradient, Stein's identity = 1")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    common.run(main)
