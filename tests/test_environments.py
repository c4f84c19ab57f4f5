"""Harder environments: what they need, grids and bytes, and that each of their experiments trains."""

import csv
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from bd_lightning.checks import UserError
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import Convolutions, CVaR, Flat, GaussianFields, MeanReturn, Policy

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")

import gymnasium

from benchmarks import returns_linearity as linearity
from benchmarks import returns_training as benchmark
from callbacks import EpisodeReturns
from datamodules import Environment
from datamodules.environments import make_envs
from datamodules.experience import encode
from datamodules.splits import DataError


def test_caution_keeps_away_from_a_cliff_where_the_mean_does_not():
    """By exact backups. On gymnasium's slipping CliffWalking the best mean never risks a fall: no more can be done."""
    _, (data,), (model,) = benchmark.build(["experiment=rl_frozen_cliff"], [0])
    outcomes, rep = linearity.outcomes_of(data), model.representation
    chances = []
    for preference in (MeanReturn(), CVaR(0.25)):
        w = linearity.solved(rep, outcomes, Policy(preference), backups=60)
        chances.append(linearity.chance(outcomes, preference(rep, w).argmax(-1), -15, start=12))
    assert 0.08 < chances[0] < 0.16 and chances[1] < 0.01
    _, (data,), (model,) = benchmark.build(["experiment=rl_cliff"], [0])
    outcomes = linearity.outcomes_of(data)
    w = linearity.solved(model.representation, outcomes, Policy(), backups=150)
    assert linearity.chance(outcomes, model.representation.mean(w).argmax(-1), -100, start=36) < 0.01


