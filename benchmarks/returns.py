"""Fields of return distributions against C51: environment steps to a threshold, and distance to Monte-Carlo returns.

    uv run benchmarks/returns.py control [--envs …] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py evaluate [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py peer --script FOLDER/c51.py [--python …] [--out runs/returns]
    uv run benchmarks/returns.py examples
    uv run benchmarks/returns.py table [--out runs/returns] [--figure docs/returns.png]

`control` trains `train.py experiment=rl_… model=returns|c51` for ten seeds, at the common rate of 2.5e-4 and at the
rate that took each method the fewest steps on five other seeds. All seeds of a row are trained at once, with one
batched product for each layer; the steps are those of train.py, and `tests/test_returns.py` compares the two.

`evaluate` learns the returns of Markov reward processes and measures the 1-Wasserstein distance to 20,000 simulated
returns of each state, the mean over states, in units of the mean standard deviation of a state's return.

`peer` trains C51 on CartPole, ours and cleanrl's script as it is, and compares the returns of the training episodes.

A row that is finished is kept in OUT/*.jsonl and not computed again, so that the command can be stopped and repeated.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from bd_lightning import build as builder
from bd_lightning import config as configs
from bd_lightning.dynamics import BellmanDynamics, SampleNoise
from bd_lightning.modules import ReturnLearner
from bd_lightning.modules.returns import td_loss
from bd_lightning.returns import (
    Categorical,
    GaussianFields,
    ReturnFields,
    bellman_target,
    conditional_value_at_risk,
    quantile,
    ruin,
    sample_by_sde,
    wasserstein1,
)
from datamodules.replay import Environment, play

METHODS = ("returns", "c51")
SEEDS, TUNING_SEEDS = range(10), range(100, 105)
COMMON_RATE = 2.5e-4
ENVS: dict[str, tuple[tuple[float, ...], int, int]] = {  # thresholds, optimiser steps, steps between evaluations
    "rl_frozen_lake": ((0.95,), 6000, 50),
    "rl_frozen_lake_slippery": ((0.6, 0.7), 12_000, 600),
    "rl_cartpole": ((195.0, 475.0), 30_000, 500),
}
RATES = {
    "rl_frozen_lake": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "rl_frozen_lake_slippery": (1e-3, 2e-3, 4e-3, 8e-3),
    "rl_cartpole": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
}


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
        self.optimizer = torch.optim.AdamW(self.parameters, model.lr, model.betas, weight_decay=0.0)
        self.steps = 0

    def copy(self) -> None:
        """Network to target network."""
        self.target = [p.detach().clone() for p in self.parameters]

    def heads(self, parameters: list[Tensor], x: Tensor) -> Tensor:
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
        return rep.mean(rep.read(self.heads(self.parameters, torch.from_numpy(observation)))).argmax(-1).numpy()

    def of(self, run: int) -> Any:
        """The greedy policy of one run."""
        part = [p[run : run + 1] for p in self.parameters]
        rep = self.model.representation

        @torch.no_grad()
        def greedy(observation: np.ndarray) -> np.ndarray:
            y = self.heads(part, torch.from_numpy(observation)[None])
            return rep.mean(rep.read(y))[0].argmax(-1).numpy()

        return greedy

    def step(self, batches: list[tuple[Tensor, ...]]) -> Tensor:
        """One optimiser step of every run on its batch; losses (R,)."""
        observation, action, reward, discount, following = (torch.stack(part) for part in zip(*batches))
        rep, model = self.model.representation, self.model
        with torch.no_grad():
            y = self.heads(self.target, following).flatten(0, 1)
        target = bellman_target(rep, y, reward.flatten(), discount.flatten(), model.uniform)
        y = self.heads(self.parameters, observation)
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
        models.append(builder.instantiate(config["model"], "model", data[-1].facts))
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
                found = play(evaluation, data[0].shape, runs.of(i), options["episodes"], options.get("seed", 1))
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


# ---- evaluation


class RewardProcess:
    """A Markov reward process of eight states on a ring that never ends.

    Args:
        rewards: "continuous", N(μ_k, 0.5²) in state k, or "discrete", ±1 with P(+1) = 1/(1 + e^{−2μ_k}); μ_k ~ N(0, 1).
        gamma: discount.
        backwards: share of another transition model, which stays or steps back with equal chances.
    """

    states = 8

    def __init__(self, rewards: str, gamma: float, backwards: float = 0.0) -> None:
        self.rewards, self.gamma = rewards, gamma
        self.mu = torch.randn(self.states, generator=torch.Generator().manual_seed(0))
        eye = torch.eye(self.states)
        forward = 0.6 * eye.roll(1, 1) + 0.3 * eye.roll(3, 1) + 0.1 * eye
        self.moves = (1 - backwards) * forward + backwards * (0.5 * eye.roll(-1, 1) + 0.5 * eye)

    def step(self, state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rewards and next states (B,)."""
        if self.rewards == "continuous":
            reward = self.mu[state] + 0.5 * torch.randn(len(state), generator=generator)
        else:
            chance = torch.sigmoid(2 * self.mu[state])
            reward = 2 * (torch.rand(len(state), generator=generator) < chance).float() - 1
        return reward, torch.multinomial(self.moves[state], 1, generator=generator)[:, 0]

    def simulate(self, n: int, seed: int) -> Tensor:
        """n returns of each state, (states, n), cut off where γᵗ falls below 1e-4."""
        generator = torch.Generator().manual_seed(seed)
        state = torch.arange(self.states).repeat_interleave(n)
        total, weight = torch.zeros(len(state)), 1.0
        while weight > 1e-4:
            reward, state = self.step(state, generator)
            total, weight = total + weight * reward, weight * self.gamma
        return total.reshape(self.states, n)


