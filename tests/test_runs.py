"""Nothing that was computed is lost to another run, and two at once do not disturb each other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import train
from bd_lightning import checkpoints
from bd_lightning.cli import folders
from bd_lightning.cli.plan import settings_of
from bd_lightning.cli.resumed import data_keys
from bd_lightning.dynamics import noise
from callbacks.records import append_record
from callbacks.writers import ImageWriter, TableWriter
from conftest import ROOT
from small_run import WORDS, contents, launch, refused

# ---- runs that are there already


def test_a_run_is_not_written_over(run, capsys):
    said = refused(run.parents[1], capsys, "run_id=one")
    assert "is there already: give ckpt_path=last to go on with it, or another run_id" in said


def test_the_ids_of_a_cluster_are_no_exception(run, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "one")
    assert "is there already" in refused(run.parents[1], capsys)


def test_going_on_and_starting_with_one_command(run):
    root = run.parents[1]
    assert launch(root, "run_id=one", "ckpt_path=last", "steps=6") == 0
    assert checkpoints.read(run / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 6
    assert launch(root, "run_id=two", "ckpt_path=last", "steps=2") == 0
    (root / "bellman-diffusion" / "two" / "checkpoints" / "last.ckpt").unlink()  # killed before its first checkpoint
    assert launch(root, "run_id=two", "ckpt_path=last", "steps=2") == 0
    rows = (root / "bellman-diffusion" / "two" / "metrics.csv").read_text().splitlines()
    assert len(rows) == len(set(rows))


def test_the_last_checkpoint_is_not_made_anew_beside_others(run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    last.rename(last.with_name("at-4.ckpt"))
    said = refused(run.parents[1], capsys, "run_id=one", "ckpt_path=last")
    assert "has no last.ckpt but at-4.ckpt" in said


def test_a_finished_run_is_not_finished_again(run, capsys):
    said = refused(run.parents[1], capsys, f"ckpt_path={run}/checkpoints/last.ckpt", "steps=2")
    assert "is at step 4 and 'steps' is 2: nothing is left to train" in said
    before = contents(run)
    for words in ([f"ckpt_path={run}/checkpoints/last.ckpt", "model.lr=0.5"], [*WORDS, "run_id=one", "ckpt_path=last"]):
        assert train.main([*words, f"root={run.parents[1]}"]) == 0  # what was asked for is there
        assert "nothing is left to train: " in capsys.readouterr().out
    assert contents(run) == before


def test_what_a_killed_run_had_left_to_do_is_done(run, capsys):
    """Its last checkpoint was there, but not what comes after the last validation."""
    (run / "report.html").unlink()
    (run / folders.LOCK).write_text("process 1 on nowhere")
    assert train.main([f"ckpt_path={run}/checkpoints/last.ckpt"]) == 0
    assert "nothing is left" not in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_steps_after_an_earlier_checkpoint_are_kept(run, capsys):
    early = run / "checkpoints" / "early.ckpt"
    shutil.copy(run / "checkpoints" / "last.ckpt", early)
    root = run.parents[1]
    assert launch(root, "run_id=one", "ckpt_path=last", "steps=6") == 0
    said = refused(root, capsys, f"ckpt_path={early}", "steps=8")
    assert "is at step 4 and its run has gone on to step 6" in said and "or a run_id" in said
    before = contents(run)
    assert launch(root, f"ckpt_path={early}", "steps=6", "run_id=branch") == 0
    assert contents(run) == before
    branch = root / "bellman-diffusion" / "branch"
    assert checkpoints.read(branch / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert "is there already" in refused(root, capsys, f"ckpt_path={early}", "steps=8", "run_id=branch")


# ---- two at once

HOLD = """
import sys, time
from pathlib import Path
from bd_lightning.cli.folders import claimed
with claimed(Path(sys.argv[1]), False):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has a run folder."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_a_living_process_has_its_folder_alone_and_a_dead_one_has_nothing(run, capsys, monkeypatch):
    other = hold(run)
    last = run / "checkpoints" / "last.ckpt"
    try:
        said = refused(run.parents[1], capsys, f"ckpt_path={last}", "steps=6")
        assert f"is in use by process {other.pid} on" in said
        monkeypatch.setenv("LOCAL_RANK", "1")  # a process of the same run
        with folders.claimed(run, False):
            pass
        monkeypatch.delenv("LOCAL_RANK")
    finally:
        other.kill()
        other.wait()
    assert (run / folders.LOCK).is_file()
    assert launch(run.parents[1], f"ckpt_path={last}", "steps=6") == 0
    assert not (run / folders.LOCK).exists()