class Pixels(gymnasium.Env):
    """Bytes that tell how many steps were taken."""

    observation_space = gymnasium.spaces.Box(0, 255, (4, 5, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return np.zeros((4, 5, 3), np.uint8), {}

    def step(self, action):
        self.taken += 1
        return np.full((4, 5, 3), 51 * self.taken, np.uint8), 1.0, self.taken == 5, False, {}


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("BytePixels-v0", entry_point=Pixels)
    return "BytePixels-v0"


def test_bytes_need_a_scale(pixels):
    with pytest.raises(DataError, match="uint8, up to 255.*no scale is declared: set data.scale .*data.scale=255$"):
        Environment(pixels, 0, 5)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        Environment(pixels, 0, 5, scale=0)
    data = Environment(pixels, 0, 5, scale=255, num_envs=2, warmup=20)
    stream = data.open(0)
    stream.fill()
    observation, _, _, discount, following = stream.replay[np.arange(20)]
    assert data.shape == (4, 5, 3)
    assert observation[:, 0, 0, 0].unique().tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert (following - observation).allclose(torch.tensor(0.2))  # that of the last step is 1, not the next episode's 0
    assert (discount == 0).sum() == 4


TINY = [
    "data.warmup=20", "data.held_out=20", "data.batch_size=8", "callbacks.returns.episodes=1",
    "callbacks.returns.num_envs=1", "callbacks.figures=null", "callbacks.report=null", "callbacks.progress=null",
    "logger=none", "steps=4", "eval_every=2", "run_id=tiny",
]  # fmt: skip
LAKE = ["experiment=rl_frozen_lake", *TINY]


def test_returns_of_grids_are_a_table_too(pixels, tmp_path):
    words = ["experiment=rl_frozen_lake", "data.options=null", f"data.env={pixels}", "data.scale=255", "data.v_max=6"]
    assert train.main([*words, *TINY, f"root={tmp_path}"]) == 0
    last, folder = next(tmp_path.rglob("last.ckpt")), tmp_path / "exported"
    assert train.main(["predict", f"ckpt_path={last}", "n=3", "callbacks.progress=null"]) == 0
    assert train.main(["export", f"ckpt_path={last}", f"to={folder}", "callbacks.progress=null"]) == 0
    assert len((folder / "samples.csv").read_text().splitlines()) == 65
    assert "val/return 5" in (folder / "README.md").read_text() and (folder / "returns.json").is_file()
    careful = "model.preference={_target_: bd_lightning.returns.CVaR, level: 0.25}"
    assert train.main(["test", f"ckpt_path={last}", careful, "callbacks.progress=null"]) == 0
    cards = {}
    for name, word in (("mean", "model.sampler=inverse_cdf"), ("careful", careful)):
        words = [f"ckpt_path={last}", f"to={tmp_path / name}", word, "callbacks.progress=null"]
        assert train.main(["export", *words]) == 0
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert "by MeanReturn()" in cards["mean"] and "CVaR" not in cards["mean"]
    assert "test/return" in cards["careful"] and "by CVaR(level=0.25)" in cards["careful"]
    assert "MeanReturn" not in cards["careful"]
    assert len(next(tmp_path.rglob("predict-*/samples.csv")).read_text().splitlines()) == 4


def test_averages_of_a_return_model_begin_and_go_on(tmp_path):
    words = [*LAKE, "callbacks.ema._target_=callbacks.PowerAverages", f"root={tmp_path}"]
    assert train.main(words) == 0
    last = next(tmp_path.rglob("last.ckpt"))
    assert train.main([f"ckpt_path={last}", "steps=6", "callbacks.progress=null"]) == 0
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 6 and kept["state_dict"]["probes"].abs().sum() > 0


@pytest.mark.parametrize("name", ["steps", "epsilon", "left", "above", "solved"])
def test_counts_and_shares_that_no_training_has_are_refused(name):
    values = ("many", -5, 2.5, 10**30, True) if name not in ("epsilon", "left") else (math.nan, -3.0)
    holder = Environment("FrozenLake-v1", 0, 1) if name in ("steps", "epsilon", "left") else EpisodeReturns()
    sound = holder.state_dict()
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must "):
            holder.load_state_dict({**sound, name: value})
        assert holder.state_dict() == sound


def test_damaged_states_of_returns_are_one_sentence(tmp_path, capsys):
    assert train.main([*LAKE, f"root={tmp_path}"]) == 0
    last, changed = next(tmp_path.rglob("last.ckpt")), tmp_path / "changed.ckpt"

    def answer(place, values, *words):
        kept = node = torch.load(last, weights_only=True)
        for key in place:
            node = node[key]
        node.update(values)
        torch.save(kept, changed)
        return train.main([*words, f"ckpt_path={changed}"]), capsys.readouterr().err

    for place, values in ((["Environment"], {"steps": -5}), (["callbacks", "EpisodeReturns"], {"above": "x"})):
        status, said = answer(place, values, "steps=6", f"root={tmp_path / 'other'}")
        assert status == 2 and "its states are damaged" in said and said.count("error: ") == 1, said
    for probes in (torch.zeros(4, 7), torch.zeros(0, 16), torch.zeros(4, 16, dtype=torch.long), torch.tensor(1.0)):
        status, said = answer(["state_dict"], {"probes": probes}, "predict", "n=3")
        assert status == 2 and "do not fit the model" in said, said
    half = torch.load(last, weights_only=True)["state_dict"]["probes"].half()
    assert answer(["state_dict"], {"probes": half}, "predict", "n=3")[0] == 0  # as weights in half precision are


def test_a_test_says_what_its_threshold_is_and_calls_are_of_other_samplers(tmp_path, capsys):
    assert train.main([*LAKE, f"root={tmp_path}"]) == 0
    last = next(tmp_path.rglob("last.ckpt"))
    for threshold, told in ((-1, "-1 was reached"), (2, "2 was not reached")):
        assert train.main(["test", f"ckpt_path={last}", f"callbacks.returns.threshold={threshold}"]) == 0
        assert told in capsys.readouterr().out
    own, *tests = [json.loads(path.read_text())[-1] for path in sorted(tmp_path.rglob("returns.json"))]
    assert "seed 1" in own["protocol"].split(", ")[-1] and len(tests) == 2
    assert all(row["protocol"].endswith("seed 10001") for row in tests)  # not the episodes that chose the best
    assert train.main(["test", f"ckpt_path={last}", "calls=[5]"]) == 2
    assert "calls are network calls of samplers of noise levels, and ReturnLearner has none" in capsys.readouterr().err


def test_a_test_with_another_discount_says_so(tmp_path, capsys):
    """And a threshold that one evaluation met was not held over two."""
    assert train.main([*LAKE, "eval_every=4", "callbacks.returns.threshold=0", f"root={tmp_path}"]) == 0
    assert "; 0 was not held over two evaluations" in capsys.readouterr().out
    last = next(tmp_path.rglob("last.ckpt"))
    assert train.main(["test", f"ckpt_path={last}", "data.gamma=0.9"]) == 0
    told = "; data not as in training (data.gamma)"
    assert told in capsys.readouterr().out
    rows = [json.loads(path.read_text())[-1]["protocol"] for path in sorted(tmp_path.rglob("returns.json"))]
    assert [told in protocol for protocol in rows] == [False, True]


def test_callbacks_of_points_are_not_for_environments(tmp_path, capsys):
    assert train.main(["experiment=rl_frozen_lake", "callbacks=points", "logger=none", f"root={tmp_path}"]) == 2
    assert "is for vectors, and FrozenLake-v1 is an environment: choose callbacks=returns" in capsys.readouterr().err


def test_exploration_fades_as_fast_in_a_run_that_goes_on():
    """ε of a run that is resumed twice, against one that is not: the same at as many steps after each warm-up."""

    def begun(state, decay=1000):
        data = Environment("CartPole-v1", 0, 100, decay=decay, warmup=10, num_envs=1)
        data.load_state_dict(state)
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(explore=None), global_rank=0)
        data.train_dataloader()
        return data

    data, gone = begun({}), 0
    for more in (300, 300, 900):
        data.experience.steps += 10 + more
        gone = min(1000, gone + more)
        assert data.experience.exploration == pytest.approx(1 - 0.95 * gone / 1000)
        data = begun(data.state_dict())
    first, second = begun({}).experience, data.experience
    assert (first.observation != second.observation).all() and first.random.random() != second.random.random()
    longer = begun({"steps": 500, "epsilon": 0.5, "left": 0.5}, decay=4000)  # the share that is left, of another length
    assert longer.experience.decay == 2000 and longer.experience.exploration == 0.5


def test_each_process_has_experience_of_its_own():
    """Not that of any process of another seed either, nor what it has met itself before it was resumed."""
    first = {}
    for seed, rank, steps in itertools.product((0, 1, 1000, 2000), (0, 1, 2), (0, 500)):
        data = Environment("CartPole-v1", 0, 100, warmup=10, num_envs=1, seed=seed)
        data.load_state_dict({"steps": steps})
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(explore=None), global_rank=rank)
        data.train_dataloader()
        first[tuple(data.experience.observation.flatten().tolist())] = seed, rank, steps
    assert len(first) == 4 * 3 * 2


