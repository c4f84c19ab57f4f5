"""Consistency models: tuning and distillation from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bd_lightning
import train
from bd_lightning import checkpoints
from bd_lightning.checks import UserError
from bd_lightning.fields import Guidance
from callbacks.drawing import classes_of
from conftest import ROOT
from datamodules.subsets import random_subset
from wandb_records import read_records

# ---- from the command line

SHORT = ["trainer=cpu", "logger=none", "callbacks.metrics.n=60", "callbacks.metrics.n_test=60", "data.batch_size=64"]
SHORT += ["callbacks.metrics.features.steps=20", "callbacks.trajectory=null", "callbacks.memorisation=null"]
SHORT += ["callbacks.progress=null", "callbacks.grid.n=4", "model.network.width=32", "model.network.depth=1"]


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("consistency")


def fit(root, name, *words, code=0):
    command = [*words, *SHORT, f"run_id={name}", f"root={root / 'runs'}", f"data.root={root / 'data'}"]
    assert train.main(command) == code
    return root / "runs" / "bellman-diffusion" / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def teacher(root) -> Path:
    return fit(root, "teacher", "model=mlp", "steps=20", "eval_every=20")


@pytest.fixture(scope="session")
def relative(root) -> Path:
    return fit(root, "relative", "model=relative", "steps=4", "eval_every=4")


@pytest.fixture(scope="session")
def tuned(root, teacher) -> Path:
    return fit(root, "tuned", "model=consistency", f"model.init={teacher}", "steps=4", "eval_every=2")


def test_tuning_begins_with_the_weights_of_its_checkpoint(root, teacher, tuned):
    still = fit(
        root, "still", "model=consistency", f"model.init={teacher}", "steps=1", "eval_every=1", "model.lr=1e-12"
    )
    old, _ = checkpoints.load(teacher)
    new, _ = checkpoints.load(still)
    for (name, a), b in zip(old.fields.network.named_parameters(), new.fields.network.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)
    moved, _ = checkpoints.load(tuned)
    assert not torch.equal(next(moved.parameters()), next(new.parameters()))
    rows = json.loads((tuned.parents[1] / "fid.json").read_text())
    assert [row["step"] for row in rows] == [2, 4] and "(two, 2 network calls, seed 1)" in rows[-1]["protocol"]


def test_tuning_goes_on_with_the_parametrisation_that_was_learned(root, capsys):
    teacher = fit(root, "flow", "model=mlp", "model.parametrisation=velocity", "steps=20", "eval_every=20")
    words = ["model=consistency", f"model.init={teacher}", "eval_every=1", "steps=1", "model.lr=1e-12"]
    fit(root, "mixed-up", *words, code=2)
    assert "velocity fields, and factored fields are learned here" in capsys.readouterr().err
    still, _ = checkpoints.load(fit(root, "flow-still", *words, "model.parametrisation=velocity"))
    old, _ = checkpoints.load(teacher)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([1e-6, 0.5, 20.0])
    expected = x + sigma.square().reshape(-1, 1, 1, 1) * old.fields.score(x, sigma)
    torch.testing.assert_close(still.function(x, sigma), expected, atol=1e-4, rtol=1e-4)
    fit(root, "direct", *words, "model.parametrisation=direct", code=2)
    assert "parametrisation must be one of factored, velocity" in capsys.readouterr().err


def test_a_tuned_model_resumes_and_draws_without_what_it_came_from(root, teacher, tuned, tmp_path):
    copy = tmp_path / "init.ckpt"
    copy.write_bytes(teacher.read_bytes())
    whole = fit(root, "whole", "model=consistency", f"model.init={copy}", "steps=4", "eval_every=2")
    copy.unlink()
    words = ["model=consistency", f"model.init={teacher}", "eval_every=2", "model.lr_decay=none", "model.gaps.stages=1"]
    half = fit(root, "half", *words, "steps=2")
    assert train.main([f"ckpt_path={half}", "steps=4"]) == 0
    straight = fit(root, "straight", *words, "steps=4")
    states = [torch.load(one, weights_only=True)["state_dict"] for one in (half, straight)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert not any("teacher" in name for name in states[0])
    for sampler in ("one", "two"):
        assert train.main(["predict", f"ckpt_path={whole}", f"model.sampler={sampler}", "n=5"]) == 0


def test_mixtures_that_were_never_trained_on_are_distilled(root, relative):
    words = ["model=consistency", f"model.teacher={relative}", "steps=2", "eval_every=2"]
    student = fit(root, "mixture", *words, "model.mix={3: 0.7, 8: 0.3}", "model.calibrate=20")
    fit(root, "removed", *words, "model.remove=[7]", f"model.merge={{{relative}: 1.0}}")
    assert train.main(["predict", f"ckpt_path={student}", "n=5"]) == 0


def test_a_student_keeps_having_a_teacher_or_none(root, teacher, tuned, capsys):
    """What it has learned is written beside its numbers, so that it may not forget."""
    student = fit(root, "taught", "model=consistency", f"model.teacher={teacher}", "steps=2", "eval_every=2")
    for words in ([f"ckpt_path={student}", "steps=4"], ["test", f"ckpt_path={student}"]):
        assert train.main([*words, "model.teacher=null"]) == 2
        assert "'model.teacher' says whom a student learns from, and this one has learned" in capsys.readouterr().err
    moved = teacher.with_name("moved.ckpt")
    moved.write_bytes(teacher.read_bytes())
    assert (
        train.main([f"ckpt_path={student}", "steps=4", f"model.teacher={moved}"]) == 0
    )  # it may lie elsewhere by then
    assert train.main([f"ckpt_path={tuned}", "steps=6", f"model.teacher={teacher}"]) == 2
    assert "'model.teacher' says whom" in capsys.readouterr().err


def test_a_student_of_some_classes_draws_these_alone(root, relative, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    words = ["model=distilled", f"model.teacher={relative}", "steps=2", "eval_every=2", "model.chains=20"]
    words += ["model.network.conditional=true", "model.labels=['3', 8]", "model.guidance=2", "model.flow.levels=3"]
    student = fit(root, "guided", *words)
    assert "metrics compare with all the data, and this model learns labels=" in caplog.text
    model, _ = checkpoints.load(student)
    assert model.drawn_classes == [3, 8] == checkpoints.load(relative)[0].drawn_classes[3:9:5]
    assert classes_of(model, range(5)).tolist() == [3, 8, 3, 8, 3]
    loaded = bd_lightning.load(student)
    assert torch.equal(loaded.sample(4), loaded.sample(4, labels=[3, 8]))
    for asked in ("labels=[5]", "labels=['5']"):
        assert train.main(["predict", f"ckpt_path={student}", asked]) == 2
        assert "class 5 was not learned: this model was asked for 3, 8 alone" in capsys.readouterr().err
    for word in ("model.guidance=5", "model.labels=[5]", "model.guidance_interval=[0.1,2]"):
        assert train.main(["predict", f"ckpt_path={student}", word]) == 2
        key = word.partition("=")[0]
        assert f"'{key}' says what a student learns, and this one has learned" in capsys.readouterr().err
        assert train.main([f"ckpt_path={student}", "steps=4", word]) == 2  # nor may the rest of its training
        assert f"'{key}' says what a student learns, and this one has learned" in capsys.readouterr().err
    assert train.main(["export", f"ckpt_path={student}", f"to={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert ", a student of another model, guidance 2, asked for labels=" in card
    assert "teacher: last.ckpt" in (tmp_path / "out" / "config.yaml").read_text()


def test_a_teacher_that_knows_all_the_data_teaches_who_is_told_no_class(root):
    from bd_lightning import facts, teachers

    guided = fit(root, "guided-teacher", "model=relative", "model.guidance=2", "steps=2", "eval_every=2")
    model, stored = checkpoints.load(guided)
    student = SimpleNamespace(shape=model.shape, fields=model.fields, sigma_max=1.0, conditional=False)
    student.guidance = Guidance(1.0)
    own = facts.read(stored["facts"])
    assert teachers.load(student, str(guided), own).model.conditional
    told = fit(root, "told", "model=mlp", "model.network.conditional=true", "steps=2", "eval_every=2")
    with pytest.raises(UserError, match="is told the class: set model.network.conditional=true here too"):
        teachers.load(student, str(told), own)


def test_a_student_has_losses_while_it_is_trained_alone(root, teacher, tuned):
    assert "val/loss" in (tuned.parents[1] / "metrics.csv").read_text()
    assert train.main(["validate", f"ckpt_path={tuned}"]) == 0
    (folder,) = tuned.parents[1].glob("validate-*")
    assert "loss" not in (folder / "metrics.csv").read_text() and "val/fid" in (folder / "metrics.csv").read_text()


def test_a_distilled_model_resumes_and_draws_without_its_teacher(root, relative, tmp_path, capsys):
    copy = tmp_path / "teacher.ckpt"
    copy.write_bytes(relative.read_bytes())
    words = ["model=distilled", f"model.teacher={copy}", "model.mix={3: 0.7, 8: 0.3}", "model.energy=1", "eval_every=2"]
    words += ["model.chains=30", "model.every=3", "model.flow.levels=3", "model.lr_decay=none"]
    half = fit(root, "distilled-half", *words, "steps=2")
    assert train.main([f"ckpt_path={half}", "steps=4"]) == 0
    straight = fit(root, "distilled", *words, "steps=4")
    states = [torch.load(one, weights_only=True)["state_dict"] for one in (half, straight)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    copy.write_bytes(fit(root, "other", "model=relative", "steps=4", "eval_every=4", "seed=1").read_bytes())
    assert train.main([f"ckpt_path={half}", "steps=6"]) == 2
    told = f"{copy} (or what is merged with it) has other weights than those that this model has learned from"
    assert told in capsys.readouterr().err and torch.load(half, weights_only=True)["global_step"] == 4
    copy.unlink()
    assert train.main(["predict", f"ckpt_path={straight}", "n=5"]) == 0
    assert train.main(["test", f"ckpt_path={straight}"]) == 0


def test_the_weights_of_a_mixture_are_corrected_before_it_is_learned(relative, monkeypatch):
    from bd_lightning import combinations, facts, teachers

    model, stored = checkpoints.load(relative)
    own = facts.read(stored["facts"])
    student = SimpleNamespace(shape=model.shape, fields=model.fields, sigma_max=1.0, conditional=False)
    student.guidance = Guidance(1.0)
    asked = {"mix": {3: 0.7, 8: 0.3}}
    as_it_is = teachers.load(student, str(relative), own, **asked).mixture.terms[0][1]
    corrected = teachers.load(student, str(relative), own, **asked, calibrate=50).mixture.terms[0][1]
    assert (corrected[[3, 8]] / as_it_is[[3, 8]] - 1).abs().max() > 0.01 and corrected.count_nonzero() == 2
    drawn = []
    monkeypatch.setattr(combinations.fields, "calibrated", lambda mixture, draw: drawn.append(draw(mixture)) or mixture)
    teachers.load(student, str(relative), own, **asked, calibrate=7)
    assert [len(x) for x in drawn] == [7]


def test_tuning_on_two_processes(root, teacher):
    """The frozen scalar head and the teacher, which is no part of the module, keep nobody waiting."""
    command = [
        sys.executable,
        "train.py",
        "model=consistency",
        f"model.init={teacher}",
        f"model.teacher={teacher}",
        *SHORT,
    ]
    command += ["trainer=ddp_cpu", "steps=2", "eval_every=2", "run_id=two", f"root={root / 'runs'}"]
    command += [f"data.root={root / 'data'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((root / "runs" / "bellman-diffusion" / "two" / "fid.json").read_text())
    assert row["step"] == 2 and row["val/fid"] > 0


def test_mistakes(root, teacher, relative, tuned, capsys, caplog):
    caplog.set_level("INFO")

    def refused(*words):
        fit(root, "refused", "model=consistency", "steps=2", "eval_every=2", *words, code=2)
        assert not (root / "runs" / "bellman-diffusion" / "refused").exists()
        return capsys.readouterr().err

    message = refused(f"model.init={teacher}", "model.network.fourier=[1.0]")
    assert "set model.network as it is there, or leave model.init out" in message
    assert " has the shape [" in message and "size mismatch" not in message and "state_dict" not in message
    assert "checkpoint not found: nowhere.ckpt" in refused("model.init=nowhere.ckpt")
    assert "is sampled from noise level 20 down, the samplers here begin at 80" in refused(
        f"model.init={teacher}", "model.samplers.one.sigma_max=80.0"
    )
    lower = ["model.samplers.one.sigma_max=10.0", "model.samplers.two.sigma_max=10.0"]
    fit(root, "lower", "model=consistency", f"model.init={teacher}", *lower, "steps=2", "eval_every=2")
    told = "is sampled from noise level 20 down, and this model begins at 10: where 20 was needed"
    assert caplog.text.count(told) == 1
    both = [f"model.init={teacher}", f"model.teacher={teacher}"]
    fit(root, "both", "model=consistency", *both, *lower, "steps=2", "eval_every=2")
    assert caplog.text.count(told) == 2
    words = ["model=consistency", f"model.init={teacher}", "data=wine", "callbacks=points", "steps=2", "eval_every=2"]
    assert train.main([*words, "logger=none", f"root={root / 'runs'}"]) == 2
    assert "its shape of a sample is [1, 8, 8], here it is [13]" in capsys.readouterr().err
    assert "labels need a class-conditional model" in refused(
        f"model.teacher={teacher}", "model.network.conditional=true", "model.labels=[3]"
    )
    assert "train with model=relative" in refused(f"model.teacher={teacher}", "model.mix={3: 1.0}")
    assert "is a consistency model, no score to learn from" in refused(f"model.teacher={tuned}")
    assert "guidance needs a teacher with classes" in refused(f"model.teacher={teacher}", "model.guidance=2")
    assert "mix says what a teacher's flow is made of" in refused("model.mix={3: 1.0}")
    assert "calibrate corrects the weights of a mixture" in refused(f"model.teacher={relative}", "model.calibrate=9")
    told = ["model.network.conditional=true", "model.mix={3: 1.0}"]
    assert "a mixture has no classes to be told" in refused(f"model.teacher={relative}", *told)
    assert "knows no classes" in refused(f"model.teacher={teacher}", "model.network.conditional=true")
    assert "no pairs of opposite noise: noise.antithetic=0" in refused("model.noise.antithetic=0.5")
    assert "no class 'cat'" in refused(f"model.teacher={relative}", "model.mix={cat: 1.0}")
    for word in ("model.sampler=ode", "model.samplers.sde={_target_: bd_lightning.dynamics.MultistepDynamics}"):
        message = refused(word)
        assert "is no score that" in message and "take one or two" in message
    assert train.main(["predict", f"ckpt_path={tuned}", "model.sampler=sde"]) == 2
    assert "is no score that 'sde' could follow" in capsys.readouterr().err
    assert train.main(["predict", f"ckpt_path={tuned}", "model.samplers.one.sigma_max=80"]) == 2
    assert "begins at noise level 80, and 20 is the highest learned" in capsys.readouterr().err
    steps = "model.samplers.two={_target_: bd_lightning.dynamics.ConsistencySteps, between: [0.5]}"
    assert train.main(["predict", f"ckpt_path={teacher}", "model.sampler=two", steps]) == 2
    assert "samplers.two takes a function that ends chains" in capsys.readouterr().err


def test_metrics_against_calls(root, teacher, tuned, capsys, caplog):
    caplog.set_level("INFO")
    folder = teacher.parents[1]
    words = ["calls=[8, 3]", "model.samplers.sde.order=3", "model.samplers.sde.corrector=true"]
    assert train.main(["test", f"ckpt_path={teacher}", *words]) == 0
    (folder,) = folder.glob("test-*")
    rows = json.loads((folder / "calls.json").read_text())
    assert [(row["sampler"], row["calls"]) for row in rows] == [("sde", 3), ("sde", 8), ("ode", 3), ("ode", 7)]
    assert all(row["fid"] > 0 and 0 <= row["recall"] <= 1 for row in rows)
    assert "(ode@7, 7 network calls, seed 1)" in rows[-1]["protocol"]
    written = (folder / "calls.md").read_text()
    assert "| sampler | calls | fid | kid | precision | recall |" in written
    assert all(row["protocol"] in written for row in rows) and len({row["protocol"] for row in rows}) == 4
    assert (folder / "figures" / "calls-0000020.png").is_file()
    assert train.main(["test", f"ckpt_path={tuned}", "calls=5", "logger=wandb"]) == 0
    (folder,) = tuned.parents[1].glob("test-*")
    rows = json.loads((folder / "calls.json").read_text())
    assert [(row["sampler"], row["calls"]) for row in rows] == [("one", 1), ("two", 2)]
    assert "two takes 2 network calls, whatever is asked for: [5]" in caplog.text
    (path,) = tuned.parents[1].glob("wandb/offline-run-*/run-*.wandb")
    assert any("calls/fid" in key for row in read_records(path).history for key in row)
    capsys.readouterr()
    for words, sentence in [
        (
            ["test", f"ckpt_path={teacher}", "calls=[0]"],
            "'calls' are numbers of network calls, from 1 to 10,000, got [0]",
        ),
        (["test", f"ckpt_path={teacher}", "calls=[5]", "callbacks.metrics=null"], "calls needs callbacks.metrics"),
        (["validate", f"ckpt_path={teacher}", "calls=[5]"], "'calls' is for train.py test"),
        (["predict", f"ckpt_path={teacher}", "calls=[5]"], "'calls' is for train.py test"),
        (["test", f"ckpt_path={teacher}", "calls=[100000000000]"], "from 1 to 10,000"),
    ]:
        assert train.main(words) == 2
        assert sentence in capsys.readouterr().err


def test_benchmark_of_calls(root, teacher, tuned, trained, monkeypatch, capsys):
    from benchmarks import few_steps

    words = [str(teacher), str(tuned), "--n", "40", "--calls", "4", "3", "--rules", "Heun", "order 3+"]
    words += ["--out", str(root / "few"), "--asked", "{3: 0.7, 8: 0.3}", "--time"]
    monkeypatch.setattr("sys.argv", ["few_steps.py", *words])
    compared, plain = [], few_steps.precision_recall
    monkeypatch.setattr(few_steps, "precision_recall", lambda ours, real: compared.append(real) or plain(ours, real))
    few_steps.main()
    judge = few_steps.judge_of(checkpoints.load(tuned)[1], SimpleNamespace(split="test", asked=None))
    assert len(judge.real) > 40 and torch.equal(compared[0], judge.real[random_subset(len(judge.real), 40)])
    printed = capsys.readouterr().out
    assert "| rule | 1 | 2 | 3 | 4 |" in printed or "| rule | 1 | 2 |" in printed
    assert printed.count("Σ |share counted − share asked| of 40 samples") == 2 and "| time of a step |" in printed
    kept = (root / "few" / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert sorted((row["rule"], row["calls"]) for row in rows if row["path"] == str(teacher)) == [
        ("Heun", 3), ("order 3+", 3), ("order 3+", 4),
    ]  # fmt: skip
    assert "±" not in printed  # Heun with 3 calls is asked for twice, and is one row
    few_steps.main()
    assert (root / "few" / "rows.jsonl").read_text() == kept
    for more, sentence in [
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--n", "3"], "--n must be more than 3, which precision and recall compare; got 3"),
        (["--asked", "{12: 1.0}"], "--asked: there is no class 12, of 10 that are counted from 0"),
        (["--calls", "0"], "--calls must be at least 1"),
        (["--sigma-min", "50"], "--sigma-min: sigma_min must lie below sigma_max 20"),
        (["--asked", "3"], "--asked says the shares of classes"),
        (["--ddpm", str(Path(__file__))], "not the weights of a DDPM"),
    ]:
        monkeypatch.setattr("sys.argv", ["few_steps.py", *words, *more])
        with pytest.raises(UserError, match=sentence):
            few_steps.main()
    assert (root / "few" / "rows.jsonl").read_text() == kept  # refused before anything was judged
    flowless = fit(
        root, "flowless", "model=mlp", "model.samplers.ode=null", "model.sampler=sde", "steps=1", "eval_every=1"
    )
    monkeypatch.setattr("sys.argv", ["few_steps.py", str(flowless), *words[2:]])
    with pytest.raises(UserError, match="without the sampler 'ode'"):
        few_steps.main()
    other = str(trained / "checkpoints" / "last.ckpt")  # without callbacks.metrics
    for given, sentence in (([other, words[0]], "callbacks.metrics=null"), ([words[0], other], "other data, codes or")):
        monkeypatch.setattr("sys.argv", ["few_steps.py", *given, *words[2:]])
        with pytest.raises(UserError, match=sentence):
            few_steps.main()
    monkeypatch.setattr("sys.argv", ["few_steps.py", *words[:-3], "--out", str(root / "few"), "--asked", "{5: 1.0}"])
    few_steps.main()
    assert len((root / "few" / "rows.jsonl").read_text()) > len(kept)  # another question