FIELDS = "bd_lightning.returns.GaussianFields"
LEARNERS: dict[str, dict[str, Any]] = {
    "fields": {"_target_": FIELDS, "nodes": 52, "bandwidth": 0.7},
    "c51": {"_target_": "bd_lightning.returns.Categorical", "atoms": 51},
    "fields, density": {"_target_": FIELDS, "nodes": 51, "learn": "density"},
    "fields, density, positive part": {"_target_": FIELDS, "nodes": 51, "learn": "density", "positive": True},
    "fields, density, mass free": {"_target_": FIELDS, "nodes": 51, "learn": "density", "mass": False},
}


def evaluate(rewards: str, gamma: float, learner: str, seeds: range, rate: float, steps: int) -> list[dict]:
    """Learn the returns of a process from fresh transitions; a row for each seed (two for C51)."""
    process = RewardProcess(rewards, gamma)
    truth = process.simulate(20_000, seed=99)
    center, reach = float(truth.mean()), 4.5 * float(truth.std())
    node = {**LEARNERS[learner], "v_min": center - reach, "v_max": center + reach}
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        rep = builder.instantiate(node, "representation")
        models.append(ReturnLearner((process.states,), 1, rep, uniform=1.0, target_every=20, lr=rate))
    runs, eye = Seeds(models), torch.eye(process.states)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    discount, action = torch.full((64,), gamma), torch.zeros(64, dtype=torch.long)
    start = time.process_time()
    for k in range(steps):
        for group in runs.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * k / steps))
        batches = []
        for generator in generators:
            state = torch.randint(process.states, (64,), generator=generator)
            reward, following = process.step(state, generator)
            batches.append((eye[state], action, reward, discount, eye[following]))
        runs.step(batches)
    seconds = (time.process_time() - start) / len(models)
    rep, spread = runs.model.representation, float(truth.std(1).mean())
    x = torch.linspace(center - 1.5 * reach, center + 1.5 * reach, 6001)
    with torch.no_grad():
        w = rep.read(runs.heads(runs.parameters, eye.expand(len(models), -1, -1)))[:, :, 0]
    rows = []
    for raw in (False, True) if learner == "c51" else (False,):
        if raw:
            rep.interpolate = False
        cdf = rep.cdf(w, x)
        mean = x[-1] - (cdf[..., 1:] + cdf[..., :-1]).sum(-1) / 2 * (x[1] - x[0])
        square = x[-1] ** 2 - ((cdf * x)[..., 1:] + (cdf * x)[..., :-1]).sum(-1) * (x[1] - x[0])
        for i, seed in enumerate(seeds):
            rows.append(
                {
                    "rewards": rewards,
                    "gamma": gamma,
                    "learner": learner + (", raw" if raw else ""),
                    "rate": rate,
                    "seed": seed,
                    "w1": float(wasserstein1(x, cdf[i], truth).mean()) / spread,
                    "mean_error": float((mean[i] - truth.mean(1)).abs().mean()) / spread,
                    "sd_ratio": float(((square[i] - mean[i] ** 2).clamp_min(0).sqrt() / truth.std(1)).mean()),
                    "parameters": sum(p.numel() for p in models[0].network.parameters()),
                    "seconds": seconds,
                }
            )
    return rows


