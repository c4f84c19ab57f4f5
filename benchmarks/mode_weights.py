"""Weights of four separated modes against network calls, for every kernel and step rule.

    uv run benchmarks/mode_weights.py [--chains 10000] [--figure docs/mode_weights.png] [--checkpoint FILE]

The target is the mixture of `configs/data/gaussians_2d.yaml`, true weights .4/.3/.2/.1. The fields are the analytic
ones, so that only the sampler errs. Rules, all from σ = 10 to 0.01, starts Gaussian:

- plain: `AnnealedDynamics`, c = 0.6, 30 levels of 1 to 20 steps;
- multistep: `MultistepDynamics`, relaxation 0.25, 10 to 80 levels;
- ODE: `ProbabilityFlow`, 5 to 40 steps.

Prints a Markdown table of the largest error of a weight and of the mean squared distance to the nearest mode relative
to its true value. A second table is of variances: a rotated Gaussian in 8 dimensions with eigenvalues from 1 to 0.01,
analytic fields of closed-form slices, and the relative errors of the samples' variances along its axes, each with a
standard error of √(2 / chains). With --checkpoint of a `gaussians_2d` run it samples the trained model instead, from a
Gaussian and from a uniform start, and counts the chains that are lost.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd_lightning import checkpoints, kernels
from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.distances import wasserstein2
from bd_lightning.dynamics import AnnealedDynamics, MultistepDynamics, ProbabilityFlow, SampleNoise, Sampler
from bd_lightning.fields import AnalyticFields
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.targets import GaussianMixture
from benchmarks import arguments, common
from benchmarks.rows import table

RANGE: dict[str, Any] = {"sigma_max": 10.0, "sigma_min": 0.01, "exact_score": True}
KERNELS = {
    "exact": kernels.Exact(0.001),
    "closed-form slices": kernels.ClosedFormSlices(0.001),
    "constant": kernels.Constant(),
}


def rules() -> Iterator[tuple[str, Sampler]]:
    """Name and sampler."""
    for steps in (1, 5, 10, 20):
        yield "plain", AnnealedDynamics(levels=30, steps_per_level=steps, step_size=0.6, **RANGE)
    for levels in (10, 15, 20, 30, 40, 80):
        yield "multistep", MultistepDynamics(levels=levels, relaxation=0.25, **RANGE)
    for steps in (5, 8, 10, 15, 20, 40):
        yield "ODE", ProbabilityFlow(steps=steps, **RANGE)


def judge(x: Tensor, target: GaussianMixture) -> tuple[list[float], float, float]:
    """Weights, their largest error, and the spread about the modes relative to the true one."""
    mode = target.mode_of(x.double())
    weights = torch.bincount(mode, minlength=len(target.weights)) / len(x)
    spread = (x - target.means[mode]).square().sum(1).mean() / (target.weights @ target.variances.sum(1))
    return weights.tolist(), float((weights - target.mode_weights).abs().max()), float(spread)


def variances(chains: int) -> None:
    """How well samplers keep the widths of a density that is narrow in some directions."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    true = torch.logspace(0, -2, 8, dtype=torch.float64)
    matrix = axes @ torch.diag(true) @ axes.T
    target = GaussianMixture([[0.0] * 8], covariances=[((matrix + matrix.T) / 2).tolist()])
    fields = AnalyticFields(target, kernels.ClosedFormSlices(0.001), float(true.mean() ** 0.5))
    lines = []
    for calls in (15, 31, 101):
        steps = (calls + 1) // 2
        for name, sampler in (
            ("ODE", ProbabilityFlow(steps=steps, **RANGE)),
            ("ODE, churn 10", ProbabilityFlow(steps=steps, churn=10.0, **RANGE)),
            ("multistep, relaxation 0.5", MultistepDynamics(levels=calls, relaxation=0.5, **RANGE)),
            ("multistep, relaxation 1", MultistepDynamics(levels=calls, relaxation=1.0, **RANGE)),
        ):
            x = sampler(fields, SampleNoise(range(chains), (8,), seed=1)).double() @ axes
            ratio = x.var(0) / true
            worst = float((ratio - 1).abs().max())
            ends = [f"{float(one) - 1:+.3f}" for one in (ratio[0], ratio[-1])]
            lines.append([name, sampler.calls, f"{worst:.3f}", *ends])
    print(table(["rule", "calls", "largest error of a variance", "of the widest", "of the narrowest"], lines))


