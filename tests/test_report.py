"""Pages of run folders, and runs beside each other."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import train
from bd_lightning import report
from bd_lightning.checks import UserError
from bd_lightning.report import comparison
from bd_lightning.report.curves import Line, chart, smoothed, thinned, ticks
from bd_lightning.report.folder import read_curves
from callbacks import ImageMetrics, Report

ROOT = Path(train.__file__).parent


def make_run(folder: Path, samples: int = 500, fids=(90.0, 40.0, 50.0), data="Digits") -> Path:
    """A run folder with three validations."""
    (folder / "samples").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").touch()
    (folder / "config.yaml").write_text(
        f"steps: 300\neval_every: 100\ndata: {{_target_: datamodules.{data}, keep: '<b>&'}}\n"
        f"model: {{_target_: bd_lightning.modules.BellmanDiffusion, lr: {samples / 1e5}}}\n"
    )
    lines = ["epoch,step,train/loss,val/fid,val/loss,field/loss_sigma_0.1-0.2,field/loss_sigma_1-2"]
    lines += [f"0,{s - 1},{300 / s},,,{s},{2 * s}" for s in range(10, 301, 10)]
    lines += [f"0,{100 * (i + 1) - 1},,{fid},{fid / 100},," for i, fid in enumerate(fids)]
    lines.sort(key=lambda line: int(line.split(",")[1]) if line[0] == "0" else -1)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    protocol = f"{samples} samples (ode); <64> features"
    rows = [
        {"step": 100 * (i + 1), "val/fid": fid, "floor": 16.7, "protocol": protocol, "summary": "x"}
        for i, fid in enumerate(fids)
    ]
    (folder / "fid.json").write_text(json.dumps(rows))
    (folder / "metrics.json").write_text('{"val/fid": {"mode": "min", "digits": 1}}')
    for step in (100, 300, 200):
        Image.new("L", (8, 8), step // 2).save(folder / "samples" / f"ode-{step:07d}.png")
    Image.new("L", (8, 8)).save(folder / "samples" / "trajectory-ode.gif")
    return folder


def test_a_page_holds_the_run_and_needs_nothing_else(tmp_path):
    page = report.run_page(report.read(make_run(tmp_path / "a&b")), "to sample: train.py predict ckpt_path=x n=64")
    for text in ("a&amp;b", "best 40.0 at 200", "step 300 of 300", "train.py predict", "&lt;64&gt; features", "16.7"):
        assert text in page, text
    assert page.count("data:image/png;base64,") == page.count("data:image/gif;base64,") == 1  # the latest grid
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'src="?([^" >]*)', page))
    assert "<b>&" not in page  # the config is text
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_the_best_the_last_and_the_latest(tmp_path):
    run = report.read(make_run(tmp_path / "a"))
    assert run.last("val/fid") == 50.0 and run.best("val/fid") == (200, 40.0) and run.step == 300
    assert run.best("train/loss") is None
    assert run.pictures() == {"samples/ode": (300, tmp_path / "a" / "samples" / "ode-0000300.png")}


def test_later_evaluations_of_a_checkpoint_are_no_part_of_the_curves(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/fid,test/fid\n9,5,\n19,4,\n0,3,\n0,,2\n29,nan,\n39,3.5,\n49,1")  # the last unfinished
    assert read_curves(path) == {"val/fid": [(10, 5.0), (20, 4.0), (40, 3.5)]}


def test_a_last_number_that_may_be_cut_is_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/fid\n9,50.25\n19,48")  # of 48.31, say
    assert read_curves(path) == {"val/fid": [(10, 50.25)]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", "step,a/b\n1,2,3\n4,5\n", "line 2 has 3 values for 2 columns"),
        ("metrics.csv", "step,a/b\n1,two\n", "line 2: could not convert string to float: 'two'"),
        ("metrics.csv", "a/b\n1\n", "line 1 has no column 'step'"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv is damaged: 'utf-8' codec can't decode"),
        ("fid.json", '[{"step": 1', "fid.json is damaged"),
        ("fid.json", '{"step": 1}', "it holds no list"),
        ("fid.json", "[3]", "it is no list of rows with a step"),
        ("fid.json", '[{"step": true}]', "it is no list of rows with a step"),
        ("fid.json", '[{"step": 1, "protocol": [1]}]', "a protocol is [1]"),
        ("fid.json", f'[{{"step": 1, "val/fid": {10**400}}}]', "a number that is too large"),
        ("fid.json", "[" * 100_000, "fid.json is damaged"),
        ("metrics.json", '{"val/fid": 3}', "does not say how val/fid is read"),
        ("metrics.json", '{"val/fid": {"mode": "worst"}}', "does not say how val/fid is read"),
        ("metrics.json", '{"val/fid": {"digits": -3}}', "does not say how val/fid is read"),
        ("metrics.csv", "step,a/b\nnan,1\n", "line 2: nan is no step"),
        ("metrics.csv", "step,a/b\ninf,1\n", "line 2: inf is no step"),
        ("metrics.csv", "step,a/b\n1.5,1\n", "line 2: 1.5 is no step"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "- 1", "it is no mapping"),
    ],
)
def test_damaged_files_are_one_sentence(name, content, message, tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert train.main(["compare", str(a), str(b)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "compare needs two or more run folders"),
        (["a", "a"], "the same run folder twice"),
        (["a", "nothing"], "nothing is no run folder: it has no config.yaml"),
        (["a", "b", "steps=3"], "cannot read 'steps=3'"),
        (["a", "b", "out=x.png"], "out must be the path of an HTML file"),
        (["a", "b", "out=no/x.html"], "no/x.html cannot be written: No such file or directory"),
    ],
)
def test_mistakes_are_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert train.main(["compare", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_runs_are_compared_without_torch(tmp_path):
    """A table, what differs, a warning where numbers do not compare, and a page with every run in every curve."""
    make_run(tmp_path / "x" / "same"), make_run(tmp_path / "y" / "same", samples=100, fids=(80.0, 60.0, 30.0))
    code = "import sys, train; status = train.main(sys.argv[1:]); sys.exit(status or 'torch' in sys.modules)"
    words = ["compare", str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same"), f"out={tmp_path}/both.html"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert re.search(r"val/fid +50\.0 \(40\.0 at 200\) +30\.0 \(30\.0 at 300\)", told)
    assert re.search(r"model\.lr +0\.005 +0\.001", told)
    assert "warning: val/fid do not compare, the protocols differ: x/same: 500 samples (ode); y/same: 100" in told
    page = (tmp_path / "both.html").read_text()
    assert page.count('class="warn"') == 1 and page.count("x/same <b>50</b>") == 1


def test_runs_of_one_protocol_are_compared_without_a_warning(tmp_path):
    runs = [report.read(make_run(tmp_path / name)) for name in "ab"]
    assert "warning" not in report.compare_text(runs)
    other = report.read(make_run(tmp_path / "c", data="MNIST"))
    assert "losses do not compare, the data differs: a: Digits, c: MNIST" in report.compare_text([runs[0], other])

    def of(**model):
        return [runs[0], replace(runs[1], config={**runs[1].config, "model": {**runs[0].config["model"], **model}})]

    for model, told in [
        ({"_target_": "m.Distilled", "noise": {"mean": 1}}, "the model differs: a: BellmanDiffusion, b: Distilled"),
        ({"parametrisation": "velocity"}, "the parametrisation differs: a: factored, b: velocity"),
        ({"objective": {"trace": "hutchinson"}}, "the models differ: model.objective.trace"),
        ({"kernel": {"_target_": "k.Constant"}}, "the models differ: model.kernel._target_"),
        ({"noise": {"mean": 1, "antithetic": 0.5}}, "the models differ: model.noise.mean"),
        ({"representation": {"_target_": "r.Categorical", "nodes": 3}}, "the representation differs: a: None, b: Cat"),
    ]:
        (sentence,) = comparison.warnings(of(**model))
        assert sentence.startswith(f"losses do not compare, {told}")
    assert not comparison.warnings(of(noise={"antithetic": 0.5}, network={"width": 3}))
    tables = [replace(run, config={"data": {"_target_": "T", "file": f"{run.name}/t.csv"}}) for run in runs]
    assert "losses do not compare, the data differ: data.file" in report.compare_text(tables)
    tables[1].config["data"] = {
        "_target_": "T",
        "file": "t.csv",
        "batch_size": 3,
        "seed": 1,
    }  # an export's, read otherwise
    assert "losses" not in report.compare_text(tables)


def test_what_one_run_knows_of_a_metric_holds_for_all(tmp_path):
    """metrics.json is written by a run's first validation, and may be missing."""
    for name in "ab":
        make_run(tmp_path / name)
    (tmp_path / "b" / "metrics.json").unlink()
    runs = [report.read(tmp_path / name) for name in "ab"]
    assert re.search(r"val/fid( +50\.0 \(40\.0 at 200\)){2}", report.compare_text(runs))
    assert report.compare_page(runs).count("50.0 (40.0 at 200)") == 2


