"""Ways of taking the trace: how noisy the gradient of the parameters is by each, and what each learns.

    uv run --group benchmarks benchmarks/trace.py [--seeds 3] [--steps 500] [--draws 200] [--problems NAME]
        [--learn STEPS] [--out runs/trace] [--figure FILE] [KEY=VALUE …]

Problems: a mixture of four Gaussians in the plane, a mixture of ten in 32 dimensions, MNIST's codes (with
data.autoencoder.ckpt_path=…) and MNIST in pixels (with data.root=…). A model of each is trained for some steps by
Stein's identity; then, at each noise level, gradients of the gradient field's loss in independent batches are taken by
each way, and the sum of their variances over all parameters is given in units of that by Stein's identity. Batches have
64 rows, antithetic pairs among them 32 points. Both kernels: the default's closed-form slices, and the constant one, so
that what is due to the trace and what to the kernel can be told apart.

The gradient of a combined trace is that by Stein's identity plus (1 − a) times another of mean zero, so that its
variance is a parabola in a; "best a" is its minimum, and the crossover c that it stands for, a = σ²/(σ² + c²), in units
of the data's standard deviation.

--learn trains a model of each problem by each way for as many steps instead (pairs below half of σ_data and strata of
noise levels where it says antithetic, the config's batches and rate), and after each quarter of them gives the relative
errors of both fields against their closed forms, where there are any, and the error of the denoised data
E‖D(x + σn) − x‖²/d, on held-out data at noise levels 0.1, 0.3, 1 and 3 in units of the data's; minutes are processor
time of the training steps in one thread.

A finished row is kept in OUT/rows.jsonl with the settings that it is of, and not computed again. Prints Markdown tables
of the settings and seeds asked for.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.objectives import FieldDivergence, NoiseLevels
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training
from benchmarks.rows import Rows, mean_sd, sound, table
from benchmarks.trace_learning import measure_learning, report_learning
from benchmarks.trace_problems import KERNELS, PROBLEMS, WAYS, problem_of, words_of

BATCH, LEVELS = 64, (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0)
READ = ("data.", "model", "model.", "callbacks.ema.decay", "trainer.gradient_clip_val")
INSTEAD = {
    "model.init": "networks are trained anew",
    "seed": "use --seeds",
    "experiment": "use --problems",
    "steps": "use --steps, or --learn",
}
MEASURED = {
    **INSTEAD,
    "model.objective.trace": "all are compared, by a network that is trained by Stein's identity",
    "model.warmup_steps": "it is a tenth of --steps",
    "data.batch_size": "batches have 64 rows",
}
LEARNED = {**INSTEAD, **dict.fromkeys(("model.kernel", "model.objective.trace"), "all are compared")}


def check(options: argparse.Namespace) -> None:
    """Refuse words that are wrong or for none of the problems, before anything is measured."""
    options.words = arguments.settings(options.words, READ, LEARNED if options.learn else MEASURED)
    unused = set(options.words).difference(*(words_of(name, options.words) for name in options.problems))
    if unused:
        raise UserError(f"{', '.join(sorted(unused))}: not for {', '.join(options.problems)}, leave it out")
    for name in options.problems:
        config = common.compose(*PROBLEMS[name], *words_of(name, options.words))
        build.check_kind(config["model"], "model", "bd_lightning.modules.BellmanDiffusion")


class Problem:
    """Data, and a model of it that was trained for some steps.

    Args:
        name: one of `PROBLEMS`.
        words: settings of the data.
        seed: of the weights and of the training.
        steps: of the training.
    """

    def __init__(self, name: str, words: list[str], seed: int, steps: int) -> None:
        config, self.data = problem_of(name, words)
        self.name, self.seed = name, seed
        self.begin()
        self.model = common.make_model(config, self.data.facts.arguments, seed)
        self.sigma_data: float = self.data.facts.sigma_data
        training = Training(self.model, replace(Recipe.of(self.model, config, steps), warmup_steps=steps // 10))
        torch.manual_seed(seed)
        for _ in range(steps):
            x, label = next(self.source)
            training.step(lambda x=x, label=label: self.model.losses(x, label).total)

    def begin(self) -> None:
        """Begin with the batches anew, so that a row does not depend on those before it."""
        torch.manual_seed(self.seed)
        self.source = self._batches(self.data, self.seed)

    @staticmethod
    def _batches(data: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, label in common.batches(data, seed):
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
    problem.begin()
    problem.model.fields.kernel = problem.model.kernel = KERNELS[kernel]
    base = spread(problem.gradients("Stein", level, draws))
    found = {"Stein": 1.0}
    for way in list(WAYS)[1:]:
        if way == "exact" and problem.model.dim > 32:
            continue
        fewer = min(draws, max(20, draws // 8)) if way == "exact" and problem.model.dim > 8 else draws
        found[way] = spread(problem.gradients(way, level, fewer)) / base
    a = best(*problem.parts(level, draws))
    return {**found, "a": a} | ({"c": level * math.sqrt(1 / a - 1)} if 0 < a < 1 else {})


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=common.count, default=3, help="how many networks of each problem")
    parser.add_argument("--steps", type=common.count, default=500, help="of a training before variances are taken")
    parser.add_argument("--draws", type=common.at_least(2), default=200, help="gradients that a variance is taken of")
    parser.add_argument("--learn", type=int, metavar="STEPS", help="train by each way instead, a multiple of 4 steps")
    parser.add_argument("--problems", action="append", choices=list(PROBLEMS), help="all if left out; may be repeated")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/trace"), help="folder of the rows")
    picture = arguments.picture(".png", ".jpg", ".pdf", ".svg")
    parser.add_argument("--figure", type=picture, help="file of the variances' figure")
    parser.add_argument("words", nargs="*", help="settings of MNIST's problems, as in train.py")
    options = parser.parse_intermixed_args()
    options.problems = list(dict.fromkeys(options.problems or PROBLEMS))
    if options.learn is not None and (options.learn < 4 or options.learn % 4):
        parser.error("--learn must be a positive multiple of 4")
    for name in ("steps", "draws"):
        if options.learn and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} is for variances, which --learn does not take: leave one of them out")
    if options.learn and options.figure:
        parser.error("--figure draws variances, which --learn does not take: leave one of them out")
    rows = Rows(options.out / "rows.jsonl")
    check(options)
    if options.learn:
        measure_learning(rows, options)
        with sound(rows.path):
            return report_learning(rows, options)
    for seed in range(options.seeds):
        for name in options.problems:
            kept = {**measured(name, options), "seed": seed}
            missing = [(k, s) for k in KERNELS for s in LEVELS if not rows.where(**kept, kernel=k, level=s)]
            problem = Problem(name, words_of(name, options.words), seed, options.steps) if missing else None
            for kernel, level in missing:
                rows.say(**kept, kernel=kernel, level=level, **measure(problem, kernel, level, options.draws))
    with sound(rows.path):
        report(rows, options)
        if options.figure:
            draw(rows, options)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What rows of variances of a problem are of."""
    words = common.contents(words_of(name, options.words))
    return {"problem": name, "words": words, "steps": options.steps, "draws": options.draws}


