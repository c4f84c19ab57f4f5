"""Environments of gymnasium as data: they are stepped while the model trains, and it learns from a replay buffer."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bd_lightning.checks import UserError, in_range, positive
from datamodules.base import DataError, DataModule

Greedy = Callable[[np.ndarray], np.ndarray]
"""Best actions (n,) for observations (n, *shape)."""
BATCHES = 10**9  # the stream has no end; a length keeps Lightning from fetching ahead of the weights


def make_envs(name: str, count: int, options: dict[str, Any] | None = None) -> Any:
    """Environments stepped together; after the end of an episode they start the next in the same step.

    Raises:
        UserError: if gymnasium is absent, the environment unknown, or its spaces not supported.
    """
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode
    except ImportError as error:
        raise UserError("environments need gymnasium: install it with 'uv sync --group rl'") from error
    try:
        mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
        envs = gymnasium.make_vec(name, count, vectorization_mode="sync", vector_kwargs=mode, **(options or {}))
    except (gymnasium.error.Error, TypeError, ModuleNotFoundError) as error:
        given = f" with options {options}" if options else ""
        raise DataError(f"cannot make the environment '{name}'{given}: {' '.join(str(error).split())}") from error
    actions, states = envs.single_action_space, envs.single_observation_space
    if not isinstance(actions, gymnasium.spaces.Discrete):
        raise DataError(
            f"'{name}' has actions in {actions}: only a finite set of actions is supported, each has a distribution"
        )
    if not isinstance(states, (gymnasium.spaces.Discrete, gymnasium.spaces.Box)):
        raise DataError(f"'{name}' has observations in {states}: only Box and Discrete are supported")
    return envs


def encode(observations: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Observations as the network reads them, (n, *shape): vectors as they are, states of a finite set one-hot."""
    if observations.ndim == 1 and len(shape) == 1:
        return np.eye(shape[0], dtype=np.float32)[observations]
    return observations.astype(np.float32)


class Transitions(Dataset):
    """A ring buffer of (observation, action, reward, discount, next observation), all of them tensors when sampled.

    Args:
        size: how many transitions are kept.
        shape: shape of an observation.
    """

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        self.observation, self.following = (np.zeros((size, *shape), dtype=np.float32) for _ in range(2))
        self.action = np.zeros(size, dtype=np.int64)
        self.reward, self.discount = (np.zeros(size, dtype=np.float32) for _ in range(2))
        self.size, self.count = size, 0

    def add(self, observation: Any, action: Any, reward: float, discount: float, following: Any) -> None:
        """Keep one transition, in place of the oldest when the buffer is full."""
        i = self.count % self.size
        self.observation[i], self.following[i] = observation, following
        self.action[i], self.reward[i], self.discount[i] = action, reward, discount
        self.count += 1

    def __len__(self) -> int:
        return min(self.count, self.size)

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        parts = (self.observation, self.action, self.reward, self.discount, self.following)
        return tuple(torch.as_tensor(part[index]) for part in parts)

    def __getitems__(self, indices: Any) -> tuple[Tensor, ...]:
        return self[indices]


