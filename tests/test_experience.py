"""Transitions of environments: their lengths, ends, limits and mixtures; whole episodes."""

import sys

import numpy as np
import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.facts import EnvironmentFacts
from bd_lightning.modules import LambdaReturnLearner, ReturnLearner
from bd_lightning.returns import GaussianFields
from bd_lightning.returns.fields import normal_cdf

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")

from datamodules import Environment
from datamodules.environments import LONGEST, make_envs
from datamodules.experience import Experience, LambdaExperience, Transitions, mean_of_worst, play
from tests.corridor import Corridor


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


def test_a_full_replay_keeps_the_newest_transitions():
    replay = Transitions(3, (1,))
    for k in range(5):
        replay.add([k], k, float(k), 0.5, [k + 1])
    assert len(replay) == 3 and sorted(replay.action.tolist()) == [2, 3, 4]
    assert replay.reward.tolist() == replay.action.tolist() == replay.observation[:, 0].tolist()


def test_batches_are_drawn_of_what_was_seen_alone():
    stream = Experience(Corridor(), (4,), gamma=0.5, size=1000, warmup=6)
    stream.fill()
    assert (stream.draw()[0].sum(1) == 1).all()


def test_actions_are_random_with_the_probability_of_exploration():
    for epsilon, least, most in ((0.0, 200, 200), (0.5, 120, 180), (1.0, 65, 135)):  # within five standard deviations
        stream = Experience(Corridor(), (4,), gamma=0.5, epsilon=(epsilon, epsilon), size=200)
        for _ in range(200):
            stream.step(np.array([1]))  # of two actions
        assert least <= stream.replay.action.sum() <= most


def test_before_every_batch_as_many_steps_are_made_as_are_asked_for():
    stream = Experience(Corridor(), (4,), gamma=0.5, warmup=6, collect=3).bind(lambda observation: np.array([0]))
    batches = iter(stream)
    assert [next(batches) and stream.steps for _ in range(2)] == [9, 12]


def test_extremes_are_those_of_all_episodes_and_rounding_is_not_outside():
    class Paying(Corridor):
        pay = [1.5, 1.0, 2.0, 1.5]  # for every step of an episode

        def step(self, action):
            observed, _, done, *rest = super().step(action)
            return observed, np.array([self.pay.pop(0) if done else self.pay[0]]), done, *rest

    nearly = np.nextafter(1.75, 2), np.nextafter(3.5, 0)  # 1 + ½ + ¼, and twice that
    stream = Experience(Paying(), (4,), gamma=0.5, warmup=12, returns_range=nearly)
    stream.fill()
    assert stream.episodes == 4 and stream.outside == 0 and stream.extremes == (1.75, 3.5)


def test_episodes_of_an_evaluation_are_the_first_of_every_environment():
    class Unequal:
        """Episodes of one step in the first environment and of three in the second."""

        num_envs, steps = 2, 0

        def reset(self, seed=None):
            return np.zeros(2, dtype=int), {}

        def step(self, action):
            self.steps += 1
            ended = np.array([True, self.steps % 3 == 0])
            return np.zeros(2, dtype=int), np.array([float(self.steps), 100.0]), ended, np.zeros(2, bool), {}

    returns, cut = play(Unequal(), (1,), lambda observation: np.zeros(2, dtype=int), 4, 0)
    assert returns.tolist() == [1, 2, 300, 300] and not cut.any()


def test_the_worst_seven_of_a_hundred_are_seven():
    assert 0.07 * 100 > 7  # in double precision
    assert mean_of_worst(np.arange(100.0), 0.07) == 3 and mean_of_worst(np.arange(100.0), 0.071) == 3.5


def test_the_mass_outside_is_that_of_the_target():
    """Of the return from the next state on, moved by the transition: not of that of the state before it."""
    rep = GaussianFields(-10, 0)
    model, states = ReturnLearner((2,), 1, rep), torch.eye(2)
    table = torch.stack([normal_cdf((rep.points - mean) / rep.h) - rep.start for mean in (-9.9, -5.0)])
    model.outputs = lambda network, observation: (observation @ table)[:, None]
    for state, following, outside in ((0, 1, 0.0), (1, 0, 1.0)):
        step = torch.tensor([-1.0]), torch.tensor([0.99])
        batch = states[[state]], torch.tensor([0]), *step, states[[following]]
        assert float(model.compute(batch, None)[0]["outside"]) == pytest.approx(outside, abs=0.02)


def test_batches_wait_for_the_first_transition():
    """Of three steps: a shorter warm-up has none yet."""
    data = Environment("CartPole-v1", 0, 100, num_envs=2, n_step=3, warmup=2)
    assert next(iter(data.open(0).bind(lambda x: np.zeros(2, dtype=int))))[0].shape == (128, 4)


def test_neighbouring_seeds_share_no_environment():
    data, seen = Environment("CartPole-v1", 0, 100, num_envs=3), []

    def first(observation):
        seen.append(observation)
        raise KeyboardInterrupt

    for seed in (0, 1):
        seen.append(data.open(seed).observation)
        with pytest.raises(KeyboardInterrupt):
            play(data.make(3), data.shape, first, 3, seed)
    assert len(np.unique(np.concatenate(seen), axis=0)) == 12


def test_as_many_transitions_are_held_out_as_were_asked_for():
    """By four environments, whatever the size of the replay."""
    for size in (10, 1000):
        data = Environment("CartPole-v1", 0, 100, size=size, held_out=25)
        assert len(data.held_out_transitions("val")) == 25


def test_time_limits_do_not_end_the_return():
    """CartPole cut off after five steps is truncated, so that its transitions keep their discount."""
    data = Environment("CartPole-v1", 0, 100, options={"max_episode_steps": 5}, num_envs=2, warmup=40)
    stream = data.open(0)
    stream.fill()
    assert stream.episodes == 8 and list(stream.finished) == [5.0] * 8
    batch = stream.replay.__getitems__(np.arange(40))
    assert (batch[3] == np.float32(0.99)).all()
    assert (batch[0] - batch[4]).abs().max() < 1  # the last observation of an episode, not the first of the next


def test_limits_of_environments_hold_unless_another_is_set():
    made = [
        (Environment("CliffWalking-v1", -100, 0), LONGEST, LONGEST),
        (Environment("CliffWalking-v1", -100, 0, options={"max_episode_steps": 7}), None, 7),
        (Environment("CartPole-v1", 0, 100), None, 500),
        (Environment("CartPole-v1", 0, 100, max_steps=20), 20, 20),
    ]
    for data, cap, limit in made:
        assert (data.cap, data.make(1).envs[0].spec.max_episode_steps) == (cap, limit)


def test_environments_have_actions_and_no_classes():
    facts = Environment("FrozenLake-v1", 0, 1, options={"is_slippery": False}).facts
    assert facts == EnvironmentFacts("FrozenLake-v1", (16,), 4, 0, 1) and facts.num_classes == 0
    assert facts.arguments == {"shape": (16,), "actions": 4, "v_min": 0, "v_max": 1}


def test_absent_gymnasium_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match="environments need gymnasium: install it with 'uv sync --group rl'"):
        make_envs("CartPole-v1", 1)
