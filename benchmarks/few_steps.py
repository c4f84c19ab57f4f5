"""FID against network calls: the solvers of a trained model, and consistency models tuned from it.

    uv run benchmarks/few_steps.py CKPT [CKPT …] [--n 10000] [--calls 5 8 10 15 20 35] [--seeds 1]
        [--split test|val] [--sigma-min S] [--asked '{3: 0.7, 8: 0.3}'] [--time] [--out runs/few_steps]
        [--rules NAME …] [--figure FILE] [--ddpm FILE …]

Each checkpoint is one of `train.py`, of images or of codes of images: a `BellmanDiffusion`, of which every rule below
is asked at every number of calls, or a `ConsistencyModel`, whose own samplers are taken. Samples are drawn with the
seeds 1, 2, … and judged as `callbacks.ImageMetrics` judges them, in the features of the checkpoint's config, against
the test split, or, where something is to be chosen, the validation split. Of a mixture in closed form it is the largest
error of a mode's weight and W2. Rules, all over the noise levels of the checkpoint's
`ode`, whose last one --sigma-min replaces:

- Heun: `ProbabilityFlow`, the nearest odd number of calls from below;
- order 1, 2, 3, +: `MultistepDynamics` with relaxation 0 at equal ratios, `+` with the corrector;
- … ρ7: on EDM's grid; … λ.5: with relaxation 0.5.

--ddpm takes DDPMs that `benchmarks/images.py` trained (OUT/DDPM-0-….pt) with the data and the network of the first
checkpoint, and asks diffusers' own DPM-Solver++ of second and third order and UniPC of third.

With --asked a second table has Σ |share counted − share asked|, the shares counted by the features' classifier. --time
takes training steps of all checkpoints in turns and prints their times relative to the first one's.

A finished row is kept in OUT/rows.jsonl and not computed again for the same weights. Prints Markdown tables, means over
seeds.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from bd_lightning import checkpoints, facts
from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.distances import wasserstein2
from bd_lightning.dynamics import MultistepDynamics, ProbabilityFlow, Sampler
from bd_lightning.modules import Generator
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training, Turns
from benchmarks.peers import DDPM, diffusers_solver
from benchmarks.rows import Rows, mean_sd, sound, table
from callbacks.metrics import NEIGHBOURS, frechet_distance, kernel_distance, precision_recall
from callbacks.points import mode_shares
from datamodules import to_uint8
from datamodules.subsets import random_subset

RULES: dict[str, dict[str, Any]] = {
    "Heun": {},
    "order 1": {"order": 1},
    "order 2": {"order": 2},
    "order 2+": {"order": 2, "corrector": True},
    "order 3": {"order": 3},
    "order 3+": {"order": 3, "corrector": True},
    "order 2+ ρ7": {"order": 2, "corrector": True, "rho": 7.0},
    "order 3+ ρ7": {"order": 3, "corrector": True, "rho": 7.0},
    "order 2 λ.5": {"order": 2, "relaxation": 0.5},
    "order 2+ λ.5": {"order": 2, "corrector": True, "relaxation": 0.5},
    "order 3+ λ.5": {"order": 3, "corrector": True, "relaxation": 0.5},
}


def sampler_of(rule: str, calls: int, like: Any, last: float | None) -> Sampler:
    """A rule with a number of calls, over the noise levels of another sampler, or down to another last one."""
    levels = {"sigma_max": like.sigma_max, "sigma_min": last or like.sigma_min, "exact_score": like.exact_score}
    if rule == "Heun":
        return ProbabilityFlow(steps=(calls + 1) // 2, **levels)
    return MultistepDynamics(levels=calls, **({"relaxation": 0.0} | RULES[rule] | levels))


DIFFUSERS: dict[str, tuple[str, int]] = {
    "DPM-Solver++(2M), diffusers": ("DPMSolverMultistepScheduler", 2),
    "DPM-Solver++(3M), diffusers": ("DPMSolverMultistepScheduler", 3),
    "UniPC, diffusers": ("UniPCMultistepScheduler", 3),
}


class Peer(torch.nn.Module):
    """A trained DDPM with the surface of a `Generator`.

    Args:
        path: its weights, as `benchmarks/images.py` keeps them.
        stored: the config that it was trained with.
        calls: how many network calls to ask each solver for.
    """

    def __init__(self, path: str, stored: dict[str, Any], calls: Sequence[int]) -> None:
        super().__init__()
        data = build.instantiate(stored["data"], "data")
        data.prepare_data()
        data.setup("fit")
        self.num_classes = data.facts.num_classes
        self.ddpm = DDPM(stored, data.facts.arguments)
        try:
            self.ddpm.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:  # whatever the reader raises, the file is at fault
            raise UserError(
                f"--ddpm {path}: not the weights of a DDPM with the network of the first checkpoint; train one with "
                "benchmarks/images.py --only DDPM and that experiment"
            ) from error
        self.ddpm.eval()
        self.conditional, self.samplers = self.ddpm.conditional, {}
        for rule, (kind, order) in DIFFUSERS.items():
            for count in calls:
                self.samplers[f"{rule}@{count}"] = SimpleNamespace(
                    calls=count, interacting=False, draw=diffusers_solver(kind, count, solver_order=order)
                )

    @torch.no_grad()
    def sample(self, indices: range, sampler: str, seed: int, label: Tensor | None = None) -> Tensor:
        """Samples (B, *) with the noise of a seed."""
        self.ddpm.seed = seed
        return self.samplers[sampler].draw(self.ddpm, indices, label)


class Points:
    """The modes of a mixture in closed form."""

    metrics: ClassVar = {"largest error of a mode's weight": ("mode_error", 4), "W2": ("w2", 3)}

    def __init__(self, data: Any) -> None:
        self.density = data.density
        self.real = data.density.sample(20_000, torch.Generator().manual_seed(0)).float()

    def __call__(self, model: Any, sampler: str, n: int, seed: int) -> dict[str, float]:
        """The largest error of a mode's weight, W2 of parts of 2,000, and the processor's seconds."""
        start = time.process_time()
        x = model.sample(range(n), sampler, seed=seed)
        seconds = time.process_time() - start
        parts = [wasserstein2(a, b) for a, b in zip(x.split(2000), self.real.split(2000))]
        error = mode_shares(x, self.density)["mode_error"]
        return {"mode_error": error, "w2": float(torch.tensor(parts).mean()), "seconds": seconds}


class Judge:
    """A split in the features of a config."""

    def __init__(self, stored: dict[str, Any], split: str = "test", asked: dict[int, float] | None = None) -> None:
        self.asked = asked
        self.metrics = {"FID": ("fid", 2)} | ({"Σ |share counted − share asked|": ("l1", 3)} if asked else {})
        self.data = build.instantiate(stored["data"], "data")
        self.data.prepare_data()
        if unknown := set(asked or {}) - set(range(len(self.data.facts.class_names))):
            count = len(self.data.facts.class_names)
            raise UserError(f"--asked: there is no class {min(unknown)}, of {count} that are counted from 0")
        self.features = build.instantiate(features_of(stored), "features")
        self.features.prepare(self.data.observed)
        images = self.data.observed.load_split(split)
        real = torch.utils.data.DataLoader(images, 1000, collate_fn=self.data.observed.collate)
        self.real = self.embed(x for x, _ in real)

    @torch.no_grad()
    def embed(self, images: Any) -> Tensor:
        """Features of batches of images in [−1, 1]."""
        return torch.cat([self.features(to_uint8(x)) for x in images])

    @torch.no_grad()
    def __call__(self, model: Any, sampler: str, n: int, seed: int) -> dict[str, float]:
        """FID, KID, precision and recall of n samples, and the processor's seconds from their noise to images."""
        parts, seconds = [], 0.0
        for first in range(0, n, 1000):
            rows = range(first, min(n, first + 1000))
            label = torch.tensor([i % model.num_classes for i in rows]) if model.conditional else None
            start = time.process_time()
            x = self.data.decode(model.sample(rows, sampler, seed=seed, label=label))
            seconds += time.process_time() - start
            parts.append(x)
        found = self.embed(parts)
        few = min(n, len(self.real), 5000)
        precision, recall = precision_recall(found[:few], self.real[random_subset(len(self.real), few)])
        kid = kernel_distance(found, self.real, min(500, few), self.features.kid_scale)
        fid = frechet_distance(self.real, found)
        values = {"fid": fid, "kid": kid, "precision": precision, "recall": recall, "seconds": seconds}
        if self.asked is not None:
            found = torch.cat([self.features.classify(to_uint8(x)) for x in parts])
            shares = torch.bincount(found, minlength=len(self.data.facts.class_names)) / n
            wanted = torch.tensor([self.asked.get(k, 0.0) for k in range(len(shares))])
            values["l1"] = float((shares - wanted / wanted.sum()).abs().sum())
        return values


