"""What is asked of the rows of the returns benchmark: rates, ratios, tables and curves."""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd_lightning.checks import UserError
from benchmarks.returns_training import reached
from benchmarks.rows import Rows, sound

METHODS = {"returns": "fields", "returns_positive": "positive fields", "c51": "C51", "qr_dqn": "QR-DQN"}
"""Methods, as train.py's `model`, and their names in tables."""
OURS = ("returns", "returns_positive")
"""Those that the others are compared with."""
SEEDS, TUNING_SEEDS = 0, 100
"""First seeds of the runs that are reported, and of those that choose rates."""
COMMON_RATE = 2.5e-4
TOGETHER = 10
"""Seeds of one job: one batched product of small networks serves them all."""


@dataclass(frozen=True)
class Setting:
    """How an experiment is run.

    Args:
        name: of the experiment, as train.py knows it.
        thresholds: mean returns whose steps are counted.
        steps: optimiser steps.
        eval_every: optimiser steps between evaluations.
        rates: learning rates that every method is tried with.
        seeds: number of seeds that are reported.
        tuning: number of seeds that choose a rate.
        wider: how often a rate beyond either end is tried, a factor of two away, while the best is at that end.
    """

    name: str
    thresholds: tuple[float, ...]
    steps: int
    eval_every: int
    rates: tuple[float, ...]
    seeds: int = 10
    tuning: int = 5
    wider: int = 2

    def chunks(self, first: int, count: int) -> list[range]:
        """Seeds of the jobs of one row."""
        last = first + count
        return [range(k, min(k + TOGETHER, last)) for k in range(first, last, TOGETHER)]