class Experience(IterableDataset):
    """Steps environments ε-greedily and draws batches from what was seen.

    Each batch comes after `collect` steps of all environments. Everything random comes from the seed.

    Args:
        envs: environments of `make_envs`; this object resets them.
        shape: shape of an encoded observation.
        gamma: discount γ of one step.
        n_step: steps that a transition spans: r is Σ γᵏ r_k over them, its discount γⁿ, or 0 if the episode ended.
        batch_size: transitions in a batch.
        collect: steps of all environments before each batch.
        size: transitions kept.
        warmup: environment steps with random actions before the first batch.
        epsilon: probability of a random action, before and after its linear decay.
        decay: environment steps over which it decays, counted after the warm-up.
        seed: seed of environments, actions and batches.
        returns_range: declared range of returns; discounted returns of episodes outside it are counted.

    Attributes:
        steps: environment steps so far, over all environments.
        finished: undiscounted returns of the last 100 finished episodes.
        episodes: number of finished episodes.
        outside: how many of them had a discounted return outside `returns_range`.
    """

    def __init__(
        self,
        envs: Any,
        shape: tuple[int, ...],
        gamma: float,
        n_step: int = 1,
        batch_size: int = 64,
        collect: int = 1,
        size: int = 10_000,
        warmup: int = 500,
        epsilon: tuple[float, float] = (1.0, 0.05),
        decay: int = 5_000,
        seed: int = 0,
        returns_range: tuple[float, float] = (-np.inf, np.inf),
    ) -> None:
        self.envs, self.shape, self.gamma, self.n_step = envs, shape, gamma, n_step
        self.batch_size, self.collect, self.warmup = batch_size, collect, warmup
        self.epsilon, self.decay, self.returns_range = epsilon, decay, returns_range
        self.random = np.random.default_rng(seed)
        self.replay = Transitions(size, shape)
        self.observation = encode(envs.reset(seed=seed)[0], shape)
        count = envs.num_envs
        self.pending: list[deque] = [deque() for _ in range(count)]
        self.totals, self.discounted, self.lengths = np.zeros(count), np.zeros(count), np.zeros(count, dtype=int)
        self.finished: deque[float] = deque(maxlen=100)
        self.steps, self.episodes, self.outside = 0, 0, 0

    @property
    def exploration(self) -> float:
        """The present ε."""
        first, last = self.epsilon
        return first + (last - first) * min(1.0, max(0, self.steps - self.warmup) / self.decay)

    def step(self, greedy: np.ndarray | None) -> None:
        """Step all environments once, by these actions (n,) or, with probability ε or if None, by random ones."""
        count = self.envs.num_envs
        action = self.random.integers(self.envs.single_action_space.n, size=count)
        explore = self.random.random(count) < self.exploration
        if greedy is not None:
            action = np.where(explore, action, greedy)
        observed, reward, terminated, truncated, info = self.envs.step(action)
        following = encode(observed, self.shape)
        done = terminated | truncated
        last = following
        if done.any():
            last = following.copy()
            for i in np.flatnonzero(done).tolist():
                last[i] = encode(np.asarray(info["final_obs"][i])[None], self.shape)[0]
        self.totals += reward
        self.discounted += self.gamma**self.lengths * reward
        self.lengths += 1
        for i in range(count):
            self._remember(i, action[i], float(reward[i]), last[i], bool(terminated[i]), bool(done[i]))
            if done[i]:
                self._close(i, bool(terminated[i]))
        self.observation = following
        self.steps += count

    def _remember(self, i: int, action: Any, reward: float, last: np.ndarray, terminated: bool, done: bool) -> None:
        pending = self.pending[i]
        pending.append((self.observation[i], action, reward))
        while pending and (done or len(pending) == self.n_step):
            total = sum(self.gamma**k * step[2] for k, step in enumerate(pending))
            discount = 0.0 if terminated else self.gamma ** len(pending)
            observation, first, _ = pending.popleft()
            self.replay.add(observation, first, total, discount, last)

    def _close(self, i: int, terminated: bool) -> None:
        low, high = self.returns_range
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        self.finished.append(float(self.totals[i]))
        self.episodes += 1
        self.outside += not low - slack <= self.discounted[i] <= high + slack
        self.totals[i], self.discounted[i], self.lengths[i] = 0.0, 0.0, 0

    def fill(self) -> None:
        """The random steps before the first batch."""
        while self.steps < self.warmup:
            self.step(None)

    def draw(self) -> tuple[Tensor, ...]:
        """A batch of transitions, drawn with replacement."""
        return self.replay.__getitems__(self.random.integers(len(self.replay), size=self.batch_size))

    def bind(self, greedy: Greedy) -> "Experience":
        """Say whose actions are explored around."""
        self.greedy = greedy
        return self

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self.fill()
        while True:
            for _ in range(self.collect):
                self.step(self.greedy(self.observation))
            yield self.draw()


def play(envs: Any, shape: tuple[int, ...], greedy: Greedy, episodes: int, seed: int) -> np.ndarray:
    """Undiscounted returns of episodes under a greedy policy, the same number in each environment, shape (episodes,).

    Args:
        envs: environments of `make_envs`.
        shape: shape of an encoded observation.
        greedy: the policy.
        episodes: a multiple of the number of environments.
        seed: seed of the environments.
    """
    observed, _ = envs.reset(seed=seed)
    count, each = envs.num_envs, episodes // envs.num_envs
    total = np.zeros(count)
    returns: list[list[float]] = [[] for _ in range(count)]
    while min(map(len, returns)) < each:
        observed, reward, terminated, truncated, _ = envs.step(greedy(encode(observed, shape)))
        total += reward
        for i in np.flatnonzero(terminated | truncated):
            returns[i].append(total[i])
            total[i] = 0.0
    return np.array([r[:each] for r in returns]).ravel()


