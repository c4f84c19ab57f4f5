"""The rows of images.py as tables, grids and curves; `suite` is its `Suite`."""

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Rows, mean_sd, table
from callbacks.pictures import grid_image


def _trained(suite: Any, rows: Rows) -> list[str]:
    """Methods that have a score."""
    return [name for name in suite.names if rows.where(kind="score", name=name, **suite.scored)]


def costs_of(suite: Any, rows: Rows) -> dict[str, dict[str, float]]:
    """What each method costs, by the newest measurement."""
    return {name: cost for row in rows.where(kind="speed", **suite.speeds) for name, cost in row["values"].items()}


def report(suite: Any, rows: Rows) -> None:
    """Print the tables of the settings asked for."""
    costs, lines = costs_of(suite, rows), []
    for name in suite.names:
        scores = rows.where(kind="score", name=name, **suite.scored)
        for sampler in dict.fromkeys(row["sampler"] for row in scores):
            part = [row for row in scores if row["sampler"] == sampler]
            cells = [mean_sd(row["fid"] for row in part), mean_sd(1000 * row.get("kid", math.nan) for row in part)]
            cells += [mean_sd((row.get(key, math.nan) for row in part), 3) for key in ("precision", "recall")]
            cost = costs[name]
            tail = [f"{cost['step']:.2f}", f"{cost['memory']:.0f}", f"{cost['sampling']:.1f}"]
            lines.append([name, sampler, *cells, *tail])
    header = ["method", "sampler", "FID", "KID × 1000", "precision", "recall"]
    print(f"{suite.features.description}; {suite.options.n} samples against {len(suite.real)} test images")
    print(table([*header, "step time / DDPM", "memory, MiB", "s per 1,000"], lines))
    lines = []
    for name in _trained(suite, rows) if suite.options.n_curve else ():
        curve = rows.where(kind="curve", name=name, **suite.curved)
        done = sorted({row["done"] for row in curve})
        if done:
            lines.append([name, *(mean_sd(row["fid"] for row in curve if row["done"] == k) for k in done)])
    if lines:
        print(f"\nFID of {suite.options.n_curve} samples after each quarter of {suite.steps} steps:")
        print(table(["method", "¼", "½", "¾", "1"], lines))
    habits = rows.where(kind="habit", **suite.scored)
    names = dict.fromkeys(row["name"] for row in habits)
    lines = [[name, mean_sd(row["fid"] for row in habits if row["name"] == name)] for name in names]
    print(table([suite.default, "FID"], lines))


def draw(suite: Any, rows: Rows, path: Path) -> None:
    """A row of samples of each method at its main sampler, and the learning curves beside FILE as FILE-curves."""
    from matplotlib.figure import Figure

    pictures = []
    for name in _trained(suite, rows):
        method = suite.restore(suite.build(name, 0), name, 0)
        pictures.append(next(suite.draw(method, method.main, 16)))
    grid_image(torch.cat(pictures), columns=16).save(path)
    if not suite.options.n_curve:
        return
    costs = costs_of(suite, rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in _trained(suite, rows):
        curve = rows.where(kind="curve", name=name, seed=0, **suite.curved)
        axes.plot([row["done"] * costs[name]["step"] for row in curve], [row["fid"] for row in curve], "o-", label=name)
    axes.set(xlabel="training time, in steps of DDPM", ylabel=f"FID of {suite.options.n_curve} samples", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_stem(f"{path.stem}_curves"), dpi=120)
