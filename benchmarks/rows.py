"""Rows that benchmarks keep, and tables of them."""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bd_lightning.checks import UserError

UNFINISHED = b" (unfinished)"
"""The end of a line that a killed run began and another one found."""


def _whole(line: bytes) -> bool:
    """Whether a line is a JSON object to its end, which the beginning of a longer one never is."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class Row(dict[str, Any]):
    """A row that was read, and where it stands; to ask for what it lacks is a `UserError`."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.place} is damaged, its row has no '{key}': delete that line, or mend it")


class Rows(Sequence[dict[str, Any]]):
    """Finished rows, one JSON object a line, so that a benchmark can be stopped and repeated.

    A line that a killed run left unfinished is left out. It stays in the file, which other processes may write to, and
    is marked as unfinished by the next row that follows it. A last line that lacks its end alone, as editors leave it,
    is a row.

    Args:
        path: the file; it need not be there.

    Raises:
        UserError: naming the first line that is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        try:
            *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise UserError(f"cannot read the rows in {path}: {error.strerror}") from error
        lines += [last] if _whole(last) else []
        for number, line in enumerate(lines, 1):
            if line.endswith(UNFINISHED):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is damaged, it holds no row: delete that line, or mend it")
            self.rows.append(Row(row, f"{path}, line {number}"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep one more row.

        Raises:
            UserError: with the row, if it cannot be written.
        """
        self.rows.append(row)
        text = json.dumps(row)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                last = file.read().split(b"\n")[-1]
                ending = (b"" if _whole(last) else UNFINISHED) + b"\n" if last else b""
                file.write(ending + text.encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}): add this row there by hand: {text}"
            ) from error
        return row

    def say(self, **row: Any) -> dict[str, Any]:
        """Keep one more row and print it, beside what a benchmark prints at its end."""
        print(self.add(**row), file=sys.stderr, flush=True)
        return row

    def where(self, **values: Any) -> list[dict[str, Any]]:
        """The rows that have these values, oldest first."""
        return [row for row in self.rows if all(key in row and row[key] == v for key, v in values.items())]

    def of_seeds(self, seeds: Iterable[int], **values: Any) -> list[dict[str, Any]]:
        """The first row of each of some seeds that has these values: two of one seed are no two seeds."""
        return [found[0] for seed in seeds if (found := self.where(**values, seed=seed))]


@contextmanager
def sound(path: Path | str) -> Iterator[None]:
    """What is computed inside comes from the rows of a file, which may have been edited by hand.

    Raises:
        UserError: if a value is not of the kind that is expected.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{path} has a row with a value that is none of its kind ({reason}): mend it") from error


def mean_sd(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation over as many seeds as there are."""
    found = list(values)
    if not found:
        return "–"
    if not all(map(math.isfinite, found)):
        return "not finite"
    sd = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{sd}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, an empty line before it."""

    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    return "\n".join(["", line(header), "|" + "---|" * len(header), *map(line, rows)])
