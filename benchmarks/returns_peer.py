"""Independent implementations on CartPole: cleanrl's C51, and QR-DQN of stable-baselines3-contrib, against ours."""

import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bd_lightning.checks import UserError
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import Categorical
from benchmarks.returns_training import Seeds, build

PEER_STEPS, PEER_WINDOW = 20_000, 2000
OTHER = "has no network and update as cleanrl's c51.py has them"


def same_update(script: Path) -> tuple[float, float]:
    """Largest difference between the gradients of our C51 and those of the update in cleanrl's script, and their size.

    The script's network and the lines of its update, from the target to the loss, are run on random transitions.

    Raises:
        UserError: for a script that has no such lines, or whose lines do not run.
    """
    try:
        source = script.read_text()
        network = source[source.index("class QNetwork") : source.index("def linear_schedule")]
        first = source.index("with torch.no_grad():\n                    _, next_pmfs")
        update = " " * 16 + source[first : source.index("if global_step % 100 == 0", first)]
    except ValueError as error:
        raise UserError(f"{script} {OTHER}: give that file") from error
    torch.manual_seed(0)
    scope: dict[str, Any] = {"nn": torch.nn, "torch": torch, "np": np}
    spaces = {"single_action_space": SimpleNamespace(n=2), "single_observation_space": SimpleNamespace(shape=(4,))}
    observation, following = torch.randn(64, 4), torch.randn(64, 4)
    action, reward, done = torch.randint(2, (64,)), 3 * torch.rand(64) - 1, (torch.rand(64) < 0.2).float()
    data = {"observations": observation, "next_observations": following, "actions": action[:, None]}
    scope["data"] = SimpleNamespace(**data, rewards=reward[:, None], dones=done[:, None])
    scope["args"] = SimpleNamespace(gamma=0.99, v_min=0.0, v_max=100.0, n_atoms=51)
    try:
        exec(network, scope)
        theirs, target = (scope["QNetwork"](SimpleNamespace(**spaces), 51, 0.0, 100.0) for _ in range(2))
        scope |= {"q_network": theirs, "target_network": target}
        exec(textwrap.dedent(update), scope)
        scope["loss"].backward()
    except Exception as error:  # it is the script's
        raise UserError(f"{script} {OTHER} ({type(error).__name__}: {error}): give that file") from error
    ours = ReturnLearner((4,), 2, Categorical(0, 100), hidden=[120, 84])
    ours.network.load_state_dict(theirs.network.state_dict())
    ours.target_network.load_state_dict(target.network.state_dict())
    ours.compute((observation, action, reward, 0.99 * (1 - done), following), None)[0]["loss"].backward()
    gradients = [(a.grad, b.grad) for a, b in zip(ours.network.parameters(), theirs.network.parameters())]
    return max(float((a - b).abs().max()) for a, b in gradients), max(float(b.abs().max()) for _, b in gradients)


Episodes = list[tuple[int, float]]
"""(environment step, return) of the training episodes, at their ends."""


def cleanrl(seed: int, script: Path, python: str) -> Episodes:
    """Those of cleanrl's c51.py on CartPole, run as it is.

    Raises:
        UserError: if it fails, with the last line that it says, and if it tells of no episodes.
    """
    options = {
        "seed": seed, "total-timesteps": PEER_STEPS, "n-atoms": 51, "v-min": 0, "v-max": 100, "gamma": 0.99,
        "learning-rate": 1e-3, "batch-size": 64, "buffer-size": 20_000, "learning-starts": 1000, "train-frequency": 4,
        "target-network-frequency": 400, "start-e": 1.0, "end-e": 0.05, "exploration-fraction": 0.25,
    }  # fmt: skip
    words = [python, script.name, "--no-cuda", *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(words, cwd=script.parent, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{script} failed by {python}, give --python one that has what it needs; it said: {said}")
    found = re.findall(r"global_step=(\d+), episodic_return=\[?([\d.]+)", done.stdout)
    if not found:
        raise UserError(f"{script} printed no 'global_step=…, episodic_return=…': give cleanrl's c51.py of fe8d8a0")
    return [(int(step), float(value)) for step, value in found]


def contributed(seed: int, script: Path, python: str) -> Episodes:
    """Those of QR-DQN of stable-baselines3-contrib, with the same network, schedule and replay as ours."""
    import gymnasium
    from sb3_contrib import QRDQN
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gymnasium.make("CartPole-v1"))
    model = QRDQN(
        "MlpPolicy", env, seed=seed, device="cpu", gamma=0.99, learning_rate=1e-3, batch_size=64, buffer_size=20_000,
        learning_starts=1000, train_freq=4, gradient_steps=1, target_update_interval=400, exploration_fraction=0.25,
        exploration_initial_eps=1.0, exploration_final_eps=0.05,
        policy_kwargs={"n_quantiles": 51, "net_arch": [120, 84], "optimizer_kwargs": {"eps": 1e-8}},
    )  # fmt: skip
    model.learn(PEER_STEPS)
    return list(zip(np.cumsum(env.get_episode_lengths()).tolist(), env.get_episode_rewards()))


def own(method: list[str], seed: int, eps: float = 1e-8) -> Episodes:
    """Those of ours, with the same network, optimiser, schedule and replay."""
    words = ["experiment=rl_cartpole", *method, "model.hidden=[120,84]", "model.lr=1e-3", "model.target_every=100"]
    words += ["data.num_envs=1", "data.collect=4", "data.n_step=1", "data.size=20000"]
    words += ["data.epsilon=[0.81,0.05]", "data.decay=4000"]  # from step 1,000: their line from 1 at step 0
    _, data, models = build(words, [seed])
    runs, stream = Seeds(models, eps), data[0].open(seed)
    episodes: Episodes = []
    while stream.steps < PEER_STEPS:
        before = stream.episodes
        stream.step(runs.explore(stream.observation[None])[0] if stream.steps >= stream.warmup else None)
        if stream.episodes > before:
            episodes.append((stream.steps, stream.finished[-1]))
        if stream.steps > stream.warmup and stream.steps % 4 == 0:
            runs.step([stream.draw()])
    return episodes


SAME_QUANTILES = ["model=qr_dqn", "data.v_max=1", "model.representation.kappa=51"]
"""Our QR-DQN with outputs in units of reward, and the Huber loss linear from an error of 1 on, as theirs."""

PEERS: dict[str, Callable[[int, Path, str], Episodes]] = {
    "ours": lambda seed, script, python: own(["model=c51"], seed, 0.01 / 64),  # as cleanrl's Adam
    "cleanrl": cleanrl,
    "our QR-DQN": lambda seed, script, python: own(SAME_QUANTILES, seed),
    "QR-DQN of stable-baselines3-contrib": contributed,
}


def windows(episodes: Episodes) -> list[float]:
    """Mean return of the episodes that ended in each window of steps.

    Raises:
        UserError: for a window in which none ended.
    """
    edges = range(0, PEER_STEPS, PEER_WINDOW)
    ended = [[v for step, v in episodes if e <= step < e + PEER_WINDOW] for e in edges]
    if not all(ended):
        raise UserError(f"no episode ended between steps {(e := edges[ended.index([])])} and {e + PEER_WINDOW}")
    return [float(np.mean(values)) for values in ended]
