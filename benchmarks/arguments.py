"""Options and words that are checked before a benchmark computes anything; each refusal is one sentence."""

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bd_lightning.checks import UserError


def folder(text: str) -> Path:
    """A type of arguments: a folder, which need not be there yet."""
    path = Path(text)
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if there.exists() and not there.is_dir():
        raise ArgumentTypeError(f"{there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"cannot write into {there}")
    return path


def pattern(text: str) -> re.Pattern[str]:
    """A type of arguments: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"is no regular expression, {error}: {text!r}") from None


def picture(*kinds: str) -> Callable[[str], Path]:
    """A type of arguments: a file with one of some suffixes, in a folder that is there."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in kinds:
            raise ArgumentTypeError(f"must end in {' or '.join(kinds)}, got {text!r}")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"there is no folder {path.parent}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ArgumentTypeError(f"cannot write {text!r}")
        return path

    return read


def device(text: str) -> str:
    """A type of arguments: cpu, or cuda where there is one."""
    try:
        asked = torch.device(text)
    except RuntimeError:
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"there is no GPU for {text!r}, take cpu")
    return text


def settings(words: Sequence[str], read: Sequence[str], instead: Mapping[str, str]) -> list[str]:
    """The words KEY=VALUE of a command line, in the order that rows name them and that they are applied in.

    Args:
        words: the words.
        read: keys that the benchmark reads; those that end with a dot stand for all that begin so.
        instead: keys that it does not read, or sets itself, with what to do about that.

    Raises:
        UserError: for words that it does not read, for others than KEY=VALUE, and for a key that is given twice, or
            within another one.
    """
    keys: dict[str, str] = {}
    for word in sorted(words):
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read '{word}': expected KEY=VALUE")
        if key in keys:
            raise UserError(f"'{keys[key]}' and '{word}' contradict each other, or say the same: give one of them")
        keys[key] = word
    for key, word in keys.items():
        for outer in instead:
            if key == outer or key.startswith(f"{outer}."):
                raise UserError(f"'{word}' would not be read: {instead[outer]}")
        if not any(key == known or known.endswith(".") and key.startswith(known) for known in read):
            known = ", ".join(f"{name}…" if name.endswith(".") else f"{name}=…" for name in read)
            raise UserError(f"'{word}' would not be read: leave it out; there are {known}")
        for other in keys:
            if other.startswith(f"{key}.") and "." in key:
                raise UserError(f"'{word}' and '{keys[other]}' contradict each other: say both in one of them")
    return list(keys.values())
