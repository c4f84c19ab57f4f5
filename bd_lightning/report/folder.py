"""What a run folder says."""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bd_lightning.checks import UserError
from bd_lightning.cli.links import refuse_links

SETTINGS = "settings.json"
"""What tells the folder of an evaluation."""
OTHERS = (SETTINGS, "metrics.json")
"""JSON files that hold no rows."""
LARGEST = 1e300
"""Larger numbers are taken for infinite: differences of them are."""

Series = list[tuple[int, float]]
"""Values by optimiser step, in order of steps; finite ones only."""


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Args:
        folder: the run folder.
        name: what it is called among others.
        config: its config, as plain values.
        curves: what was logged in training and validation, name → values; of an exported folder what its records hold.
        records: rows of its JSON records, name → rows.
        metrics: how the numbers of its evaluations are read, name → {"mode": "min" or "max", "digits"}.
        evaluations: records of later evaluations of its checkpoints, <folder>/<name> → rows.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    curves: dict[str, Series]
    records: dict[str, list[dict[str, Any]]]
    metrics: dict[str, dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that anything was written at."""
        steps = [series[-1][0] for series in self.curves.values() if series]
        return max([*steps, *(row["step"] for rows in self.records.values() for row in rows)], default=0)

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        series = self.curves.get(name)
        return series[-1][1] if series else None

    def best(self, name: str) -> tuple[int, float] | None:
        """Step and value of the best one, where it is known which is better; losses are best when small."""
        series, mode = (
            self.curves.get(name),
            "min" if name.startswith("val/loss") else self.metrics.get(name, {}).get("mode"),
        )
        if not series or mode is None:
            return None
        return (min if mode == "min" else max)(series, key=lambda point: point[1])

    def protocol(self, name: str) -> str | None:
        """How the last value of a number came about, where its record says so."""
        found = [row["protocol"] for rows in self.records.values() for row in rows if name in row and "protocol" in row]
        return found[-1] if found else None

    def pictures(self) -> dict[str, tuple[int, Path]]:
        """The latest picture of each kind, e.g. "samples/ode" → (step, file)."""
        found: dict[str, tuple[int, Path]] = {}
        for path in sorted([*self.folder.glob("samples/*.png"), *self.folder.glob("figures/*.png")]):
            match = re.fullmatch(r"(.+)-(\d{7,})", path.stem)
            if match:
                kind, step = f"{path.parent.name}/{match[1]}", int(match[2])
                found[kind] = max(found.get(kind, (0, path)), (step, path))
        return dict(sorted(found.items(), reverse=True))

    def animations(self) -> list[Path]:
        """Its animations."""
        return sorted(self.folder.glob("samples/*.gif"))


def read(folder: str | Path, name: str | None = None, fetched: bool = False) -> Run:
    """Read a run folder.

    Args:
        folder: the folder.
        name: what the run is called; None takes the folder's name.
        fetched: whether a hub's client has laid it out, which keeps files elsewhere and links to them.

    Raises:
        UserError: if it is none, or one of its files is damaged.
    """
    folder = Path(folder)
    if not fetched:
        refuse_links(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    except Exception as error:  # whatever the YAML reader raises
        raise UserError(f"{folder / 'config.yaml'} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.yaml'} is damaged: it is no mapping of keys to values")
    records = _records(folder)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        config={str(key): value for key, value in config.items()},
        curves=read_curves(folder / "metrics.csv") or _points(records),
        records=records,
        metrics=_metrics(folder / "metrics.json"),
        evaluations={
            f"{path.parent.name}/{name}": rows
            for path in sorted([*folder.glob(f"test-*/{SETTINGS}"), *folder.glob(f"validate-*/{SETTINGS}")])
            for name, rows in _records(path.parent).items()
        },
    )


def _points(records: dict[str, list[dict[str, Any]]]) -> dict[str, Series]:
    """Numbers of validation in records, as curves: an exported folder has no others."""
    found: dict[str, dict[int, float]] = {}
    for row in (row for rows in records.values() for row in rows):
        for key, value in row.items():
            if key.startswith("val/") and isinstance(value, (int, float)) and abs(value) < LARGEST:
                found.setdefault(key, {})[row["step"]] = value
    return {key: sorted(points.items()) for key, points in found.items()}


def _records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records in a folder, by name."""
    return {path.name: _rows(path) for path in sorted(folder.glob("*.json")) if path.name not in OTHERS}


def read_curves(path: Path) -> dict[str, Series]:
    """The columns of a metrics.csv, empty if there is none; a last line that is still being written is left out.

    Steps count from 1. What is logged by a later evaluation of a checkpoint stands behind the training's rows with an
    earlier step, and is left out: it is in the records.

    Raises:
        UserError: if it is damaged, with the line.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.reader(text.splitlines(keepends=True)))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not rows:
        return {}
    header = rows[0]
    if "step" not in header:
        raise UserError(f"{path} is damaged: line 1 has no column 'step'")
    curves: dict[str, Series] = {key: [] for key in header if "/" in key and not key.startswith("test/")}
    whole = rows[1:] if text.endswith("\n") else rows[1:-1]
    for line, row in enumerate(whole, start=2):
        if len(row) != len(header):
            raise UserError(f"{path} is damaged: line {line} has {len(row)} values for {len(header)} columns")
        try:
            values = {key: float(value) for key, value in zip(header, row) if value}
        except ValueError as error:
            raise UserError(f"{path} is damaged: line {line}: {error}") from error
        step = values.get("step", -1.0)
        if not abs(step) < LARGEST or step != round(step):
            raise UserError(f"{path} is damaged: line {line}: {step} is no step")
        for key, value in values.items():
            if key in curves and abs(value) < LARGEST and (not curves[key] or step + 1 > curves[key][-1][0]):
                curves[key].append((int(step) + 1, value))
    return {key: series for key, series in curves.items() if series}


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path, list)
    if not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
        raise UserError(f"{path} is damaged: it is no list of rows with a step")
    for row in rows:
        if not isinstance(row.get("protocol", ""), str):
            raise UserError(f"{path} is damaged: a protocol is {row['protocol']!r}")
        if any(isinstance(value, int) and abs(value) > LARGEST for value in row.values()):
            raise UserError(f"{path} is damaged: it has a number that is too large")
    return rows


def _metrics(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    for name, about in found.items():
        digits = about.get("digits") if isinstance(about, dict) else "none"
        if not (digits is None or type(digits) is int and 0 <= digits <= 20) or about.get("mode") not in (
            "min",
            "max",
            None,
        ):
            raise UserError(f"{path} is damaged: it does not say how {name} is read")
    return found


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is damaged, or holds something of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: it holds no {kind.__name__}")
    return content
