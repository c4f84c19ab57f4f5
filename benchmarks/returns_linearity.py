"""What linearity gives in control: expected updates, λ-returns, exploration, caution, transfer between dynamics.

Each example trains small models with the steps of train.py (`benchmarks.returns_training`) and compares with exact
backups in field space (`bd_lightning.returns.finite`) or with episodes that are played.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from bd_lightning.returns import CVaR, GaussianFields, MeanReturn, Policy, Preference, Representation
from bd_lightning.returns.finite import Outcomes, backup, mixed, remembered, tabulated
from benchmarks.returns_training import Training, build, learn, reached
from datamodules import Environment
from datamodules.experience import mean_of_worst, play

Found = Iterator[tuple[str, int, dict[str, float | None]]]
"""What was done, the seed, and numbers by their names."""


@dataclass(frozen=True)
class DrawnAction(Policy):
    """The same policy, by one action drawn from it instead of the mixture over all: SARSA beside expected SARSA."""

    def __call__(self, representation: Representation, w: Tensor) -> Tensor:
        """One-hot, shape (B, A)."""
        p = super().__call__(representation, w)
        return nn.functional.one_hot(torch.multinomial(p, 1)[:, 0], p.shape[1]).to(p)


def outcomes_of(data: Environment) -> Outcomes:
    """The true outcomes of an environment of gymnasium's toy text."""
    return tabulated(data.make(1).envs[0].unwrapped.P, data.gamma)


def solved(
    rep: GaussianFields, outcomes: Outcomes, policy: Policy, w: Tensor | None = None, backups: int = 600
) -> Tensor:
    """Returns (S, A, N) after so many backups from w, or from the uniform distribution."""
    if w is None:
        w = rep.read(torch.zeros(outcomes.states, outcomes.actions, rep.outputs))
    for _ in range(backups):
        w = backup(rep, outcomes, w, policy)
    return w


