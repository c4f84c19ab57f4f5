"""Several runs of a learner of returns at once, with the steps and evaluations of train.py."""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd_lightning.cli import build as builder
from bd_lightning.cli import config as configs
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import bellman_target, td_loss
from datamodules import Environment
from datamodules.experience import play


class Seeds:
    """The networks of several runs, trained together: parameters with a leading dimension for the run.

    Args:
        models: one learner for each run, as train.py builds them.
    """

    def __init__(self, models: list[ReturnLearner]) -> None:
        self.model = models[0]
        stacked = zip(*(m.network.parameters() for m in models))
        self.parameters = [torch.stack([p.detach() for p in group]).requires_grad_() for group in stacked]
        self.copy()
        model = self.model
        self.optimizer = torch.optim.AdamW(self.parameters, model.lr, model.optimizer.betas, weight_decay=0.0)
        self.steps = 0

    def copy(self) -> None:
        """Network to target network."""
        self.target = [p.detach().clone() for p in self.parameters]

    def outputs(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Outputs (R, B, A, outputs) at observations (R, B, *shape)."""
        h = x.flatten(2)
        for i in range(0, len(parameters), 2):
            h = torch.baddbmm(parameters[i + 1][:, None], h, parameters[i].mT)
            h = h.relu() if i + 2 < len(parameters) else h
        return h.unflatten(2, (self.model.actions, -1))

    @torch.no_grad()
    def greedy(self, observation: np.ndarray) -> np.ndarray:
        """Best actions (R, B) at observations (R, B, *shape)."""
        rep = self.model.representation
        return rep.mean(rep.read(self.outputs(self.parameters, torch.from_numpy(observation)))).argmax(-1).numpy()

    def of(self, run: int) -> Any:
        """The greedy policy of one run."""
        part = [p[run : run + 1] for p in self.parameters]
        rep = self.model.representation

        @torch.no_grad()
        def greedy(observation: np.ndarray) -> np.ndarray:
            y = self.outputs(part, torch.from_numpy(observation)[None])
            return rep.mean(rep.read(y))[0].argmax(-1).numpy()

        return greedy

    def step(self, batches: list[tuple[Tensor, ...]]) -> Tensor:
        """One optimiser step of every run on its batch; losses (R,)."""
        observation, action, reward, discount, following = (torch.stack(part) for part in zip(*batches))
        rep, model = self.model.representation, self.model
        with torch.no_grad():
            y = self.outputs(self.target, following).flatten(0, 1)
        target = bellman_target(rep, y, reward.flatten(), discount.flatten(), model.uniform_policy)
        y = self.outputs(self.parameters, observation)
        losses = td_loss(rep, y, action, target.unflatten(0, action.shape)).mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps % model.target_every == 0:
            self.copy()
        return losses.detach()


def build(words: list[str], seeds: range | list[int]) -> tuple[dict, list[Environment], list[ReturnLearner]]:
    """The config, data modules and models of `train.py words seed=…`, one for each seed."""
    data, models = [], []
    for seed in seeds:
        config = configs.compose(configs.parse([*words, f"seed={seed}"]))
        torch.manual_seed(seed)
        data.append(builder.instantiate(config["data"], "data"))
        models.append(builder.instantiate(config["model"], "model", data[-1].facts.arguments))
    return config, data, models


def learn(words: list[str], seeds: range | list[int], steps: int, eval_every: int, stop: float = math.inf) -> dict:
    """Train all seeds, with evaluations as `callbacks.EpisodeReturns` makes them.

    Args:
        words: command line of train.py.
        seeds: seeds of the runs.
        steps: optimiser steps.
        eval_every: steps between evaluations.
        stop: end when every run has held this return over two evaluations.

    Returns:
        "env_steps" (E,), "returns" (R, E), "seconds" of training and collection for one run, evaluations not counted,
        and "final_loss" (R,).
    """
    config, data, models = build(words, seeds)
    options = config["callbacks"]["returns"]
    evaluation = data[0].make(options["num_envs"])
    runs = Seeds(models)
    streams = [d.open(d.seed) for d in data]
    for stream in streams:
        stream.fill()
    env_steps: list[int] = []
    returns: list[list[float]] = [[] for _ in streams]
    seconds, losses = 0.0, torch.zeros(len(streams))
    for k in range(1, steps + 1):
        start = time.process_time()
        for _ in range(streams[0].collect):
            greedy = runs.greedy(np.stack([stream.observation for stream in streams]))
            for stream, action in zip(streams, greedy):
                stream.step(action)
        losses = runs.step([stream.draw() for stream in streams])
        seconds += time.process_time() - start
        if k % eval_every == 0:
            env_steps.append(streams[0].steps)
            for i, row in enumerate(returns):
                found, _ = play(evaluation, data[0].shape, runs.of(i), options["episodes"], options.get("seed", 1))
                row.append(float(found.mean()))
            if all(reached(env_steps, row, stop) < math.inf for row in returns):
                break
    return {
        "env_steps": env_steps,
        "returns": returns,
        "seconds": seconds / len(streams),
        "final_loss": losses.tolist(),
    }


def reached(env_steps: list[int], returns: list[float], threshold: float) -> float:
    """Environment steps at the first of two evaluations in a row at or above a threshold; inf if there are none."""
    for i in range(len(returns) - 1):
        if returns[i] >= threshold and returns[i + 1] >= threshold:
            return env_steps[i]
    return math.inf
