"""Files of numbers in the run folder."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from bd_lightning.checks import UserError
from bd_lightning.loggers import moved_aside


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder."""
    return Path(trainer.default_root_dir)


def step_of(trainer: L.Trainer) -> int:
    """The optimiser step that the module's weights come from, also when they were loaded to be evaluated."""
    module: Any = trainer.lightning_module
    return max(trainer.global_step, module.loaded_step)


def read_record(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a record, none where there is no file; None if it is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (ValueError, RecursionError):
        return None
    sound = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows)
    return rows if sound else None


def append_record(trainer: L.Trainer, name: str, row: dict[str, Any]) -> None:
    """Append a row to <run folder>/<name>, a JSON list; "summary" of the last row is printed when the run ends.

    It takes the place of a row of the same step, protocol, sampler and calls, which a run that was killed had written
    before.
    Numbers that are not finite, which JSON does not know, become null. A damaged file is moved aside.
    """
    path = run_folder(trainer) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_record(path)
    if rows is None:
        rank_zero_info(f"{name} was damaged: it is now {moved_aside(path).name}, and a new one is begun")

    def place(one: dict[str, Any]) -> tuple:
        return one["step"], one.get("protocol"), one.get("drawn"), one.get("sampler"), one.get("calls"), set(one)

    rows = [old for old in rows or [] if place(old) != place(row)]
    known = {key: None if value in (math.inf, -math.inf) or value != value else value for key, value in row.items()}
    part = Path(f"{path}.part")
    try:
        text = json.dumps([*rows, known], indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"rows of {name} must hold plain numbers and text, which JSON knows ({error})") from error
    part.write_text(text)
    part.replace(path)
