"""One-sentence refusals of values that no computation should be started with."""

import difflib
import errno
import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake that its message explains in one sentence; `train.py` prints it without a traceback."""


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for a close match, else the choices."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def reason_of(error: BaseException) -> str:
    """Why a file could not be written, in the system's words, also if torch has put its own around them."""
    deeper: BaseException | None = error
    while deeper is not None:
        if isinstance(deeper, OSError) and deeper.strerror:
            return deeper.strerror
        deeper = deeper.__cause__ or deeper.__context__
    return "the file could not be written whole; is the disk full?"


def regular_file(path: str | Path, what: str) -> None:
    """Refuse a path at which there is no file that can be read to its end.

    Args:
        path: the path.
        what: what the file should be, for the message.

    Raises:
        UserError: saying what is there instead.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte
        looped = isinstance(error, OSError) and error.errno == errno.ELOOP
        raise UserError(f"{what} not found: {path}{' is a link to itself' if looped else ''}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{what} not found: {path} is {kind}, not a file")


def plain_name(**values: object) -> None:
    """Refuse what cannot be the name of a file, a folder and a W&B run alike.

    Raises:
        ValueError: naming the first offending argument and what is wrong with it.
    """
    for name, value in values.items():
        wrong = sorted({c for c in str(value) if c in "/\\#?%:" or not c.isprintable()})
        if not isinstance(value, str) or not value.strip() or value.strip() != value:
            raise ValueError(f"{name} must be a name, got {value!r}")
        if wrong:
            raise ValueError(f"{name} {_cut(value)!r} may not hold {' '.join(map(ascii, wrong))}")
        if value.startswith("."):
            raise ValueError(f"{name} {_cut(value)!r} may not begin with a dot")
        if len(value) > 128 or len(value.encode(errors="replace")) > 200:
            raise ValueError(f"{name} {_cut(value)!r} is too long, 128 characters are the most")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def positive(**values: float) -> None:
    """Refuse values that are not finite and above zero.

    Raises:
        ValueError: naming the first offending argument.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive{' and finite' * (value > 0)}, got {value}")


def count(**values: int) -> None:
    """Refuse what no counter counts: other than whole numbers from 0 on that fit in 64 bits.

    Raises:
        ValueError: naming the first offending argument.
    """
    for name, value in values.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")


def in_range(low: float, high: float, **values: float) -> None:
    """Refuse values outside the closed interval [low, high].

    Raises:
        ValueError: naming the first offending argument.
    """
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value}")


def interval(**values: Sequence[float]) -> None:
    """Refuse pairs that are not 0 ≤ low < high; high may be infinite.

    Raises:
        ValueError: naming the first offending argument.
    """
    for name, pair in values.items():
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise ValueError(f"{name} must be [low, high] with 0 ≤ low < high, got {list(pair)}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Refuse values that are not among the choices.

    Raises:
        ValueError: naming the first offending argument and the choices.
    """
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def at_hand(x: Any) -> bool:
    """Whether a number of a tensor can be read without waiting until a device has done all that it was asked for."""
    return x.device.type == "cpu"
