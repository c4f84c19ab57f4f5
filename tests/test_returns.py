"""Environments, learners of returns and their experiments, end to end."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from bd_lightning.modules import ReturnLearner
from bd_lightning.modules import returns as learners
from bd_lightning.returns import GaussianFields
from callbacks import EpisodeReturns, ReturnFigures
from datamodules.experience import mean_of_worst

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")


QUICK = ["experiment=rl_frozen_lake", "model.lr=3e-3", "steps=600"]
QUIET = ["callbacks.progress=null", "trainer.enable_progress_bar=false"]


def launch(root, *words):
    return train.main([*words, *QUIET, f"root={root}"])


def evaluations(folder):
    return [row["val/return"] for row in json.loads((folder / "returns.json").read_text())]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """FrozenLake, learned by fields in 600 steps."""
    root = tmp_path_factory.mktemp("returns")
    words = [*QUICK, "eval_every=200", "run_id=x", "logger.mode=offline"]
    assert launch(root, *words) == 0
    return root / "bellman-diffusion" / "x"


def test_frozen_lake_is_learned_and_everything_is_in_the_folder(finished):
    assert evaluations(finished)[-1] == 1.0
    row = json.loads((finished / "returns.json").read_text())[-1]
    assert row["val/env_steps"] == 500 + 4 * 600 and "greedy episodes of FrozenLake-v1" in row["summary"]
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert {"figures/returns-0000600.png", "samples/trajectory-returns.gif", "checkpoints/best.ckpt"} <= names
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    for name in ("train/loss", "train/return", "train/env_steps", "train/epsilon", "train/returns_outside", "val/loss"):
        assert any(row.get(name) for row in rows), name


def test_the_animation_has_what_was_drawn_before_a_run_was_resumed(tmp_path, monkeypatch):
    curve = torch.linspace(0, 1, 20)
    monkeypatch.setattr(
        "callbacks.returns.return_densities", lambda module: (curve, curve[None, None], curve[:1, None])
    )
    module = SimpleNamespace(loaded_step=0)
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, loggers=[], lightning_module=module)
    for steps in ((10, 20), (30,)):
        figures = ReturnFigures()
        for trainer.global_step in steps:
            figures.on_validation_epoch_end(trainer, module)
        figures.on_train_end(trainer, module)
        (tmp_path / "figures" / "returns-mine.png").touch()  # of no step
        (tmp_path / "figures" / "returns-0000090.png").touch()  # of a step that is still to come, after a resumption
    with Image.open(tmp_path / "samples" / "trajectory-returns.gif") as animation:
        assert animation.n_frames == 3


def test_environment_steps_are_those_of_all_processes():
    experience = SimpleNamespace(steps=70, exploration=0.5, outside=0, cut=0, finished=[])
    rows = {}
    for count in (1, 3):
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(experience=experience), global_step=0, log_every_n_steps=1, world_size=count
        )
        module = SimpleNamespace(log_dict=lambda values, count=count: rows.update({count: values}))
        EpisodeReturns().on_train_batch_end(trainer, module, None, None, 0)
    assert rows[1]["train/env_steps"] == 70 and rows[3]["train/env_steps"] == 210


@pytest.mark.parametrize("resumed", [False, True])
def test_a_threshold_is_held_from_the_first_of_two_evaluations_on(resumed, monkeypatch):
    found, logged = iter([5.0, 0, 5, 0, 5, 6, 0, 5, 5]), []  # twice by one alone, and not lost when they fall again
    data = SimpleNamespace(env="a", shape=(1,), cap=None, experience=SimpleNamespace(steps=0), options=None)
    monkeypatch.setattr("callbacks.returns.need_environment", lambda *_: data)
    monkeypatch.setattr("callbacks.returns.play", lambda *_: (np.full(4, next(found)), np.zeros(4, bool)))
    trainer = SimpleNamespace(world_size=2, state=SimpleNamespace(fn="fit"), is_global_zero=False)  # steps of two
    module = SimpleNamespace(greedy=None, log_dict=lambda values, **_: logged.append(values))
    callback = EpisodeReturns(threshold=5.0)
    for k in range(1, 10):
        data.experience.steps = 50 * k
        callback.on_validation_epoch_end(trainer, module)
        if resumed:
            state, callback = callback.state_dict(), EpisodeReturns(threshold=5.0)
            callback.load_state_dict(state)
        assert callback.solved == (500 if k >= 6 else None)
    assert [values["val/env_steps"] for values in logged] == [100 * k for k in range(1, 10)]


def test_the_worst_episodes_may_be_those_that_count(tmp_path, monkeypatch):
    """Ten of known returns: the worst three have a mean of −4, which the threshold is held against."""
    monkeypatch.setattr(
        "callbacks.returns.play", lambda *_: (np.array([5.0, -6, 5, 5, -3, 5, 5, -3, 5, 5]), np.zeros(10, bool))
    )
    words = [*QUICK, "steps=20", "eval_every=10", "logger=none", "callbacks.figures=null"]
    counted = ["callbacks.returns.worst=0.3", "callbacks.best.monitor=val/return_worst"]
    for name, threshold, solved in (("low", -4.5, 540), ("high", -3.9, None)):
        words_of_one = [f"run_id={name}", f"callbacks.returns.threshold={threshold}", *counted]
        assert launch(tmp_path, *words, *words_of_one) == 0
        row = json.loads((tmp_path / "bellman-diffusion" / name / "returns.json").read_text())[-1]
        assert row["val/return"] == pytest.approx(2.3) and row["val/return_worst"] == -4 and row["solved"] == solved
        assert row["val/return_error"] == pytest.approx((176.1 / 9 / 10) ** 0.5)  # 229 − 10 · 2.3²
        assert "return 2.300" in row["summary"] and ", the worst 30% -4.000 over" in row["summary"]
    assert mean_of_worst(np.array([3.0, 1, 2]), 0.34) == 1.5 and mean_of_worst(np.array([3.0, 1, 2]), 0.1) == 1
    assert launch(tmp_path, *words, counted[1]) == 2  # nothing logs it
    with pytest.raises(ValueError, match="worst"):
        EpisodeReturns(worst=1.5)


def test_a_broken_target_does_not_learn(tmp_path, monkeypatch):
    """The same run with a target that forgets the next state: the level of the test above is not reached."""
    whole = learners.bellman_target

    def broken(representation, y, reward, discount, policy):
        return whole(representation, y, reward, torch.zeros_like(discount), policy)

    monkeypatch.setattr(learners, "bellman_target", broken)
    words = [*QUICK, "eval_every=300", "run_id=x", "logger=none", "callbacks.figures=null"]
    assert launch(tmp_path, *words) == 0
    assert max(evaluations(tmp_path / "bellman-diffusion" / "x")) < 0.5


@pytest.mark.parametrize("sampler", ["inverse_cdf", "sde"])
def test_predict_draws_returns_of_the_start(finished, sampler):
    words = ["predict", f"ckpt_path={finished}/checkpoints/last.ckpt", "n=300", "callbacks.progress=null"]
    assert train.main([*words, f"model.sampler={sampler}"]) == 0
    lines = list(csv.reader((finished / f"predict-{sampler}-seed0" / "samples.csv").open()))
    assert lines[0] == [f"action_{i}" for i in range(4)]
    returns = np.array(lines[1:], dtype=float)
    stored = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = ReturnLearner((16,), 4, GaussianFields(0, 1))
    model.probes = stored["probes"]
    model.load_state_dict(stored)
    with torch.no_grad():
        values = model.values(torch.eye(16)[:1])[0]
    assert returns.mean(0) == pytest.approx(values.numpy(), abs=0.07)


def test_resume_goes_on(finished, tmp_path):
    import shutil

    folder = tmp_path / "bellman-diffusion" / "x"
    shutil.copytree(finished, folder)
    words = [
        f"ckpt_path={folder}/checkpoints/last.ckpt",
        "steps=660",
        "eval_every=60",
        "logger=none",
        "callbacks.figures=null",
    ]
    assert train.main([*words, *QUIET]) == 0
    last = json.loads((folder / "returns.json").read_text())[-1]
    assert last["step"] == 660 and last["val/env_steps"] == 2900 + 500 + 4 * 60


def test_seeds_reproduce(tmp_path):
    words = ["experiment=rl_cartpole", "steps=40", "eval_every=40", "data.warmup=100", "logger=none", "seed=5"]
    stored = []
    for name in ("a", "b"):
        assert launch(tmp_path, *words, f"run_id={name}", "callbacks.returns.episodes=20") == 0
        path = tmp_path / "bellman-diffusion" / name / "checkpoints" / "last.ckpt"
        stored.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_returns_outside_the_range_are_reported(tmp_path, caplog):
    """When the first occurs, which is before the first evaluation, and all together at the end."""
    words = ["experiment=rl_cartpole", "data.v_max=5", "steps=20", "eval_every=20", "logger=none", "run_id=x"]
    assert launch(tmp_path, *words, "callbacks.returns.episodes=20", "data.warmup=400") == 0
    found = [message for message in caplog.messages if "discounted return outside the declared range [0, 5]" in message]
    assert len(found) == 2 and all("widen data.v_min and data.v_max" in message for message in found)
    assert found[0].startswith("a training episode had") and " episodes had" in found[1]


CLIFF = ["experiment=rl_frozen_lake", "data.env=CliffWalking-v1", "data.options=null", "data.v_min=-100"]


def test_an_environment_without_a_time_limit_is_cut(tmp_path, caplog):
    """CliffWalking goes on for ever under a policy that stands still; each cut is said once, and counted."""
    words = [*CLIFF, "data.v_max=0", "data.max_steps=30", "steps=20", "eval_every=10", "logger=none", "run_id=x"]
    assert launch(tmp_path, *words, "callbacks.figures=null", "trainer.log_every_n_steps=5") == 0
    said = [message for message in caplog.messages if "was cut after at most 30 steps (data.max_steps)" in message]
    assert len(said) == 1 and "an episode of CliffWalking-v1" in said[0]
    folder = tmp_path / "bellman-diffusion" / "x"
    row = json.loads((folder / "returns.json").read_text())[-1]
    assert (
        row["episodes_cut"] == 10
        and "of CliffWalking-v1 by MeanReturn(), seed 1, 10 cut after at most 30 steps" in row["summary"]
    )
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert max(float(row["train/episodes_cut"] or 0) for row in rows) >= 4


def test_sigterm_ends_an_evaluation():
    """The policy that is evaluated asks at every step."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from callbacks.returns import interruptible

    class Trainer:
        received_sigterm = False

    act = interruptible(Trainer, lambda observation: observation + 1)
    assert act(np.zeros(1)) == 1
    Trainer.received_sigterm = True
    with pytest.raises(SIGTERMException):
        act(np.zeros(1))


