"""The command line end to end, on real short runs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import small_run
import train
from bd_lightning.cli.folders import short
from bd_lightning.upgrade import FORMAT
from conftest import ROOT
from datamodules import Digits
from tiny_data import write_cifar, write_folder, write_mnist
from wandb_records import read_records

TINY = [
    "model=mlp", "model.network.width=64", "model.network.depth=1", "model.samplers.sde.levels=8",
    "model.samplers.ode.steps=5", "data.batch_size=64", "callbacks.metrics.features.steps=60",
    "callbacks.metrics.n=120", "callbacks.metrics.n_test=150", "callbacks.metrics.kid_subset=60",
    "callbacks.grid.n=8", "callbacks.trajectory.n=4", "trainer=cpu", "trainer.log_every_n_steps=5",
]  # fmt: skip


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("train")


def launch(root: Path, *argv: str) -> int:
    return train.main([*argv, f"root={root / 'runs'}", f"data.root={root / 'data'}"])


@pytest.fixture(scope="session")
def finished(root) -> Path:
    """The folder of a finished run of 40 steps."""
    assert launch(root, *TINY, "steps=40", "eval_every=20", "run_id=first", "logger.tags=[a, b]") == 0
    return root / "runs" / "bellman-diffusion" / "first"


def rows(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def column(folder: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows(folder) if row.get(name)}


def test_run_folder_holds_everything(finished):
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "report.html",
        "fid.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= names
    assert {"samples/sde-0000040.png", "samples/ode-0000040.png", "samples/trajectory-sde.gif"} <= names
    losses = column(finished, "train/loss_gradient")
    assert len(losses) == 8 and sum(list(losses.values())[-3:]) < sum(list(losses.values())[:3])
    fids = [row["val/fid"] for row in json.loads((finished / "fid.json").read_text())]
    assert fids == pytest.approx(list(column(finished, "val/fid").values())) and len(fids) == 2


def test_offline_wandb_run_holds_images_fid_and_config(finished):
    (path,) = finished.glob("wandb/offline-run-*/run-first.wandb")
    records = read_records(path)
    history, config, summary = records.history, records.config, records.summary
    assert config["steps"] == 40 and config["model"]["kernel"]["_target_"] == "bd_lightning.kernels.ClosedFormSlices"
    assert config["facts"] == Digits().facts.plain() and config["format"] == FORMAT
    logged = [row for row in history if "val/fid" in row]
    assert [row["val/fid"] for row in logged] == pytest.approx(list(column(finished, "val/fid").values()))
    assert all("trainer/global_step" in row for row in history)
    for key in ("samples/sde", "samples/ode", "trajectory/sde"):
        assert any(name.startswith(f"{key}/") for row in history for name in row), key
    media = [p.suffix for p in path.parent.rglob("media/**/*") if p.is_file()]
    assert media.count(".png") == 4 and media.count(".gif") == 1
    assert "features/accuracy" in summary or any("features/accuracy" in row for row in history)
    assert (
        records.metrics["val/fid"] == "min" and records.metrics["val/precision"] == "max" and records.tags == ["a", "b"]
    )


def test_checkpoints_are_plain_data_and_name_their_data(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 40 and checkpoint["hyper_parameters"]["facts"]["name"] == "Digits"
    assert checkpoint["hyper_parameters"]["steps"] == 40
    average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert average.keys() == current.keys() and any((average[k] != current[k]).any() for k in average)


def test_predict_writes_images(finished, root, capsys):
    best = finished / "checkpoints" / "best.ckpt"
    assert train.main(["predict", f"ckpt_path={best}", "n=12"]) == 0
    folder = finished / "predict-ode-seed0"
    assert "12 images and grid.png in" in capsys.readouterr().out
    files = sorted(p.name for p in folder.iterdir())
    assert files == [f"{i:06d}.png" for i in range(12)] + ["grid.png", "settings.json"]
    with Image.open(folder / "000003.png") as image:
        assert image.size == (8, 8) and image.mode == "L"
    first = (folder / "000003.png").read_bytes()
    assert train.main(["predict", f"ckpt_path={best}", "n=5", "model.sampler=ode"]) == 0
    other = finished / "predict-ode-seed0-2"  # what lies in a folder belongs together
    assert (other / "000003.png").read_bytes() == first  # a sample depends on its index and the seed alone
    assert train.main(["predict", f"ckpt_path={best}", "n=5", "model.sampler=sde", "seed=4"]) == 0
    assert (finished / "predict-sde-seed4" / "000003.png").read_bytes() != first


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run, for tests that add to it."""
    folder = tmp_path / "runs" / "bellman-diffusion" / "first"
    shutil.copytree(finished, folder)
    return folder


def test_checkpoint_holds_the_weights_whose_fid_was_logged(copied):
    logged = {row["val/fid"]: row["step"] for row in json.loads((copied / "fid.json").read_text())}
    assert train.main(["validate", f"ckpt_path={copied}/checkpoints/best.ckpt"]) == 0
    (record,) = copied.glob("validate-best-*/fid.json")
    (again,) = json.loads(record.read_text())
    assert again["val/fid"] == pytest.approx(min(logged), rel=1e-4) and again["step"] == logged[min(logged)]


