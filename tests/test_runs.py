"""Nothing that was computed is lost to another run, nothing is written outside root, and refusals leave nothing."""

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
from bd_lightning.checkpoints import SavingFailed, WholeCheckpoints
from bd_lightning.cli import config as configs
from bd_lightning.cli import folders
from bd_lightning.cli.predict import settings_of
from conftest import ROOT
from datamodules import Digits, cache
from tiny_data import write_autoencoder

WORDS = [
    "model=mlp", "model.network.width=16", "model.network.depth=1", "model.samplers.sde=null",
    "model.samplers.ode.steps=3", "data.batch_size=64", "callbacks.metrics=null", "callbacks.best=null",
    "callbacks.grid=null", "callbacks.trajectory=null", "callbacks.progress=null", "callbacks.memorisation=null",
    "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "steps=4", "eval_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of 4 steps."""
    root = tmp_path_factory.mktemp("runs")
    assert train.main([*WORDS, f"root={root}", f"data.root={root / 'data'}", "run_id=one"]) == 0
    return root / "bellman-diffusion" / "one"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, in a root of its own."""
    return Path(shutil.copytree(trained, tmp_path / "root" / "bellman-diffusion" / "one"))


def launch(root: Path, *words: str) -> int:
    return train.main([*WORDS, f"root={root}", f"data.root={root.parent / 'data'}", *words])


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(root: Path, capsys, *words: str) -> str:
    """The one sentence of a refusal that changes no file."""
    before = contents(root.parent)
    capsys.readouterr()
    assert launch(root, *words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert contents(root.parent) == before
    return said[0]


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
    assert "is at step 4 and 'steps' is 2: nothing is left to do" in said
    before = (run / "config.yaml").read_bytes()
    assert (
        train.main([f"ckpt_path={run}/checkpoints/last.ckpt", "model.lr=0.5"]) == 0
    )  # as it was asked for: it is done
    assert (run / "config.yaml").read_bytes() == before


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
        assert train.main(["test", f"ckpt_path={last}"]) == 2
        assert "is in use by" in capsys.readouterr().err
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


# ---- nothing outside, nothing behind


NAMES = ["../x", "../../x", "a/b", "a\\b", "a:b", "a#b", "a?b", "a%b", "x" * 129, "é" * 128, "..", ".", "' '", "''"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["run_id", "logger.project", "logger.entity"])
def test_names_that_cannot_be_names(key, name, tmp_path, capsys):
    more = [] if key == "run_id" else ["logger=wandb", "run_id=x"]
    assert key.rpartition(".")[2] in refused(tmp_path / "root", capsys, *more, f"{key}={name}")


def test_tags_that_are_too_long(tmp_path, capsys):
    said = refused(tmp_path / "root", capsys, "logger=wandb", "run_id=x", f"logger.tags=[{'t' * 100}]")
    assert "'logger'" in said and "64 characters" in said


def test_names_of_samplers_are_names_of_files(tmp_path, capsys):
    node = "{_target_: bd_lightning.dynamics.ProbabilityFlow, steps: 2, sigma_max: 20.0, sigma_min: 0.02}"
    said = refused(tmp_path / "root", capsys, f"model.samplers={{../../x: {node}, ode: {node}}}", "run_id=x")
    assert "the name of a sampler '../../x' may not hold '/'" in said


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("{file}", "is a file"), ("{file}/a", "is a file"), ("/proc/nowhere", "No such file"),
        ("/dev/full/a", "Not a directory"), ("x" * 300, "File name too long"), ("a/" * 3000, "File name too long"),
    ],
)  # fmt: skip
def test_a_root_that_cannot_be_written(root, reason, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(tmp_path / "root", capsys, f"root={root.replace('{file}', str(tmp_path / 'file'))}", "run_id=x")
    assert reason in said and "set root to another place" in said


@pytest.mark.parametrize(
    "words",
    [
        ("data.batch_size=2000",), ("callbacks.best={_target_: callbacks.LastCheckpoint}",),
        ("data=folder", "data.folder=nowhere"), ("model.network.width=0",),
        ("callbacks.grid={_target_: callbacks.SampleGrid, samplers: [a]}",),
    ],
)  # fmt: skip
def test_a_refused_run_leaves_no_folder(words, tmp_path, capsys):
    refused(tmp_path / "root", capsys, "run_id=x", *words)


NUMBERS = {
    "accumulate_grad_batches": ["0", "-1"], "log_every_n_steps": ["0", "-5"], 
    "limit_train_batches": ["0", "0.0", "2.5"],
    "limit_val_batches": ["0", "-1"], "gradient_clip_val": ["-1", ".nan"], "devices": ["0", "1000000000000"],
    "precision": ["64", "64-true"], "num_nodes": ["0"], "max_time": ["banana"], "min_steps": ["-1"],
}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_the_trainer(key, tmp_path, capsys):
    for value in NUMBERS[key]:
        assert "trainer" in refused(tmp_path / "root", capsys, "run_id=x", f"trainer.{key}={value}")


FRAGMENTS = [
    "defaults: [a]", "defaults: word", "1: 2", "null: 3", "true: 4", "data: {1: 2}", "data: {null: 2}", "[1, 2]",
    "word",
    "? [a]\n: 3", "defaults: {1: 2}", "defaults: {data: [a]}", "a: &x [*x]", "labels: {1: 2}", "mix: {null: 1}",
]  # fmt: skip


@pytest.mark.parametrize("text", FRAGMENTS)
def test_config_files_of_another_shape(text, tmp_path, capsys):
    path = tmp_path / "fragment.yaml"
    path.write_text(text)
    refused(tmp_path / "root", capsys, "run_id=x", f"--config={path}")


def test_a_full_disk_in_the_middle_of_a_run(tmp_path, capsys):
    folder = tmp_path / "root" / "bellman-diffusion" / "x"
    folder.mkdir(parents=True)
    (folder / "metrics.csv.part").symlink_to("/dev/full")  # what stands for a disk that fills up
    (folder / "config.yaml.part").symlink_to("/dev/full")
    assert launch(tmp_path / "root", "run_id=x", "ckpt_path=last") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said


def test_the_reason_is_the_systems_also_for_a_large_checkpoint(tmp_path):
    (tmp_path / "a.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(SavingFailed, match=r"No space left on device\), there is none yet"):
        WholeCheckpoints().save_checkpoint({"x": torch.zeros(1_000_000)}, tmp_path / "a.ckpt")


def test_caches_that_cannot_be_kept_are_one_warning(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    data = Digits(root=str(file))
    with pytest.warns(UserWarning, match="nothing can be kept in .*Not a directory") as caught:
        for what in ("a", "b"):
            cache.save_cached(torch.zeros(2), cache.cache_path(data, what))
    assert len(caught) == 1


# ---- paths


def test_home_is_known_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["root=~/r", "ckpt_path=~/c.ckpt", "data.root=~/d", "merge={~/m.ckpt: 1.0}"]
    words += ["data=digits_latent", "data.autoencoder.ckpt_path=~/ae.ckpt"]
    config = configs.compose(configs.parse(words))
    assert (config["root"], config["data"]["root"]) == (f"{tmp_path}/r", f"{tmp_path}/d")
    assert config["ckpt_path"] == f"{tmp_path}/c.ckpt" and config["merge"] == {f"{tmp_path}/m.ckpt": 1.0}
    assert config["data"]["autoencoder"]["ckpt_path"] == f"{tmp_path}/ae.ckpt"
    (tmp_path / "mine.yaml").write_text("seed: 3")
    assert configs.compose(configs.parse(["--config", "~/mine.yaml"]))["seed"] == 3
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    said = train.main(
        ["data=table", "data.file=~/t.csv", "model=points", "callbacks=points", "trainer=cpu", "logger=none"]
    )
    assert said == 2 and "not found" not in capsys.readouterr().err


# ---- checkpoints and commands that do not go together


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_model_that_does_not_fit_the_checkpoint(command, run, capsys):
    words = [f"ckpt_path={run}/checkpoints/last.ckpt", "steps=6", "model.network.width=32"]
    before = contents(run)
    assert train.main([command, *words, "eval_every=2"]) == 2
    said = capsys.readouterr().err
    assert "do not fit the model: leave model as it was" in said and len(said.splitlines()) == 1
    assert contents(run) == before


def test_predict_of_an_autoencoder(tmp_path, capsys):
    path = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), "Digits")
    assert train.main(["predict", f"ckpt_path={path}", f"root={tmp_path}", "logger=none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
