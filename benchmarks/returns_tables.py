"""What is asked of the rows of the returns benchmark: rates, ratios, tables and curves."""

import json
import math
from pathlib import Path

import numpy as np

from benchmarks.returns_training import reached

METHODS = ("returns", "c51")
SEEDS, TUNING_SEEDS = range(10), range(100, 105)
COMMON_RATE = 2.5e-4
ENVS: dict[str, tuple[tuple[float, ...], int, int]] = {  # thresholds, optimiser steps, steps between evaluations
    "rl_frozen_lake": ((0.95,), 6000, 50),
    "rl_frozen_lake_slippery": ((0.6, 0.7), 12_000, 600),
    "rl_cartpole": ((195.0, 475.0), 30_000, 500),
}
RATES = {
    "rl_frozen_lake": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rl_frozen_lake_slippery": (1e-3, 2e-3, 4e-3, 8e-3),
    "rl_cartpole": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}


def read(path: Path) -> list[dict]:
    """Rows of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def score(row: dict, budget: int) -> float:
    """Geometric mean, over thresholds and seeds, of the steps to them; a run that fails counts twice the budget."""
    steps = [min(reached(row["env_steps"], r, t), 2 * budget) for t in ENVS[row["env"]][0] for r in row["returns"]]
    return float(np.exp(np.mean(np.log(steps))))


def best_rates(rows: list[dict], env: str) -> dict[str, float]:
    """The rate of the tuning runs with the best score, for each method."""
    tuning = [r for r in rows if r["env"] == env and r["seeds"] == list(TUNING_SEEDS)]
    budget = max((r["env_steps"][-1] for r in rows if r["env"] == env), default=1)
    return {m: min((score(r, budget), r["rate"]) for r in tuning if r["method"] == m)[1] for m in METHODS}


def ratio(ours: list[float], theirs: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of the means of their steps to ours, and its 95 % interval by resampling the seeds of either."""
    random = np.random.default_rng(0)
    a, b = np.array(ours), np.array(theirs)
    means = [rows[random.integers(len(rows), size=(draws, len(rows)))].mean(1) for rows in (b, a)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float(b.mean() / a.mean()), float(low), float(high)


def table(folder: Path, figure: Path | None) -> None:
    """Markdown tables of everything that is in the folder, and curves."""
    rows, drawn = read(folder / "control.jsonl"), []
    print(
        "| experiment | threshold | rates (fields, C51) | fields | C51 | C51 / fields (95 %) ",
        end="",
    )
    print("| ms per step, fields, C51 |\n|---|---|---|---|---|---|---|")
    for env, (thresholds, _, _) in ENVS.items():
        here = [r for r in rows if r["env"] == env and r["seeds"] == list(SEEDS)]
        if not here:
            continue
        choices = [{m: COMMON_RATE for m in METHODS}]
        if any(r["env"] == env and r["seeds"] == list(TUNING_SEEDS) for r in rows):
            choices.append(best_rates(rows, env))
        for rates in choices:
            pair = {r["method"]: r for r in here if r["rate"] == rates[r["method"]]}
            if len(pair) < 2:
                continue
            drawn.append((env, rates, pair))
            budget = max(r["env_steps"][-1] for r in here)
            cost = [1000 * r["seconds"] / (len(r["env_steps"]) * ENVS[env][2]) for r in map(pair.get, METHODS)]
            for threshold in thresholds:
                cells, counted = [], []
                for method in METHODS:
                    found = [reached(pair[method]["env_steps"], r, threshold) for r in pair[method]["returns"]]
                    counted.append([min(f, budget) for f in found])
                    cells.append(f"{np.mean(counted[-1]):,.0f}, {sum(f < math.inf for f in found)}/{len(found)}")
                value, low, high = ratio(*counted)
                shown = ", ".join(f"{rates[m]:g}" for m in METHODS)
                print(
                    f"| {env} | {threshold:g} | {shown} | {' | '.join(cells)} | {value:.2f} ({low:.2f} to {high:.2f}) ",
                    end="",
                )
                print(f"| {cost[0]:.2f}, {cost[1]:.2f} |")
    rows = read(folder / "evaluate.jsonl")
    print("\n| rewards | γ | learner | rate | W1 / sd | mean error / sd | sd / true sd | parameters |")
    print("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple, dict[int, dict]] = {}  # a seed that was run twice counts once
    for row in rows:
        groups.setdefault((row["rewards"], row["gamma"], row["learner"], row["rate"]), {})[row["seed"]] = row
    for (rewards, gamma, learner, rate), seeds in sorted(groups.items()):
        cells, group = [], list(seeds.values())
        for key in ("w1", "mean_error", "sd_ratio"):
            values = np.array([r[key] for r in group])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        print(f"| {rewards} | {gamma} | {learner} | {rate:g} | {' | '.join(cells)} | {group[0]['parameters']:,} |")
    for name in ("ours", "cleanrl"):
        values = np.array([r["windows"] for r in read(folder / "peer.jsonl") if r["name"] == name])
        if len(values):
            mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
            print(f"\nC51 on CartPole, {name}: " + ", ".join(f"{m:.0f} ± {e:.0f}" for m, e in zip(mean, error)))
    if figure and drawn:
        curves(drawn, figure)


def curves(drawn: list[tuple], path: Path) -> None:
    """Mean return against environment steps, a panel for each pair of rates, with the middle half of the seeds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 2.6 * -(-len(drawn) // 2)), dpi=110, layout="constrained")
    for axes, (env, rates, pair) in zip(picture.subplots(-(-len(drawn) // 2), 2, squeeze=False).flat, drawn):
        for method, name in zip(METHODS, ("fields", "C51")):
            values, steps = np.array(pair[method]["returns"]), pair[method]["env_steps"]
            low, high = np.quantile(values, [0.25, 0.75], axis=0)
            axes.plot(steps, values.mean(0), label=f"{name}, rate {rates[method]:g}")
            axes.fill_between(steps, low, high, alpha=0.2)
        for threshold in ENVS[env][0]:
            axes.axhline(threshold, color="k", lw=0.5, ls=":")
        axes.set(title=env, xlabel="environment steps", ylabel="return")
        axes.legend(fontsize=7)
    picture.savefig(path)
