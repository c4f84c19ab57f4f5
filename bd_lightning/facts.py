"""What a data module tells the model that learns from it: plain facts, kept in every checkpoint beside the config."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

PROBES = 4
"""States of an environment that figures and samples are for."""


@dataclass(frozen=True)
class Facts:
    """Base of the facts.

    Args:
        name: what caches and protocols call the data.
        shape: shape of one sample, or of one observation.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order; empty if there are none."""
        return ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def space(self) -> str | None:
        """What the samples are codes of, as a key; None for the data themselves."""
        return None

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns of a drawn table; None numbers them."""
        return None

    @property
    def center(self) -> tuple[float, ...] | None:
        """What is added to each column of a drawn table, in its units; None adds nothing."""
        return None

    @property
    def scale(self) -> tuple[float, ...] | None:
        """What each column of a drawn table is multiplied by; None leaves it."""
        return None

    @property
    def units(self) -> dict[str, Any]:
        """What the numbers of a sample stand for, by name: only where all of it agrees do models go together."""
        return {
            "space (pixels, or the codes of one autoencoder)": self.space,
            "columns": self.columns,
            "center (data.center, what each column is standardised around)": self.center,
            "scale (data.scale, what each column is divided by)": self.scale,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """What a class of a config is given if it has an argument of that name and no value for it."""
        return {"shape": self.shape, "num_classes": self.num_classes}

    def plain(self) -> dict[str, Any]:
        """Lists, numbers and strings, for a checkpoint or a log; `read` is the inverse."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"kind": type(self).__name__, **values}


@dataclass(frozen=True)
class SampleFacts(Facts):
    """Facts of samples of a density.

    Args:
        sigma_data: standard deviation of the training samples, in the model's units.
        class_names: names of the classes, in label order.
        space: what the samples are codes of, as a key; None for the data themselves. Models merge only in one space.
    """

    sigma_data: float
    class_names: tuple[str, ...] = ()
    space: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Shape, number of classes and scale."""
        return {**super().arguments, "sigma_data": self.sigma_data}


@dataclass(frozen=True)
class TableFacts(SampleFacts):
    """Facts of the rows of a table, which are standardised.

    Args:
        columns: names of the d columns.
        center: their means, in the table's units.
        scale: their standard deviations, in the table's units.
    """

    columns: tuple[str, ...] = ()
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class EnvironmentFacts(Facts):
    """Facts of an environment; `shape` is that of an observation.

    Args:
        actions: number of actions.
        v_min: smallest discounted return, as declared.
        v_max: largest one.
    """

    actions: int
    v_min: float
    v_max: float

    @property
    def columns(self) -> tuple[str, ...]:
        """One column of returns for each action."""
        return tuple(f"action_{i}" for i in range(self.actions))

    @property
    def arguments(self) -> dict[str, Any]:
        """Shape of an observation, number of actions, range of returns."""
        return {"shape": self.shape, "actions": self.actions, "v_min": self.v_min, "v_max": self.v_max}


KINDS = {kind.__name__: kind for kind in (SampleFacts, TableFacts, EnvironmentFacts)}


def rounded(total: float) -> float:
    """A sum of weights to nine digits, by which they are known: the last ones differ with the number of threads."""
    return float(f"{total:.9g}")


def read(values: Mapping[str, Any]) -> Facts:
    """Facts of the plain values that `Facts.plain` gave.

    Raises:
        ValueError: for values of no known kind, or that do not belong to it.
    """
    given = dict(values)
    if isinstance(space := given.get("space"), str) and space.startswith("['diffusers', "):  # as written before, too
        given["space"] = re.sub(r"(?<=, )[-+.e\d]+(?=\]$)", lambda number: str(rounded(float(number[0]))), space)
    kind: Any = KINDS.get(str(given.pop("kind", None)))
    if kind is None or set(given) - {f.name for f in fields(kind)}:
        raise ValueError(f"these are not facts of a data module: {', '.join(map(str, values))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not _is(value, hints[name]):
            raise ValueError(f"the fact {name} of a data module must be {hints[name]}, got {value!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"these facts of a data module are not whole: {error}") from error


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that a fact has: a number, a string, a tuple of one of these, or None."""
    if isinstance(hint, UnionType):
        return any(_is(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    return isinstance(value, (int, float) if hint is float else hint)