def report(rows: Rows, options: argparse.Namespace) -> None:
    """Print a table for each problem and kernel."""
    for name in options.problems:
        for kernel in KERNELS:
            lines = []
            for level in LEVELS:
                part = rows.of_seeds(range(options.seeds), **measured(name, options), kernel=kernel, level=level)
                ways = [mean_sd((row[way] for row in part if way in row), 3) for way in list(WAYS)[1:]]
                a, c = mean_sd(row["a"] for row in part), mean_sd(row["c"] for row in part if "c" in row)
                lines.append([level, *ways, a, c, len(part)])
            print(f"\n{name}, {kernel}: variance of the gradient in units of that by Stein's identity")
            print(table(["σ/σ_data", *list(WAYS)[1:], "best a", "its c", "seeds"], lines))


def draw(rows: Rows, options: argparse.Namespace) -> None:
    """All problems in one figure, kernels below each other."""
    from matplotlib.figure import Figure

    names = options.problems
    figure = Figure(figsize=(3.2 * len(names), 6), layout="constrained")
    axes = figure.subplots(len(KERNELS), len(names), sharex=True, sharey=True, squeeze=False)
    for i, kernel in enumerate(KERNELS):
        for j, name in enumerate(names):
            key = {**measured(name, options), "kernel": kernel}
            found = {level: rows.of_seeds(range(options.seeds), **key, level=level) for level in LEVELS}
            for way in WAYS:
                points = {level: [row[way] for row in part if way in row] for level, part in found.items()}
                seen = {level: sum(values) / len(values) for level, values in points.items() if values}
                axes[i, j].plot(list(seen), list(seen.values()), "o-", ms=3, label=way)
            axes[i, j].set(xscale="log", yscale="log", title=f"{name.replace('_', ' ')}, {kernel}")
            axes[i, j].title.set_fontsize(8)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("noise level, in units of the data's standard deviation")
    figure.supylabel("variance of the gradient, Stein's identity = 1")
    figure.savefig(options.figure, dpi=120)


if __name__ == "__main__":
    common.run(main)
