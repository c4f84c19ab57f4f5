import decimal

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.facts import read
from bd_lightning.teachers import check_units
from datamodules import Table
from datamodules.splits import DataError

SPLITS = ("train", "val", "test")


def frame(rows=40) -> pd.DataFrame:
    """Columns of different units; no two rows alike."""
    x = np.random.default_rng(0).normal(size=(rows, 3)) * [1.0, 100.0, 0.01] + [0.0, 5000.0, -3.0]
    return pd.DataFrame(x, columns=["height", "mass", "charge"])


def table(path, **options) -> Table:
    return Table(str(path), **{"batch_size": 4, **options})


def write(path, text):
    path.write_text(text)
    return path


def save(path, data):
    data.to_parquet(path) if path.suffix in (".parquet", ".pq") else data.to_csv(path, index=False)
    return path


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        table(path, **options)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


def numbered(cells, column="b"):
    """A CSV of two columns whose second one has the given first cells, then numbers."""
    cells = [*cells, *map(str, range(20 - len(cells)))]
    return f"a,{column}\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))


def test_splits_are_standardised_on_the_training_rows(tmp_path):
    original = frame()
    data = table(save(tmp_path / "t.csv", original))
    splits = {split: data.load_split(split).x for split in SPLITS}
    assert {split: tuple(x.shape) for split, x in splits.items()} == {"train": (32, 3), "val": (4, 3), "test": (4, 3)}
    assert splits["train"].dtype == torch.float32 and data.center.dtype == data.scale.dtype == torch.float64
    assert torch.allclose(splits["train"].mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(splits["train"].square().mean(0).sqrt(), torch.ones(3), atol=1e-5)

    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    back = torch.cat([splits[split].double() for split in SPLITS]) * data.scale + data.center
    expected = torch.from_numpy(original.to_numpy().copy())[order]
    assert back.dtype == torch.float64 and torch.allclose(back, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(data.center, expected[:32].mean(0))


def test_held_out_rows_do_not_move_the_statistics(tmp_path):
    before = table(save(tmp_path / "t.csv", frame()))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    for place, moves in ((order[-1], False), (order[32], False), (order[0], True)):
        changed = frame()
        changed.loc[place] += 1000.0
        after = table(save(tmp_path / "t.csv", changed))
        assert torch.equal(after.center, before.center) == torch.equal(after.scale, before.scale) == (not moves)
        assert after.fingerprint != before.fingerprint
    assert table(save(tmp_path / "t.csv", frame())).fingerprint == before.fingerprint
    assert table(tmp_path / "t.csv", val_fraction=0.2).fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["t.parquet", "t.pq", "t.tsv", "t.txt", "T.CSV"])
def test_formats_agree(tmp_path, name):
    data = table(save(tmp_path / "t.csv", frame()))
    if name.endswith(("tsv", "txt")):
        frame().to_csv(tmp_path / name, index=False, sep="\t")
        other = table(tmp_path / name)
    elif name == "T.CSV":
        other = table(write(tmp_path / name, "\ufeff" + frame().to_csv(index=False).replace(",", ", ")))
    else:
        other = table(save(tmp_path / name, frame()))
    assert other.columns == data.columns and other.digest == data.digest and other.name == f"Table-{name}"
    for split in SPLITS:
        assert torch.equal(other.load_split(split).x, data.load_split(split).x)


def test_facts_and_loaders(tmp_path):
    data = table(save(tmp_path / "t.csv", frame()), columns=["charge", "mass", "height"], drop=["mass"])
    facts = data.facts
    assert facts.plain() == {
        "kind": "TableFacts",
        "name": "Table-t.csv",
        "shape": [2],
        "sigma_data": 1.0,
        "class_names": [],
        "space": None,
        "columns": ["charge", "height"],
        "center": data.center.tolist(),
        "scale": data.scale.tolist(),
    }
    assert read(facts.plain()) == facts and facts.num_classes == 0
    data.setup("fit")
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (4, 2) and [len(x) for x, _ in data.val_dataloader()] == [4]
    assert facts.center == pytest.approx([-3, 0], abs=0.5) and facts.scale == pytest.approx([0.01, 1], rel=0.4)


@pytest.mark.parametrize(
    "name, rows, dim, column, mean",
    [
        ("wine", 178, 13, "alcohol", 13.0),
        ("breast_cancer", 569, 30, "mean radius", 14.1),
        ("diabetes", 442, 10, "age", 48.5),
    ],
)
def test_sklearn_sets(name, rows, dim, column, mean):
    data = Table(dataset=name, batch_size=64)
    assert sum(len(data.load_split(split)) for split in SPLITS) == rows
    assert data.shape == (dim,) and data.name == f"Table-{name}" and len(data.columns) == dim
    assert data.facts.center[data.columns.index(column)] == pytest.approx(mean, rel=0.05)


def test_parquet_columns_of_every_numeric_kind(tmp_path):
    kinds = {
        "integer": pd.Series(range(20), dtype="int32"),
        "nullable": pd.Series(range(20), dtype="Int64"),
        "decimal": [decimal.Decimal(i) / 4 for i in range(20)],
        "bool": [i % 2 == 0 for i in range(20)],
        "object": pd.Series([f"{i}e3" for i in range(20)], dtype=object),
    }
    data = table(save(tmp_path / "t.parquet", pd.DataFrame(kinds)))
    row = sorted(torch.cat([data.rows[split] for split in SPLITS]).tolist())[3]
    assert row == [3.0, 3.0, 0.75, 0.0, 3000.0]


def test_booleans_of_a_csv(tmp_path):
    data = table(write(tmp_path / "t.csv", numbered(["True", "false", "TRUE"])))
    rows = sorted(torch.cat([data.rows[split] for split in SPLITS]).tolist())
    assert [row[1] for row in rows[:4]] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "cell, complaint",
    [
        ("", "is missing; fill it in, delete the row, or leave the column out with data.drop"),
        ("NaN", "is missing"),
        ("NA", "is missing"),
        ("inf", "is infinite"),
        ("-1e400", "is infinite"),
        ("twelve", "is not a number: 'twelve'"),
        ("1_000", "is not a number: '1_000'"),
        ('"1,5"', "is not a number: '1,5'"),
    ],
)
def test_bad_cells_of_a_csv(tmp_path, cell, complaint):
    path = write(tmp_path / "t.csv", numbered(["0.5", "1.5", cell]))
    assert f"t.csv: row 3, column 'b' {complaint}" in refusal(path)
    with pytest.raises(DataError, match="no columns are left"):
        table(path, columns=["b"], drop=["b"])
    assert table(path, drop=["b"]).columns == ["a"]