def test_resume_continues_in_the_same_folder(copied, capsys):
    folder = copied
    before = rows(folder)
    assert train.main([f"ckpt_path={folder}/checkpoints/last.ckpt", "steps=60"]) == 0
    assert f"run folder: {short(folder)}" in capsys.readouterr().out
    assert [row["step"] for row in json.loads((folder / "fid.json").read_text())] == [20, 40, 60]
    after = rows(folder)
    assert len(after) > len(before) and [r["step"] for r in after[: len(before)]] == [r["step"] for r in before]
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 60
    assert len(list(folder.glob("wandb/offline-run-*/run-first.wandb"))) == 2  # two parts of one W&B run
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_config_of_a_run_repeats_it(finished, root):
    assert launch(root, "--config", str(finished / "config.yaml"), "run_id=again") == 0
    again = finished.parent / "again"
    assert column(again, "train/loss") == column(finished, "train/loss")
    assert column(again, "val/fid") == column(finished, "val/fid")
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load((finished / "config.yaml").read_text())


def test_fid_is_the_same_on_one_and_two_processes(copied):
    """`test` of one checkpoint, at two batch sizes and on two processes."""
    values = []
    for k, words in enumerate((["trainer=cpu"], ["trainer=ddp_cpu", "callbacks.metrics.batch_size=7"])):
        command = [sys.executable, "train.py", "test", f"ckpt_path={copied}/checkpoints/best.ckpt", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder,) = copied.glob(f"test-best-{'?' * 7}{'-2' if k else ''}")
        row = json.loads((folder / "fid.json").read_text())[-1]
        assert row["protocol"].startswith("150 samples (ode, 9 network calls")
        copies = json.loads((folder / "memorisation.json").read_text())[-1]
        numbers = [row[f"test/{name}"] for name in ("fid", "kid", "precision", "recall")]
        values.append([*numbers, copies["memorisation/distance_ratio"], copies["memorisation/close"]])
        assert len(list((folder / "samples").glob("memorisation-*.png"))) == 1
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_a_monitor_that_is_never_logged_is_one_sentence(root, capsys):
    assert launch(root, *TINY, "run_id=monitor", "logger=none", "steps=2", "callbacks.best.monitor=val/nothing") == 2
    said = capsys.readouterr()
    (sentence,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "nothing measures val/nothing" in sentence and "val/fid" in sentence and "Traceback" not in said.err


def test_training_on_two_processes(root):
    command = [
        sys.executable, "train.py", *TINY, "trainer=ddp_cpu", "steps=12", "eval_every=6", "run_id=ddp",
        f"root={root / 'runs'}", f"data.root={root / 'data'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = root / "runs" / "bellman-diffusion" / "ddp"
    before = {p.name for p in folder.parent.iterdir()} if folder.parent.is_dir() else set()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in json.loads((folder / "fid.json").read_text())] == [6, 12]
    assert not {p.name for p in folder.parent.iterdir()} - before - {"ddp"}  # both processes share one folder
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1  # rank 0 alone starts a run
    assert done.stdout.count("everything is in") == 1
    with Image.open(folder / "samples" / "ode-0000012.png") as grid:
        assert grid.size == (8 * 66 + 2, 66 + 2)


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10", "folder"])
def test_data_sets_are_swapped_by_one_word(data, root, tmp_path, monkeypatch, request):
    """The same model and callbacks on all four, from files of each format."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    write_mnist(tmp_path, n=60)
    write_cifar(tmp_path, n=12)
    write_folder(tmp_path / "folder", n=30)
    words = {
        "digits": [],
        "mnist": ["data.val_size=20"],
        "cifar10": ["data.val_size=20"],
        "folder": [f"data.folder={tmp_path / 'folder'}"],
    }[data]
    status = train.main([
        *TINY, f"data={data}", *words,
        "model.samplers.sde.levels=3", "model.samplers.ode.steps=2", "data.batch_size=10", "steps=2",
        "callbacks.metrics.n=10",
        "callbacks.metrics.features.steps=5", "callbacks.metrics.kid_subset=5", "logger=none",
        f"root={tmp_path / 'runs'}", f"data.root={tmp_path}", "run_id=x",
    ])  # fmt: skip
    assert status == 0
    folder = tmp_path / "runs" / "bellman-diffusion" / "x"
    with Image.open(folder / "samples" / "ode-0000002.png") as grid:
        assert grid.size[0] > 100
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_paper_setting_runs(tmp_path):
    """Single scale, two networks, sliced divergence loss: it may lose chains, and then says so and trains on."""
    status = train.main([
        "experiment=paper_digits", "steps=4", "eval_every=4",
        "callbacks.metrics.n=80", "callbacks.metrics.kid_subset=40",
        "callbacks.metrics.features.steps=40", "model.samplers.sde.steps=20", "logger=none",
        f"root={tmp_path}", f"data.root={tmp_path}", "run_id=x",
    ])  # fmt: skip
    assert status == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    assert "20 network calls" in json.loads((folder / "fid.json").read_text())[-1]["protocol"]


def test_conditional_model_is_sampled_by_label(root, tmp_path, capsys):
    words = [*TINY, "model.network.conditional=true", "steps=2", "callbacks.metrics=null", "callbacks.best=null"]
    assert launch(root, *words, "run_id=conditional", "logger=none") == 0
    checkpoint = root / "runs/bellman-diffusion/conditional/checkpoints/last.ckpt"
    assert train.main(["predict", f"ckpt_path={checkpoint}", "n=4", "labels=[3, '8']"]) == 0
    assert train.main(["predict", f"ckpt_path={checkpoint}", "labels=cat"]) == 2
    assert "no class 'cat' was learned." in capsys.readouterr().err
    assert train.main(["predict", f"ckpt_path={checkpoint}", "n=2", "labels=3", "callbacks.progress=null"]) == 0


def test_non_finite_loss_keeps_the_last_checkpoint(root, capsys):
    words = [*TINY, "logger=none", "steps=40", "eval_every=2", "model.lr=1e30", "model.warmup_steps=0"]
    assert launch(root, *words, "run_id=nan", "callbacks.metrics=null", "callbacks.best=null") == 2
    printed = capsys.readouterr()
    assert re.search(r"error: the (loss|gradient's norm) is (nan|inf) at step \d+; the batch is kept in", printed.err)
    assert "Traceback" not in printed.err


MISTAKES = [
    ("data.bath_size=3", "unknown key 'data.bath_size' for Digits. Did you mean 'batch_size'?"),
    ("model.lr=fast", "'model.lr' must be float, got 'fast'"),
    ("data=cifar100", "no data config named 'cifar100'. Did you mean 'cifar10'?"),
    ("ckpt_path=nowhere.ckpt", "checkpoint not found: nowhere.ckpt"),
    ("ckpt_path={text}", "is not a checkpoint of this project, or it is damaged"),
    ("predict", "predict needs ckpt_path=<run folder>/checkpoints/best.ckpt"),
    ("data=folder data.folder=nowhere", "image folder not found: nowhere; set data.folder"),
    ("model=unet_large data.batch_size=2000", "the training split has 1500 samples, fewer than one batch"),
    ("model.network.channels=[0]", "channels[0] must be positive, got 0"),
    ("trainer.devices=0", "'trainer' (Trainer): `Trainer(devices=0)` value is not a valid input"),
    ("trainer.max_steps=5", "'trainer.max_steps' is set by train.py; leave it out (steps and eval_every"),
    ("callbacks.metrics=null", "set callbacks.best=null too"),
    ("callbacks.metrics=null", "no callback measures val/fid, to choose the best checkpoint by (ImageMetrics does)"),
    (
        "callbacks.grid.samplers=[od] callbacks.metrics=null callbacks.best=null",
        "SampleGrid: no sampler named 'od'; the model has sde, ode",
    ),
    ("callbacks.metrics.features={_target_: callbacks.InceptionFeatures, weights: nowhere.pth}", "file not found"),
]


def test_a_single_image_left_over_of_a_split_has_no_loss(tmp_path):
    """148 digits in batches of 147: the last has one, and no partner for it."""
    assert small_run.launch(tmp_path / "runs", "data.eval_batch_size=147", "run_id=rest") == 0
    rows = (tmp_path / "runs" / "bellman-diffusion" / "rest" / "metrics.csv").read_text()
    assert "val/loss" in rows and "nan" not in rows.lower()


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_sentence(words, message, root, tmp_path, capsys):
    (tmp_path / "text").write_text("hello")
    argv = re.split(r" (?=[a-z_.]+=)", words.replace("{text}", str(tmp_path / "text")))
    place = [f"root={tmp_path}", f"data.root={root / 'data'}", "logger=none", "trainer.accelerator=cpu"]
    if argv[0] == "predict":
        place = []
    assert train.main([*argv, *place]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed
    assert "Traceback" not in printed


def test_a_machine_without_gpu_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert train.main(["experiment=mnist", f"root={tmp_path}", f"data.root={tmp_path}", "logger=none"]) == 2
    assert (
        "error: 'trainer.accelerator' is gpu, and PyTorch finds no GPU here; set trainer=cpu" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_other_data_is_refused(finished, root, tmp_path, capsys):
    folder = write_folder(tmp_path / "f", n=40)
    words = ["test", f"ckpt_path={finished}/checkpoints/best.ckpt", "data=folder", f"data.folder={folder}"]
    assert train.main(words) == 2
    assert (
        "the checkpoint was trained on data with name Digits, this data has ImageFolder-f-32x3: leave data as it was"
        in capsys.readouterr().err
    )
