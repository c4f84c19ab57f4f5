"""What a model of returns does: episodes under its greedy policy, and pictures of the distributions it has learned."""

import math
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bd_lightning.checks import UserError, count, in_range, positive
from callbacks.evaluation import Evaluation, Metric, remarked
from callbacks.pictures import publish_animation, publish_image
from callbacks.records import append_record, run_folder, step_of
from datamodules.environments import Environment
from datamodules.experience import Greedy, mean_of_worst, play

TEST = 10_000
"""How far the seed of a test's episodes is from that of validations."""


def need_environment(trainer: L.Trainer, owner: str) -> Environment:
    """The data module, which has to be an environment.

    Raises:
        UserError: naming the callback and what to choose instead.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, Environment):
        raise UserError(
            f"{owner} is for environments, and data is {data.name}: choose data=frozen_lake or data=cart_pole"
        )
    return data


def interruptible(trainer: L.Trainer, greedy: Greedy) -> Greedy:
    """The same policy, which ends the run at its next step if SIGTERM has arrived."""

    def act(observation: np.ndarray) -> np.ndarray:
        if trainer.received_sigterm:
            raise SIGTERMException
        return greedy(observation)

    return act


class EpisodeReturns(Evaluation):
    """Plays episodes under the greedy policy at every validation and test, and watches those of the training.

    Logged under <stage>/: `return`, the mean undiscounted return, its standard error `return_error`, and `env_steps`,
    the environment steps of all processes, which make equally many, and `return_worst` where only the `worst` of the
    episodes are to count; while training, at every logging step,
    `train/env_steps`, `train/epsilon`, and of the first process alone `train/return` (of the last 100 finished
    episodes), `train/episodes_cut`, how many episodes so far a limit of steps ended, and `train/returns_outside`, how
    many had a discounted return outside [v_min, v_max]. The first return outside, and the first episode that
    `data.max_steps` cuts, are reported at once. Rows go to <run folder>/returns.json, with the number of episodes that
    were cut, and the environment steps after which `threshold` was first held over two evaluations.

    Args:
        episodes: episodes of one evaluation.
        num_envs: environments that play them together; divides `episodes`.
        threshold: the mean return that counts as solved, of the episodes that count; None watches for none.
        seed: seed of the episodes, the same at every validation; a test has another, since the best checkpoint was
            chosen by these.
        worst: the share of episodes, the worst of them, whose mean return counts: that of the whole for 1. To choose
            the best checkpoint by it takes `callbacks.best.monitor=val/return_worst`.
    """

    metrics = (Metric("return", 3, "max"), Metric("return_error", 3))
    record: str = "returns.json"

    def __init__(
        self,
        episodes: int = 50,
        num_envs: int = 10,
        threshold: float | None = None,
        seed: int = 1,
        worst: float = 1.0,
    ) -> None:
        positive(episodes=episodes, num_envs=num_envs, worst=worst)
        in_range(0, math.inf, seed=seed)
        in_range(0, 1, worst=worst)
        if episodes % num_envs:
            raise ValueError(f"episodes must be a multiple of num_envs, got {episodes} and {num_envs}")
        self.episodes, self.num_envs, self.threshold, self.seed = episodes, num_envs, threshold, seed
        self.worst = worst
        self.more = ("env_steps", "return_worst") if worst < 1 else ("env_steps",)
        self.above: int | None = None
        self.solved: int | None = None
        self.envs: Any = None
        self.told: set[str] = set()

    def _tell(self, what: str, message: str) -> None:
        """Report something when it happens first."""
        if what not in self.told:
            self.told.add(what)
            rank_zero_info(message)

    def _tell_of_cuts(self, data: Environment) -> None:
        self._tell(
            "cut",
            f"an episode of {data.env} was cut after at most {data.cap} steps (data.max_steps): the returns "
            "that are reported of such episodes end there, the learned ones go on",
        )

    def state_dict(self) -> dict[str, Any]:
        """When the threshold was reached."""
        return {"above": self.above, "solved": self.solved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: for what are no environment steps.
        """
        reached = {name: state_dict[name] for name in ("above", "solved")}
        count(**{name: steps for name, steps in reached.items() if steps is not None})
        self.above, self.solved = reached["above"], reached["solved"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the data is an environment."""
        self.envs = need_environment(trainer, type(self).__name__).make(self.num_envs)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the training episodes gave."""
        data: Environment = trainer.datamodule  # type: ignore[attr-defined]
        stream: Any = data.experience
        if stream.outside:
            (low, high), (smallest, largest) = data.returns_range, stream.extremes
            self._tell(
                "outside",
                f"a training episode had a discounted return outside the declared range [{low:g}, {high:g}] (so far "
                f"they lie between {smallest:.4g} and {largest:.4g}): widen data.v_min and data.v_max",
            )
        if stream.cut and data.cap is not None:
            self._tell_of_cuts(data)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {"env_steps": stream.steps * trainer.world_size, "epsilon": stream.exploration}
            values |= {"episodes_cut": stream.cut, "returns_outside": stream.outside}
            if stream.finished:
                values["return"] = float(np.mean(stream.finished))
            pl_module.log_dict({f"train/{name}": float(value) for name, value in values.items()})

    def _run(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        data = need_environment(trainer, type(self).__name__)
        policy = interruptible(trainer, pl_module.greedy)
        seed = self.seed + (TEST if stage == "test" else 0)
        returns, cut = play(self.envs, data.shape, policy, self.episodes, seed)
        if cut.any() and data.cap is not None:
            self._tell_of_cuts(data)
        one = len(returns) == 1  # of which there is no error to be told
        mean, error = float(returns.mean()), float(returns.std(ddof=1 - one) / len(returns) ** 0.5)
        steps = data.experience.steps * trainer.world_size if data.experience is not None else 0
        counts = mean_of_worst(returns, self.worst)
        values = {"return": mean, "return_error": error} | ({"env_steps": float(steps)} if steps else {})
        values |= {"return_worst": counts} if self.worst < 1 else {}
        pl_module.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        trained = trainer.state.fn == "fit"
        if trained and self.threshold is not None and self.solved is None:
            if counts >= self.threshold and self.above is not None:
                self.solved = self.above
            self.above = (self.above or steps) if counts >= self.threshold else None
        if trainer.is_global_zero:
            reached = ""
            if self.threshold is not None:
                when = "reached" if counts >= self.threshold else "not reached"
                if trained:
                    held = "not held over two evaluations"
                    when = held if self.solved is None else f"held from {self.solved} environment steps on"
                reached = f"; {self.threshold:g} was {when}"
            low = f", the worst {self.worst:.0%} {counts:.3f}" if self.worst < 1 else ""
            short = f", {cut.sum()} cut after at most {data.cap} steps" if cut.any() and data.cap is not None else ""
            (policy,) = pl_module.drawings()
            how = f" with {data.options}" if data.options else ""
            protocol = f"{self.episodes} greedy episodes of {data.env}{how} by {policy}, seed {seed}{short}"
            row = {
                "step": step_of(trainer),
                "drawn": policy,
                **{f"{stage}/{name}": value for name, value in values.items()},
                "episodes_cut": int(cut.sum()),
                "solved": self.solved,
                "protocol": protocol,
                "summary": f"return {mean:.3f} ± {error:.3f}{low} over {protocol}{reached}",
            }
            append_record(trainer, self.record, remarked(row, data.remark))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the policy."""
        self._run(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the policy."""
        self._run(trainer, pl_module, "test")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how many returns lay outside the declared range."""
        stream = trainer.datamodule.experience  # type: ignore[attr-defined]
        if stream.outside:
            low, high = trainer.datamodule.returns_range  # type: ignore[attr-defined]
            rank_zero_info(
                f"{stream.outside} of {stream.episodes} episodes had a discounted return outside the declared range "
                f"[{low:g}, {high:g}]: they lie between {stream.extremes[0]:.4g} and {stream.extremes[1]:.4g}, "
                "widen data.v_min and data.v_max"
            )


class ReturnFigures(L.Callback):
    """Learned densities of the return of every action in a few states (`Environment.probes`).

    At every validation <run folder>/figures/returns-<step>.png, logged as figures/returns; at the end of training all
    of them as an animation, samples/trajectory-returns.gif.

    Args:
        seconds: length of the animation.
    """

    def __init__(self, seconds: float = 4.0) -> None:
        positive(seconds=seconds)
        self.seconds = seconds

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the data is an environment."""
        need_environment(trainer, type(self).__name__)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the figure."""
        if not trainer.is_global_zero:
            return
        x, density, values = return_densities(pl_module)
        figure = density_figure(x, density, values, step_of(trainer))
        path = run_folder(trainer) / "figures" / f"returns-{step_of(trainer):07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        publish_image(trainer, "figures/returns", path, "density of the return of each action, mean dashed")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the animation, also of what was drawn before the run was resumed."""
        if not trainer.is_global_zero:
            return
        drawn = sorted((run_folder(trainer) / "figures").glob("returns-*.png"))
        steps = {path: path.stem.removeprefix("returns-") for path in drawn}
        ours = [path for path, step in steps.items() if step.isdecimal() and int(step) <= step_of(trainer)]
        frames = [Image.open(path).convert("RGB") for path in ours]
        if frames:
            publish_animation(trainer, "returns", frames, self.seconds)


@torch.no_grad()
def return_densities(pl_module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A grid (Q,), densities (P, A, Q) and means (P, A) of the returns in the module's probe states."""
    rep, w = pl_module.representation, pl_module.weights(pl_module.probes)
    x = rep.grid(500)
    return x.cpu(), rep.fields(w, x)[0].cpu(), rep.mean(w).cpu()


def density_figure(x: Tensor, density: Tensor, values: Tensor, step: int) -> Figure:
    """One panel for each of P states, one curve for each of A actions."""
    states = len(density)
    figure = Figure(figsize=(3 * states, 2.6), dpi=100, layout="constrained")
    for i, axes in enumerate(figure.subplots(1, states, squeeze=False).flat):
        for a, (curve, value) in enumerate(zip(density[i], values[i])):
            (line,) = axes.plot(x, curve, lw=1.2, label=f"action {a}")
            axes.axvline(float(value), color=line.get_color(), lw=0.8, ls="--")
        axes.set(title=f"state {i}, step {step}", xlabel="return", ylim=(min(0.0, float(density.min())), None))
    figure.axes[0].legend(fontsize=7)
    return figure
