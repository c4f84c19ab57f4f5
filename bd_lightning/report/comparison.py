"""Several runs beside each other: as text, and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath
from typing import Any

from bd_lightning.report.curves import COLOURS, Line, chart, number
from bd_lightning.report.folder import Run
from bd_lightning.report.page import LOSSES, digits, headline, levels
from bd_lightning.report.style import document, table

COMPARISON = '<meta name="description" content="comparison of runs">'
"""What tells a comparison from other pages."""
IGNORED = ("format", "root", "data.root", "run_id", "ckpt_path", "trust", "n", "logger")
"""Keys of configs that say nothing about how runs differ."""
WHOSE_LOSSES = (
    ("data._target_", "data", None),
    ("model._target_", "model", None),
    ("model.representation._target_", "representation", None),
    ("model.objective._target_", "objective", None),
    ("model.parametrisation", "parametrisation", "factored"),
)
"""Keys that losses depend on, what that is, and what it is where it is not said."""
LEARNING = ("model.objective.", "model.noise.", "model.kernel.", "model.representation.")
"""Beginnings of the keys that say what a model learns, and at which noise levels."""
LOADING = {
    *("root", "batch_size", "total_batch_size", "eval_batch_size", "num_workers", "pin_memory", "download"),
    *("cache", "ckpt_path", "seed"),
}
"""Arguments of data sets that change no held-out sample; an autoencoder's codes are told by the facts."""
DRAWING = {"antithetic", "stratified"}
"""Arguments of noise levels that change no loss in the mean."""


def warnings(runs: Sequence[Run]) -> list[str]:
    """Where numbers of runs do not compare, a sentence each: other protocols, other data, other losses."""
    found = []
    for name in _names(runs):
        protocols = {run.name: protocol for run in runs if (protocol := run.protocol(name)) is not None}
        if len(set(protocols.values())) > 1 and name not in LOSSES:
            told = "; ".join(f"{run}: {_what_differs(text, protocols.values())}" for run, text in protocols.items())
            found.append((told, name))
    sentences = [
        f"{', '.join(name for text, name in found if text == told)} do not compare, the protocols differ: {told}"
        for told in dict.fromkeys(text for text, _ in found)
    ]
    said: list[str] = []
    for key, what, usual in WHOSE_LOSSES:
        values = {run.name: flat(run.config).get(key, usual) for run in runs}
        if len(set(map(str, values.values()))) > 1 and not key.startswith(tuple(said)):
            said.append(key.removesuffix("_target_"))
            told = ", ".join(f"{run}: {str(value).rpartition('.')[2]}" for run, value in values.items())
            sentences.append(f"losses do not compare, the {what} differs: {told}")
    for what, starts, but in (("data", ("data.",), LOADING), ("models", LEARNING, DRAWING)):
        keys = [key for key in _keys(runs, starts) if key.rpartition(".")[2] not in but]
        keys = [key for key in keys if not key.startswith(tuple(said))]
        if keys:
            sentences.append(f"losses do not compare, the {what} differ: {', '.join(keys)}")
    return sentences


def _keys(runs: Sequence[Run], starts: tuple[str, ...]) -> list[str]:
    """Keys with one of these beginnings that runs differ in; an exported folder has names for paths."""
    configs = [flat(run.config) for run in runs]
    found = []
    for key in dict.fromkeys(key for config in configs for key in config if key.startswith(starts)):
        values = {str(config.get(key)) for config in configs}
        names = {name for value in values if (name := PurePath(value).name) != value}
        if len(values - names) > 1:
            found.append(key)
    return found


def _what_differs(protocol: str, others: Any) -> str:
    """The parts of a protocol that not all of them have."""
    shared = set.intersection(*(set(other.split("; ")) for other in others))
    return "; ".join(part for part in protocol.split("; ") if part not in shared) or "nothing more"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as dotted keys and values."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys of the config that runs differ in → the value of each run, a dash where it has none."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [str(config[key]) if key in config else "–" for config in configs] for key in keys}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1}
    others = [key.removesuffix("_target_") for key in rows if key.endswith("._target_")]  # of another class altogether
    return {
        key: values
        for key, values in rows.items()
        if key not in IGNORED
        and not key.startswith(("logger.", "callbacks.", "facts."))
        and not any(key.startswith(other) and key != f"{other}_target_" for other in others)
    }


