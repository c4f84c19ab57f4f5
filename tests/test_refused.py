"""Nothing is written outside root, refusals leave nothing behind, and each is one sentence."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from bd_lightning.checkpoints import SavingFailed, WholeCheckpoints
from bd_lightning.cli import config as configs
from bd_lightning.cli import fit
from datamodules import Digits, cache
from small_run import contents, launch, refused
from tiny_data import write_autoencoder

# ---- nothing outside, nothing behind


V1 = Path(__file__).parent / "checkpoints" / "v1"
NAMES = ["../x", "../../x", "a/b", "a\\b", "a:b", "a#b", "a?b", "a%b", "x" * 129, "é" * 128, "..", ".", "' '", "''"]
NAMES += [".lock", ".x"]


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
    assert reason in said and "give root= another place" in said


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
    "precision": ["64", "64-true", "bf16-true", "16-true"], "num_nodes": ["0", "2"], "barebones": ["true"],
    "strategy": ["ddp_spawn", "ddp_fork"], "max_time": ["banana"], "min_steps": ["-1"],
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
    full = "callbacks.full={_target_: faults.FillDisk, step: null, file: config.yaml.part}"
    assert launch(tmp_path / "root", "run_id=x", "ckpt_path=last", full) == 2
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


def test_samples_go_where_a_folder_can_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [f"ckpt_path={V1}/default.ckpt", "n=1", f"root={tmp_path / 'file'}"]
    assert train.main(["predict", *words]) == 2
    said = capsys.readouterr().err
    assert "is a file): give root= another place" in said and len(said.splitlines()) == 1


def test_predict_of_an_autoencoder(tmp_path, capsys):
    path = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), "Digits")
    assert train.main(["predict", f"ckpt_path={path}", f"root={tmp_path}", "logger=none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1


def test_misfits_are_told_whole(run, capsys):
    assert train.main(["predict", f"ckpt_path={run}/checkpoints/last.ckpt", "model.network.width=32"]) == 2
    said = capsys.readouterr().err
    assert " has the shape [" in said and "], the model's [" in said and said.rstrip().endswith(" more)")


def test_steps_mean_nothing_to_other_commands(run, capsys):
    assert train.main(["predict", f"ckpt_path={run}/checkpoints/last.ckpt", "n=1", "steps=3"]) == 0
    assert "must be a multiple" in refused(run.parents[1], capsys, "run_id=x", "steps=3", "eval_every=2")


@pytest.mark.parametrize("word", ["run_id=", "ckpt_path=", "model.lr=", "data=", "experiment= "])
def test_a_variable_that_is_not_set_is_no_value(word, tmp_path, capsys):
    assert "has no value" in refused(tmp_path / "root", capsys, word)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "missing"])
def test_what_is_no_file_is_not_read(kind, tmp_path, capsys):
    path = tmp_path / "a"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir,
     "loop": lambda p: p.symlink_to(p), "missing": lambda p: None}[kind](path)  # fmt: skip
    reason = {"pipe": "a pipe or a device", "device": "a pipe or a device", "loop": "a link to itself"}.get(kind, "")
    for words in (["predict", f"ckpt_path={path}"], [f"--config={path}"]):
        assert train.main(words) == 2
        said = capsys.readouterr().err
        assert "not found: " in said and reason in said and "Errno" not in said


def test_what_nothing_measures_is_said_before_training(tmp_path, capsys):
    node = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/nothing}"
    said = refused(tmp_path / "root", capsys, "run_id=x", f"callbacks.best={node}")
    assert "nothing measures val/nothing" in said and "val/loss, val/loss_gradient, val/loss_scalar" in said


def test_one_sample_has_no_fid(tmp_path, capsys):
    node = "{_target_: callbacks.ImageMetrics, features: {_target_: callbacks.ClassifierFeatures}, n: 1}"
    assert "n must lie between 2" in refused(tmp_path / "root", capsys, "run_id=x", f"callbacks.metrics={node}")


def test_the_last_line_names_no_checkpoint_that_is_not_there(tmp_path, capsys):
    assert launch(tmp_path / "root", "run_id=x", "callbacks.last=null", "callbacks.best=null") == 0
    assert "no checkpoint was kept" in capsys.readouterr().out


def test_a_run_that_diverged_is_not_recommended():
    begin = fit.Begin(None)
    begin.loss = 1.2
    for last, diverged in ((0.5, False), (900.0, False), (1e6, True), (float("inf"), True)):
        said = begin.diverged(SimpleNamespace(callback_metrics={"val/loss": last}))
        assert bool(said) == diverged and (not said or "lower model.lr" in said)
    begin.loss = float("nan")  # of one batch, whose step was left out
    assert not begin.diverged(SimpleNamespace(callback_metrics={"val/loss": 0.5}))
    assert (
        "lower" not in (said := begin.diverged(SimpleNamespace(callback_metrics={"val/loss": float("nan")}))) and said
    )


def test_other_nodes_are_waited_for_aloud(capsys):
    waiting = fit.Waiting(2, 0.01)
    waiting.timer.join()
    assert "waiting for the processes of all 2 nodes at 127.0.0.1" in capsys.readouterr().out
    waiting = fit.Waiting(2, 0.2)
    waiting.setup(None, None, "fit")
    waiting.timer.join()
    assert not capsys.readouterr().out


def test_what_weights_stand_for_cannot_change(tmp_path, capsys):
    root = tmp_path / "root"
    assert launch(root, "run_id=x", "model.parametrisation=velocity") == 0
    ckpt = f"ckpt_path={root / 'bellman-diffusion' / 'x' / 'checkpoints' / 'last.ckpt'}"
    asked = f"to={tmp_path / 'to'}"
    capsys.readouterr()

    def said(*words: str) -> str:
        before = contents(tmp_path)
        assert train.main(list(words)) == 2 and contents(tmp_path) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    told = "was trained with model.parametrisation=velocity, and its weights stand for something else with factored"
    for words in (["predict", ckpt, "n=2"], ["export", ckpt, asked], ["test", ckpt], [ckpt, "steps=6"]):
        assert told in said(*words, "model.parametrisation=factored")
    constant = "model.kernel._target_=bd_lightning.kernels.Constant"
    told = "was trained with model.kernel._target_=bd_lightning.kernels.ClosedFormSlices"
    assert told in said("predict", ckpt, constant)
    assert "was trained with model.kernel.epsilon=" in said("predict", ckpt, "model.kernel.epsilon=0.5")
    told = "holds a bd_lightning.modules.BellmanDiffusion, and its weights stand for something else in a bd_"
    for words in (["predict", ckpt, "n=2"], [ckpt, "run_id=other"]):
        assert told in said(
            *words, "model=consistency", "model.network={_target_: bd_lightning.networks.MLP, width: 16, depth: 1}"
        )
    same = ["model.parametrisation=velocity", "model.samplers.ode.steps=2"]
    assert train.main(["predict", ckpt, "n=2", *same]) == 0
    single = ["model.noise=null", "model.parametrisation=direct", "model.kernel._target_=bd_lightning.kernels.Sliced"]
    single += ["model.samplers={'ode': null, 'one': {_target_: bd_lightning.dynamics.BellmanDynamics}}"]
    single += ["model.objective.trace=hutchinson"]
    assert launch(root, "run_id=one", *single, "model.sampler=one") == 0
    ckpt = f"ckpt_path={root / 'bellman-diffusion' / 'one' / 'checkpoints' / 'last.ckpt'}"
    capsys.readouterr()
    levels = "model.noise={_target_: bd_lightning.objectives.NoiseLevels}"
    assert "was trained with noise=null, at a single scale" in said("predict", ckpt, levels)
    assert train.main(["predict", ckpt, "n=2", "model.kernel.slices=3"]) == 0


def test_a_model_that_was_always_told_the_class_cannot_be_guided(tmp_path, capsys):
    root = tmp_path / "root"
    assert launch(root, "run_id=x", "model.network.conditional=true") == 0
    ckpt = f"ckpt_path={root / 'bellman-diffusion' / 'x' / 'checkpoints' / 'last.ckpt'}"
    for words in (["predict", ckpt, "n=2", "model.guidance=3"], [ckpt, "steps=6"]):
        capsys.readouterr()
        assert train.main([*words, "model.label_dropout=0.1"]) == 2
        assert "'model.label_dropout' is 0.1, and this model was trained without" in capsys.readouterr().err
