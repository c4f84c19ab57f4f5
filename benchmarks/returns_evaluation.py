"""Returns of Markov reward processes: learned, backed up exactly, and simulated."""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd_lightning.cli import build as builder
from bd_lightning.dynamics import BellmanDynamics, SampleNoise
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import (
    GaussianFields,
    conditional_value_at_risk,
    quantile,
    ruin,
    sample_by_sde,
    wasserstein1,
)
from benchmarks.returns_training import Seeds


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
    "positive fields": {"_target_": "bd_lightning.returns.PositiveFields", "nodes": 52, "bandwidth": 0.7},
    "c51": {"_target_": "bd_lightning.returns.Categorical", "atoms": 51},
    "qr_dqn": {"_target_": "bd_lightning.returns.Quantiles", "quantiles": 51},
    "fields, density": {"_target_": FIELDS, "nodes": 51, "learn": "density"},
    "fields, density, positive part": {"_target_": FIELDS, "nodes": 51, "learn": "density", "positive": True},
    "fields, density, mass free": {"_target_": FIELDS, "nodes": 51, "learn": "density", "mass": False},
}


def evaluate(
    rewards: str, gamma: float, learner: str, seeds: range, rate: float, steps: int, simulated: int = 20_000
) -> list[dict]:
    """Learn the returns of a process from fresh transitions; a row for each seed (two for C51)."""
    process = RewardProcess(rewards, gamma)
    truth = process.simulate(simulated, seed=99)
    center, reach = float(truth.mean()), 4.5 * float(truth.std())
    node = {**LEARNERS[learner], "v_min": center - reach, "v_max": center + reach}
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        rep = builder.instantiate(node, "representation")
        models.append(ReturnLearner((process.states,), 1, rep, uniform_policy=1.0, target_every=20, lr=rate))
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
        w = rep.read(runs.outputs(runs.parameters, eye.expand(len(models), -1, -1)))[:, :, 0]
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
        ("by the SDE, width annealed, 60 calls", sample_by_sde(rep, w[:1], range(2000))[:, 0]),
        (
            "by the SDE at width h from a uniform start, 500 calls",
            center + plain(rep.field_pair(w[0], center), SampleNoise(range(2000), (1,), 0))[:, 0],
        ),
    ):
        rows.append((name, f"W1 {float(wasserstein1(x, cdf, drawn)) / spread:.3f} sd"))
    print("| example | result |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