SETTINGS = (
    Setting("rl_frozen_lake", (0.95,), 6000, 50, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    Setting("rl_frozen_lake_slippery", (0.6, 0.7), 12_000, 600, (1e-3, 2e-3, 4e-3, 8e-3)),
    Setting("rl_cartpole", (195.0, 475.0), 30_000, 500, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    Setting("rl_cliff", (-100.0,), 20_000, 500, (1e-3, 2e-3, 4e-3, 8e-3)),
    Setting("rl_frozen_cliff_cautious", (-10.0,), 6000, 250, (1e-3, 2e-3, 4e-3, 8e-3)),
    Setting("rl_acrobot", (-150.0, -100.0), 20_000, 500, (5e-4, 1e-3, 2e-3, 4e-3)),
    Setting("rl_lunar_lander", (0.0, 200.0), 50_000, 1000, (2.5e-4, 5e-4, 1e-3, 2e-3), tuning=3),
    Setting("rl_breakout", (2.0, 5.0), 60_000, 2500, (2.5e-4, 5e-4, 1e-3), 5, 2),
    Setting("rl_asterix", (2.0, 5.0), 60_000, 2500, (2.5e-4, 5e-4, 1e-3), 5, 2),
)
ENVS = {setting.name: setting for setting in SETTINGS}

Row = dict
"""Evaluations of several seeds: "env_steps" (E,), "returns" (R, E), "seconds" of one run, "whole" if no job ended
early."""


def finished(path: Path) -> list[dict]:
    """The rows of the finished jobs in a file: a line is a job with all its rows, so that none is there in part.

    Raises:
        UserError: for a file of another format.
    """
    lines = Rows(path)
    if any("rows" not in line for line in lines):
        raise UserError(
            f"{path} holds a row a line, as an earlier version wrote it: choose another --out, or move it away"
        )
    rows = []
    for line in lines.rows:
        with sound(line.place):
            trained = lasted(line["job"])
            if not line["rows"]:
                raise ValueError("a job without a row")
            rows += [{**row, "trained": trained} for row in line["rows"]]
            _refuse_lost(line["rows"])
            for row in line["rows"]:
                if "env" in row:  # of control
                    _refuse_torn(row)
    return rows


def lasted(job: str) -> tuple[int, ...]:
    """The whole numbers that the words of a job end with: its optimiser steps, and those between evaluations.

    Raises:
        TypeError: for a job that is no words.
    """
    found = re.search(r"((?:, \d+)+)\)\)$", job)
    return tuple(map(int, found[1].split(", ")[1:])) if found else ()


def _refuse_lost(value: Any) -> None:
    """Refuse a row with a number that is none.

    Raises:
        ValueError: if there is one.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_lost(part)


def _refuse_torn(row: Row) -> None:
    """Refuse a row of `control` whose evaluations are not those of its seeds and environment steps.

    Raises:
        ValueError: naming what is wrong.
    """
    steps, seeds, returns = row["env_steps"], row["seeds"], row["returns"]
    if not (isinstance(steps, list) and steps and all(type(step) is int for step in steps)):
        raise ValueError(f"env_steps are {steps!r:.60}")
    if not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
        raise ValueError(f"seeds are {seeds!r:.60}")
    if not (isinstance(returns, list) and [len(run) for run in returns] == [len(steps)] * len(seeds)):
        raise ValueError(f"returns are not {len(steps)} of each of {len(seeds)} seeds")
    numbers = [row["rate"], row["seconds"], *(value for run in returns for value in run)]
    if not all(type(value) in (int, float) for value in numbers):
        raise ValueError("its rate, its seconds or one of its returns is no number")
    if not (0 < row["rate"] < 1 and row["seconds"] >= 0 and steps == sorted(set(steps))):
        raise ValueError("its rate, its seconds or its env_steps cannot be")
    if not isinstance(row["env"], str) or not isinstance(row["method"], str):
        raise ValueError(f"env and method are {row['env']!r:.60} and {row['method']!r:.60}")


def rows_of(rows: Iterable[dict], setting: Setting) -> list[dict]:
    """The rows of an experiment, of trainings of its length: those of a rehearsal are not."""
    return [row for row in rows if row["env"] == setting.name and row["trained"] == (setting.steps, setting.eval_every)]


def gathered(rows: Iterable[dict], setting: Setting, method: str, rate: float, first: int) -> Row | None:
    """The row of all seeds of a setting, of the rows of its jobs; None before all of them are there.

    Jobs end when all their seeds are done; from there on their last evaluations count.
    """
    count = setting.seeds if first == SEEDS else setting.tuning
    found, wanted = runs_of(rows, setting, method, rate), range(first, first + count)
    if not found.keys() >= set(wanted):
        return None
    runs = [found[seed] for seed in wanted]
    longest = max((row["env_steps"] for _, row in runs), key=len)
    returns = [run + run[-1:] * (len(longest) - len(run)) for run, _ in runs]
    seconds = sum(row["seconds"] for _, row in runs) / count
    steps = sum(len(row["env_steps"]) for _, row in runs) / count * setting.eval_every
    whole = all(len(row["env_steps"]) == setting.steps // setting.eval_every for _, row in runs)
    costs = {"seconds": seconds, "milliseconds": 1000 * seconds / steps}
    return {"env_steps": longest, "returns": returns, "whole": whole, **costs}


def runs_of(rows: Iterable[dict], setting: Setting, method: str, rate: float) -> dict[int, tuple[list[float], dict]]:
    """Of each finished seed its run, and the job that it is of."""
    found: dict[int, tuple[list[float], dict]] = {}
    for row in rows_of(rows, setting):
        if (row["method"], row["rate"]) == (method, rate):
            for seed, run in zip(row["seeds"], row["returns"], strict=True):
                found.setdefault(seed, (run, row))
    return found


def tell_of_unfinished(rows: list[dict], setting: Setting) -> None:
    """Say which runs of a setting are left out of tables, since they are of another length or seeds are missing."""
    own = rows_of(rows, setting)
    if others := [row for row in rows if row["env"] == setting.name and row not in own]:
        lengths = " and ".join(f"{steps:,}" for steps in sorted({sum(row["trained"][:1]) for row in others}))
        said = f"trainings of {lengths} optimiser steps are left out, it takes {setting.steps:,} (see --smoke)"
        print(f"{setting.name}: {said}", file=sys.stderr)
    for method, name in METHODS.items():
        for rate in sorted({row["rate"] for row in own if row["method"] == method}):
            there = runs_of(rows, setting, method, rate)
            seeds = [seed for seed in there if SEEDS <= seed < SEEDS + setting.seeds]
            if seeds and len(seeds) < setting.seeds:
                more = f"{len(seeds)} of {setting.seeds} seeds are there"
                print(f"{setting.name}, {name} at {rate:g} is left out: {more} (see --seeds)", file=sys.stderr)


def budget(rows: Iterable[dict], setting: Setting) -> int:
    """The environment steps of a whole run."""
    return max((row["env_steps"][-1] for row in rows_of(rows, setting)), default=1)


def score(row: Row, setting: Setting, most: int) -> float:
    """Geometric mean, over thresholds and seeds, of the steps to them; a run that fails counts twice the budget."""
    steps = [min(reached(row["env_steps"], r, t), 2 * most) for t in setting.thresholds for r in row["returns"]]
    return float(np.exp(np.mean(np.log(steps))))


def late(row: Row) -> list[float]:
    """Mean return of each run in the last quarter of the evaluations."""
    return [float(np.mean(run[-max(1, len(run) // 4) :])) for run in row["returns"]]


def best_rate(rows: list[dict], setting: Setting, method: str) -> tuple[float, list[float]]:
    """The rate of the tuning runs with the best score, and all that were tried: the setting's, and those `beyond`.

    Of equal scores, as where no run gets to a threshold, the one of the best returns at the end.
    """
    tried = sorted({row["rate"] for row in rows_of(rows, setting) if row["method"] == method})
    ends = min(setting.rates), max(setting.rates)
    tried = [
        rate for rate in tried if rate in setting.rates or (rate < ends[0] or rate > ends[1]) and _near(rate, setting)
    ]
    found = {rate: gathered(rows, setting, method, rate, TUNING_SEEDS) for rate in tried}
    most = budget(rows, setting)
    whole = {rate: row for rate, row in found.items() if row is not None}

    def badness(rate: float) -> tuple[float, float, float]:
        return score(whole[rate], setting, most), -float(np.mean(late(whole[rate]))), rate

    return min(whole, key=badness), list(whole)


def beyond(rate: float, tried: list[float], setting: Setting) -> float | None:
    """The next rate to try if the best is the smallest or largest so far; None if not, or if that went far enough."""
    for edge, following in ((min(tried), rate / 2), (max(tried), rate * 2)):
        if rate == edge and _near(following, setting):
            return following
    return None


def _near(rate: float, setting: Setting) -> bool:
    """Whether a rate is as near to those of a setting as it goes."""
    return min(setting.rates) / 2**setting.wider <= rate <= max(setting.rates) * 2**setting.wider


def ratio(ours: list[float], theirs: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of the means of their steps to ours, and its 95 % interval by resampling the seeds of either.

    Of five seeds such an interval holds the ratio of equal methods in about 86 % of the cases.
    """
    b, a = _resampled(theirs, ours, draws)
    low, high = np.quantile(b / a, [0.025, 0.975])
    return float(np.mean(theirs) / np.mean(ours)), float(low), float(high)


def difference(ours: list[float], theirs: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Theirs less ours, and its 95 % interval, as `ratio`."""
    b, a = _resampled(theirs, ours, draws)
    low, high = np.quantile(b - a, [0.025, 0.975])
    return float(np.mean(theirs) - np.mean(ours)), float(low), float(high)


def _resampled(first: list[float], second: list[float], draws: int) -> list[np.ndarray]:
    """Means (draws,) of either, its seeds resampled."""
    random = np.random.default_rng(0)
    both = (np.array(values) for values in (first, second))
    return [rows[random.integers(len(rows), size=(draws, len(rows)))].mean(1) for rows in both]


def control_table(rows: list[dict], settings: Iterable[Setting]) -> list[tuple]:
    """Print steps to thresholds, at the common rate and at each method's own; returns what curves are drawn of.

    Raises:
        ValueError: for a row of an experiment or method that there is none of.
    """
    for key, known in (("env", ENVS), ("method", METHODS)):
        if unknown := {str(row[key]) for row in rows} - set(known):
            raise ValueError(f"there is no {key} {', '.join(sorted(unknown))}")
    drawn: list[tuple] = []
    names = " | ".join(METHODS.values())
    lines = [f"| experiment | threshold | rates | {names} | baseline / fields (95 %) | ms |"]
    lines += ["|---|---|---|" + "---|" * len(METHODS) + "---|---|"]
    for setting in settings:
        if not any(row["env"] == setting.name for row in rows):
            continue
        tell_of_unfinished(rows, setting)
        most, choices = budget(rows, setting), [dict.fromkeys(METHODS, COMMON_RATE)]
        choices.append({m: best_rate(rows, setting, m)[0] for m in METHODS if _tuned(rows, setting, m)})
        for rates in choices:
            found = {m: gathered(rows, setting, m, rate, SEEDS) for m, rate in rates.items()}
            these = {m: row for m, row in found.items() if row is not None}
            if len(these) < 2 or not these.keys() & set(OURS):
                continue
            shown = {m: rates[m] for m in these}
            if any(which == setting and shown == {m: before[m] for m in kept} for which, before, kept in drawn):
                continue  # the best rates are the common one
            drawn.append((setting, rates, these))
            lines += [line(setting.name, threshold, rates, these, most) for threshold in setting.thresholds]
            if all(row["whole"] for row in these.values()):
                lines.append(line_of_returns(setting.name, rates, these))
        if not any(which == setting for which, *_ in drawn):
            needed = "all reported seeds of fields of a kind and of another method, at the common or their best rates"
            print(f"{setting.name} is left out: a line of the table needs {needed}", file=sys.stderr)
    if drawn:
        print("\n".join(lines))
    return drawn


def _tuned(rows: list[dict], setting: Setting, method: str) -> bool:
    """Whether a method was tried with all rates of a setting; says so if it was with some of them."""
    tried = [rate for rate in setting.rates if gathered(rows, setting, method, rate, TUNING_SEEDS)]
    if len(tried) < len(setting.rates) and any((row["env"], row["method"]) == (setting.name, method) for row in rows):
        more = f"{len(tried)} of {len(setting.rates)} rates are there (see --rates)"
        print(f"{setting.name}, {METHODS[method]} is not tuned: {more}", file=sys.stderr)
    return len(tried) == len(setting.rates)


def there(row: Row, threshold: float) -> int:
    """How many runs get to a threshold."""
    return sum(reached(row["env_steps"], run, threshold) < math.inf for run in row["returns"])


def line(env: str, threshold: float, rates: dict[str, float], rows: dict[str, Row], most: int) -> str:
    """One line of the table of steps to thresholds."""
    counted, cells = {}, {}
    for method, row in rows.items():
        counted[method] = [min(reached(row["env_steps"], run, threshold), most) for run in row["returns"]]
        cells[method] = f"{np.mean(counted[method]):,.0f}, {there(row, threshold)}/{len(row['returns'])}"
    if not any(there(row, threshold) for row in rows.values()):
        return _line(env, f"{threshold:g}", rates, rows, cells, [])
    return _line(env, f"{threshold:g}", rates, rows, cells, _pairs(counted, "/", ratio))


def line_of_returns(env: str, rates: dict[str, float], rows: dict[str, Row]) -> str:
    """The line of the returns at the end of whole trainings, ± the standard error of their mean over seeds."""
    values = {method: late(row) for method, row in rows.items()}
    spread = {m: f" ± {np.std(v, ddof=1) / len(v) ** 0.5:.2f}" if len(v) > 1 else "" for m, v in values.items()}
    cells = {method: f"{np.mean(found):.2f}{spread[method]}" for method, found in values.items()}
    return _line(env, "return, last quarter", rates, rows, cells, _pairs(values, "−", difference))


def _pairs(values: dict[str, list[float]], sign: str, compare: Callable) -> list[str]:
    """Each baseline against each kind of fields, all of them: the best of several would be chosen by these seeds."""
    pairs = [(ours, other) for ours in values for other in values if ours in OURS and other not in OURS]
    found = []
    for ours, other in pairs:
        value, low, high = compare(values[ours], values[other])
        interval = f"{low:.2f} to {high:.2f}" if len(values[ours]) > 1 else "one seed"
        found.append(f"{METHODS[other]} {sign} {METHODS[ours]} {value:.2f} ({interval})")
    return found


def _line(env: str, what: str, rates: dict, rows: dict[str, Row], cells: dict[str, str], compared: list[str]) -> str:
    """A line of the table, a cell for each method, – for one that is not there."""
    shown = ", ".join(f"{rates[method]:g}" for method in rows)
    costs = ", ".join(f"{row['milliseconds']:.2f}" for row in rows.values())
    found = " | ".join(cells.get(method, "–") for method in METHODS)
    return f"| {env} | {what} | {shown} | {found} | {'; '.join(compared) or '–'} | {costs} |"


def evaluation_table(rows: list[dict]) -> None:
    """Print distances to simulated returns."""
    print("\n| rewards | γ | learner | rate | steps | W1 / sd | mean error / sd | sd / true sd | parameters |")
    print("|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple, dict[int, dict]] = {}  # a seed that was run twice counts once
    for row in rows:
        key = (row["rewards"], row["gamma"], row["learner"], row["rate"], row["trained"][0])
        groups.setdefault(key, {}).setdefault(row["seed"], row)
    for (rewards, gamma, learner, rate, steps), seeds in sorted(groups.items()):
        cells, group = [], list(seeds.values())
        for key in ("w1", "mean_error", "sd_ratio"):
            values = np.array([r[key] for r in group])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        words = f"| {rewards} | {gamma} | {learner} | {rate:g} | {steps:,}"
        print(f"{words} | {' | '.join(cells)} | {group[0]['parameters']:,} |")


def peer_table(rows: list[dict]) -> None:
    """Print the returns of training episodes, ours and others'."""
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = {row["seed"]: row["windows"] for row in reversed(rows) if row["name"] == name}  # twice counts once
        values = np.array(list(seeds.values()))
        mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
        print(f"\nCartPole, {name}: " + ", ".join(f"{m:.0f} ± {e:.0f}" for m, e in zip(mean, error)))


def linear_table(rows: list[dict]) -> None:
    """Print what linearity gives in control: the mean ± the standard error of every number over seeds."""
    groups: dict[tuple[str, int, str], dict[int, dict]] = {}  # a seed that was run twice counts once
    for row in rows:
        groups.setdefault((row["example"], row["trained"][0], row["way"]), {}).setdefault(row["seed"], row["numbers"])
    shown = None
    for (example, steps, way), seeds in sorted(groups.items(), key=lambda group: group[0][:2]):
        numbers = list(seeds.values())
        if (example, steps) != shown:
            heads = [f"{example}, {steps:,} steps", *numbers[0], "seeds"]
            print(f"\n| {' | '.join(heads)} |\n|" + "---|" * len(heads))
            shown = example, steps
        cells = []
        for name in numbers[0]:
            values = np.array([n[name] for n in numbers if n.get(name) is not None], dtype=float)
            error = f" ± {round(values.std(ddof=1) / len(values) ** 0.5, 9):.2g}" if len(values) > 1 else ""
            cells.append(f"{round(values.mean(), 9) + 0.0:.4g}{error}" if len(values) else "–")
        print(f"| {way} | {' | '.join(cells)} | {len(numbers)} |")


def table(folder: Path, settings: Iterable[Setting], figure: Path | None) -> None:
    """Markdown tables of everything that is in the folder, and curves.

    Raises:
        UserError: if nothing is finished there.
    """
    names = ("control", "evaluate", "peer", "linear")
    kept = {name: folder / f"{name}.jsonl" for name in names}
    rows = {name: finished(path) for name, path in kept.items()}
    if not any(rows.values()):
        raise UserError(
            f"nothing is finished in {folder} yet: run night, control, linear, evaluate or peer with this --out"
        )
    drawn, settings = [], list(settings)
    there_are = sorted({str(row["env"]) for row in rows["control"]})  # unknown ones are refused below
    other = there_are and set(there_are) <= set(ENVS) - {one.name for one in settings}
    if other and sum(map(bool, rows.values())) == 1:
        raise UserError(
            f"nothing is finished in {folder} of the --envs that are asked for: it has {', '.join(there_are)}"
        )
    if rows["control"]:
        with sound(kept["control"]):
            drawn = control_table(rows["control"], settings)
    parts: dict[str, Callable[[list[dict]], None]]
    parts = {"evaluate": evaluation_table, "peer": peer_table, "linear": linear_table}
    for name, show in parts.items():
        if rows[name]:
            with sound(kept[name]):
                show(rows[name])
    if figure and drawn:
        with sound(kept["control"]):
            curves(drawn, figure)


def curves(drawn: list[tuple], path: Path) -> None:
    """Mean return against environment steps, a panel for each choice of rates, with the middle half of the seeds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 2.6 * -(-len(drawn) // 2)), dpi=110, layout="constrained")
    for axes, (setting, rates, rows) in zip(picture.subplots(-(-len(drawn) // 2), 2, squeeze=False).flat, drawn):
        for method, row in rows.items():
            values, steps = np.array(row["returns"]), row["env_steps"]
            low, high = np.quantile(values, [0.25, 0.75], axis=0)
            axes.plot(steps, values.mean(0), label=f"{METHODS[method]}, rate {rates[method]:g}")
            axes.fill_between(steps, low, high, alpha=0.2)
        for threshold in setting.thresholds:
            axes.axhline(threshold, color="k", lw=0.5, ls=":")
        axes.set(title=setting.name, xlabel="environment steps", ylabel="return")
        axes.legend(fontsize=7)
    picture.savefig(path)