def test_mistakes_of_environments_are_one_sentence(tmp_path, capsys, monkeypatch):
    assert train.main([*LAKE, "data.options.map_name=5x5", f"root={tmp_path}"]) == 2
    assert "cannot make the environment 'FrozenLake-v1' with options" in capsys.readouterr().err
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Lost-v0", entry_point="test_environments:Corider")
    with pytest.raises(DataError, match="cannot make the environment 'Lost-v0': AttributeError: .*no attribute"):
        make_envs("Lost-v0", 1)
    words = ["experiment=rl_frozen_lake", "data=frozen_lake_lambda", "model=returns_in_x", *TINY, f"root={tmp_path}"]
    assert train.main(words) == 2
    assert "these transitions are of 1 to n steps, for λ-returns" in capsys.readouterr().err


class FromFive(gymnasium.Env):
    """Three states 5, 6, 7, which the actions 2 and 3 leave as they are and raise; or the state as one number."""

    action_space = gymnasium.spaces.Discrete(2, start=2)

    def __init__(self, number=False):
        spaces = gymnasium.spaces
        self.number = number
        self.observation_space = spaces.Box(0, 9, (), np.float32) if number else spaces.Discrete(3, start=5)

    def seen(self):
        return np.float32(self.at) if self.number else self.at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 5
        return self.seen(), {}

    def step(self, action):
        assert action in (2, 3)
        self.at += int(action) - 2
        return self.seen(), 0.0, self.at == 7, False, {}