def figure(rows: list[dict], path: Path) -> None:
    """Largest error against calls."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3), dpi=110, layout="constrained")
    for axes, kernel in zip(picture.subplots(1, 3, sharey=True), KERNELS):
        for rule in ("plain", "multistep", "ODE"):
            mine = [r for r in rows if r["kernel"] == kernel and r["rule"] == rule]
            axes.plot([r["calls"] for r in mine], [r["error"] for r in mine], "o-", ms=3, label=rule)
        axes.axhline(0.02, color="k", lw=0.6, ls="--")
        axes.set(title=kernel, xlabel="network calls", xscale="log", yscale="log")
    picture.axes[0].set_ylabel("largest error of a weight")
    picture.axes[0].legend()
    picture.savefig(path)


def relative(found: Tensor, floor: Tensor) -> str:
    """The ratio of two means, with its standard error in brackets where there are several values of each."""
    if not len(found):
        return "–"
    ratio = found.mean() / floor.mean()
    if len(found) == 1:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} ({(found - ratio * floor[: len(found)]).std() / floor.mean() / len(found) ** 0.5:.2f})"


def trained(path: str, chains: int, density: dict[str, Any]) -> None:
    """Sample a checkpoint from both starts.

    Raises:
        UserError: if it is of other data.
    """
    model, stored = checkpoints.load(path, BellmanDiffusion)
    if stored["data"].get("density") != density:
        raise UserError(f"--checkpoint must be of a run of experiment=gaussians_2d; {path} is of other data")
    target = build.instantiate(density, "data.density")
    real, other = (target.sample(chains, torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def distances(x: Tensor) -> Tensor:
        """W2 of disjoint sets of 2,000 samples to as many real points."""
        return torch.tensor([wasserstein2(a, b) for a, b in zip(x.split(2000), real.split(2000)) if len(a) == 2000])

    floor = distances(other)
    print(f"W2: {len(floor)} sets of 2,000; standard error of the ratio of means in brackets")
    lines = []
    for name, sampler in model.samplers.items():
        for start in ("gaussian", "uniform"):
            model.samplers[name] = dataclasses.replace(sampler, start=start)
            x = model.sample(range(chains), name, seed=1, finite_part=True).double()
            weights, error, spread = judge(x, target)
            shown = " ".join(f"{w:.3f}" for w in weights)
            found = distances(x)
            line = [name, sampler.calls, start, chains - len(x), shown, f"{error:.3f}", f"{spread:.3f}"]
            lines.append([*line, relative(found, floor)])
    print(table(["sampler", "calls", "start", "lost", "weights", "largest error", "spread", "W2 / floor"], lines))


def main() -> None:
    """Run and print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--chains", type=common.count, default=10_000)
    parser.add_argument("--figure", type=arguments.picture(".png", ".jpg", ".pdf", ".svg"))
    parser.add_argument("--checkpoint")
    options = parser.parse_args()
    density = common.compose("data=gaussians_2d")["data"]["density"]
    if options.checkpoint and options.figure:
        parser.error("--figure shows samplers of the exact fields: leave --checkpoint out")
    if options.checkpoint:
        trained(options.checkpoint, options.chains, density)
        return
    target = build.instantiate(density, "data.density")
    rows, lines = [], []
    for kernel, k in KERNELS.items():
        for rule, sampler in rules():
            x = sampler(AnalyticFields(target, k, 1.04), SampleNoise(range(options.chains), (2,), seed=1)).double()
            weights, error, spread = judge(x, target)
            rows.append({"kernel": kernel, "rule": rule, "calls": sampler.calls, "error": error})
            shown = " ".join(f"{w:.3f}" for w in weights)
            lines.append([kernel, rule, sampler.calls, shown, f"{error:.3f}", f"{spread:.2f}"])
    print(table(["kernel", "rule", "calls", "weights", "largest error", "spread"], lines))
    variances(options.chains)
    if options.figure:
        figure(rows, options.figure)


if __name__ == "__main__":
    common.run(main)
