"""What is learned by each way to take the trace, in trace.py."""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bd_lightning.distances import relative_error
from bd_lightning.targets import Density
from benchmarks import common
from benchmarks.common import Recipe, Training
from benchmarks.rows import Rows, mean_sd, table
from benchmarks.trace_problems import KERNELS, WAYS, problem_of, words_of

JUDGED = (0.1, 0.3, 1.0, 3.0)


def learn(name: str, words: list[str], kernel: str, way: str, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """Train by one way; errors after each quarter."""
    config, data = problem_of(name, words)
    model = common.make_model(config, data.facts.arguments, seed)
    model.fields.kernel = model.kernel = KERNELS[kernel]
    trace, antithetic = WAYS[way]
    model.objective = replace(model.objective, trace=trace)
    model.noise = replace(model.noise, antithetic=0.5 if antithetic else 0.0, stratified=bool(antithetic))
    training, seconds = Training(model, Recipe.of(model, config, steps)), 0.0
    densities = [] if name.startswith("mnist") else [data.density]
    torch.manual_seed(seed)
    for done, (x, label) in zip(range(1, steps + 1), common.batches(data, seed)):
        start = time.process_time()
        training.step(lambda x=x, label=label: model.losses(x, label).total)
        seconds += time.process_time() - start
        if done % (steps // 4) == 0:
            state = torch.get_rng_state()
            yield {"done": done, "minutes": seconds / 60, "errors": errors(training.averaged, data, *densities)}
            torch.set_rng_state(state)


@torch.no_grad()
def errors(model: Any, data: Any, *densities: Density) -> dict[str, list[float]]:
    """Errors of the denoised held-out data, and of the fields against those of a density, at each of `JUDGED`."""
    rows = data.split("val")
    pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2000].tolist()
    x = torch.stack([rows[i][0] for i in pick])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {}
    for level in JUDGED:
        sigma = torch.full((len(x),), level * data.facts.sigma_data)
        point = x + sigma.view(-1, *[1] * (x.ndim - 1)) * noise
        for density in densities:
            known = model.analytic(density)(point.double(), sigma.double())
            for field, ours, true in zip("sg", model.fields(point, sigma), known):
                found.setdefault(field, []).append(relative_error(ours, true))
        denoised = point + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2 * model.fields.score(point, sigma, exact=True)
        found.setdefault("denoised", []).append(float((denoised - x).square().mean()) / data.facts.sigma_data**2)
    return found


def report_learning(rows: Rows, options: argparse.Namespace) -> None:
    """Print a table for each problem and kernel: errors after each quarter, and at each level after the last."""
    for name, kernel in itertools.product(options.problems, KERNELS):
        lines = []
        for way in WAYS:
            key = {**learned(name, options), "kernel": kernel, "way": way}
            for done in sorted({row["done"] for row in rows.where(**key)}):
                if not (part := rows.of_seeds(range(options.seeds), **key, done=done)):
                    continue
                cells = [
                    "; ".join(mean_sd((row["errors"][key][i] for row in part), 3) for i in range(len(JUDGED)))
                    for key in ("s", "g", "denoised")
                    if key in part[0]["errors"]
                ]
                lines.append([way, done, mean_sd((row["minutes"] for row in part), 2), *cells, len(part)])
        known = len(lines[0]) == 7
        print(f"\n{name}, {kernel}: errors at σ/σ_data = {', '.join(map(str, JUDGED))}")
        header = ["way", "steps", "minutes", *(["s", "g"] if known else []), "denoised", "seeds"]
        print(table(header, lines))


def learned(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What rows of a problem that is learned are of."""
    words = common.contents(words_of(name, options.words))
    return {"kind": "learned", "problem": name, "words": words, "steps": options.learn}


def measure_learning(rows: Rows, options: argparse.Namespace) -> None:
    """Train what is missing."""
    for seed in range(options.seeds):
        for name in options.problems:
            for kernel in KERNELS:
                for way in WAYS:
                    if way == "exact" and not name.startswith("mixture_2d"):
                        continue
                    kept = {**learned(name, options), "kernel": kernel, "way": way, "seed": seed}
                    if rows.where(**kept, done=options.learn):
                        continue
                    for row in learn(name, words_of(name, options.words), kernel, way, seed, options.learn):
                        if not rows.where(**kept, done=row["done"]):
                            rows.say(**kept, **row)