class Environment(DataModule):
    """A gymnasium environment, stepped while a model of `bd_lightning.modules.ReturnLearner` trains.

    The replay buffer is not part of checkpoints: a resumed run fills it anew, and goes on with the decay of ε.

    Args:
        env: id of the environment, e.g. CartPole-v1.
        v_min: smallest discounted return, as declared to the model; episodes outside are counted and reported.
        v_max: largest one.
        options: its arguments, e.g. {is_slippery: false}.
        gamma: discount γ of one step, in [0, 1).
        num_envs: environments stepped together.
        collect: steps of all of them for each optimiser step.
        n_step: steps that a transition spans.
        size: transitions in the replay buffer.
        warmup: environment steps with random actions before training.
        epsilon: probability of a random action, before and after its linear decay.
        decay: environment steps of the decay.
        held_out: transitions under random actions that the validation loss is taken on.
        seed: seed of environments, exploration and batches.
        base: arguments of `DataModule`.

    Attributes:
        probes: observations of a few states, (P, *shape), the start of an episode first, for figures.
    """

    def __init__(
        self,
        env: str,
        v_min: float,
        v_max: float,
        options: dict[str, Any] | None = None,
        gamma: float = 0.99,
        num_envs: int = 4,
        collect: int = 1,
        n_step: int = 1,
        size: int = 10_000,
        warmup: int = 500,
        epsilon: tuple[float, float] = (1.0, 0.05),
        decay: int = 5_000,
        held_out: int = 256,
        seed: int = 0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
        if not v_min < v_max:
            raise ValueError(f"v_min must be below v_max, got {v_min} and {v_max}")
        positive(num_envs=num_envs, collect=collect, n_step=n_step, size=size, warmup=warmup, decay=decay)
        positive(held_out=held_out)
        in_range(0, np.inf, seed=seed)
        for i, value in enumerate(epsilon):
            in_range(0, 1, **{f"epsilon[{i}]": value})
        if self.num_workers:
            raise ValueError("num_workers must be 0: the policy that steps the environments is the model in training")
        self.env, self.options, self.gamma, self.num_envs = env, options or {}, gamma, num_envs
        self.streams: dict[str, Any] = {
            "n_step": n_step,
            "batch_size": self.batch_size,
            "collect": collect,
            "size": size,
            "warmup": warmup,
            "epsilon": (epsilon[0], epsilon[1]),
            "decay": decay,
        }
        self.returns_range = (v_min, v_max)
        self.held_out, self.seed, self.name, self.steps = held_out, seed, env, 0
        self.experience: Experience | None = None
        envs = self.make(1)
        states = envs.single_observation_space
        self.shape = (int(states.n),) if hasattr(states, "n") else tuple(states.shape)
        self.class_names = tuple(f"action_{i}" for i in range(int(envs.single_action_space.n)))
        self.sigma_data = 1.0
        self.probes = self._probes(envs)

    @property
    def facts(self):
        return {
            **super().facts,
            "columns": list(self.class_names),
            "v_min": self.returns_range[0],
            "v_max": self.returns_range[1],
        }

    def make(self, count: int) -> Any:
        """So many environments, stepped together."""
        return make_envs(self.env, count, self.options)

    def open(self, seed: int) -> Experience:
        """A fresh stream of experience."""
        envs = self.make(self.num_envs)
        return Experience(envs, self.shape, self.gamma, seed=seed, returns_range=self.returns_range, **self.streams)

    def _probes(self, envs: Any, count: int = 4) -> Tensor:
        """The first observation of an episode and others under random actions, all distinct."""
        random = np.random.default_rng(0)
        rows = [encode(envs.reset(seed=0)[0], self.shape)[0]]
        for _ in range(2000):
            observed = encode(envs.step(random.integers(envs.single_action_space.n, size=1))[0], self.shape)[0]
            if random.random() < 0.1 and all(np.abs(observed - row).max() > 1e-3 for row in rows):
                rows.append(observed)
            if len(rows) == count:
                break
        return torch.from_numpy(np.stack(rows))

    def load_split(self, split):
        if split == "train":
            raise DataError("the training data of an environment is made while a model trains")
        stream = self.open(seed=10_000 + ("val", "test").index(split))
        while stream.replay.count < self.held_out:
            stream.step(None)
        return stream.replay

    def setup(self, stage=None):
        for split in {"fit": ("val",), "validate": ("val",), "test": ("test",)}.get(stage or "", ()):
            self.split(split)

    def train_dataloader(self):
        model = self.trainer.lightning_module  # type: ignore[union-attr]
        rank = self.trainer.global_rank  # type: ignore[union-attr]
        self.experience = self.open(self.seed + 1000 * rank).bind(model.greedy)
        if self.steps:  # resumed: ε goes on from there, after a new warm-up
            self.experience.steps, self.experience.warmup = self.steps, self.steps + self.experience.warmup
            self.experience.epsilon = (self.resumed_epsilon, self.experience.epsilon[1])
        return DataLoader(self.experience, batch_size=None)

    def state_dict(self):
        """Environment steps so far, and the present ε."""
        if self.experience is None:
            return {}
        return {"steps": self.experience.steps, "epsilon": float(self.experience.exploration)}

    def load_state_dict(self, state):
        """Go on from these."""
        self.steps, self.resumed_epsilon = state.get("steps", 0), state.get("epsilon", 1.0)
