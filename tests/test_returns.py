"""Environments, learners of returns and their experiments, end to end."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

import train
from bd_lightning.checks import UserError
from bd_lightning.facts import EnvironmentFacts
from bd_lightning.modules import FreeReturnLearner, LambdaReturnLearner, ReturnLearner
from bd_lightning.modules import returns as learners
from bd_lightning.returns import Categorical, GaussianFields, UpperQuantile, normal_cdf

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")

from benchmarks import returns_training as benchmark
from datamodules import Environment
from datamodules.environments import LONGEST, make_envs
from datamodules.experience import Experience, LambdaExperience

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


@pytest.mark.parametrize("method", ["returns", "c51"])
def test_the_benchmark_trains_as_train_py_does(method, tmp_path):
    """Weights after 60 steps of two runs at once against those of train.py, and the evaluations on the way."""
    words = ["experiment=rl_frozen_lake", f"model={method}", "data.warmup=100"]
    config, data, models = benchmark.build(words, [3, 4])
    runs, streams = benchmark.Seeds(models), [d.open(d.seed) for d in data]
    for stream in streams:
        stream.fill()
    for _ in range(60):
        for stream, action in zip(streams, runs.explore(np.stack([s.observation for s in streams]))):
            stream.step(action)
        runs.step([stream.draw() for stream in streams])
    options = ["steps=60", "eval_every=30", "seed=4", "run_id=x", "logger=none", "callbacks.figures=null"]
    assert launch(tmp_path, *words, *options) == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for i, p in enumerate(runs.parameters):
        name = f"network.{2 * (i // 2)}.{'weight' if i % 2 == 0 else 'bias'}"
        assert torch.allclose(p[1], stored[name], atol=2e-5), name
    found = benchmark.learn(words, [3, 4], 60, 30)
    assert found["returns"][1] == evaluations(folder)
    assert found["env_steps"] == [100 + 4 * 30, 100 + 4 * 60]


@pytest.mark.parametrize(
    ("experiment", "steps", "level"), [("rl_cartpole", 500, 60.0), ("rl_frozen_lake_slippery", 1600, 0.3)]
)
def test_the_other_experiments_learn_and_a_broken_target_does_not(experiment, steps, level, monkeypatch):
    words = [f"experiment={experiment}", "model.lr=2e-3"]
    assert benchmark.learn(words, [0], steps, steps)["returns"][0][-1] > level
    whole = learners.bellman_target
    monkeypatch.setattr(
        learners, "bellman_target", lambda rep, y, r, discount, policy: whole(rep, y, r, 0 * discount, policy)
    )
    assert benchmark.learn(words, [0], 300, 300)["returns"][0][-1] < level


def test_seeds_reproduce(tmp_path):
    words = ["experiment=rl_cartpole", "steps=40", "eval_every=40", "data.warmup=100", "logger=none", "seed=5"]
    stored = []
    for name in ("a", "b"):
        assert launch(tmp_path, *words, f"run_id={name}", "callbacks.returns.episodes=20") == 0
        path = tmp_path / "bellman-diffusion" / name / "checkpoints" / "last.ckpt"
        stored.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


class Corridor:
    """Three states to the right, reward 1 for each step, then the end: what is remembered can be told by hand."""

    num_envs = 1
    single_action_space = type("Actions", (), {"n": 2})()

    def reset(self, seed=None):
        self.at = 0
        return np.array([0]), {}

    def step(self, action):
        self.at += 1
        done = self.at == 3
        info = {"final_obs": [np.array(3)]} if done else {}
        observed = np.array([0 if done else self.at])
        self.at = 0 if done else self.at
        return observed, np.array([1.0]), np.array([done]), np.array([False]), info


@pytest.mark.parametrize("n", [1, 2])
def test_transitions_of_several_steps(n):
    stream = Experience(Corridor(), (4,), gamma=0.5, n_step=n, size=10, warmup=6, returns_range=(0.0, 1.7))
    stream.fill()
    observation, action, reward, discount, following = stream.replay.__getitems__(np.arange(3))
    assert observation.argmax(1).tolist() == [0, 1, 2]
    assert reward.tolist() == ([1, 1, 1] if n == 1 else [1.5, 1.5, 1])
    assert discount.tolist() == ([0.5, 0.5, 0] if n == 1 else [0.25, 0, 0])
    assert following.argmax(1).tolist() == ([1, 2, 3] if n == 1 else [2, 3, 3])
    assert stream.episodes == 2 and stream.outside == 2  # 1 + ½ + ¼ = 1.75 each
    assert list(stream.finished) == [3.0, 3.0]


def test_transitions_of_all_lengths_and_their_mixture():
    stream = LambdaExperience(Corridor(), (4,), gamma=0.5, n_step=2, size=10, warmup=6)
    stream.fill()
    batch = stream.replay.__getitems__(np.arange(3))
    observation, action, reward, discount, following = batch
    assert observation.argmax(1).tolist() == [0, 1, 2]
    assert reward.tolist() == [[1, 1.5], [1, 1.5], [1, 1]]
    assert discount.tolist() == [[0.5, 0.25], [0.5, 0], [0, 0]]
    assert following.argmax(2).tolist() == [[1, 2], [2, 3], [3, 3]]
    model = LambdaReturnLearner((4,), 2, GaussianFields(0, 2), lam=0.3)
    with torch.no_grad():
        y = model.outputs(model.target_network, following.flatten(0, 1)).unflatten(0, (3, 2))
    one, two = (ReturnLearner.backup(model, y[:, k], reward[:, k], discount[:, k]) for k in (0, 1))
    assert torch.allclose(model.backup(y, reward, discount), 0.7 * one + 0.3 * two, atol=1e-6)
    assert not torch.allclose(one[0], two[0], atol=1e-3)
    assert model.compute(batch, None)[0]["loss"].isfinite()
    with pytest.raises(UserError, match="λ-returns need transitions of 1 to n steps: choose data=frozen_lake_lambda"):
        model.compute((observation, action, reward[:, 0], discount[:, 0], following[:, 0]), None)


def test_experience_is_collected_by_exploration_and_evaluation_is_by_preference():
    """Two actions of one state: the mean prefers the second, a high quantile the first."""
    rep = GaussianFields(-4, 6, nodes=80)
    model = ReturnLearner((1,), 2, rep, exploration=UpperQuantile(0.9))
    y = torch.stack([normal_cdf((rep.points - m) / sd) - rep.start for m, sd in ((0.8, 2.0), (1.2, 0.5))])[None]
    model.outputs = lambda network, observation: y
    seen = np.ones((1, 1), dtype=np.float32)
    assert model.greedy(seen).tolist() == [1] and model.explore(seen).tolist() == [0]


def test_time_limits_do_not_end_the_return():
    """CartPole cut off after ten steps is truncated, so that its transitions keep their discount."""
    data = Environment("CartPole-v1", 0, 100, options={"max_episode_steps": 5}, num_envs=2, warmup=40)
    stream = data.open(0)
    stream.fill()
    assert stream.episodes == 8 and list(stream.finished) == [5.0] * 8
    batch = stream.replay.__getitems__(np.arange(40))
    assert (batch[3] == np.float32(0.99)).all()
    assert (batch[0] - batch[4]).abs().max() < 1  # the last observation of an episode, not the first of the next


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
    said = [message for message in caplog.messages if "was cut after 30 steps, which data.max_steps sets" in message]
    assert len(said) == 1 and "an episode of CliffWalking-v1" in said[0]
    folder = tmp_path / "bellman-diffusion" / "x"
    row = json.loads((folder / "returns.json").read_text())[-1]
    assert row["episodes_cut"] == 10 and "of CliffWalking-v1, 10 cut after 30 steps" in row["summary"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert max(float(row["train/episodes_cut"] or 0) for row in rows) >= 4


def test_limits_of_environments_hold_unless_another_is_set():
    made = [
        (Environment("CliffWalking-v1", -100, 0), LONGEST, LONGEST),
        (Environment("CliffWalking-v1", -100, 0, options={"max_episode_steps": 7}), None, 7),
        (Environment("CartPole-v1", 0, 100), None, 500),
        (Environment("CartPole-v1", 0, 100, max_steps=20), 20, 20),
    ]
    for data, cap, limit in made:
        assert (data.cap, data.make(1).envs[0].spec.max_episode_steps) == (cap, limit)


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


def test_environments_have_actions_and_no_classes():
    facts = Environment("FrozenLake-v1", 0, 1, options={"is_slippery": False}).facts
    assert facts == EnvironmentFacts("FrozenLake-v1", (16,), 4, 0, 1) and facts.num_classes == 0
    assert facts.arguments == {"shape": (16,), "actions": 4, "v_min": 0, "v_max": 1}


@pytest.mark.parametrize(
    ("cls", "representation"),
    [(ReturnLearner, Categorical(0, 2)), (FreeReturnLearner, GaussianFields(0, 2, learn="density"))],
)
def test_networks_are_built_once(cls, representation, monkeypatch):
    """The target network is a copy, and nothing else draws initial weights."""
    drawn, draw = [], torch.nn.Linear.reset_parameters
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: drawn.append(draw(layer)))
    model = cls((4,), 2, representation, hidden=[8])
    assert len(drawn) == sum(isinstance(layer, torch.nn.Linear) for layer in model.network.modules())


def test_names_of_parameters_stay():
    """A state of the first version, given by the names and shapes that it had, is loaded."""
    names = [f"network.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")]
    model = ReturnLearner((16,), 4, GaussianFields(0, 1), hidden=[8])
    assert list(model.state_dict()) == ["probes", *names, *(f"target_{name}" for name in names)]
    shapes = {
        "network.0.weight": (8, 16),
        "network.0.bias": (8,),
        "network.2.weight": (204, 8),
        "network.2.bias": (204,),
    }
    stored = {f"{which}{name}": torch.full(shape, 0.5) for which in ("", "target_") for name, shape in shapes.items()}
    checkpoint = {"global_step": 20, "state_dict": {"probes": torch.eye(16)[:4], **stored}}
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    assert model.probes.shape == (4, 16) and bool((model.network[2].weight == 0.5).all()) and model.loaded_step == 20
    parts = [f"state.{k}.0" for k in (0, 1)] + [f"{part}.{k}" for part in ("place", "out") for k in (0, 1)]
    names = [f"network.{part}.{what}" for part in parts for what in ("weight", "bias")]
    free = FreeReturnLearner((16,), 4, GaussianFields(0, 1, learn="density"), hidden=[8])
    assert list(free.state_dict()) == ["probes", *names, *(f"target_{name}" for name in names)]


def test_policy_evaluation_of_the_uniform_policy():
    """uniform_policy=1: values of a learner are those of the uniform policy in a corridor, solved by hand."""
    torch.manual_seed(0)
    stream = Experience(Corridor(), (4,), gamma=0.5, size=100, warmup=90, batch_size=32)
    stream.fill()
    free = GaussianFields(0, 2, learn="density", positive=True)
    for cls, representation in (
        (ReturnLearner, GaussianFields(0, 2)),
        (ReturnLearner, Categorical(0, 2)),
        (FreeReturnLearner, free),
    ):
        model = cls((4,), 2, representation, hidden=[32, 32], uniform_policy=1.0)
        optimizer = torch.optim.Adam(model.network.parameters(), 5e-3)
        for k in range(300):
            loss = model.compute(stream.draw(), None)[0]["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if k % 10 == 0:
                model.target_network.load_state_dict(model.network.state_dict())
        with torch.no_grad():
            values = model.values(torch.eye(4)[:3])
        assert values.flatten().tolist() == pytest.approx([1.75, 1.75, 1.5, 1.5, 1.0, 1.0], abs=0.08)


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
    ("callbacks.returns.episodes=7", "episodes must be a multiple of num_envs"),
    ("data.max_steps=0", "max_steps must be positive, got 0"),
    (
        "data.env=CliffWalking-v1",
        "the options {'is_slippery': False} are meant for FrozenLake-v1, and env is CliffWalking-v1: "
        "set data.options=null, or data.options_for=CliffWalking-v1 if they are for it too",
    ),
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


def test_sde_of_categorical_returns_is_refused():
    model = ReturnLearner((4,), 2, Categorical(0, 1), sampler="sde")
    with pytest.raises(UserError, match="the sde needs fields"):
        model.sample(model.weights(torch.zeros(1, 4))[0], range(3))


def test_absent_gymnasium_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="environments need gymnasium: install it with 'uv sync --group rl'"):
        make_envs("CartPole-v1", 1)