@pytest.mark.parametrize(
    "cells, complaint",
    [
        ([1.5, float("nan")], "is missing"),
        ([1.5, float("-inf")], "is infinite"),
        ([1, None], "is missing"),
        ([decimal.Decimal("1.5"), None], "is missing"),
        ([True, None], "is missing"),
        (["1", "red"], "is not a number: 'red'"),
        ([pd.Timestamp("2020-01-01"), pd.Timestamp("2020-01-02")], "is not a number: '2020-01-0"),
        (pd.Series([1, None], dtype="Int64"), "is missing"),
    ],
)
def test_bad_cells_of_a_parquet(tmp_path, cells, complaint):
    data = pd.DataFrame({"a": range(20), "b": [*cells, *[cells[0]] * 18]})
    row = 1 if "2020" in complaint else 2
    assert f"t.parquet: row {row}, column 'b' {complaint}" in refusal(save(tmp_path / "t.parquet", data))


def test_short_and_long_lines(tmp_path):
    assert "row 2, column 'b' is missing" in refusal(write(tmp_path / "t.csv", "a,b\n1,2\n3\n5,6\n"))
    assert "cannot read the table" in refusal(write(tmp_path / "t.csv", "a,b\n1,2\n3,4,5\n"))


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_constant_column(tmp_path, value):
    path = save(tmp_path / "t.csv", frame().assign(x=value))
    assert f"t.csv: column 'x' is constant (all {value})" in refusal(path)
    assert refusal(path).endswith("in the training split; leave it out with data.drop")
    assert table(path, drop=["x"]).shape == (3,)


def test_column_beyond_floats(tmp_path):
    path = save(tmp_path / "t.csv", frame().assign(x=frame()["height"] * 1e300))
    assert "t.csv: column 'x' is too small or too large" in refusal(path)


def test_duplicate_columns(tmp_path):
    complaint = "column 'a' appears 2 times"
    assert complaint in refusal(write(tmp_path / "t.csv", "a,b,a\n" + "1,2,3\n4,5,6\n" * 10))
    two = pyarrow.table([[1.0] * 9, [2.0] * 9], names=["a", "a"])
    pyarrow.parquet.write_table(two, tmp_path / "t.parquet")
    assert complaint in refusal(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column 'mass' appears 2 times"):
        table(save(tmp_path / "t.csv", frame()), columns=["mass", "mass"])


def test_unknown_columns(tmp_path):
    path = save(tmp_path / "t.csv", frame())
    assert "no column 'mas', named in data.columns. Did you mean 'mass'?" in refusal(path, columns=["mas"])
    assert "no column 'hight', named in data.drop. Did you mean 'height'?" in refusal(path, drop=["hight"])


def test_the_index_that_pandas_writes_is_no_column(tmp_path):
    frame().to_csv(tmp_path / "t.csv")
    assert "t.csv: column 1 has no name, as the index that pandas writes" in refusal(tmp_path / "t.csv")
    assert table(tmp_path / "t.csv", drop=[""]).columns == list(frame().columns)


def test_header(tmp_path):
    rows = "".join(f"{i}.5,{i * i}\n" for i in range(20))
    assert "first line holds numbers" in refusal(write(tmp_path / "t.csv", rows))
    assert table(write(tmp_path / "t.csv", "0,1\n" + rows)).columns == ["0", "1"]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_too_few_rows(tmp_path, rows):
    path = save(tmp_path / "t.csv", frame(rows))
    assert f"t.csv: {rows} rows are too few" in refusal(path, batch_size=2)


def test_smallest_table(tmp_path):
    data = table(save(tmp_path / "t.csv", frame(6)), batch_size=2)
    assert [len(data.load_split(split)) for split in SPLITS] == [2, 2, 2]
    path = save(tmp_path / "t.csv", frame(40))
    assert "lower data.val_fraction and data.test_fraction" in refusal(path, val_fraction=0.5, test_fraction=0.5)


def test_fewer_training_rows_than_a_batch(tmp_path):
    path = save(tmp_path / "t.csv", frame())
    few = "the training split has 32 samples, fewer than one batch; set data.batch_size to 32 or less"
    with pytest.raises(DataError, match=few):
        table(path, batch_size=33).setup("fit")
    shared = table(path, batch_size=128, total_batch_size=32)  # whose batch is known when devices are
    shared.share(2)
    assert shared.batch_size == 16 and len(shared.split("train")) == 32
    assert len(table(path, batch_size=32).train_dataloader()) == 1


def test_unusable_files(tmp_path):
    assert "table not found" in refusal(tmp_path / "no.csv")
    assert "must end in one of .csv, .tsv" in refusal(write(tmp_path / "t.xlsx", "a,b\n1,2\n"))
    assert "cannot read the table" in refusal(write(tmp_path / "t.csv", ""))
    assert "cannot read the table" in refusal(write(tmp_path / "t.parquet", "not a table"))
    (tmp_path / "b.csv").write_bytes(b"a,b\n1,\xff\xfe\n")
    assert "cannot read the table" in refusal(tmp_path / "b.csv")


@pytest.mark.parametrize("options", [{}, {"file": "x.csv", "dataset": "wine"}])
def test_one_source(options):
    with pytest.raises(ValueError, match=r"give data.file or data.dataset \(one of wine, breast_cancer, diabetes\)"):
        Table(**options)


def test_bad_options():
    with pytest.raises(ValueError, match="dataset must be one of wine, breast_cancer, diabetes; got 'iris'"):
        Table(dataset="iris")
    for name in ("val_fraction", "test_fraction"):
        with pytest.raises(ValueError, match=f"{name} must lie between 0.001 and 0.5"):
            Table(dataset="wine", **{name: 0.6})


def test_a_center_and_a_scale_that_are_given(tmp_path):
    path = save(tmp_path / "t.csv", frame())
    data = table(path, center=[1.0, 2.0, 3.0], scale=[4.0, 5.0, 6.0])
    assert data.facts.center == (1.0, 2.0, 3.0) and data.facts.scale == (4.0, 5.0, 6.0)
    x = data.load_split("train").x
    units = torch.tensor([[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(x.double() * units[0] + units[1], data.rows["train"], rtol=1e-5)
    assert data.log_volume == pytest.approx(np.log(120))
    said = refusal(path, center=[1.0, 2.0])
    assert "data.center must be 3 finite numbers, one for each column (height, mass, charge)" in said
    assert "data.scale must be 3 positive numbers" in refusal(path, scale=[1.0, 0.0, 1.0])
    assert "data.center must be 3 finite numbers" in refusal(path, center=[1.0, 2.0, float("nan")])


def test_a_teacher_in_other_units_is_refused(tmp_path):
    path = save(tmp_path / "t.csv", frame())
    facts = table(path).facts
    check_units("a.ckpt", facts, table(path).facts)
    with pytest.raises(UserError, match=r"a.ckpt does not fit: its scale .* is \(1.0, 1.0, 1.0\), here it is"):
        check_units("a.ckpt", table(path, scale=[1.0, 1.0, 1.0]).facts, facts)
    with pytest.raises(UserError, match=r"its columns is \('mass', 'charge', 'height'\), here it is"):
        check_units("a.ckpt", table(path, columns=["mass", "charge", "height"]).facts, facts)
