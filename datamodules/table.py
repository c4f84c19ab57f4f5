"""Tables of numbers: CSV and Parquet files, and scikit-learn's built-in sets."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd_lightning.checks import in_range, one_of, suggest
from bd_lightning.facts import TableFacts
from datamodules.base import DataModule
from datamodules.splits import DataError, Rows

DATASETS = ("wine", "breast_cancer", "diabetes")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_PARQUET = (".parquet", ".pq")
_MISSING = ("", "nan", "na", "n/a", "null", "none", "nat", "<na>")


class Table(DataModule):
    """Rows of a table, each column standardised to mean 0 and standard deviation 1 on the training split.

    A center and a scale may be given instead: tables whose models are to be merged need the same.

    Every cell of the columns in use must be a finite number; booleans count as 0 and 1. Rows are split by a fixed
    shuffle, and blank lines of a text file are skipped.

    Args:
        file: a table with the columns' names on its first line: .csv (commas), .tsv or .txt (tabs), .parquet or .pq.
        dataset: instead of a file, one of scikit-learn's sets, without its target: wine, breast_cancer or diabetes.
        columns: the columns to model, in this order; None takes all.
        drop: columns to leave out.
        center: what each column is standardised around, (d,), in the table's units; None takes the means.
        scale: what each column is divided by, (d,), in the table's units; None takes the standard deviations.
        val_fraction: share of the rows held out for validation, at least 2 rows.
        test_fraction: share of the rows held out for the test, at least 2 rows.
        options: arguments of `DataModule`.

    Attributes:
        columns: names of the d columns.
        center: their means over the training split, or what was given, (d,), in the table's units.
        scale: their standard deviations over the training split, or what was given, (d,), in the table's units.

    Raises:
        DataError: if the table is missing, unreadable, too short, or has a cell or column that cannot be modelled.
    """

    sigma_data = 1.0

    def __init__(
        self,
        file: str | None = None,
        dataset: str | None = None,
        columns: list[str] | None = None,
        drop: list[str] | None = None,
        center: list[float] | None = None,
        scale: list[float] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (file is None) == (dataset is None):
            raise ValueError(f"give data.file or data.dataset (one of {', '.join(DATASETS)}), and not both")
        in_range(0.001, 0.5, val_fraction=val_fraction, test_fraction=test_fraction)
        if dataset is not None:
            one_of(DATASETS, dataset=dataset)
        self.place = dataset or Path(str(file)).name
        self.name = f"{type(self).__name__}-{self.place}"
        frame = _load_sklearn(dataset) if dataset else _load_file(Path(str(file)))
        self.columns = self._choose(list(frame.columns), columns, drop)
        self.shape = (len(self.columns),)
        values = np.stack([_numbers(self.place, name, frame[name]) for name in self.columns], 1)
        self.digest = hashlib.sha256(values.tobytes()).hexdigest()
        self.rows = self._cut(torch.from_numpy(values), val_fraction, test_fraction)
        self.center = self._given("center", center, -math.inf, self.rows["train"].mean(0))
        self.scale = self._given("scale", scale, 0.0, self.rows["train"].std(0, correction=0))
        self._check_scale()
        self.log_volume = float(self.scale.log().sum())

    @property
    def facts(self) -> TableFacts:
        own = tuple(self.columns), tuple(self.center.tolist()), tuple(self.scale.tolist())
        return TableFacts(self.name, self.shape, self.sigma_data, (), None, *own)

    @property
    def fingerprint(self) -> list[Any]:
        return [*super().fingerprint, self.columns, [len(rows) for rows in self.rows.values()], self.digest]

    def load_split(self, split: str) -> Rows:
        return Rows(((self.rows[split] - self.center) / self.scale).float())

    def _choose(self, known: list[str], columns: list[str] | None, drop: list[str] | None) -> list[str]:
        for key, wanted in (("columns", columns), ("drop", drop)):
            for name in wanted or ():
                if name not in known:
                    raise DataError(f"{self.place}: no column '{name}', named in data.{key}.{suggest(name, known)}")
        chosen = [name for name in (known if columns is None else columns) if name not in (drop or ())]
        _refuse_duplicates("data.columns", chosen)
        if "" in chosen:
            raise DataError(
                f"{self.place}: column {known.index('') + 1} has no name, as the index that pandas writes has none: "
                "give it one, write the table with index=False, or choose data.columns"
            )
        if not chosen:
            raise DataError(f"{self.place}: no columns are left; change data.columns or data.drop")
        return chosen

    def _cut(self, rows: Tensor, val_fraction: float, test_fraction: float) -> dict[str, Tensor]:
        val, test = (max(2, round(fraction * len(rows))) for fraction in (val_fraction, test_fraction))
        train = len(rows) - val - test
        if train < 2:
            raise DataError(
                f"{self.place}: {len(rows)} rows are too few for training, validation and test splits of 2 rows or "
                "more; add rows or lower data.val_fraction and data.test_fraction"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return dict(zip(("train", "val", "test"), rows[order].split([train, val, test])))

    def _given(self, key: str, values: list[float] | None, least: float, own: Tensor) -> Tensor:
        if values is None:
            return own
        if len(values) != len(own) or not all(least < value < math.inf for value in values):
            kind = "finite numbers" if least < 0 else "positive numbers"
            raise DataError(
                f"{self.place}: data.{key} must be {len(own)} {kind}, one for each column ({', '.join(self.columns)}); "
                f"got {list(values)}"
            )
        return torch.tensor(values, dtype=own.dtype)

    def _check_scale(self) -> None:
        low, high = self.rows["train"].aminmax(dim=0)
        for name, a, b, scale in zip(self.columns, low.tolist(), high.tolist(), self.scale.tolist()):
            if a == b:
                problem = f"is constant (all {a}) in the training split"
            elif not 0 < scale < math.inf:
                problem = f"is too small or too large to standardise ({a} to {b})"
            else:
                continue
            raise DataError(f"{self.place}: column '{name}' {problem}; leave it out with data.drop")


def _refuse_duplicates(place: str, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{place}: column '{name}' appears {count} times; names must differ")


def _load_sklearn(name: str) -> Any:
    import pandas
    import sklearn.datasets

    options = {"scaled": False} if name == "diabetes" else {}
    data = getattr(sklearn.datasets, f"load_{name}")(as_frame=False, **options)
    return pandas.DataFrame(data.data, columns=[str(n) for n in data.feature_names])


def _load_file(path: Path) -> Any:
    import pandas

    kind = path.suffix.lower()
    if kind not in (*_SEPARATORS, *_PARQUET):
        known = ", ".join((*_SEPARATORS, *_PARQUET))
        raise DataError(f"cannot tell the format of the table {path}: its name must end in one of {known}")
    if not path.is_file():
        raise DataError(f"table not found: {path}; set data.file")
    try:
        if kind in _PARQUET:
            import pyarrow.parquet

            _refuse_duplicates(path.name, pyarrow.parquet.read_schema(path).names)
            frame = pandas.read_parquet(path)
            names = [str(n) for n in frame.columns]
        else:  # the header is read as a row, because pandas renames duplicates
            frame = pandas.read_csv(
                path, sep=_SEPARATORS[kind], header=None, dtype=str, keep_default_na=False, skipinitialspace=True
            )
            names = [str(n).strip() for n in frame.iloc[0]]
            frame = frame.iloc[1:].reset_index(drop=True)
    except (OSError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"cannot read the table {path}: {reason}; repair it or set data.file") from error
    numeric = pandas.to_numeric(pandas.Series(names), errors="coerce").notna().all()
    if kind in _SEPARATORS and numeric and names != [str(i) for i in range(len(names))]:
        raise DataError(f"{path.name}: the first line holds numbers; put the columns' names there")
    _refuse_duplicates(path.name, names)
    return frame.set_axis(names, axis=1)


def _numbers(place: str, name: str, column: Any) -> Any:
    """A column as float64; cells that are not stored as numbers are read as text."""
    import pandas

    if pandas.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype="float64", na_value=math.nan)
        missing = wrong = pandas.Series(values).isna()
    else:
        text = column.map(str).str.strip()
        lower = text.str.lower()
        values = pandas.to_numeric(lower.replace({"true": "1", "false": "0"}), errors="coerce").to_numpy("float64")
        wrong, missing = pandas.Series(values).isna(), lower.isin(_MISSING)
    wrong = wrong.to_numpy() | (abs(values) == math.inf)
    if wrong.any():
        row = int(wrong.argmax())
        if missing.iloc[row]:
            problem = "is missing; fill it in"
        elif math.isinf(values[row]):
            problem = "is infinite; correct it"
        else:
            problem = f"is not a number: {text.iloc[row]!r}; correct it"
        raise DataError(
            f"{place}: row {row + 1}, column '{name}' {problem}, delete the row, or leave the column out with data.drop"
        )
    return values
