"""Bellman Diffusion beside denoising score matching: the same network, data, steps, noise levels and solver.

    uv run benchmarks/kernels.py [--steps 1000] [--seeds 3] [--samples 1500]
    uv run benchmarks/kernels.py --mobility 3000 [KEY=VALUE ...]

Both models of a seed are trained in turn, a step of one and a step of the other, so that their step times are
measured side by side. FID is of `samples` samples (ODE, 35 calls) of the averaged weights against the 1,500 training
digits, in features of a classifier of the training split. Prints a Markdown table.

--mobility trains nothing: it says how far the two are apart in the data of a config (KEY=VALUE as in train.py). m is
the mobility of the config's kernel, closed-form slices unless it says another, estimated from N training images at half
as many noised others: the standard
deviation of log m over these points; σ∇log m, by which the two drifts differ; and its share of σ∇log p_σ, which is
at least that of a Gaussian of the data's variance, σ/√(σ² + σ_d²) (Cramér and Rao's bound). For score matching all are
zero.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.kernels import Kernel
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.modules.base import told
from benchmarks import common
from benchmarks.common import Recipe, Training, Turns
from benchmarks.rows import table
from callbacks import ClassifierFeatures
from callbacks.metrics import frechet_distance
from datamodules import to_uint8

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
KERNELS = {"closed-form slices (Bellman Diffusion)": "ClosedFormSlices", "constant (score matching)": "Constant"}
OURS, BASE = KERNELS


def compose(kernel: str) -> dict[str, Any]:
    """The default config with another kernel."""
    return common.compose(f"model.kernel._target_=bd_lightning.kernels.{kernel}", "model.kernel.epsilon=0.001")


def closure(model: BellmanDiffusion, x: Tensor, label: Tensor, seed: int) -> Callable[[], Tensor]:
    """The loss on a batch with the noise of a seed, still to be computed."""
    return lambda: model.losses(x, label, torch.Generator().manual_seed(seed)).total


def train(data: Any, steps: int, seed: int) -> tuple[dict[str, BellmanDiffusion], Turns]:
    """Averaged models of both kernels from the same initial weights, and the seconds of every step."""
    trainings = {}
    for name, kernel in KERNELS.items():
        config = compose(kernel)
        model = common.make_model(config, data.facts.arguments, seed)
        trainings[name] = Training(model, Recipe.of(model, config, steps))
    turns = Turns(KERNELS)
    torch.manual_seed(seed)
    for step, (x, label) in zip(range(steps), common.batches(data, seed)):
        for name in turns.next():
            loss = closure(trainings[name].model, x, label, seed * 1_000_003 + step)  # the same noise for both
            with turns.clock(name):
                trainings[name].update(loss)
            trainings[name].follow()
    return {name: training.averaged for name, training in trainings.items()}, turns


def variation(kernel: Kernel, y: Tensor, x: Tensor, sigma: float, noise: Tensor) -> tuple[float, float]:
    """How far the mobility of a kernel is from a constant at noised points.

    Args:
        kernel: the kernel.
        y: partners, shape (N, d).
        x: points, shape (B, d).
        sigma: noise level, in units of the data.
        noise: standard normal noise of the points, shape (B, d).

    Returns:
        The standard deviation of log m over the points, and the root mean square of an entry of σ∇log m.
    """
    levels, weights = x.new_full((len(x),), sigma), x.new_full((len(x), len(y)), 1 / len(y))
    m, grad_m = kernel(x + sigma * noise, y, levels, weights, torch.Generator().manual_seed(1))
    return float(m.log().std()), float((sigma * grad_m / m[:, None]).square().mean().sqrt())


def mobility(words: list[str], n: int) -> None:
    """Print how far the mobility of a config's kernel is from a constant, by noise level."""
    config = common.compose(*words)
    build.check_kind(config["model"], "model", "bd_lightning.modules.BellmanDiffusion")
    kernel = build.instantiate(config["model"]["kernel"], "model.kernel")
    data = common.make_data(config)
    data.prepare_data()
    data.setup("fit")
    others, epoch = max(2, n // 2), islice(common.batches(data, 0), len(data.train_dataloader()))  # none stands twice
    x = torch.cat(list(collect(epoch, n + others))).flatten(1).double()
    if n + others > len(x):
        raise UserError(f"--mobility {n} takes {n + others} samples, and an epoch of training has {len(x)}: give fewer")
    y, points = x[:n], x[n : n + others]
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    sizes = {level: variation(kernel, y, points, level * data.facts.sigma_data, noise) for level in LEVELS}
    print(f"{' '.join(words)}: {told(kernel)}, {x.shape[1]} dimensions, {n} partners, {len(points)} points, seed 0\n")
    lines = [
        [f"{level:g}", f"{spread:.3f}", f"{slope:.5f}", f"{100 * slope * math.sqrt(1 + level**-2):.2f} %"]
        for level, (spread, slope) in sizes.items()
    ]
    print(table(["σ/σ_d", "sd of log m", "σ∇log m, root mean square", "of σ∇log p, at most"], lines))


def collect(batches: Iterator[tuple[Tensor, Tensor]], n: int) -> Iterator[Tensor]:
    """The points of as many batches as have n of them."""
    for x, _ in batches:
        yield x
        n -= len(x)
        if n <= 0:
            return


def main() -> None:
    """Run and print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=common.count, help="1000 if left out")
    parser.add_argument("--seeds", type=common.count, help="3 if left out")
    parser.add_argument("--samples", type=common.count, help="1500 if left out")
    parser.add_argument("--mobility", type=common.count, metavar="N", help="train nothing, measure m with N partners")
    parser.add_argument("words", nargs="*", help="with --mobility: settings of the config, as in train.py")
    options = parser.parse_intermixed_args()
    given = {name: getattr(options, name) for name in ("steps", "seeds", "samples")}
    if options.mobility:
        if unread := [f"--{name}" for name, value in given.items() if value is not None]:
            parser.error(f"--mobility trains nothing: leave {', '.join(unread)} out")
        mobility(options.words, options.mobility)
        return
    for name, usual in (("steps", 1000), ("seeds", 3), ("samples", 1500)):
        setattr(options, name, given[name] or usual)
    if options.words:
        parser.error("settings go with --mobility; the training is the default config's")
    data = common.make_data(common.compose())
    features = ClassifierFeatures()
    features.prepare(data)
    real = features(data.load_split("train").x)
    fids: dict[str, list[float]] = {name: [] for name in KERNELS}
    ratios = []
    for seed in range(options.seeds):
        averaged, turns = train(data, options.steps, seed)
        for name, model in averaged.items():
            parts = [range(options.samples)[k : k + 500] for k in range(0, options.samples, 500)]
            samples = torch.cat([model.sample(rows) for rows in parts])
            fids[name].append(frechet_distance(real, features(to_uint8(samples))))
        ratios.append(turns.ratio(OURS, BASE))
        found = f"FID {fids[OURS][-1]:.2f} and {fids[BASE][-1]:.2f}, step time {ratios[-1]:.3f}"
        print(f"seed {seed}: {found}", flush=True)
    print(f"\n{options.steps} steps, {options.samples} samples, {options.seeds} seeds, {features.description}")
    means = {name: statistics.mean(values) for name, values in fids.items()}
    each = {name: ", ".join(f"{fid:.2f}" for fid in values) for name, values in fids.items()}
    times = {OURS: f"{statistics.mean(ratios):.2f}", BASE: "1"}
    lines = [[name, f"{means[name]:.2f}", each[name], times[name]] for name in KERNELS]
    print(table(["kernel", "FID, mean over seeds", "each seed", "step time, median ratio"], lines))
    print(f"\nFID ratio of the means: {means[OURS] / means[BASE]:.3f}")


if __name__ == "__main__":
    common.run(main)