def value_of(outcomes: Outcomes, action: Tensor, start: int = 0) -> float:
    """The expected discounted return of a policy with these actions (S,), solved exactly, from a state."""
    chosen = (outcomes.pair // outcomes.actions, outcomes.pair % outcomes.actions)
    own = chosen[1] == action[chosen[0]]
    states, share = chosen[0][own], outcomes.share[own].double()
    rewards = torch.zeros(outcomes.states, dtype=torch.float64).index_add(0, states, share * outcomes.reward[own])
    moves = torch.zeros(outcomes.states, outcomes.states, dtype=torch.float64)
    moves.index_put_((states, outcomes.following[own]), share * outcomes.discount[own], accumulate=True)
    value = float(torch.linalg.solve(torch.eye(outcomes.states, dtype=torch.float64) - moves, rewards)[start])
    return round(value, 9) + 0.0  # what the solver rounds is no value, nor is it divided by


def expected_updates(policy: str, seeds: range, steps: int) -> Found:
    """The uniform policy on the slippery lake: targets over all actions, or by one that is drawn."""
    words = ["experiment=rl_frozen_lake_slippery", "model.uniform_policy=1", "data.epsilon=[1.0,1.0]"]
    training = Training(words, seeds)
    model, outcomes = training.runs.model, outcomes_of(training.data[0])
    rep, x = model.representation, model.representation.grid(500)
    exact = solved(rep, outcomes, Policy(uniform=1.0))
    alive = outcomes.discount.new_zeros(outcomes.states * outcomes.actions).index_add(
        0, outcomes.pair, outcomes.discount
    )
    alive = (alive > 0).reshape(outcomes.states, -1)
    model.policy = {"all actions": Policy, "one drawn": DrawnAction}[policy](uniform=1.0)
    torch.manual_seed(seeds[0])
    numbers: list[dict[str, float | None]] = [{} for _ in seeds]
    for k in range(1, steps + 1):
        training.step()
        if k in (steps // 4, steps // 2, steps):
            w = training.runs.weights()
            for row, own in zip(numbers, w):
                gap = rep.cdf((own - exact)[alive], x).abs().sum(1) * (x[1] - x[0])
                row[f"W1, {k} steps"] = float(gap.mean())
                row[f"error of values, {k} steps"] = float((rep.mean(own) - rep.mean(exact))[alive].abs().mean())
    for seed, row in zip(seeds, numbers):
        yield policy, seed, row


STEPS = {
    "1 step": ["data.n_step=1"],
    "3 steps": ["data.n_step=3"],
    "5 steps": ["data.n_step=5"],
    "λ = 0.5 of 5 steps": ["data=frozen_lake_lambda", "model=returns_lambda", "model.lam=0.5"],
    "λ = 0.8 of 5 steps": ["data=frozen_lake_lambda", "model=returns_lambda", "model.lam=0.8"],
}


def until(words: list[str], seeds: range, steps: int, threshold: float) -> Iterator[tuple[int, dict]]:
    """Environment steps of every seed to a threshold, the whole budget where it is not reached, and whether it is."""
    found = learn(words, seeds, steps, min(100, steps), stop=threshold)
    most = 500.0 + 4 * steps
    for seed, returns in zip(seeds, found["returns"]):
        at = reached(found["env_steps"], returns, threshold)
        yield seed, {"environment steps": min(at, most), "share of seeds there": float(at <= most)}


def several_steps(way: str, seeds: range, steps: int) -> Found:
    """FrozenLake without slipping, with targets of several lengths and their mixtures, to 0.95."""
    for seed, numbers in until(["experiment=rl_frozen_lake", *STEPS[way]], seeds, steps, 0.95):
        yield way, seed, numbers


PREFER = "model.exploration={_target_: bd_lightning.returns."
EXPLORE = {
    "ε from 1 to 0.05": [],
    "ε = 0.05": ["data.epsilon=[0.05,0.05]"],
    "0.9-quantile, ε from 1 to 0.05": [PREFER + "UpperQuantile, level: 0.9}"],
    "0.9-quantile, ε = 0.05": [PREFER + "UpperQuantile, level: 0.9}", "data.epsilon=[0.05,0.05]"],
    "mean + sd, ε = 0.05": [PREFER + "Spread, weight: 1.0}", "data.epsilon=[0.05,0.05]"],
}


def exploration(way: str, seeds: range, steps: int) -> Found:
    """The 8×8 lake without slipping, to 0.95: random steps hardly ever find the goal."""
    words = ["experiment=rl_frozen_lake", "data.options.map_name=8x8", *EXPLORE[way]]
    for seed, numbers in until(words, seeds, steps, 0.95):
        yield way, seed, numbers


def chance(outcomes: Outcomes, action: Tensor, reward: float, start: int) -> float:
    """Probability that a policy with actions (S,) gets a reward this low, which ends an episode, in 10⁸ steps or so.

    A step is survived with 1 − 10⁻⁸, without which there is no answer for a policy that may stay for ever.
    """
    hit = (outcomes.reward <= reward).double()
    counted = replace(outcomes, reward=hit, discount=(1 - 1e-8) * (outcomes.discount > 0).double())
    return value_of(counted, action, start)


RISK: dict[str, Preference] = {"mean": MeanReturn(), "CVaR, worst 25 %": CVaR(0.25), "CVaR, worst 10 %": CVaR(0.1)}
"""What a policy along the cliff is greedy in; each by exact backups and learned."""
BY_MEAN = ", exploring by the mean"
LEARNED: dict[str, tuple[str, Preference | None]] = {
    "learned": ("returns", None),
    "learned" + BY_MEAN: ("returns", MeanReturn()),
    "positive fields" + BY_MEAN: ("returns_positive", MeanReturn()),
    "C51" + BY_MEAN: ("c51", MeanReturn()),
    "QR-DQN" + BY_MEAN: ("qr_dqn", MeanReturn()),
}
"""What is learned, and how experience is collected: None explores by what the policy is greedy in."""


def caution(way: str, seeds: range, steps: int) -> Found:
    """Policies that are greedy in the mean or in CVaR along a cliff on ice, in 1,000 episodes of each."""
    name, _, how = way.partition(": ")
    policy = Policy(RISK[name])
    _, (data,), (exact,) = build(["experiment=rl_frozen_cliff"], [0])
    outcomes, rep, envs = outcomes_of(data), exact.representation, data.make(20)
    if how in LEARNED:
        model, explored = LEARNED[how]
        training = Training(["experiment=rl_frozen_cliff", f"model={model}"], seeds)
        rep = training.runs.model.representation
        training.runs.model.policy = policy
        training.runs.model.exploration = explored or policy.preference
        for _ in range(steps):
            training.step()
        found = list(training.runs.weights())
    else:
        found = [solved(rep, outcomes, policy, backups=150)]
    start = int(envs.reset(seed=0)[0][0])
    for seed, w in zip(seeds, found):
        action = policy.preference(rep, w).argmax(-1)
        act = action.numpy()
        returns, cut = play(envs, data.shape, lambda seen, act=act: act[seen.argmax(1)], 1000, 1)
        numbers: dict[str, float | None] = {"mean return": returns.mean()}
        numbers["mean of the worst 10 %"] = mean_of_worst(returns, 0.1)
        numbers["falls, %"] = 100 * chance(outcomes, action, -15, start)
        numbers["cut after 100 steps, %"] = 100 * cut.mean()
        yield way, seed, numbers


TRANSFER = {
    "no slipping and always aside, to 1/3 ahead": (1.0, 0.0, 1 / 3),
    "1 and 1/3 ahead, to 2/3": (1.0, 1 / 3, 2 / 3),
}
"""Probabilities of going where one wants to go: of the two models, and after the change."""


def transfer(way: str, seeds: range, steps: int) -> Found:
    """Two models of other dynamics of FrozenLake, mixed at no environment steps, beside one trained on the new ones."""
    first, second, changed = TRANSFER[way]
    share = (changed - second) / (first - second)

    def trained(ahead: float) -> Training:
        words = ["experiment=rl_frozen_lake_slippery", f"data.options.success_rate={ahead}"]
        training = Training(words, seeds)
        for _ in range(steps):
            training.step()
        return training

    sources, there = (trained(first), trained(second)), trained(changed)
    rep, policy = there.runs.model.representation, Policy()
    truth = outcomes_of(there.data[0])
    best = solved(rep, truth, policy)
    x, reference = rep.grid(500), [value_of(truth, rep.mean(w).argmax(1)) for w in there.runs.weights()]

    def judged(w: Tensor, trained_there: float) -> dict[str, float | None]:
        value = value_of(truth, rep.mean(w).argmax(1))
        gap = rep.cdf(w[0, rep.mean(w[0]).argmax()] - best[0, rep.mean(best[0]).argmax()], x).abs().sum() * (
            x[1] - x[0]
        )
        return {
            "value of its policy": value,
            "of that trained there": value / trained_there if trained_there else None,
            "W1 of the start": float(gap),
        }

    for i, seed in enumerate(seeds):
        yield (
            f"{way}: trained there, {there.streams[i].steps} steps",
            seed,
            judged(there.runs.weights()[i], reference[i]),
        )
        yield f"{way}: exact backups", seed, judged(best, reference[i])
        replays = [training.streams[i].replay for training in sources]
        seen = [remembered(replay[np.arange(len(replay))], truth.actions) for replay in replays]
        both = mixed([(share, seen[0]), (1 - share, seen[1])])
        w = share * sources[0].runs.weights()[i] + (1 - share) * sources[1].runs.weights()[i]
        for source, training in zip(("first", "second"), sources):
            yield f"{way}: the {source} model as it is", seed, judged(training.runs.weights()[i], reference[i])
        done = 0
        for backups in (0, 1, 3, 10, 30, 100, 300):
            w = solved(rep, both, policy, w, backups - done)
            done = backups
            yield f"{way}: mixed, {backups} backups", seed, judged(w, reference[i])


@dataclass(frozen=True)
class Example:
    """What is tried, in which ways.

    Args:
        rows: what is found in one way, for seeds and a number of optimiser steps.
        ways: their names.
        steps: optimiser steps of a training.
    """

    rows: Callable[[str, range, int], Found]
    ways: list[str]
    steps: int


EXAMPLES = {
    "expected updates": Example(expected_updates, ["all actions", "one drawn"], 2000),
    "several steps": Example(several_steps, list(STEPS), 4000),
    "exploration": Example(exploration, list(EXPLORE), 8000),
    "caution": Example(
        caution,
        [f"{name}: {how}" for how in ("exact backups", "learned") for name in RISK]
        + [f"{name}: {how}" for how in LEARNED if how.endswith(BY_MEAN) for name in list(RISK)[1:]],
        4000,
    ),
    "transfer": Example(transfer, list(TRANSFER), 4000),
}


def jobs(names: list[str], seeds: range, steps: int | None = None) -> list[tuple]:
    """Every way of these examples, with steps of its own if they are None."""
    return [(name, way, seeds, steps or EXAMPLES[name].steps) for name in names for way in EXAMPLES[name].ways]


def example(name: str, way: str, seeds: range, steps: int) -> list[dict]:
    """Rows of one way of an example, one for each seed and thing that was tried."""
    rows = EXAMPLES[name].rows(way, seeds, steps)
    return [{"example": name, "way": done, "seed": seed, "numbers": numbers} for done, seed, numbers in rows]
