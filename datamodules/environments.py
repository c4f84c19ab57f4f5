"""Environments of gymnasium: they are stepped while the model trains, and it learns from a replay buffer."""

import importlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bd_lightning.checks import UserError, count, in_range, positive
from bd_lightning.facts import PROBES, EnvironmentFacts
from datamodules.base import Data
from datamodules.experience import Experience, LambdaExperience, Transitions, encode, seeds
from datamodules.splits import DataError

LONGEST = 1000
"""Steps after which episodes are cut in environments without a limit of their own, unless `max_steps` is given."""

NAMESPACES = {"MinAtar": ("minatar", "minatar.gym")}
"""Namespaces of ids that a package adds to gymnasium: the package, and its module that has `register_envs`."""


def register(name: str) -> None:
    """Let the package that an id belongs to add its environments to gymnasium, if it is one of `NAMESPACES`.

    Raises:
        UserError: if the package is absent.
    """
    package, module = NAMESPACES.get(name.partition("/")[0], (None, ""))
    if package is None:
        return
    import gymnasium

    if name not in gymnasium.registry:
        try:
            importlib.import_module(module).register_envs()
        except ImportError as error:
            raise UserError(f"'{name}' needs {package}: install it with 'uv sync --group games'") from error


def make_envs(name: str, count: int, options: dict[str, Any] | None = None, scale: float | None = None) -> Any:
    """Environments stepped together; after the end of an episode they start the next in the same step.

    Args:
        name: id of the environment.
        count: how many.
        options: arguments of each.
        scale: what observations are divided by; None leaves them, and is refused for bytes and other whole numbers.

    Raises:
        UserError: if gymnasium or the environment's package is absent, the environment unknown, or its spaces not
            supported.
    """
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode

        from datamodules.guarded import Guarded
    except ImportError as error:
        raise UserError("environments need gymnasium: install it with 'uv sync --group rl'") from error
    if ":" in name:  # module:id imports the module, which runs it; configs of checkpoints name environments too
        raise DataError(
            f"cannot make the environment '{name}': an id with ':' runs the code of a module; give the id of an "
            "environment that is registered, one of your own as docs/guide/returns.md says"
        )
    register(name)

    def plain(env: Any) -> Any:
        space, actions = env.observation_space, env.action_space
        if isinstance(actions, gymnasium.spaces.Discrete) and actions.start:
            inner = gymnasium.spaces.Discrete(actions.n)
            env = gymnasium.wrappers.TransformAction(env, lambda a: a + actions.start, inner)
        if isinstance(space, gymnasium.spaces.Discrete) and space.start:
            outer = gymnasium.spaces.Discrete(space.n)
            env = gymnasium.wrappers.TransformObservation(env, lambda x: x - space.start, outer)
        if isinstance(space, gymnasium.spaces.Box) and not space.shape:
            env = gymnasium.wrappers.ReshapeObservation(env, (1,))
        return env

    def divided(env: Any) -> Any:
        space = env.observation_space
        if scale is None or not isinstance(space, gymnasium.spaces.Box):
            return env
        low, high = (np.asarray(bound / scale, dtype=np.float32) for bound in (space.low, space.high))
        box = gymnasium.spaces.Box(low, high, dtype=np.float32)
        return gymnasium.wrappers.TransformObservation(env, lambda x: np.asarray(x, np.float32) / scale, box)

    wrappers: list[Any] = [partial(Guarded, name=name), plain, divided]
    try:
        mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
        envs = gymnasium.make_vec(
            name, count, vectorization_mode="sync", vector_kwargs=mode, wrappers=wrappers, **(options or {})
        )
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(
            f"'{name}' needs packages that are not installed (gymnasium says: {' '.join(str(error).split())}): those "
            "of Box2D and MinAtar come with 'uv sync --group games'"
        ) from error
    except Exception as error:  # whatever the environment's own code raises
        given = f" with options {options}" if options else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"cannot make the environment '{name}'{given}: {reason}") from error
    actions, states = envs.single_action_space, envs.single_observation_space
    if not isinstance(actions, gymnasium.spaces.Discrete):
        raise DataError(
            f"'{name}' has actions in {actions}: only a finite set of actions is supported, each has a distribution"
        )
    if not isinstance(states, (gymnasium.spaces.Discrete, gymnasium.spaces.Box)):
        raise DataError(f"'{name}' has observations in {states}: only Box and Discrete are supported")
    if 0 in (states.shape or ()):
        raise DataError(f"'{name}' observes nothing: its observation_space is {states}")
    if isinstance(states, gymnasium.spaces.Box) and np.issubdtype(states.dtype, np.integer):
        raise DataError(
            f"'{name}' observes whole numbers ({states.dtype}, up to {states.high.max()}), and no scale is declared: "
            f"set data.scale to what they are divided by, e.g. data.scale={states.high.max()}"
        )
    return envs


def own_limit(envs: Any) -> int | None:
    """The steps after which environments of `make_envs` end an episode by themselves; None if they never do."""
    return envs.envs[0].spec.max_episode_steps


def fetched_whole(batch: Any) -> Any:
    """A batch that comes in one piece, as it is."""
    return batch


class Environment(Data):
    """A gymnasium environment, stepped while a model of `bd_lightning.modules.ReturnLearner` trains.

    The replay buffer is not part of checkpoints: a resumed run fills it anew, and goes on with the decay of ε.

    Args:
        env: id of the environment, e.g. CartPole-v1.
        v_min: smallest discounted return, as declared to the model; episodes outside are counted and reported.
        v_max: largest one.
        options: its arguments, e.g. {is_slippery: false}.
        options_for: id of the environment that `options` are meant for; with another id they are refused. None takes
            them to be those of `env`.
        scale: what observations are divided by; it must be declared for pixels and other whole numbers. None leaves
            them as they are.
        max_steps: steps after which an episode is cut, which does not end its return. None leaves the environment's own
            limit, and cuts after 1,000 steps where it has none.
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
        root: folder of data sets, of which an environment needs none.
        batch_size: transitions in a batch.
        eval_batch_size: transitions in a batch of validation and test.
        num_workers: 0; the policy that steps the environments is the model in training.
        pin_memory: copy held-out batches to page-locked memory, for GPUs.

    Attributes:
        probes: observations of a few states, (P, *shape), the start of an episode first, for figures.
        cap: steps after which episodes are cut that the environment would go on with; None where its own limit holds.
        experience: the stream of the present training, None before it.
    """

    stream: type[Experience] = Experience

    def __init__(
        self,
        env: str,
        v_min: float,
        v_max: float,
        options: dict[str, Any] | None = None,
        options_for: str | None = None,
        scale: float | None = None,
        max_steps: int | None = None,
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
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
        if not v_min < v_max:
            raise ValueError(f"v_min must be below v_max, got {v_min} and {v_max}")
        positive(num_envs=num_envs, collect=collect, n_step=n_step, size=size, warmup=warmup, decay=decay)
        positive(held_out=held_out, batch_size=batch_size, eval_batch_size=eval_batch_size)
        in_range(0, np.inf, seed=seed)
        for i, value in enumerate(epsilon):
            in_range(0, 1, **{f"epsilon[{i}]": value})
        if num_workers:
            raise ValueError("num_workers must be 0: the policy that steps the environments is the model in training")
        if options and options_for not in (None, env):
            raise ValueError(
                f"the options {options} are meant for {options_for}, and env is {env}: set data.options=null, "
                f"or data.options_for={env} if they are for it too"
            )
        if scale is not None:
            positive(scale=scale)
        self.env, self.options, self.gamma, self.num_envs = env, options or {}, gamma, num_envs
        self.scale = scale
        self.name, self.root, self.batch_size, self.eval_batch_size = env, root, batch_size, eval_batch_size
        self.pin_memory = pin_memory
        self.streams: dict[str, Any] = {
            "n_step": n_step,
            "batch_size": batch_size,
            "collect": collect,
            "size": size,
            "warmup": warmup,
            "epsilon": (epsilon[0], epsilon[1]),
            "decay": decay,
        }
        self.returns_range = (v_min, v_max)
        self.held_out, self.seed, self.steps, self.resumed_epsilon = held_out, seed, 0, 1.0
        self.left = 1.0
        self.held: dict[str, Transitions] = {}
        self.experience: Experience | None = None
        self.cap = max_steps
        if max_steps is not None:
            positive(max_steps=max_steps)
        elif own_limit(self.make(1)) is None:
            self.cap = LONGEST
        envs = self.make(1)
        states = envs.single_observation_space
        self.shape = (int(states.n),) if hasattr(states, "n") else tuple(states.shape)
        self.actions = int(envs.single_action_space.n)
        self.probes = self._probes(envs)

    @property
    def facts(self) -> EnvironmentFacts:
        """Shape of an observation, number of actions, declared range of returns."""
        return EnvironmentFacts(self.name, self.shape, self.actions, *self.returns_range)

    def make(self, count: int) -> Any:
        """So many environments, stepped together, whose episodes all end."""
        limit = {} if self.cap is None else {"max_episode_steps": self.cap}
        return make_envs(self.env, count, {**self.options, **limit}, self.scale)

    def open(self, seed: int, **options: Any) -> Experience:
        """A fresh stream of experience, with other `options` of the stream than the config's."""
        envs, options = self.make(self.num_envs), {**self.streams, **options}
        return self.stream(envs, self.shape, self.gamma, seed=seed, returns_range=self.returns_range, **options)

    def _probes(self, envs: Any, count: int = PROBES) -> Tensor:
        """The first observation of an episode and others under random actions, distinct if there are as many."""
        random = np.random.default_rng(0)
        rows = [encode(envs.reset(seed=0)[0], self.shape)[0]]
        for _ in range(2000):
            observed = encode(envs.step(random.integers(envs.single_action_space.n, size=1))[0], self.shape)[0]
            if random.random() < 0.1 and all(np.abs(observed - row).max() > 1e-3 for row in rows):
                rows.append(observed)
            if len(rows) == count:
                break
        return torch.from_numpy(np.stack((rows * count)[:count]))

    def held_out_transitions(self, stage: str) -> Transitions:
        """Transitions under random actions, of "val" or "test", made at their first use."""
        if stage not in self.held:
            stream = self.open(10_000 + ("val", "test").index(stage), size=self.held_out)
            while stream.replay.count < self.held_out:
                stream.step(None)
            self.held[stage] = stream.replay
        return self.held[stage]

    def setup(self, stage: str | None = None) -> None:
        """Make the held-out transitions of a stage."""
        for name in {"fit": ("val",), "validate": ("val",), "test": ("test",)}.get(stage or "", ()):
            self.held_out_transitions(name)

    def train_dataloader(self) -> DataLoader:
        """The endless stream of batches, of which each is collected when it is asked for."""
        model: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        place = self.steps, self.trainer.global_rank  # type: ignore[union-attr]
        # a resumed run does not meet again what it began with, nor a process what another meets
        (seed,) = seeds(1, self.seed, *place) if any(place) else (self.seed,)
        self.experience = self.open(seed).bind(model.explore)
        if self.steps:  # resumed: ε goes on from there, after a new warm-up
            self.experience.steps, self.experience.warmup = self.steps, self.steps + self.experience.warmup
            self.experience.epsilon = (self.resumed_epsilon, self.experience.epsilon[1])
            self.experience.decay = max(1, round(self.left * self.experience.decay))
        return DataLoader(self.experience, batch_size=None)

    def eval_dataloader(self, stage: str) -> DataLoader:
        """Batches of the held-out transitions, in order."""
        data, size = self.held_out_transitions(stage), self.eval_batch_size
        return DataLoader(data, batch_size=size, collate_fn=fetched_whole, pin_memory=self.pin_memory)

    def val_dataloader(self) -> DataLoader:
        """Held-out transitions of validation."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """Held-out transitions of the test."""
        return self.eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        """Environment steps so far, the present ε, and the share that is left of its decay."""
        if self.experience is None:
            return {}
        stream = self.experience
        left = max(0, stream.decay - max(0, stream.steps - stream.warmup)) / self.streams["decay"]
        return {"steps": stream.steps, "epsilon": float(stream.exploration), "left": left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these.

        Raises:
            ValueError: for states that no training has.
        """
        steps = state_dict.get("steps", 0)
        epsilon, left = state_dict.get("epsilon", 1.0), state_dict.get("left", 1.0)
        count(steps=steps)
        in_range(0, 1, epsilon=epsilon)
        in_range(0, np.inf, left=left)  # of a longer decay than the present one
        self.steps, self.resumed_epsilon, self.left = steps, epsilon, min(1.0, left)


class LambdaEnvironment(Environment):
    """An environment whose transitions span 1 to `n_step` steps at once, for `modules.LambdaReturnLearner`."""

    stream = LambdaExperience
