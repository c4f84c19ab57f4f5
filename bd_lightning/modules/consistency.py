r"""A generator of one or two network calls as a LightningModule.

A consistency function f(x, σ) = x + σ²S(x, σ) takes every point of the flow dx/dσ = −σ ∇log p_σ to its end at σ = 0.
f(x, 0) = x holds however S is. Tuning begins where S is the score of a trained model.

References:
    | Song et al., Consistency Models, arXiv 2303.01469
    | Geng et al., Consistency Models Made Easy, arXiv 2406.14548 (tuning: stages, loss, noise levels)
    | Silvestri et al., Training Consistency Models with Variational Noise Coupling, arXiv 2502.18197
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.divergences import bcast
from bd_lightning.dynamics import Sampler
from bd_lightning.fields import AnalyticFields, FieldPair, LearnedFields
from bd_lightning.kernels import Constant
from bd_lightning.modules.generator import Generator
from bd_lightning.networks.base import Network
from bd_lightning.objectives import Losses, NoiseLevels
from bd_lightning.targets import Density


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
        """r/t for t (B,), in units of half the data's standard deviation, at a share of the training."""
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


class ConsistencyModel(Generator):
    r"""Learns a consistency function by tuning a trained model, or from nothing.

    With t from the noise levels, r < t from the gaps, x_t = x + t n and x_r = x + r n for one noise n,

        loss = (√(‖f(x_t, t) − f(x_r, r)‖² + c²) − c) / (t − r),        c = huber · √d · σ_d,

    without a gradient through f(x_r, r), which is x itself at r = 0. With a teacher x_r is where one step of its flow
    takes x_t instead, so that its fields, which may be those of a mixture or guided, decide what is learned; x then
    only says where. Dropout has the same masks on both sides.

    With a coupling the noise is n = μ(x) + σ(x) ε, ε ~ N(0, I), which costs kl_weight · KL(N(μ, σ²I) ‖ N(0, I)) / d.

    Args:
        network: trunk, as in `BellmanDiffusion`; its scalar head is not used.
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        sigma_data: standard deviation σ_d of the data, from the data module.
        samplers: samplers by name, None where there is none.
        sampler: name of the one that prediction and metrics use.
        noise: t in units of 2σ_d, at most the samplers' first level.
        gaps: r of t.
        huber: c above, relative.
        init: checkpoint of the same network, whose weights a new run begins with; None begins anew.
        teacher: checkpoint whose flow is learned; None learns from the data alone.
        mix: of a teacher by model=relative, weights of classes.
        remove: classes left out.
        merge: further checkpoints and their weights.
        calibrate: pilot samples of the teacher that correct the weights of a mixture.
        labels: classes of a conditional teacher that a conditional network learns; None takes all.
        guidance: scale of the teacher's guidance.
        guidance_interval: noise levels between which it acts.
        coupling: a network whose F is μ(x) and whose a is log σ(x), one for each x; None is n ~ N(0, I).
        kl_weight: weight of the coupling's KL.
        options: arguments of `Module`.

    Raises:
        ValueError: for values out of range, and for samplers that need a score.
    """

    fields: LearnedFields
    has_score = False

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        samplers: dict[str, Sampler | None],
        sampler: str = "two",
        noise: NoiseLevels = NoiseLevels(-1.1, 2.0),  # noqa: B008 (frozen)
        gaps: Gaps = Gaps(),
        huber: float = 0.03,
        init: str | None = None,
        teacher: str | None = None,
        mix: dict[int | str, float] | None = None,
        remove: list[int | str] | None = None,
        merge: dict[str, float] | None = None,
        calibrate: int = 0,
        labels: list[int | str] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        coupling: Network | None = None,
        kl_weight: float = 10.0,
        **options: Any,
    ) -> None:
        refuse_scores(samplers, sampler)
        super().__init__(shape, num_classes, samplers, sampler, noise, 1.0, guidance_interval, **options)
        in_range(0, math.inf, huber=huber, kl_weight=kl_weight, guidance=guidance, calibrate=calibrate)
        if network.head_shape:
            raise ValueError("network.per_class=true is for model=relative, which can be a teacher")
        given: dict[str, Any] = {"mix": mix, "remove": remove, "merge": merge, "labels": labels}
        for name, value in given.items():
            if value and teacher is None:
                raise ValueError(f"{name} says what a teacher's flow is made of: give teacher=<checkpoint> too")
        if guidance != 1 and teacher is None:
            raise ValueError("guidance is that of a teacher: give teacher=<checkpoint> too")
        if calibrate and not (mix or remove or merge):
            raise ValueError("calibrate corrects the weights of a mixture: give mix, remove or merge too")
        if coupling is not None and (coupling.conditional or coupling.head_shape):
            raise ValueError("coupling is a network without classes: leave its conditional and per_class out")
        if labels and not network.conditional:
            raise ValueError("labels need a network that is told the class: network.conditional=true")
        self.conditional = self.takes_labels = network.conditional
        self.fields = LearnedFields(network, Constant(), sigma_data, self.dim)
        network.scalar_head.requires_grad_(False)  # no loss reaches it, and DDP would wait for its gradient
        self.coupling, self.kl_weight, self.gaps, self.huber = coupling, kl_weight, gaps, huber
        self.init, self.teacher_path, self.asked_of = init, teacher, given | {"calibrate": calibrate}
        self.teacher_guidance = guidance
        self.sigma_max = max(one.start_scale for one in self.samplers.values())
        self.frozen: tuple[Any, ...] = ()
        self.progress = 0.0

    def prepare(self, fresh: bool) -> None:
        """Take the weights of `init`, if the run is new, and load the teacher.

        Raises:
            UserError: for checkpoints that do not fit this model.
        """
        from bd_lightning import teachers  # which builds models

        if fresh and self.init is not None:
            teachers.begin_from(self, self.init)
        if self.teacher_path is not None:
            self.frozen = (teachers.load(self, self.teacher_path, self.teacher_guidance, **self.asked_of),)

    def on_fit_start(self) -> None:
        """Move the teacher, which is no part of this module, to its device."""
        for teacher in self.frozen:
            teacher.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note how much of the training is done."""
        super().on_train_batch_start(batch, batch_idx)
        self.progress = self.trainer.global_step / max(1, self.trainer.max_steps)

    def analytic(self, density: Density) -> FieldPair:
        """The fields that tuning begins at: after it S is no score."""
        return AnalyticFields(density, self.fields.kernel, self.fields.sigma_data)

    def function(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """f(x, σ), of the shape of x, for x (B, *), σ (B,) from 0 on, and label (B,) where the network is told it."""
        S, _ = self.fields.outputs(x, sigma.clamp_min(1e-6), label)
        return x + bcast(sigma.square(), x) * S

    def noised(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The noise n (B, *) for data x (B, *), and its KL (B,)."""
        n = torch.randn(x.shape, device=x.device, generator=generator)
        if self.coupling is None:
            return n, x.new_zeros(len(x))
        mean, log_scale = self.coupling(x / self.fields.sigma_data, x.new_zeros(len(x)), None)
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

    def distance(self, error: Tensor) -> Tensor:
        """√(‖error‖² + c²) − c, shape (B,), of errors (B, *)."""
        c = self.huber * math.sqrt(self.dim) * self.fields.sigma_data
        return (error.square().flatten(1).sum(1) + max(c, 1e-6) ** 2).sqrt() - c

    def classes(self, label: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """The classes (B,) that a batch is of: its own, or those that are asked for, one after the other."""
        if not self.conditional or label is None:
            return None
        for teacher in self.frozen:
            if teacher.labels:
                return torch.tensor(teacher.labels, device=device)[
                    torch.arange(count, device=device) % len(teacher.labels)
                ]
        return label

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its parts, means over the batch, and the vectors of `losses`."""
        x, label = batch
        losses = self.losses(x, label, generator)
        parts = {"loss_consistency": losses.gradient.mean()}
        if self.coupling is not None:
            parts["loss_kl"] = losses.scalar.mean()
        return {"loss": losses.total, **parts}, dict(vars(losses))


def refuse_scores(samplers: Mapping[str, Sampler | None], sampler: str) -> None:
    """Refuse samplers that follow a score.

    Raises:
        ValueError: naming the first.
    """
    asked = {name: one for name, one in samplers.items() if one is not None}
    wrong = next((name for name, one in asked.items() if not one.consistency), None)
    if wrong is None and sampler not in asked and sampler in ("ode", "sde"):
        wrong = sampler  # what every other model has
    if wrong is not None:
        others = " or ".join(name for name, one in asked.items() if one.consistency) or "ConsistencySteps"
        raise ValueError(
            f"a consistency model is no score that '{wrong}' could follow: take {others}, or sample the checkpoint "
            "that it was tuned from"
        )
