"""The rows of images.py as tables, grids and curves; `suite` is its `Suite`."""

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Rows, mean_sd, table
from callbacks.pictures import grid_image


def _trained(suite: Any, rows: Rows) -> list[str]:
    """Methods that have a score."""
    return [name for name in suite.names if rows.where(kind="score", name=name)]


def costs_of(rows: Rows) -> dict[str, dict[str, float]]:
    """What each method costs, by the newest measurement."""
    return {name: cost for row in rows.where(kind="speed") for name, cost in row["values"].items()}


def report(suite: Any, rows: Rows) -> None:
    """Print the tables."""
    costs, lines = costs_of(rows), []
    for name in suite.names:
        for sampler in dict.fromkeys(row["sampler"] for row in rows.where(kind="score", name=name)):
            part = rows.where(kind="score", name=name, sampler=sampler)
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
        curve = rows.where(kind="curve", name=name)
        done = sorted({row["done"] for row in curve})
        lines.append([name, *(mean_sd(row["fid"] for row in curve if row["done"] == k) for k in done)])
    if lines:
        print(f"\nFID of {suite.options.n_curve} samples after each quarter of {suite.steps} steps:")
        print(table(["method", "¼", "½", "¾", "1"], lines))
    names = dict.fromkeys(row["name"] for row in rows.where(kind="habit"))
    lines = [[name, mean_sd(row["fid"] for row in rows.where(kind="habit", name=name))] for name in names]
    print(table([suite.default, "FID"], lines))


def draw(suite: Any, rows: Rows, path: Path) -> None:
    """A row of samples of each method at its main sampler, and the learning curves beside FILE as FILE-curves."""
    from matplotlib.figure import Figure

    pictures = []
    for name in _trained(suite, rows):
        method = suite.build(name, 0)
        method.load_state_dict(torch.load(suite.options.out / f"{name.replace(' ', '-')}-0.pt", weights_only=True))
        pictures.append(next(suite.draw(method.eval(), method.main, 16)))
    grid_image(torch.cat(pictures), columns=16).save(path)
    if not suite.options.n_curve:
        return
    costs = costs_of(rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in _trained(suite, rows):
        curve = rows.where(kind="curve", name=name, seed=0)
        axes.plot([row["done"] * costs[name]["step"] for row in curve], [row["fid"] for row in curve], "o-", label=name)
    axes.set(xlabel="training time, in steps of DDPM", ylabel=f"FID of {suite.options.n_curve} samples", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_stem(f"{path.stem}_curves"), dpi=120)