def test_real_data_is_a_line_where_it_is_the_same_for_all(tmp_path):
    runs = [report.read(make_run(tmp_path / name)) for name in "ab"]
    assert "16.7" in report.compare_page(runs)
    runs[1].records["fid.json"][-1]["floor"] = 19.3
    page = report.compare_page(runs)
    assert "16.7" not in page and "19.3" not in page


def test_what_never_changes_has_no_curve(tmp_path):
    run = report.read(make_run(tmp_path / "a"))
    run.curves["field/constant"] = [(10, 1.0), (20, 1.0)]
    run.curves["field/moving"] = [(10, 1.0), (20, 2.0)]
    page = report.run_page(run)
    assert "field/moving" in page and "field/constant" not in page
    assert page.count("<figcaption>loss") == 1 and "<figcaption>train/loss" not in page


def test_long_curves_are_thinned_and_smoothed_and_keep_their_level():
    series = [(i, float(i % 2)) for i in range(5000)]
    assert len(thinned(series)) <= 241 and thinned(series)[-1] == series[-1]
    assert all(abs(value - 0.5) < 0.02 for _, value in smoothed(series))
    assert smoothed([(1, 2.0)]) == [(1, 2.0)]
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert "logarithmic" in chart("x", [Line("x", [(1, 1.0), (2, 100.0)])])
    assert "nan" not in chart("x", [Line("x", [(5, 0.0)])])


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-14])
def test_small_values_have_labels_of_their_own(size):
    svg = chart("x", [Line("x", [(1, 3.4 * size), (2, 2.9 * size), (3, 2.6 * size)])])
    values = [float(label) / size for label in re.findall(r'x="\d+" y="[\d.]+" text-anchor="end">([^<]*)', svg)]
    assert values == pytest.approx([2.75, 3.0, 3.25], rel=1e-9)