# ---- examples of what linearity gives


def backup(rep: GaussianFields, process: RewardProcess, w: Tensor) -> Tensor:
    """The Bellman operator of a process with continuous rewards, all expectations taken exactly; weights (S, N)."""
    points, shares = np.polynomial.hermite_e.hermegauss(8)
    states = process.states
    total = torch.zeros(states, rep.outputs)
    for t, share in zip(points, shares / shares.sum()):
        reward = process.mu + 0.5 * float(t)
        total += float(share) * rep.target(process.moves @ w, reward, torch.full((states,), process.gamma))
    return rep.read(total)


def examples(gamma: float = 0.9) -> None:
    """Print a Markdown table: what fields give without learning anything anew, against simulation."""
    forward, back, both = (RewardProcess("continuous", gamma, share) for share in (0.0, 1.0, 0.3))
    returns = {name: p.simulate(20_000, 5) for name, p in (("forward", forward), ("back", back), ("both", both))}
    low, high = min(r.min() for r in returns.values()), max(r.max() for r in returns.values())
    rep = GaussianFields(float(low), float(high), nodes=78)
    x, spread = rep.grid(), float(returns["forward"].std(1).mean())

    def solve(operator) -> Tensor:
        w = rep.read(torch.zeros(8, rep.outputs))
        for _ in range(80):
            w = operator(w)
        return w

    def off(w: Tensor, sample: Tensor) -> str:
        return f"W1 {float(wasserstein1(x, rep.cdf(w, x), sample).mean()) / spread:.3f} sd"

    rows = []
    w, other = solve(lambda w: backup(rep, forward, w)), solve(lambda w: backup(rep, back, w))
    rows.append(("the process itself", off(w, returns["forward"])))
    mixed = solve(lambda w: 0.7 * backup(rep, forward, w) + 0.3 * backup(rep, back, w))
    rows.append(
        ("transition models mixed .7/.3 by their backups, against the mixed process", off(mixed, returns["both"]))
    )
    once = torch.cat([returns["forward"][:, :14_000], returns["back"][:, :6_000]], 1)
    rows.append(
        ("policies mixed .7/.3 at the first step, by the sum of their fields", off(0.7 * w + 0.3 * other, once))
    )
    generator, start = torch.Generator().manual_seed(1), torch.arange(8).repeat_interleave(4000)
    state, reward = start, torch.zeros(len(start))
    for k in range(3):
        r, state = forward.step(state, generator)
        reward += gamma**k * r
    begin = rep.read(torch.zeros(8, rep.outputs))
    parts = [rep.target(begin[s], r, torch.full_like(r, gamma**3)) for s, r in zip(state.split(400), reward.split(400))]
    sampled = rep.read(torch.stack([p.mean(0) for p in parts]).reshape(8, 10, -1).mean(1))
    exact = begin
    for _ in range(3):
        exact = backup(rep, forward, exact)
    gap = (rep.cdf(sampled - exact, x).abs().sum(1) * (x[1] - x[0])).mean() / spread
    rows.append(("three steps at once, 4,000 sampled paths, against three backups", f"W1 {float(gap):.3f} sd"))
    both_ways = torch.stack([backup(rep, p, w) for p in (forward, back)])
    policy = torch.tensor([0.7, 0.3])[:, None, None]
    mean = (policy * both_ways).sum(0)
    noise = torch.zeros(())
    for s in range(8):
        draws = torch.full((1000,), s)
        r, following = forward.step(draws, generator)
        target = rep.target(w[following], r, torch.full((1000,), gamma))
        noise += target.var(0).sum()
    action = sum((p * (rep.cdf(b - mean, rep.points)).square().sum()) for p, b in zip((0.7, 0.3), both_ways))
    share = float(action / (action + noise))
    rows.append(
        ("variance of a target that is due to drawing the action, gone when all are summed", f"{100 * share:.0f} %")
    )
    cdf, sample = rep.cdf(w, x)[0], returns["forward"][0].sort().values
    tail = sample[: len(sample) // 20]
    for name, value, true in (
        ("5 % quantile, state 0", quantile(x, cdf, torch.tensor([0.05]))[0], tail[-1]),
        ("CVaR at 5 %, state 0", conditional_value_at_risk(x, cdf, 0.05), tail.mean()),
        (
            "P(G ≤ mean − 1), state 0",
            ruin(x, cdf, float(sample.mean()) - 1),
            (sample <= sample.mean() - 1).float().mean(),
        ),
    ):
        rows.append((name, f"{float(value):.3f}, simulated {float(true):.3f}"))
    draw = torch.rand(2000, generator=generator)
    plain = BellmanDynamics(steps=500, step_size=0.01, scale=(rep.v_max - rep.v_min) / 12**0.5, start="uniform")
    center = (rep.v_max + rep.v_min) / 2
    for name, drawn in (
        ("2,000 draws by inverse CDF", quantile(x, cdf, draw)),
        ("by the SDE, width annealed, 60 calls", sample_by_sde(rep, w[0], SampleNoise(range(2000), (1,), 0))),
        (
            "by the SDE at width h from a uniform start, 500 calls",
            center + plain(ReturnFields(rep, w[0], center), SampleNoise(range(2000), (1,), 0))[:, 0],
        ),
    ):
        rows.append((name, f"W1 {float(wasserstein1(x, cdf, drawn)) / spread:.3f} sd"))
    print("| example | result |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


# ---- an independent C51

PEER_STEPS, PEER_WINDOW = 20_000, 2000


def same_update(script: Path) -> tuple[float, float]:
    """Largest difference between the gradients of our C51 and those of the update in cleanrl's script, and their size.

    The script's network and the lines of its update, from the target to the loss, are run on random transitions.
    """
    source = script.read_text()
    network = source[source.index("class QNetwork") : source.index("def linear_schedule")]
    first = source.index("with torch.no_grad():\n                    _, next_pmfs")
    update = " " * 16 + source[first : source.index("if global_step % 100 == 0", first)]
    torch.manual_seed(0)
    scope: dict[str, Any] = {"nn": torch.nn, "torch": torch, "np": np}
    exec(network, scope)
    spaces = {"single_action_space": SimpleNamespace(n=2), "single_observation_space": SimpleNamespace(shape=(4,))}
    theirs, target = (scope["QNetwork"](SimpleNamespace(**spaces), 51, 0.0, 100.0) for _ in range(2))
    observation, following = torch.randn(64, 4), torch.randn(64, 4)
    action, reward, done = torch.randint(2, (64,)), 3 * torch.rand(64) - 1, (torch.rand(64) < 0.2).float()
    data = {"observations": observation, "next_observations": following, "actions": action[:, None]}
    scope["data"] = SimpleNamespace(**data, rewards=reward[:, None], dones=done[:, None])
    scope["args"] = SimpleNamespace(gamma=0.99, v_min=0.0, v_max=100.0, n_atoms=51)
    scope |= {"q_network": theirs, "target_network": target}
    exec(textwrap.dedent(update), scope)
    scope["loss"].backward()
    ours = ReturnLearner((4,), 2, Categorical(0, 100), hidden=[120, 84])
    ours.network.load_state_dict(theirs.network.state_dict())
    ours.target_network.load_state_dict(target.network.state_dict())
    ours.compute((observation, action, reward, 0.99 * (1 - done), following), None)[0]["loss"].backward()
    gradients = [(a.grad, b.grad) for a, b in zip(ours.network.parameters(), theirs.network.parameters())]
    return max(float((a - b).abs().max()) for a, b in gradients), max(float(b.abs().max()) for _, b in gradients)


def peer(script: Path, python: str, seed: int) -> list[tuple[int, float]]:
    """(environment step, return) of the training episodes of cleanrl's c51.py on CartPole, run as it is."""
    options = {
        "seed": seed, "total-timesteps": PEER_STEPS, "n-atoms": 51, "v-min": 0, "v-max": 100, "gamma": 0.99,
        "learning-rate": 1e-3, "batch-size": 64, "buffer-size": 20_000, "learning-starts": 1000, "train-frequency": 4,
        "target-network-frequency": 400, "start-e": 1.0, "end-e": 0.05, "exploration-fraction": 0.25,
    }  # fmt: skip
    words = [python, script.name, "--no-cuda", *(f"--{key}={value}" for key, value in options.items())]
    printed = subprocess.run(words, cwd=script.parent, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"global_step=(\d+), episodic_return=\[?([\d.]+)", printed)
    return [(int(step), float(value)) for step, value in found]


def own(seed: int) -> list[tuple[int, float]]:
    """The same of our C51, with the same network, schedule and replay."""
    words = ["experiment=rl_cartpole", "model=c51", "model.hidden=[120,84]", "model.lr=1e-3", "model.target_every=100"]
    words += ["data.num_envs=1", "data.collect=4", "data.n_step=1", "data.size=20000"]
    words += ["data.epsilon=[0.81,0.05]", "data.decay=4000"]  # from step 1,000: cleanrl's line from 1 at step 0
    _, data, models = build(words, [seed])
    runs, stream = Seeds(models), data[0].open(seed)
    episodes: list[tuple[int, float]] = []
    while stream.steps < PEER_STEPS:
        before = stream.episodes
        stream.step(runs.greedy(stream.observation[None])[0] if stream.steps >= stream.warmup else None)
        if stream.episodes > before:
            episodes.append((stream.steps, stream.finished[-1]))
        if stream.steps > stream.warmup and stream.steps % 4 == 0:
            runs.step([stream.draw()])
    return episodes


def windows(episodes: list[tuple[int, float]]) -> list[float]:
    """Mean return of the episodes that ended in each window of steps."""
    edges = range(0, PEER_STEPS, PEER_WINDOW)
    return [float(np.mean([v for step, v in episodes if e <= step < e + PEER_WINDOW] or [np.nan])) for e in edges]


# ---- rows, kept and resumed


def work(job: tuple) -> list[dict]:
    """One row of `control`, or the rows of one `evaluate`, in a process of one thread."""
    torch.set_num_threads(1)
    kind, arguments = job
    start = time.time()
    if kind == "peer":
        name, seed, script, python = arguments
        episodes = own(seed) if name == "ours" else peer(Path(script), python, seed)
        return [{"name": name, "seed": seed, "windows": windows(episodes), "wall": time.time() - start}]
    if kind == "evaluate":
        rewards, gamma, learner, rate, steps = arguments
        return evaluate(rewards, gamma, learner, range(5), rate, steps)
    env, method, rate, seeds, extra = arguments
    thresholds, steps, eval_every = ENVS[env]
    words = [f"experiment={env}", f"model={method}", f"model.lr={rate}", *extra]
    found = learn(words, seeds, steps, eval_every, stop=max(thresholds))
    row = {"env": env, "method": method, "rate": rate, "seeds": list(seeds), "extra": list(extra)}
    return [{**row, **found, "wall": time.time() - start}]


def read(path: Path) -> list[dict]:
    """Rows of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(jobs: list[tuple], path: Path, processes: int) -> None:
    """Carry out the jobs that have no rows yet, and append theirs."""
    done = {row["job"] for row in read(path)}
    todo = [job for job in jobs if repr(job) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(processes) as pool, path.open("a") as file:
        for job, rows in zip(todo, pool.imap(work, todo)):
            for row in rows:
                print(json.dumps({"job": repr(job), **row}), file=file, flush=True)
            print(f"done: {job}", flush=True)


def evaluation_jobs() -> list[tuple]:
    """Both methods everywhere; the other ways of learning fields at the longest horizon."""
    steps = 5000
    jobs = [
        ("evaluate", (rewards, gamma, learner, rate, steps))
        for gamma in (0.97, 0.95, 0.9)
        for rewards in ("continuous", "discrete")
        for learner in ("fields", "c51")
        for rate in ((1e-3, 3e-3) if (rewards, gamma) == ("continuous", 0.97) else (1e-3,))
    ]
    return jobs + [("evaluate", ("continuous", 0.97, learner, 1e-3, steps)) for learner in list(LEARNERS)[2:]]


def score(row: dict, budget: int) -> float:
    """Geometric mean, over thresholds and seeds, of the steps to them; a run that fails counts twice the budget."""
    steps = [min(reached(row["env_steps"], r, t), 2 * budget) for t in ENVS[row["env"]][0] for r in row["returns"]]
    return float(np.exp(np.mean(np.log(steps))))


def best_rates(rows: list[dict], env: str) -> dict[str, float]:
    """The rate of the tuning runs with the best score, for each method."""
    tuning = [r for r in rows if r["env"] == env and r["seeds"] == list(TUNING_SEEDS)]
    budget = max((r["env_steps"][-1] for r in rows if r["env"] == env), default=1)
    return {m: min((score(r, budget), r["rate"]) for r in tuning if r["method"] == m)[1] for m in METHODS}


def control(env: str, path: Path, processes: int) -> None:
    """Common rate, tuning on other seeds, tuned rates."""
    jobs = [("control", (env, method, COMMON_RATE, SEEDS, ())) for method in METHODS]
    jobs += [("control", (env, method, rate, TUNING_SEEDS, ())) for rate in RATES[env] for method in METHODS]
    run(jobs, path, processes)
    best = best_rates(read(path), env)
    run([("control", (env, method, best[method], SEEDS, ())) for method in METHODS], path, processes)


def ratio(ours: list[float], theirs: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of the means of their steps to ours, and its 95 % interval by resampling the seeds of either."""
    random = np.random.default_rng(0)
    a, b = np.array(ours), np.array(theirs)
    means = [rows[random.integers(len(rows), size=(draws, len(rows)))].mean(1) for rows in (b, a)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float(b.mean() / a.mean()), float(low), float(high)


def table(folder: Path, figure: Path | None) -> None:
    """Markdown tables of everything that is in the folder, and curves."""
    rows, drawn = read(folder / "control.jsonl"), []
    print(
        "| experiment | threshold | rates (fields, C51) | fields | C51 | C51 / fields (95 %) ",
        end="",
    )
    print("| ms per step, fields, C51 |\n|---|---|---|---|---|---|---|")
    for env, (thresholds, _, _) in ENVS.items():
        here = [r for r in rows if r["env"] == env and r["seeds"] == list(SEEDS)]
        if not here:
            continue
        choices = [{m: COMMON_RATE for m in METHODS}]
        if any(r["env"] == env and r["seeds"] == list(TUNING_SEEDS) for r in rows):
            choices.append(best_rates(rows, env))
        for rates in choices:
            pair = {r["method"]: r for r in here if r["rate"] == rates[r["method"]]}
            if len(pair) < 2:
                continue
            drawn.append((env, rates, pair))
            budget = max(r["env_steps"][-1] for r in here)
            cost = [1000 * r["seconds"] / (len(r["env_steps"]) * ENVS[env][2]) for r in map(pair.get, METHODS)]
            for threshold in thresholds:
                cells, counted = [], []
                for method in METHODS:
                    found = [reached(pair[method]["env_steps"], r, threshold) for r in pair[method]["returns"]]
                    counted.append([min(f, budget) for f in found])
                    cells.append(f"{np.mean(counted[-1]):,.0f}, {sum(f < math.inf for f in found)}/{len(found)}")
                value, low, high = ratio(*counted)
                shown = ", ".join(f"{rates[m]:g}" for m in METHODS)
                print(
                    f"| {env} | {threshold:g} | {shown} | {' | '.join(cells)} | {value:.2f} ({low:.2f} to {high:.2f}) ",
                    end="",
                )
                print(f"| {cost[0]:.2f}, {cost[1]:.2f} |")
    rows = read(folder / "evaluate.jsonl")
    print("\n| rewards | γ | learner | rate | W1 / sd | mean error / sd | sd / true sd | parameters |")
    print("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["rewards"], row["gamma"], row["learner"], row["rate"]), []).append(row)
    for (rewards, gamma, learner, rate), group in sorted(groups.items()):
        cells = []
        for key in ("w1", "mean_error", "sd_ratio"):
            values = np.array([r[key] for r in group])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}")
        print(f"| {rewards} | {gamma} | {learner} | {rate:g} | {' | '.join(cells)} | {group[0]['parameters']:,} |")
    for name in ("ours", "cleanrl"):
        values = np.array([r["windows"] for r in read(folder / "peer.jsonl") if r["name"] == name])
        if len(values):
            mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
            print(f"\nC51 on CartPole, {name}: " + ", ".join(f"{m:.0f} ± {e:.0f}" for m, e in zip(mean, error)))
    if figure and drawn:
        curves(drawn, figure)


def curves(drawn: list[tuple], path: Path) -> None:
    """Mean return against environment steps, a panel for each pair of rates, with the middle half of the seeds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 2.6 * -(-len(drawn) // 2)), dpi=110, layout="constrained")
    for axes, (env, rates, pair) in zip(picture.subplots(-(-len(drawn) // 2), 2, squeeze=False).flat, drawn):
        for method, name in zip(METHODS, ("fields", "C51")):
            values, steps = np.array(pair[method]["returns"]), pair[method]["env_steps"]
            low, high = np.quantile(values, [0.25, 0.75], axis=0)
            axes.plot(steps, values.mean(0), label=f"{name}, rate {rates[method]:g}")
            axes.fill_between(steps, low, high, alpha=0.2)
        for threshold in ENVS[env][0]:
            axes.axhline(threshold, color="k", lw=0.5, ls=":")
        axes.set(title=env, xlabel="environment steps", ylabel="return")
        axes.legend(fontsize=7)
    picture.savefig(path)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("control", "evaluate", "peer", "examples", "table"))
    parser.add_argument("--script", type=Path, help="peer: cleanrl's c51.py, beside its cleanrl_utils")
    parser.add_argument("--python", default=sys.executable, help="peer: an interpreter that has what the script needs")
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/returns"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.part == "evaluate":
        run(evaluation_jobs(), options.out / "evaluate.jsonl", options.jobs)
    elif options.part == "control":
        for env in options.envs:
            control(env, options.out / "control.jsonl", options.jobs)
    elif options.part == "examples":
        torch.set_num_threads(1)
        examples()
    elif options.part == "peer":
        names = ("ours", "cleanrl") if options.script else ("ours",)
        if options.script:
            print(
                "gradients of one update differ by {:.1e}, the largest is {:.1e}".format(*same_update(options.script))
            )
        jobs = [("peer", (name, seed, str(options.script), options.python)) for seed in range(5) for name in names]
        run(jobs, options.out / "peer.jsonl", options.jobs)
    else:
        table(options.out, options.figure)


if __name__ == "__main__":
    main()