def main() -> None:
    """Judge what is missing, print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 8, 10, 15, 20, 35])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/few_steps"))
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--sigma-min", type=float)
    parser.add_argument("--asked")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--figure", type=arguments.picture(".png", ".jpg", ".pdf", ".svg"))
    parser.add_argument("--ddpm", nargs="+", default=[], metavar="FILE")
    options = parser.parse_intermixed_args()
    check(options)
    rows, results = Rows(options.out / "rows.jsonl"), {}
    judge: Any = None
    first: list[Any] = []
    ddpms = {}
    for path in options.ddpm:
        _, stored = checkpoints.load(options.checkpoints[0], Generator)  # type: ignore[type-abstract]
        ddpms[path] = Peer(path, stored, options.calls)
    for path in options.checkpoints:
        model, stored = checkpoints.load(path, Generator)  # type: ignore[type-abstract]
        judge = judge or judge_of(stored, options)
        first = first or identity(stored)
        if identity(stored) != first:
            raise UserError(
                f"{path} has other data, codes or features than {options.checkpoints[0]}, and tables have one judge: "
                "give them to two commands"
            )
        results[path] = compare(path, model, prepared(path, model, options), judge, rows, options)
    for path, peer in ddpms.items():
        results[path] = compare(path, peer, list(peer.samplers), judge, rows, options, judged_by=repr(first))
    with sound(rows.path):
        report(results, judge, options)
    if options.time:
        print(table(["checkpoint", "time of a step"], times(options.checkpoints)))


def identity(stored: dict[str, Any]) -> list[Any]:
    """What samples of a stored config are judged by."""
    known = facts.read(stored["facts"])
    return [known.name, known.shape, known.class_names, known.space, features_of(stored)]


def features_of(stored: dict[str, Any]) -> Any:
    """The features that a stored config is judged in, None where there are none."""
    return ((stored["callbacks"] or {}).get("metrics") or {}).get("features")


def check(options: argparse.Namespace) -> None:
    """Refuse numbers without a meaning, and take the shares that are asked for as numbers."""
    for name, value in (("n", options.n), ("seeds", options.seeds), *(("calls", one) for one in options.calls)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.n <= NEIGHBOURS:
        raise UserError(f"--n must be more than {NEIGHBOURS}, which precision and recall compare; got {options.n}")
    if options.sigma_min is not None and not options.sigma_min > 0:
        raise UserError(f"--sigma-min must be positive, got {options.sigma_min:g}")
    if options.asked is not None:
        try:
            options.asked = {int(k): float(v) for k, v in dict(OmegaConf.create(options.asked)).items()}
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError("--asked says the shares of classes by index, '{3: 0.7, 8: 0.3}'") from error


def compare(
    path: str,
    model: Any,
    names: Sequence[str],
    judge: Any,
    rows: Rows,
    options: argparse.Namespace,
    **more: str,
) -> list[dict[str, Any]]:
    """The rows of some samplers of a model; what is missing is judged. `more` tells rows apart that weights do not."""
    weights, results = sum(float(p.double().abs().sum()) for p in model.parameters()), []
    distinct = {(name.partition("@")[0], model.samplers[name].calls): name for name in names}  # calls are rounded
    for name in distinct.values():
        for seed in range(1, options.seeds + 1):
            key = {"path": path, "rule": name.partition("@")[0], "calls": model.samplers[name].calls, "seed": seed}
            key |= {"sigma_min": options.sigma_min, "split": options.split, "n": options.n}
            key |= {"weights": f"{weights:.9g}", "asked": options.asked and str(sorted(options.asked.items()))}
            key |= more
            found = rows.where(**key)
            if not found:
                found = [rows.say(**key, **judge(model, name, options.n, seed))]
            results.append(found[0])
    return results


def judge_of(stored: dict[str, Any], options: argparse.Namespace) -> Any:
    """What judges samples of a stored config."""
    data = build.instantiate(stored["data"], "data")
    if getattr(data, "density", None) is not None:
        if options.asked or options.split != "test":
            raise UserError(
                "--asked and --split are of images: a mixture in closed form has its own modes, leave them out"
            )
        return Points(data)
    if not features_of(stored):
        raise UserError(
            "the first checkpoint was trained with callbacks.metrics=null: give one first whose config says by which "
            "features to judge"
        )
    return Judge(stored, options.split, options.asked)


def times(paths: Sequence[str], rounds: int = 40) -> Iterator[list[str]]:
    """Forward and backward pass and update of each checkpoint's training, relative to the first one's."""
    trainings, sources, turns = {}, {}, Turns(paths, skip=5)
    for path in paths:
        model, stored = checkpoints.load(path, Generator)  # type: ignore[type-abstract]
        model.requires_grad_(True)
        model.prepare(False, facts.read(stored["facts"]))
        trainings[path] = Training(model, Recipe(rounds, 1e-6, model.optimizer))
        data = build.instantiate(stored["data"], "data")
        data.prepare_data()
        data.setup("fit")
        sources[path] = common.batches(data, 0)
    for _ in range(rounds + turns.skip):
        batches = {path: next(source) for path, source in sources.items()}
        for path in turns.next():
            loss = partial(trainings[path].model.losses, *batches[path])
            with turns.clock(path):
                trainings[path].update(lambda: loss().total)  # noqa: B023
    return ([path, f"{turns.ratio(path, paths[0]):.2f}"] for path in paths)


def prepared(path: str, model: Any, options: argparse.Namespace) -> Sequence[str]:
    """Names of the samplers to judge, which the model has been given."""
    own = dict(model.samplers)
    if any(one.consistency for one in own.values()):
        return list(own)
    if "ode" not in own:
        raise UserError(
            f"{path} was trained without the sampler 'ode', whose noise levels the rules go through: give a model that "
            "has one, model.samplers.ode={_target_: bd_lightning.dynamics.ProbabilityFlow}"
        )
    try:
        asked = {
            f"{rule}@{calls}": sampler_of(rule, calls, own["ode"], options.sigma_min)
            for calls in options.calls
            for rule in options.rules
        }
    except ValueError as error:
        raise UserError(f"--sigma-min: {error}") from error
    model.samplers = asked
    return list(asked)


def report(results: Mapping[str, list[dict[str, Any]]], judge: Any, options: argparse.Namespace) -> None:
    """Print a table of each metric for each checkpoint, and draw the figure."""
    for path, found in results.items():
        calls = sorted({row["calls"] for row in found})
        names = list(dict.fromkeys(row["rule"] for row in found))
        for title, (metric, digits) in judge.metrics.items():

            def cell(rule: str, count: int) -> str:
                values = [r[metric] for r in found if (r["rule"], r["calls"]) == (rule, count)]  # noqa: B023
                return mean_sd(values, digits)  # noqa: B023

            print(f"\n{path}: {title} of {options.n} samples by network calls")
            print(table(["rule", *calls], [[rule, *(cell(rule, count) for count in calls)] for rule in names]))
    if options.figure:
        figure(results, judge, options)


def figure(results: Mapping[str, list[dict[str, Any]]], judge: Any, options: argparse.Namespace) -> None:
    """The first metric against calls, a line for every rule."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = picture.subplots()
    title, (metric, _) = next(iter(judge.metrics.items()))
    for found in results.values():
        for rule in dict.fromkeys(row["rule"] for row in found):
            mine = sorted((row["calls"], row[metric]) for row in found if row["rule"] == rule and row["seed"] == 1)
            axes.plot(*zip(*mine), "o-", ms=3, label=rule)
    axes.set(xlabel="network calls", ylabel=title, xscale="log", yscale="log")
    axes.legend(fontsize=7)
    picture.savefig(options.figure)


if __name__ == "__main__":
    common.run(main)