def fake_trainer(folder: Path, **changes) -> SimpleNamespace:
    metrics = ImageMetrics.__new__(ImageMetrics)
    module = SimpleNamespace(next_step=lambda checkpoint: f"to sample: train.py predict ckpt_path={checkpoint}")
    known = {"is_global_zero": True, "sanity_checking": False, "loggers": [], "lightning_module": module}
    return SimpleNamespace(**{**known, "default_root_dir": str(folder), "callbacks": [metrics], **changes})


def test_the_callback_writes_the_page_and_how_metrics_are_read(tmp_path):
    trainer, callback = fake_trainer(make_run(tmp_path / "a")), Report()
    callback.teardown(trainer, trainer.lightning_module, "fit")
    assert "train.py predict ckpt_path=" in (tmp_path / "a" / "report.html").read_text()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["val/recall"] == {"mode": "max", "digits": 3}
    assert callback.seconds < 1


@pytest.mark.parametrize("changes", [{"is_global_zero": False}, {"sanity_checking": True}])
def test_the_callback_writes_nothing_on_other_ranks_and_in_sanity_checks(changes, tmp_path):
    trainer = fake_trainer(make_run(tmp_path / "a"), **changes)
    Report().write(trainer)
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_page_that_fails_is_one_line_and_no_end(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("callbacks.report.rank_zero_info", told.append)
    folder = make_run(tmp_path / "a")
    (folder / "fid.json").write_text("[")
    trainer, callback = fake_trainer(folder), Report()
    for _ in range(3):
        callback.write(trainer)
    assert len(told) == 1 and told[0].startswith("report.html was not written:") and "\n" not in told[0]


def test_a_folder_without_files_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        report.read(tmp_path)


def test_a_comparison_is_written_over_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        make_run(tmp_path / name)
    out = tmp_path / "compare.html"
    for _ in range(2):
        assert train.main(["compare", "a", "b"]) == 0
    for text in ("<html>mine</html>", ""):
        out.write_text(text)
        assert train.main(["compare", "a", "b"]) == 2
        assert "is there already and is no comparison of runs" in capsys.readouterr().err and out.read_text() == text
    out.unlink()
    out.symlink_to(tmp_path / "nowhere.html")
    assert train.main(["compare", "a", "b"]) == 2


def test_evaluations_stand_on_the_page_of_their_run(tmp_path):
    folder = make_run(tmp_path / "a")
    place = folder / "test-best-0000200"
    place.mkdir()
    (place / "settings.json").write_text("{}")
    (place / "fid.json").write_text('[{"step": 200, "test/fid": 12.25, "protocol": "of a test"}]')
    run = report.read(folder)
    assert run.evaluations["test-best-0000200/fid.json"][0]["test/fid"] == 12.25
    assert run.protocol("test/fid") is None or "of a test" not in str(run.protocol("val/fid"))
    assert "12.2" in report.run_page(run) and "of a test" in report.run_page(run)
