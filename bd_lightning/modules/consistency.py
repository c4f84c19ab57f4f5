r"""A consistency model as a LightningModule: what its function says at two points of one chain agrees.

References:
    | Song et al., Consistency Models, arXiv 2303.01469
    | Geng et al., Consistency Models Made Easy, arXiv 2406.14548 (tuning: stages, loss, noise levels)
    | Silvestri et al., Training Consistency Models with Variational Noise Coupling, arXiv 2502.18197
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.divergences import bcast
from bd_lightning.modules.few_steps import FewStepGenerator
from bd_lightning.networks.base import Network
from bd_lightning.objectives import Losses, NoiseLevels


@dataclass(frozen=True)
class Gaps:
    r"""The noise level r that f at t is compared with: r/t = max(0, 1 − (1 + 8 sigmoid(−t)) / q^(k+1)).

    Stage k rises from 0 to stages − 1 in equal parts of the training. At r = 0 the target is the data point itself.

    Args:
        q: factor by which the gap falls from stage to stage.
        stages: number of stages.

    References:
        | Geng et al., Consistency Models Made Easy, arXiv 2406.14548, §3 and Table 5
    """

    q: float = 4.0
    stages: int = 3

    def __post_init__(self) -> None:
        positive(stages=self.stages)
        in_range(1.0001, 1e6, q=self.q)

    def __call__(self, t: Tensor, progress: float) -> Tensor:
        """r/t for t (B,), in units of twice the data's standard deviation, at a share of the training."""
        stage = min(self.stages - 1, int(progress * self.stages))
        return (1 - (1 + 8 * (-t).sigmoid()) / self.q ** (stage + 1)).clamp_min(0)


@contextmanager
def repeated(device: torch.device) -> Iterator[None]:
    """What is done inside draws the random numbers of a device that come after it again: the same dropout masks."""
    cuda = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    yield
    if cuda:
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class ConsistencyModel(FewStepGenerator):
    r"""Learns a consistency function by tuning a trained model, or from nothing.

    With t from the noise levels, r < t from the gaps, x_t = x + t n and x_r = x + r n for one noise n,

        loss = (√(‖f(x_t, t) − f(x_r, r)‖² + c²) − c) / (t − r),        c = huber · √d · σ_d,

    without a gradient through f(x_r, r), which is x itself at r = 0. With a teacher x_r is where one step of its flow
    takes x_t instead, so that its fields, which may be those of a mixture or guided, decide what is learned; x then
    only says where. Dropout has the same masks on both sides.

    With a coupling the noise is n = μ(x) + σ(x) ε, ε ~ N(0, I), which costs kl_weight · KL(N(μ, σ²I) ‖ N(0, I)) / d.

    Args:
        noise: t in units of 2σ_d, at most the samplers' first level.
        gaps: r of t.
        coupling: a network whose F is μ(x) and whose a is log σ(x), one for each x; None is n ~ N(0, I).
        kl_weight: weight of the coupling's KL.
        options: arguments of `FewStepGenerator`.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        noise: NoiseLevels = NoiseLevels(-1.1, 2.0),  # noqa: B008 (frozen)
        gaps: Gaps = Gaps(),
        coupling: Network | None = None,
        kl_weight: float = 10.0,
        **options: Any,
    ) -> None:
        super().__init__(noise=noise, **options)
        if noise.antithetic:
            raise ValueError("a consistency model has no pairs of opposite noise: noise.antithetic=0")
        in_range(0, math.inf, kl_weight=kl_weight)
        if coupling is not None and (coupling.conditional or coupling.head_shape):
            raise ValueError("coupling is a network without classes: leave its conditional and per_class out")
        self.coupling, self.kl_weight, self.gaps = coupling, kl_weight, gaps
        self.progress = 0.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note how much of the training is done."""
        super().on_train_batch_start(batch, batch_idx)
        self.progress = self.trainer.global_step / max(1, self.trainer.max_steps)

    def noised(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The noise n (B, *) for data x (B, *), and its KL (B,)."""
        n = torch.randn(x.shape, device=x.device, generator=generator)
        if self.coupling is None:
            return n, x.new_zeros(len(x))
        mean, log_scale = (one.float() for one in self.coupling(x / self.fields.sigma_data, x.new_zeros(len(x)), None))
        kl = mean.square().flatten(1).mean(1) + (2 * log_scale).exp() - 1 - 2 * log_scale
        return mean + bcast(log_scale.exp(), x) * n, kl / 2

    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """The consistency loss, and the coupling's weighted KL in the place of a scalar field's; see `Generator`."""
        unit = 2 * self.fields.sigma_data
        assert self.noise is not None
        t = (unit * self.noise(len(x), x.device, generator)).clamp_max(self.sigma_max)
        r = t * self.gaps(t / unit, self.progress)
        label = self.classes(label, len(x), x.device)
        n, kl = self.noised(x, generator)
        x_t = x + bcast(t, x) * n
        x_r = x + bcast(r, x) * n
        with torch.no_grad():
            for teacher in self.frozen:
                x_r = teacher.step(x_t, t, r, label)
            with repeated(x.device):
                target = self.function(x_r, r, label)
        distance = self.distance(self.function(x_t, t, label) - target)
        return Losses(distance / (t - r), self.kl_weight * kl, t, torch.ones_like(t))

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its parts, means over the batch, and the vectors of `losses`."""
        x, label = batch
        losses = self.losses(x, label, generator)
        parts = {"loss_consistency": losses.gradient.mean()}
        if self.coupling is not None:
            parts["loss_kl"] = losses.scalar.mean()
        return {"loss": losses.total, **parts}, dict(vars(losses))