def _names(runs: Sequence[Run]) -> list[str]:
    """What runs are judged by, each name once: metrics before losses."""
    names = list(dict.fromkeys(name for run in runs for name in headline(run)))
    return sorted(names, key=lambda name: "loss" in name)


def alike(runs: Sequence[Run]) -> list[Run]:
    """Runs with what is known of the metrics of any."""
    metrics = {name: about for run in runs for name, about in run.metrics.items()}
    return [replace(run, metrics=metrics) for run in runs]


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """Last and best of every number: a row of cells each, the name first."""
    rows = []
    for name in _names(runs):
        cells = []
        for run in runs:
            last, best = run.last(name), run.best(name)
            text = "–" if last is None else number(last, digits(run, name))
            cells.append(f"{text} ({number(best[1], digits(run, name))} at {best[0]})" if best else text)
        rows.append([name, *cells])
    return [["steps", *(str(run.step) for run in runs)], *rows]


def compare_text(runs: Sequence[Run]) -> str:
    """A table of last values, with the best in brackets, the keys that differ, and what does not compare."""
    runs = alike(runs)
    parts = [_text([["last (best)", *(run.name for run in runs)], *_rows(runs)])]
    if keys := differences(runs):
        parts.append(_text([["config", *(run.name for run in runs)], *([k, *map(_cut, v)] for k, v in keys.items())]))
    parts += [f"warning: {sentence}" for sentence in warnings(runs)]
    return "\n\n".join(parts)


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def compare_page(runs: Sequence[Run]) -> str:
    """The comparison as a page with overlaid curves; a run has the same colour in all of them."""
    runs = alike(runs)
    title = " · ".join(run.name for run in runs)
    parts = [f'<h1>{len(runs)} runs</h1><p class="soft">{escape(title)}</p>']
    parts += [f'<p class="warn">{escape(sentence)}</p>' for sentence in warnings(runs)]
    cells = [[escape(cell) for cell in row] for row in _rows(runs)]
    parts.append("<h2>Last value, best in brackets</h2>" + table(["", *(escape(run.name) for run in runs)], cells))
    names = _names(runs)
    logged = dict.fromkeys(name for run in runs for name in run.curves if name.startswith(("val/", "train/loss")))
    cards = [_overlaid(runs, name) for name in names]
    parts.append(f'<h2>Curves</h2><div class="cards">{"".join(cards)}</div>')
    if rest := [_overlaid(runs, name) for name in logged if name not in names]:
        parts.append(f'<details><summary>{len(rest)} more</summary><div class="cards">{"".join(rest)}</div></details>')
    if protocols := _protocols(runs, names):
        parts.append("<h2>Protocols</h2>" + protocols)
    if keys := differences(runs):
        rows = [
            [escape(key), *(f"<span title='{escape(v)}'>{escape(_cut(v))}</span>" for v in keys[key])] for key in keys
        ]
        parts.append("<h2>What differs in the configs</h2>" + table(["", *(escape(run.name) for run in runs)], rows))
    return document(f"{len(runs)} runs", parts, COMPARISON)


def _overlaid(runs: Sequence[Run], name: str) -> str:
    lines = [
        Line(run.name, run.curves[name], i % COLOURS, dashed=i >= COLOURS)
        for i, run in enumerate(runs)
        if name in run.curves
    ]
    floors = [levels(run, name) for run in runs]
    return chart(name, lines, floors[0] if all(one == floors[0] for one in floors) else None)


def _protocols(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The protocols behind the numbers, each once, with the names and runs that it stands for."""
    where: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for run in runs:
            if (protocol := run.protocol(name)) is not None:
                where.setdefault(protocol, {}).setdefault(run.name, []).append(name)
    rows = []
    for protocol, found in where.items():
        every = dict.fromkeys(name for values in found.values() for name in values)
        rows.append(f"<li><b>{escape(', '.join(found))}</b>: {escape(', '.join(every))}. {escape(protocol)}</li>")
    return f'<ol class="protocols">{"".join(rows)}</ol>' if rows else ""