def test_file_systems_without_locks_have_none(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folders.fcntl, "lockf", unsupported)
    with folders.claimed(tmp_path / "a", True):
        pass
    monkeypatch.setattr(folders, "fcntl", None)
    with folders.claimed(tmp_path / "a", True):
        pass


# ---- evaluations


def test_an_evaluation_has_a_folder_of_its_own(run, capsys):
    """Whatever its settings, and with the run in training; the page of the run names its numbers."""
    last = run / "checkpoints" / "last.ckpt"
    grid = "callbacks.grid={_target_: callbacks.SampleGrid, n: 4}"
    words = [f"ckpt_path={last}", "callbacks.report={_target_: callbacks.Report}"]
    assert launch(run.parents[1], *words, grid, "steps=6", "eval_every=6") == 0
    before = contents(run)
    assert train.main(["validate", *words]) == 0
    assert train.main(["validate", *words, "callbacks.grid.n=2"]) == 0
    assert train.main(["validate", *words, "callbacks.grid.n=2"]) == 0  # the same again
    names = {"validate-last-0000006", "validate-last-0000006-2"}
    assert {path.name for path in run.iterdir()} - {Path(name).parts[0] for name in before} == names
    grids = [run / name / "samples" / "ode-0000006.png" for name in sorted(names)]
    assert grids[0].read_bytes() == before["samples/ode-0000006.png"] != grids[1].read_bytes()
    rows = (run / "validate-last-0000006-2" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2 and "val/loss" in rows[0]
    after = contents(run)
    assert {name for name in before if after[name] != before[name]} <= {"report.html"}
    other = hold(run)
    try:
        page = (run / "report.html").read_bytes()
        capsys.readouterr()
        assert train.main(["test", f"ckpt_path={last}", "callbacks.grid=null"]) == 0
        assert (run / "test-last-0000006" / "metrics.csv").is_file()
        assert (run / "report.html").read_bytes() == page  # the training's
    finally:
        other.kill()
        other.wait()


def test_two_processes_do_not_share_an_evaluation(run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    assert train.main(["test", f"ckpt_path={last}"]) == 0
    other = hold(run / "test-last-0000004")
    try:
        assert train.main(["test", f"ckpt_path={last}"]) == 2
        assert "is in use by" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()


def test_a_refused_evaluation_leaves_no_folder(run, capsys):
    before = contents(run)
    words = ["test", f"ckpt_path={run}/checkpoints/last.ckpt"]
    assert train.main([*words, "callbacks.grid={_target_: callbacks.SampleGrid, samplers: [a]}"]) == 2
    assert "'a'" in capsys.readouterr().err and contents(run) == before


# ---- predict


def test_samples_of_other_settings_go_elsewhere(run, capsys):
    last = run / "checkpoints" / "last.ckpt"

    def predict(*words: str) -> str:
        assert train.main(["predict", f"ckpt_path={last}", "n=3", *words]) == 0
        return Path(capsys.readouterr().out.strip().rpartition(" in ")[2]).name

    assert predict() == "predict-ode-seed0"
    first = contents(run / "predict-ode-seed0")
    assert predict("n=2") == "predict-ode-seed0-2"
    assert predict("model.samplers.ode.steps=2") == "predict-ode-seed0-3"
    assert predict("model.samplers.ode.steps=2") == "predict-ode-seed0-3"  # the same again
    assert predict() == "predict-ode-seed0"
    assert contents(run / "predict-ode-seed0") == first
    assert json.loads((run / "predict-ode-seed0-2" / "settings.json").read_text())["n"] == 2
    assert json.loads((run / "predict-ode-seed0-2" / "settings.json").read_text())["noise"] == noise.STREAMS
    (run / "predict-ode-seed0-2" / "settings.json").unlink()  # of an earlier version: what it holds is not known
    assert predict("n=2") == "predict-ode-seed0-4"
    assert launch(run.parents[1], "run_id=one", "ckpt_path=last", "steps=6") == 0
    capsys.readouterr()
    assert predict() == "predict-ode-seed0-5"  # last.ckpt is another one now


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    """A model and what it is merged with are both last.ckpt, mostly."""
    paths = [tmp_path / name / "last.ckpt" for name in ("mine", "other")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    keys = ("seed", "n", "labels", "remove", "calibrate", "model")
    rest = {**dict.fromkeys(keys), "mix": None, "data": {}, "trainer": {}}
    plan = SimpleNamespace(config={"ckpt_path": str(paths[0]), "merge": {str(paths[1]): 1.0}, **rest})
    before = settings_of(plan)
    for path in paths:  # either of them is trained on
        kept = path.read_bytes()
        path.write_bytes(b"further")
        assert settings_of(plan) != before
        path.write_bytes(kept)
    assert settings_of(plan) == before


def test_names_of_folders_of_samples_stay_inside(tmp_path):
    for name in ("a/../../b", "x" * 1000, "é" * 500, "..", "a\nb"):
        folder = folders.folder_for({}, tmp_path / "run", f"predict-{name}")
        assert folder.parent == tmp_path / "run" and len(folder.name.encode()) <= 150
        folder.mkdir(parents=True)


def test_checkpoints_are_called_as_their_runs_or_as_they_are(tmp_path):
    names = ("mine/checkpoints/last.ckpt", "kept/zeros.ckpt")
    assert [folders.called(tmp_path / name) for name in names] == ["mine", "zeros"]
    assert folders.called(tmp_path) == tmp_path.name  # an export


# ---- damage


DAMAGES = ["[{", '{"a": 1}', '[{"nostep": 1}]', "[" * 100_000, "\x00"]


@pytest.mark.parametrize("text", DAMAGES)
def test_damaged_records_are_kept_and_begun_anew(text, tmp_path, capsys):
    trainer = SimpleNamespace(default_root_dir=tmp_path)
    for k in range(2):
        (tmp_path / "fid.json").write_text(text)
        append_record(trainer, "fid.json", {"step": k})
        assert json.loads((tmp_path / "fid.json").read_text()) == [{"step": k}]
    assert (tmp_path / "fid.json.damaged").read_text() == (tmp_path / "fid.json.damaged-2").read_text() == text


TABLES = ["garbage\n1\n2\n", "step,a/b\n1,2,3\n4\n", "step,step\n1,2\n", "step,a\nx,1\nnan,1\n"]


@pytest.mark.parametrize("text", TABLES)
def test_damaged_metrics_are_kept_and_begun_anew(text, run):
    (run / "metrics.csv").write_text(text)
    assert launch(run.parents[1], "run_id=one", "ckpt_path=last", "steps=6") == 0
    assert (run / "metrics.csv.damaged").read_text() == text
    assert "train/loss" in (run / "metrics.csv").read_text() or "val/loss" in (run / "metrics.csv").read_text()


DOCTORED = {
    "global_step": ["x", -1, True, None], "loops": [3, {}, {"fit_loop": 3}, {"fit_loop": {}}],
    "callbacks": [[1], {"a": 1}], "optimizer_states": [[], 3, [{}], [1]], "lr_schedulers": [[], [{"a": 1}, {}, {}]],
    "epoch": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("key", DOCTORED)
def test_states_that_are_not_sound_are_one_sentence(key, run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for value in DOCTORED[key]:
        torch.save({**checkpoint, key: value}, path)
        capsys.readouterr()
        status = train.main([f"ckpt_path={path}", "steps=6"])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (status, len(said)) == (2, 1) or key == "epoch" and status == 0, value
        assert not said or str(path) in said[0]
    torch.save({key: value for key, value in checkpoint.items() if key != "optimizer_states"}, path)
    assert train.main([f"ckpt_path={path}", "steps=6"]) == 2
    assert "only weights to evaluate and sample from" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_of_another_model(run, capsys):
    root = run.parents[1]
    trained, _ = checkpoints.load(run / "checkpoints" / "last.ckpt")
    words = ["run_id=tuned", f"model.init={run / 'checkpoints' / 'last.ckpt'}", "data.keep=[3]", "model.lr=1e-12"]
    assert launch(root, *words, "callbacks.ema=null") == 0
    tuned, stored = checkpoints.load(root / "bellman-diffusion" / "tuned" / "checkpoints" / "last.ckpt")
    for (name, a), b in zip(trained.fields.network.named_parameters(), tuned.fields.network.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)
    assert stored["facts"]["class_names"] == ["3"]
    begin = f"model.init={run / 'checkpoints' / 'last.ckpt'}"
    assert "has learned factored fields, and direct fields are" in refused(
        root, capsys, begin, "model.parametrisation=direct"
    )
    assert "the network in" in refused(root, capsys, begin, "model.network.depth=2")
    relative = [begin, "model=relative", "model.network.per_class=false", "model.sampler=ode"]
    assert "densities relative to a Gaussian are learned here" in refused(root, capsys, *relative)
    assert "checkpoint not found: nowhere.ckpt" in refused(root, capsys, "model.init=nowhere.ckpt")
    last = root / "bellman-diffusion" / "tuned" / "checkpoints" / "last.ckpt"
    assert train.main(["predict", f"ckpt_path={last}", "n=1", "model.init=nowhere.ckpt"]) == 2
    assert "'model.init' says what a training begins with" in capsys.readouterr().err
    before = last.read_bytes()
    assert train.main([f"ckpt_path={last}", "steps=30", "model.init=nowhere.ckpt"]) == 2
    assert "began with the weights of" in capsys.readouterr().err
    assert train.main([f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "steps=30", begin]) == 2
    assert "of a run that began anew and goes on with its own: leave model.init" in capsys.readouterr().err
    assert last.read_bytes() == before


def test_classes_that_begin_with_the_weights_of_others(tmp_path, capsys, caplog):
    root, told = tmp_path / "runs", "model.network.conditional=true"
    assert launch(root, "run_id=first", told, "data.keep=[3,8]") == 0
    begin = f"model.init={root / 'bellman-diffusion' / 'first' / 'checkpoints' / 'last.ckpt'}"
    assert launch(root, "run_id=same", told, "data.keep=[3,8]", begin) == 0
    assert "with the weights of others" not in capsys.readouterr().err + caplog.text
    assert launch(root, "run_id=other", told, "data.keep=[1,8]", begin) == 0
    assert "with the weights of others" in (said := capsys.readouterr().err + caplog.text) and ": 1 with 3" in said
    said = refused(root, capsys, told, begin)
    assert "of samples [1, 8, 8] of 2 classes, here [1, 8, 8] of 10, or leave model.init out" in said
    assert (
        train.main(
            ["export", begin.replace("model.init", "ckpt_path").replace("first", "other"), f"to={tmp_path / 'x'}"]
        )
        == 0
    )
    assert "init" not in yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["model"]


@pytest.mark.parametrize(
    ("before", "now", "keys"),
    [
        ({"folder": "/a/x", "batch_size": 4}, {"folder": "/b/x", "batch_size": 8}, ["data.folder"]),
        ({"folder": "x"}, {"folder": "/b/x"}, []),  # of an exported model, which has names of folders alone
        ({"images": {"val_size": 0, "root": "a"}}, {"images": {"val_size": 5, "root": "b"}}, ["data.images.val_size"]),
    ],
)
def test_keys_of_data_that_are_not_as_in_training(before, now, keys):
    plan = SimpleNamespace(checkpoint={"hyper_parameters": {"data": before}}, config={"data": now})
    assert data_keys(plan) == keys
    assert data_keys(SimpleNamespace(checkpoint=None, config={"data": now})) == []


def test_another_root_is_heeded(run, tmp_path, capsys):
    """For all that writes; the run that it starts from stays as it is."""
    last, other, before = run / "checkpoints" / "last.ckpt", tmp_path / "other", contents(run)
    words = [f"ckpt_path={last}", f"root={other}", "run_id=b", "trainer.enable_progress_bar=false"]
    assert train.main([*words, "steps=6"]) == 0
    assert checkpoints.read(other / "bellman-diffusion" / "b" / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert train.main(["predict", f"ckpt_path={last}", f"root={other}", "run_id=drawn", "n=2"]) == 0
    assert len(list((other / "bellman-diffusion" / "drawn").rglob("0*.png"))) == 2
    assert contents(run) == before
    assert train.main(["predict", f"ckpt_path={last}", f"root={run.parents[1]}", "n=2"]) == 0  # its own
    assert list(run.glob("predict-*"))


def test_best_is_not_overwritten_by_another_choice(run, capsys):
    root, last = run.parents[1], run / "checkpoints" / "last.ckpt"
    best = "callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, filename: best, monitor: val/loss, "
    best += "enable_version_counter: false}"
    assert launch(root, f"ckpt_path={last}", "steps=6", best) == 0
    for word in ("callbacks.best.monitor=val/scalar", "callbacks.best.mode=max"):
        said = refused(root, capsys, f"ckpt_path={last}", "steps=8", best, word)
        assert "the run chose its best.ckpt by" in said and "give run_id=" in said
    words = [f"ckpt_path={last}", "steps=8", best, "callbacks.best.mode=max", "run_id=other"]
    assert launch(root, *words) == 0
    assert (root / "bellman-diffusion" / "other" / "checkpoints" / "best.ckpt").is_file()


def test_what_a_config_leaves_out_is_no_none(run, capsys):
    assert launch(run.parents[1], f"ckpt_path={run}/checkpoints/last.ckpt", "steps=6", "data.pin_memory=true") == 0
    assert "data.pin_memory=True (was left out)" in capsys.readouterr().out


def test_an_interrupt_outside_training_is_one_word(run, capsys, monkeypatch):
    def stopped(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr("bd_lightning.cli.predict.run", stopped)
    assert train.main(["predict", f"ckpt_path={run}/checkpoints/last.ckpt", "n=2"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_weights_of_another_kind_of_number_are_refused(run, capsys):
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {name: value.to(torch.int8) for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    assert train.main(["predict", f"ckpt_path={path}", "n=2"]) == 2
    assert "is of torch.int8, the model's of torch.float32" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_a_checkpoint_that_is_not_written_leaves_no_part(error, tmp_path, monkeypatch):
    def failing(content, file):
        file.write(b"half")
        raise error(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(checkpoints.SavingFailed if error is OSError else SystemExit):
        checkpoints.WholeCheckpoints().save_checkpoint({}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_write_that_was_killed_are_not_read(tmp_path, monkeypatch):
    """Two devices had shared the rows; one was killed in the middle of its part, and one device draws them anew."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: None)  # killed before the file has its name
        TableWriter(tmp_path).write([1, 3], torch.full((2, 2), 3.0))
    writer = TableWriter(tmp_path)
    writer.write([0, 1, 2, 3], torch.full((4, 2), 5.0))
    writer.finish(4, SimpleNamespace(dim=2))
    assert (tmp_path / "samples.csv").read_text().split() == ["x0,x1", *["5.0,5.0"] * 4]


@pytest.mark.parametrize("kind", ["images", "rows"])
def test_a_sample_that_is_not_written_leaves_no_file(kind, tmp_path, monkeypatch):
    def failing(*args, **options):
        if kind == "images":
            Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    writer = ImageWriter(tmp_path) if kind == "images" else TableWriter(tmp_path)
    monkeypatch.setattr("PIL.Image.Image.save" if kind == "images" else "csv.writer", failing)
    with pytest.raises(OSError, match="No space"):
        writer.write([0], torch.zeros(1, 1, 4, 4) if kind == "images" else torch.zeros(1, 2))
    assert not list(tmp_path.iterdir())
