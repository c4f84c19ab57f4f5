"""What is experienced in environments: transitions for replay, and whole episodes under a greedy policy."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

Greedy = Callable[[np.ndarray], np.ndarray]
"""Best actions (n,) for observations (n, *shape)."""
BATCHES = 10**9  # the stream has no end; a length keeps Lightning from fetching ahead of the weights


def encode(observations: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Observations as the network reads them, (n, *shape): vectors as they are, states of a finite set one-hot."""
    if observations.ndim == 1 and len(shape) == 1:
        states = np.zeros((len(observations), *shape), dtype=np.float32)
        states[np.arange(len(observations)), observations] = 1
        return states
    return observations.astype(np.float32)


class Transitions(Dataset):
    """A ring buffer of (observation, action, reward, discount, next observation), all of them tensors when sampled.

    Args:
        size: how many transitions are kept.
        shape: shape of an observation.
        ends: of how many lengths each is kept: rewards, discounts and next observations get a dimension for them.
            () keeps one length, without.
    """

    def __init__(self, size: int, shape: tuple[int, ...], ends: tuple[int, ...] = ()) -> None:
        self.observation = np.zeros((size, *shape), dtype=np.float32)
        self.following = np.zeros((size, *ends, *shape), dtype=np.float32)
        self.action = np.zeros(size, dtype=np.int64)
        self.reward, self.discount = (np.zeros((size, *ends), dtype=np.float32) for _ in range(2))
        self.size, self.count = size, 0

    def add(self, observation: Any, action: Any, reward: Any, discount: Any, following: Any) -> None:
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
        cut: how many of them a limit of steps ended.
        outside: how many of them had a discounted return outside `returns_range`.
        extremes: the smallest and the largest discounted return so far.
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
        self.replay = self._memory(size)
        count = envs.num_envs
        self.observation = encode(envs.reset(seed=seeds(count, seed))[0], shape)
        self.pending: list[deque] = [deque() for _ in range(count)]
        self.totals, self.discounted, self.lengths = np.zeros(count), np.zeros(count), np.zeros(count, dtype=int)
        self.finished: deque[float] = deque(maxlen=100)
        self.steps, self.episodes, self.cut, self.outside = 0, 0, 0, 0
        self.extremes = (np.inf, -np.inf)

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
            reward, discount, following = self._outcome(pending, terminated, last)
            observation, first, _ = pending.popleft()
            self.replay.add(observation, first, reward, discount, following)

    def _memory(self, size: int) -> Transitions:
        return Transitions(size, self.shape)

    def _outcome(self, steps: deque, terminated: bool, last: np.ndarray) -> tuple[Any, Any, Any]:
        """Reward, discount and what follows after all of these steps (observation, action, reward)."""
        total = sum(self.gamma**k * step[2] for k, step in enumerate(steps))
        return total, 0.0 if terminated else self.gamma ** len(steps), last

    def _close(self, i: int, terminated: bool) -> None:
        (low, high), value = self.returns_range, float(self.discounted[i])
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        self.finished.append(float(self.totals[i]))
        self.episodes += 1
        self.cut += not terminated
        self.outside += not low - slack <= value <= high + slack
        self.extremes = (min(self.extremes[0], value), max(self.extremes[1], value))
        self.totals[i], self.discounted[i], self.lengths[i] = 0.0, 0.0, 0

    def fill(self) -> None:
        """The random steps before the first batch, and more until there is a transition."""
        while self.steps < self.warmup or not len(self.replay):
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


class LambdaExperience(Experience):
    """Transitions of 1 to n steps, for λ-returns: rewards and discounts (B, n), next observations (B, n, *shape).

    Near the end of an episode, those that would reach beyond it are the one that reaches it.
    """

    def _memory(self, size: int) -> Transitions:
        return Transitions(size, self.shape, (self.n_step,))

    def _outcome(self, steps: deque, terminated: bool, last: np.ndarray) -> tuple[Any, Any, Any]:
        """The outcomes after 1, 2, … of these steps."""
        outcomes = []
        for k in range(1, self.n_step + 1):
            first, whole = list(steps)[:k], k >= len(steps)
            end = last if whole else steps[k][0]
            outcomes.append(super()._outcome(deque(first), terminated and whole, end))
        return tuple(map(np.stack, zip(*outcomes)))  # type: ignore[return-value]


def seeds(count: int, *numbers: int) -> list[int]:
    """Seeds of environments that are stepped together: of other numbers others, where counting up would share most."""
    return np.random.SeedSequence(numbers).generate_state(count).tolist()


def mean_of_worst(returns: np.ndarray, share: float) -> float:
    """The mean of the worst of some returns (n,), of this share of them, rounded up; of all for a share of 1."""
    count = math.ceil(share * len(returns) - 1e-9)
    return float((np.sort(returns)[:count] if count < len(returns) else returns).mean())


def play(envs: Any, shape: tuple[int, ...], greedy: Greedy, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Episodes under a greedy policy, the same number in each environment; they need a limit of steps to end surely.

    Args:
        envs: environments of `make_envs`.
        shape: shape of an encoded observation.
        greedy: the policy.
        episodes: a multiple of the number of environments.
        seed: seed of the environments.

    Returns:
        Undiscounted returns, and whether a limit of steps ended the episode; both (episodes,).
    """
    count, each = envs.num_envs, episodes // envs.num_envs
    observed, _ = envs.reset(seed=seeds(count, seed, 1))  # not those of experience
    total = np.zeros(count)
    found: list[list[tuple[float, bool]]] = [[] for _ in range(count)]
    while min(map(len, found)) < each:
        observed, reward, terminated, truncated, _ = envs.step(greedy(encode(observed, shape)))
        total += reward
        for i in np.flatnonzero(terminated | truncated):
            found[i].append((total[i], not terminated[i]))
            total[i] = 0.0
    returns, cut = zip(*(episode for of_one in found for episode in of_one[:each]))
    return np.array(returns), np.array(cut)
