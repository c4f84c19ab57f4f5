"""The rows of images.py as tables, grids and curves; `suite` is its `Suite`."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bd_lightning.checks import UserError
from bd_lightning.dynamics import SamplingDiverged
from benchmarks.rows import Rows, mean_sd, table
from callbacks.pictures import grid_image


def costs_of(suite: Any, rows: Rows) -> dict[str, dict[str, float]]:
    """What each method costs, by the newest measurement."""
    return {name: cost for row in rows.where(kind="speed", **suite.speeds) for name, cost in row["values"].items()}


def _distinct(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def report(suite: Any, rows: Rows, methods: Sequence[str], habits: Sequence[str]) -> None:
    """Print the tables of the settings, methods, habits and seeds asked for."""
    costs, lines, seeds = costs_of(suite, rows), [], range(suite.options.seeds)
    for name in methods:
        key = {"kind": "score", "name": name, **suite.scored}
        for sampler in _distinct(rows.where(**key), "sampler"):
            if not (part := rows.of_seeds(seeds, sampler=sampler, **key)):
                continue
            cells = [mean_sd(row["fid"] for row in part), mean_sd(1000 * row.get("kid", math.nan) for row in part)]
            cells += [mean_sd((row.get(what, math.nan) for row in part), 3) for what in ("precision", "recall")]
            cost = costs[name]
            tail = [f"{cost['step']:.2f}", f"{cost['memory']:.0f}", f"{cost['sampling']:.1f}", len(part)]
            lines.append([name, sampler, *cells, *tail])
    header = ["method", "sampler", "FID", "KID × 1000", "precision", "recall"]
    print(f"{suite.features.description}; {suite.options.n} samples against {len(suite.real)} test images")
    print(table([*header, "step time / DDPM", "memory, MiB", "s per 1,000", "seeds"], lines))
    lines = []
    for name in methods if suite.options.n_curve else ():
        key = {"kind": "curve", "name": name, **suite.curved}
        points = [rows.of_seeds(seeds, done=done, **key) for done in sorted(_distinct(rows.where(**key), "done"))]
        if any(points):
            lines.append([name, *(mean_sd(row["fid"] for row in part) for part in points), max(map(len, points))])
    if lines:
        print(f"\nFID of {suite.options.n_curve} samples after each quarter of {suite.steps} steps:")
        print(table(["method", "¼", "½", "¾", "1", "seeds"], lines))
    found = {name: rows.of_seeds(seeds, kind="habit", name=name, **suite.scored) for name in habits}
    lines = [[name, mean_sd(row["fid"] for row in part), len(part)] for name, part in found.items()]
    if lines:
        print(table([suite.default, "FID", "seeds"], lines))


def draw(suite: Any, rows: Rows, methods: Sequence[str], path: Path) -> None:
    """A row of samples of each method at its main sampler, and the learning curves beside FILE as FILE_curves."""
    from matplotlib.figure import Figure

    pictures = []
    for name in methods:
        method = suite.build(name, 0)
        try:
            pictures.append(next(suite.draw(suite.restore(method, name, 0), method.main, 16)))
        except (UserError, SamplingDiverged) as error:
            print(f"--figure leaves '{name}' out: {error}", file=sys.stderr)
    if pictures:
        grid_image(torch.cat(pictures), columns=16).save(path)
    costs = costs_of(suite, rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in methods if suite.options.n_curve else ():
        key = {"kind": "curve", "name": name, **suite.curved}
        curve = [row for k in _distinct(rows.where(**key), "done") for row in rows.of_seeds([0], done=k, **key)]
        if curve:
            steps = [row["done"] * costs[name]["step"] for row in curve]
            axes.plot(steps, [row["fid"] for row in curve], "o-", label=name)
    if not axes.lines:
        return
    axes.set(xlabel="training time, in steps of DDPM", ylabel=f"FID of {suite.options.n_curve} samples", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_stem(f"{path.stem}_curves"), dpi=120)