def test_what_outputs_stand_for_cannot_change(tmp_path, capsys):
    """C51's logits have the shape of quantiles."""
    words = ["experiment=rl_frozen_lake", "steps=4", "eval_every=4", "data.warmup=100", "callbacks.returns.episodes=2"]
    assert launch(tmp_path, *words, "model=c51", "run_id=c51", "callbacks.returns.num_envs=2") == 0
    ckpt = f"ckpt_path={tmp_path / 'bellman-diffusion' / 'c51' / 'checkpoints' / 'last.ckpt'}"
    capsys.readouterr()
    for command in (["test", ckpt], [ckpt, "steps=8"]):
        assert train.main([*command, "model=qr_dqn"]) == 2
        assert "was trained with model.representation._target_=bd_lightning.returns.C" in capsys.readouterr().err
    assert train.main(["test", ckpt, "model.representation.interpolate=false"]) == 0


MISTAKES = [
    ("data.gamma=1.0", "gamma must lie in [0, 1), got 1.0"),
    ("data.gamma=-0.1", "gamma must lie in [0, 1), got -0.1"),
    ("data.v_max=-1", "v_min must be below v_max"),
    ("data.env=Pendulum-v1 data.options=null", "only a finite set of actions is supported"),
    ("data.env=FrozenLake-v9 data.options=null", "cannot make the environment 'FrozenLake-v9'"),
    ("data.options.slippery=true", "cannot make the environment 'FrozenLake-v1' with options {"),
    ("data.seed=-1", "seed must lie between 0 and inf, got -1"),
    ("data.num_workers=1", "num_workers must be 0"),
    ("data.epsilon=[1.0,2.0]", "epsilon[1] must lie between 0 and 1, got 2.0"),
    ("model.uniform_policy=2.0", "uniform_policy must lie between 0 and 1"),
    ("model.sampler=ode", "sampler must be one of inverse_cdf, sde; got 'ode'"),
    ("model.representation.nodes=4", "nodes must lie between 8"),
    ("callbacks.returns.seed=-1", "seed must lie between 0 and inf, got -1"),
    ("callbacks.returns.episodes=7", "episodes must be a multiple of num_envs"),
    ("data.max_steps=0", "max_steps must be positive, got 0"),
    (
        "data.env=CliffWalking-v1",
        "the options {'is_slippery': False} are meant for FrozenLake-v1, and env is CliffWalking-v1: "
        "set data.options=null, or data.options_for=CliffWalking-v1 if they are for it too",
    ),
    (
        "model.preference.level=0.1",
        "'model.preference' must be Preference, got {'level': 0.1}: name it by model.preference._target_, such as "
        "bd_lightning.returns.policies.MeanReturn, bd_lightning.returns.policies.CVaR, ",
    ),
    ("model.exploration=UpperQuantile", "name it by model.exploration._target_, such as"),
    ("model=mlp", "sigma_data, which this data does not have"),
    ("data=digits", "'model' (ReturnLearner) needs actions, which this data does not have"),
    ("data=digits model=mlp", "EpisodeReturns is for environments, and data is Digits"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_sentence(words, message, tmp_path, capsys):
    if words == "data=digits":  # which declares no range of returns either
        words += " model.representation.v_min=0 model.representation.v_max=1"
    assert launch(tmp_path, "experiment=rl_frozen_lake", *words.split(), "logger=none") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed
