"""Several runs of a learner of returns at once, with the steps and evaluations of train.py."""

import json
import math
import time

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from bd_lightning.cli import build as builder
from bd_lightning.cli import config as configs
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import Preference, td_loss
from datamodules import Environment
from datamodules.experience import Greedy, mean_of_worst, play


class Seeds:
    """The networks of several runs, trained together: parameters with a leading dimension for the run.

    Args:
        models: one learner for each run, as train.py builds them.
        eps: what AdamW adds to the root of its second moment.
    """

    def __init__(self, models: list[ReturnLearner], eps: float = 1e-8) -> None:
        self.model = models[0]
        self.names = [name for name, _ in self.model.network.named_parameters()]
        stacked = zip(*(m.network.parameters() for m in models))
        self.parameters = [torch.stack([p.detach() for p in group]).requires_grad_() for group in stacked]
        self.copy()
        model = self.model
        self.optimizer = torch.optim.AdamW(self.parameters, model.lr, model.optimizer.betas, eps, weight_decay=0.0)
        self.steps = 0

    def copy(self) -> None:
        """Network to target network."""
        self.target = [p.detach().clone() for p in self.parameters]

    def outputs(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Outputs (R, B, A, outputs) at observations (R, B, *shape)."""

        def one(own: dict[str, Tensor], observation: Tensor) -> Tensor:
            return functional_call(self.model.network, own, (observation.flatten(1),))

        y = torch.vmap(one)(dict(zip(self.names, parameters)), x)
        return y.unflatten(2, (self.model.actions, -1))

    @torch.no_grad()
    def _best(self, preference: Preference, parameters: list[Tensor], x: np.ndarray) -> np.ndarray:
        rep = self.model.representation
        return preference(rep, rep.read(self.outputs(parameters, torch.from_numpy(x)))).argmax(-1).numpy()

    def explore(self, observation: np.ndarray) -> np.ndarray:
        """Actions (R, B) at observations (R, B, *shape) by which experience is collected."""
        return self._best(self.model.exploration, self.parameters, observation)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Distributions (R, S, A, N) of every run in all states of a finite set."""
        states = torch.eye(*self.model.shape * 2).expand(len(self.parameters[0]), -1, -1)
        return self.model.representation.read(self.outputs(self.parameters, states))

    def of(self, run: int) -> Greedy:
        """The greedy policy of one run."""
        part = [p[run : run + 1] for p in self.parameters]
        return lambda observation: self._best(self.model.policy.preference, part, observation[None])[0]

    def step(self, batches: list[tuple[Tensor, ...]]) -> Tensor:
        """One optimiser step of every run on its batch; losses (R,)."""
        observation, action, reward, discount, following = (torch.stack(part) for part in zip(*batches))
        rep, model = self.model.representation, self.model
        with torch.no_grad():
            y = self.outputs(self.target, following.reshape(len(batches), -1, *model.shape)).flatten(0, 1)
        each = reward.flatten(0, 1)
        target = model.backup(y.unflatten(0, each.shape), each, discount.flatten(0, 1))
        y = self.outputs(self.parameters, observation)
        losses = td_loss(rep, y, action, target.unflatten(0, action.shape)).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps % model.target_every == 0:
            self.copy()
        return losses.detach()


def words_of(experiment: str, method: str, rate: float) -> list[str]:
    """The words for an experiment by a method, as its file in `configs/model` represents returns, at a learning rate.

    `model=method` would leave out what the experiment says of the model: its convolution, or that it is cautious.
    """
    representation = json.dumps(configs.named("model", method)["representation"])
    return [f"experiment={experiment}", f"model.representation={representation}", f"model.lr={rate}"]


def build(words: list[str], seeds: range | list[int]) -> tuple[dict, list[Environment], list[ReturnLearner]]:
    """The config, data modules and models of `train.py words seed=…`, one for each seed."""
    data, models = [], []
    for seed in seeds:
        config = configs.compose(configs.parse([*words, f"seed={seed}"]))
        torch.manual_seed(seed)
        data.append(builder.instantiate(config["data"], "data"))
        models.append(builder.instantiate(config["model"], "model", data[-1].facts.arguments))
    return config, data, models


class Training:
    """Several runs in training, each with its own experience, in the steps of train.py.

    Args:
        words: command line of train.py.
        seeds: seeds of the runs.
    """

    def __init__(self, words: list[str], seeds: range | list[int]) -> None:
        self.config, self.data, models = build(words, seeds)
        self.runs, self.streams = Seeds(models), [d.open(d.seed) for d in self.data]
        for stream in self.streams:
            stream.fill()

    def step(self) -> Tensor:
        """Steps of the environments and one of the optimiser; losses (R,)."""
        for _ in range(self.streams[0].collect):
            actions = self.runs.explore(np.stack([stream.observation for stream in self.streams]))
            for stream, action in zip(self.streams, actions):
                stream.step(action)
        return self.runs.step([stream.draw() for stream in self.streams])


def learn(words: list[str], seeds: range | list[int], steps: int, eval_every: int, stop: float = math.inf) -> dict:
    """Train all seeds, with evaluations as `callbacks.EpisodeReturns` makes them.

    Args:
        words: command line of train.py.
        seeds: seeds of the runs.
        steps: optimiser steps.
        eval_every: steps between evaluations.
        stop: end when every run has held this return over two evaluations.

    Returns:
        "env_steps" (E,), mean "returns" (R, E) of the episodes that count, and "seconds" of training and collection for
        one run, without evaluations.
    """
    training = Training(words, seeds)
    options, data = training.config["callbacks"]["returns"], training.data[0]
    evaluation = data.make(options["num_envs"])
    env_steps: list[int] = []
    returns: list[list[float]] = [[] for _ in seeds]
    seconds = 0.0
    for k in range(1, steps + 1):
        start = time.process_time()
        training.step()
        seconds += time.process_time() - start
        if k % eval_every == 0:
            env_steps.append(training.streams[0].steps)
            for i, row in enumerate(returns):
                policy = training.runs.of(i)
                found, _ = play(evaluation, data.shape, policy, options["episodes"], options.get("seed", 1))
                row.append(mean_of_worst(found, options.get("worst", 1.0)))
            if all(reached(env_steps, row, stop) < math.inf for row in returns):
                break
    return {
        "env_steps": env_steps,
        "returns": returns,
        "seconds": seconds / len(seeds),
    }


def reached(env_steps: list[int], returns: list[float], threshold: float) -> float:
    """Environment steps at the first of two evaluations in a row at or above a threshold; inf if there are none."""
    for i in range(len(returns) - 1):
        if returns[i] >= threshold and returns[i + 1] >= threshold:
            return env_steps[i]
    return math.inf