class Faulty(gymnasium.Env):
    """Gives what it is told to at its third step of an episode."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, fault):
        self.fault = fault

    def reset(self, seed=None, options=None):
        self.at = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.at += 1
        seen, reward = np.zeros(2, np.float32), 0.0
        if self.at == 3:
            if self.fault == "raise":
                raise RuntimeError("motor on fire")
            seen = {"shape": np.zeros(3, np.float32), "nan": np.full(2, np.nan, np.float32)}.get(self.fault, seen)
            seen = np.full(2, -1e39) if self.fault == "far" else seen
            rewards = {"reward": float("nan"), "none": None, "inf": float("inf"), "1e39": -1e39}
            reward = rewards.get(self.fault, reward)
        return seen, reward, self.at == 5, False, {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", r"'Faulty-v0' failed in step\(\): RuntimeError: motor on fire"),
        ("shape", r"'Faulty-v0' observes the shape \[3\] in step\(\), and its observation_space says \[2\]"),
        ("nan", r"'Faulty-v0' observes numbers that are not finite in single precision in step\(\)"),
        ("reward", r"'Faulty-v0' gives the reward nan in step\(\): rewards must be finite numbers"),
        ("inf", r"'Faulty-v0' gives the reward inf in step\(\): rewards must be finite numbers"),
        ("1e39", r"'Faulty-v0' gives the reward -1e\+39 in step\(\): rewards must be .* single precision"),
        ("far", r"'Faulty-v0' observes numbers that are not finite in single precision in step\(\)"),
        ("none", r"'Faulty-v0' failed in step\(\): TypeError: .*NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # gymnasium's own checker has seen it too
def test_faults_of_environments_name_them(fault, message, monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Faulty-v0", entry_point=Faulty, disable_env_checker=True)
    with pytest.raises(DataError, match=message):
        envs = make_envs("Faulty-v0", 2, {"fault": fault})
        envs.reset(seed=0)
        for _ in range(4):
            envs.step(np.zeros(2, dtype=int))


class Room(Faulty):
    """One of four numbered places; says another thing at its third step."""

    observation_space = gymnasium.spaces.Discrete(4)

    def reset(self, **options):
        super().reset()
        return 0, {}

    def step(self, action):
        _, *rest = super().step(action)
        return (self.fault if self.at == 3 else np.int64(self.at % 4)), *rest


@pytest.mark.parametrize("place", [99, -1, 1.5])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_states_outside_their_space_are_named(place, monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Room-v0", entry_point=Room, disable_env_checker=True)
    told = rf"'Room-v0' observes {place} in step\(\), and its observation_space has the integers 0 to 3"
    with pytest.raises(DataError, match=told):
        envs = make_envs("Room-v0", 2, {"fault": place})
        envs.reset(seed=0)
        for _ in range(4):
            envs.step(np.zeros(2, dtype=int))


def test_many_states_are_encoded_one_by_one():
    observed = np.array([3, 10**6 - 1])
    states = encode(observed, (10**6,))  # of which all are a matrix of 4 TB
    assert states.dtype == np.float32 and states.argmax(1).tolist() == observed.tolist() and states.sum() == 2


def test_environments_without_an_observation_are_refused(monkeypatch):
    class Blind(Pixels):
        observation_space = gymnasium.spaces.Box(-1, 1, (0,), np.float32)

    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("Blind-v0", entry_point=Blind, disable_env_checker=True)
    with pytest.raises(DataError, match="'Blind-v0' observes nothing: its observation_space is Box"):
        make_envs("Blind-v0", 1)


def test_spaces_that_do_not_start_at_zero_and_single_numbers(monkeypatch):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("FromFive-v0", entry_point=FromFive, max_episode_steps=20)
    for number, shape in ((False, (3,)), (True, (1,))):
        data = Environment("FromFive-v0", -1, 1, options={"number": number}, num_envs=1, warmup=40)
        stream = data.open(0)
        stream.fill()
        observation, action, _, _, following = stream.replay[np.arange(40)]
        assert data.shape == shape and data.actions == 2 and set(action.tolist()) == {0, 1}
        places = [
            one.float() @ (torch.arange(5.0, 8.0) if not number else torch.ones(1)) for one in (observation, following)
        ]
        assert torch.equal(places[1], places[0] + action)


def test_an_environment_of_ones_own_is_registered_beside_a_class_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_environment.py").write_text(
        "import datamodules, gymnasium\n"
        "class Environment(datamodules.Environment):\n    pass\n"
        "gymnasium.register('Own-v0', entry_point='test_environments:FromFive', max_episode_steps=20)\n"
    )
    words = [
        "experiment=rl_frozen_lake",
        "data._target_=own_environment.Environment",
        "data.env=Own-v0",
        "data.options=null",
        "data.v_min=-1",
        "data.v_max=1",
        "steps=4",
    ]
    words += ["eval_every=4", "logger=none", f"root={tmp_path}", "run_id=own"]
    assert train.main(words) == 0
    path = next(tmp_path.rglob("last.ckpt"))
    assert train.main(["predict", f"ckpt_path={path}", "n=3"]) == 2
    assert "names 'own_environment.Environment'" in capsys.readouterr().err
    assert train.main(["predict", f"ckpt_path={path}", "n=3", "trust=true"]) == 0


def test_packages_of_environments_that_are_missing_are_named(monkeypatch):
    registry = {name: spec for name, spec in gymnasium.registry.items() if not name.startswith("MinAtar/")}
    monkeypatch.setattr(gymnasium, "registry", registry)
    monkeypatch.setitem(sys.modules, "minatar", None)
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    with pytest.raises(
        UserError, match="^'MinAtar/Breakout-v1' needs minatar: install it with 'uv sync --group games'$"
    ):
        make_envs("MinAtar/Breakout-v1", 1)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    with pytest.raises(
        UserError, match="^'LunarLander-v3' needs packages .*Box2D and MinAtar come with 'uv sync --group games'$"
    ):
        make_envs("LunarLander-v3", 1)


def test_convolutions_read_grids_with_channels_last():
    layers, width = Convolutions(channels=[2, 3], size=3)((6, 5, 4))
    network = torch.nn.Sequential(*layers)
    observation = torch.rand(7, 6, 5, 4)
    assert network(observation.flatten(1)).shape == (7, width) and width == 3 * 2 * 1
    layers, width = Convolutions(channels=[1])((4, 5, 3))
    network = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        next(network.parameters())[0, 2, 0, 1] = 1.0  # the last channel, one cell up
    observation = torch.rand(7, 4, 5, 3)
    assert torch.equal(network(observation.flatten(1)), observation[:, :2, 1:4, 2].flatten(1)) and width == 6
    assert Flat()((4, 5)) == ([], 20)
    layers, width = Convolutions(channels=[2, 3], size=2)((6, 5, 4))
    assert torch.nn.Sequential(*layers)(torch.rand(7, 120)).shape == (7, width) and width == 3 * 4 * 3


@pytest.mark.parametrize("shape", [(16,), (10, 10), (2, 10, 3)])
def test_convolutions_of_what_is_no_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"convolutions read grids of shape \(H, W, C\) with sides above 2"):
        ReturnLearner(shape, 2, GaussianFields(0, 1), features=Convolutions())


def test_refusals_reach_the_command_line(tmp_path, capsys):
    words = ["experiment=rl_frozen_lake", "logger=none", f"root={tmp_path}"]
    assert train.main([*words, "model.features._target_=bd_lightning.returns.Convolutions"]) == 2
    assert train.main([*words, "model.features={_target_: bd_lightning.returns.Convolutions, channels: [0]}"]) == 2
    printed = capsys.readouterr().err
    assert "convolutions read grids of shape (H, W, C)" in printed and "channels[0] must be positive" in printed
    assert "Traceback" not in printed


EXPERIMENTS = {  # the package that it needs, and what makes it quick
    "rl_acrobot": ("gymnasium", ("data.max_steps=50",)),
    "rl_cliff": ("gymnasium", ("data.max_steps=30",)),
    "rl_frozen_cliff_cautious": ("gymnasium", ("data.max_steps=30",)),
    "rl_breakout": ("minatar", ("data.size=2000", "data.max_steps=30")),
    "rl_asterix": ("minatar", ("data.size=2000", "data.max_steps=30")),
    "rl_lunar_lander": ("Box2D", ("data.max_steps=50",)),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_train(name, tmp_path):
    """300 steps towards the targets of a target network that stays: the loss on held-out transitions has fallen."""
    package, more = EXPERIMENTS[name]
    pytest.importorskip(package, reason=f"{package} is not installed: uv sync --group games")
    words = [f"experiment={name}", "data.warmup=300", "model.target_every=1000", "model.lr=1e-3", *more]
    _, (data,), (model,) = benchmark.build(words, [0])
    held_out = data.held_out_transitions("val")[np.arange(data.held_out)]
    before = float(model.compute(held_out, None)[0]["loss"])
    words += ["steps=300", "eval_every=150", "logger=none", "run_id=x", f"root={tmp_path}", "callbacks.figures=null"]
    words += ["callbacks.returns.episodes=2", "callbacks.returns.num_envs=2", "callbacks.progress=null"]
    assert train.main([*words, "trainer.enable_progress_bar=false"]) == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row.get("val/loss")]
    losses = [float(row["val/loss"]) for row in rows]
    assert len(losses) == 2 and losses[-1] < before
    assert len(json.loads((folder / "returns.json").read_text())) == 2  # episodes were played


def test_convolutions_of_several_runs_are_those_of_each():
    """The benchmark's batched networks against the models that they were stacked from."""
    pytest.importorskip("minatar", reason="minatar is not installed: uv sync --group games")
    _, data, models = benchmark.build(["experiment=rl_breakout", "data.warmup=64"], [0, 1])
    runs = benchmark.Seeds(models)
    rows = [d.held_out_transitions("val")[np.arange(8)] for d in data]
    y = runs.outputs(runs.parameters, torch.stack([row[0] for row in rows]))
    for i, model in enumerate(models):
        assert torch.allclose(y[i], model.outputs(model.network, rows[i][0]), atol=1e-5)
    losses = runs.step(rows)
    for i, model in enumerate(models):
        assert float(losses[i]) == pytest.approx(float(model.compute(rows[i], None)[0]["loss"]), rel=1e-4)
