"""Progress bars of what takes its time beside the steps of the training: what is being done, and how much of it."""

import sys
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm.auto import tqdm

DELAY = 1.0
"""Seconds before a bar appears: what is done by then has none."""
SELDOM = 10.0
"""Seconds between two states of a bar where they are not seen in place, in a file of output."""

_shown = True


def show(shown: bool) -> None:
    """Whether bars are shown from now on; `train.py` asks the config: not with callbacks.progress=null."""
    global _shown
    _shown = shown


def bar(what: str, total: int) -> Any:
    """A bar, a context manager whose `update(n)` moves it; shown on rank 0 alone.

    Args:
        what: what is being done, e.g. "classifier of MNIST for FID".
        total: how much there is of it.
    """
    return tqdm(
        desc=what,
        total=total,
        disable=not _shown or rank_zero_only.rank != 0,  # type: ignore[attr-defined]
        delay=DELAY,
        mininterval=0.1 if sys.stderr.isatty() else SELDOM,
        leave=False,
        dynamic_ncols=True,
    )
