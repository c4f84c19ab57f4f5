"""What generators of one or two network calls share: their function, their teacher, and what they refuse.

A function f(x, σ) = x + σ²S(x, σ) takes every point of the flow dx/dσ = −σ ∇log p_σ to its end at σ = 0.
f(x, 0) = x holds however S is. Training may begin where S is the score of a trained model.

References:
    | Song et al., Consistency Models, arXiv 2303.01469
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bd_lightning.checks import UserError, in_range, one_of
from bd_lightning.divergences import bcast
from bd_lightning.dynamics import ConsistencySteps, Sampler
from bd_lightning.facts import Facts
from bd_lightning.facts import read as read_facts
from bd_lightning.fields import AnalyticFields, FieldPair, LearnedFields
from bd_lightning.kernels import Constant
from bd_lightning.modules.generator import Generator
from bd_lightning.networks.base import Network
from bd_lightning.objectives import NoiseLevels
from bd_lightning.targets import Density

PARTS = ("mix", "remove", "merge", "labels")
"""What a teacher can be asked for instead of all that it knows."""


class FewStepGenerator(Generator):
    r"""Base of the models whose samples cost one or two network calls.

    Args:
        network: trunk, as in `BellmanDiffusion`; its scalar head is not used.
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        sigma_data: standard deviation σ_d of the data, from the data module.
        samplers: samplers by name, None where there is none.
        sampler: name of the one that prediction and metrics use.
        noise: noise levels of the data that it learns from; None if it learns from none.
        huber: c of the loss √(‖error‖² + c²) − c, in units of √d · σ_d.
        teacher: checkpoint whose flow is learned; None is none.
        mix: of a teacher by model=relative, weights of classes.
        remove: classes left out.
        merge: further checkpoints and their weights.
        calibrate: pilot samples of the teacher that correct the weights of a mixture.
        labels: classes of a conditional teacher that a conditional network learns; None takes all.
        guidance: scale of the teacher's guidance.
        guidance_interval: noise levels between which it acts.
        parametrisation: "factored" or "velocity", as in `BellmanDiffusion`; that of `init`, if weights are taken.
        options: arguments of `Generator` and `Module`.

    Raises:
        ValueError: for values out of range, and for samplers that need a score.
    """

    fields: LearnedFields
    fixed = ("parametrisation",)
    has_score = False
    multi_scale = True

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        samplers: dict[str, Sampler | None],
        sampler: str = "two",
        noise: NoiseLevels | None = None,
        huber: float = 0.03,
        teacher: str | None = None,
        mix: dict[int | str, float] | None = None,
        remove: list[int | str] | None = None,
        merge: dict[str, float] | None = None,
        calibrate: int = 0,
        labels: list[int | str] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        parametrisation: str = "factored",
        **options: Any,
    ) -> None:
        refuse_scores(samplers, sampler)
        super().__init__(shape, num_classes, samplers, sampler, noise, 1.0, guidance_interval, **options)
        in_range(0, math.inf, huber=huber, calibrate=calibrate)
        in_range(0, 1000, guidance=guidance)
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
        if labels and not network.conditional:
            raise ValueError("labels need a network that is told the class: network.conditional=true")
        self.conditional = self.takes_labels = network.conditional
        one_of(("factored", "velocity"), parametrisation=parametrisation)
        self.fields = LearnedFields(network, Constant(), sigma_data, self.dim, parametrisation)
        network.scalar_head.requires_grad_(False)  # no loss reaches it, and DDP would wait for its gradient
        self.huber = huber
        self.teacher_path, self.asked_of = teacher, given | {"calibrate": calibrate}
        self.teacher_guidance = guidance
        self.sigma_max = max(one.start_scale for one in self.samplers.values())
        self.frozen: tuple[Any, ...] = ()
        self.taught_by = ""

    def prepare(self, fresh: bool, facts: Facts) -> None:
        """Take the weights of `init`, if the run is new, and load the teacher.

        Raises:
            UserError: for checkpoints that do not fit this model.
        """
        from bd_lightning import teachers  # which builds models

        self.know(facts)
        super().prepare(fresh, facts)
        if self.teacher_path is not None:
            self.frozen = (teachers.load(self, self.teacher_path, facts, self.teacher_guidance, **self.asked_of),)
            self.taught_by = self.frozen[0].digest()

    def check_init(self, other: Generator, path: str, theirs: Facts, mine: Facts) -> None:
        """Refuse weights of other noise levels too, where training is along a flow of the same data."""
        from bd_lightning import teachers

        teachers.check_fit(self, other, path, theirs, mine)
        if self.teacher_path is None:
            teachers.say_where_it_begins(self, other, path)

    def know(self, facts: Facts) -> None:
        """Take note of which classes of the data are learned."""
        from bd_lightning.combinations import class_name

        labels, names = self.asked_of["labels"] or [], facts.class_names
        self.learned = [names.index(class_name(label, names)) for label in labels] or None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the teacher is known by."""
        checkpoint["teacher"] = self.taught_by

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take note of the classes that were learned.

        Raises:
            UserError: if the run goes on from what another teacher has taught.
        """
        super().on_load_checkpoint(checkpoint)
        if self.taught_by and self.taught_by != checkpoint.get("teacher", self.taught_by):
            raise UserError(
                f"{self.teacher_path} (or what is merged with it) has other weights than those that this model has "
                "learned from: give the checkpoint of then as model.teacher, or begin a new run with model.init"
            )
        self.know(read_facts(checkpoint["hyper_parameters"]["facts"]))

    def describe_part(self) -> str:
        """What is asked of the teacher, if it is not all that it knows."""
        return ", ".join(f"{key}={self.asked_of[key]}" for key in PARTS if self.asked_of[key])

    def describe(self) -> str:
        """Whose student it is, and of what."""
        if self.teacher_path is None:
            return ""
        part = self.describe_part()
        guided = f", guidance {self.teacher_guidance:g}" if self.teacher_guidance != 1 else ""
        return f", a student of another model{guided}" + (f", asked for {part}" if part else "")

    def refuse_changes(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse what would change what was learned, and samplers that begin above all that was trained."""
        super().refuse_changes(was, now)
        for key in (*PARTS, "calibrate", "guidance", "guidance_interval"):
            if was.get(key) != now.get(key):
                raise UserError(f"'model.{key}' says what a student learns, and this one has learned: leave it out")
        if (was.get("teacher") is None) != (now.get("teacher") is None):
            raise UserError("'model.teacher' says whom a student learns from, and this one has learned: leave it out")
        trained = max(one.get("sigma_max", ConsistencySteps.sigma_max) for one in was["samplers"].values() if one)
        if self.sigma_max > trained:
            raise UserError(
                f"a sampler begins at noise level {self.sigma_max:g}, and {trained:g} is the highest learned"
            )

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Losses while it is trained. Later there is no teacher, and no stage of the training, that they are of."""
        return super()._evaluate(stage, batch, batch_idx) if self.trainer.state.fn == "fit" else None

    def on_fit_start(self) -> None:
        """Move the teacher, which is no part of this module, to its device, and say what metrics compare with."""
        for teacher in self.frozen:
            teacher.to(self.device)
        if part := self.describe_part():
            alone = "; data of these classes alone (keep) compare" if self.learned else ""
            rank_zero_info(
                f"metrics compare with all the data, and this model learns {part}: best.ckpt, which they choose, says "
                f"little, last.ckpt is the model{alone}"
            )

    def analytic(self, density: Density) -> FieldPair:
        """The fields that training begins at: after it S is no score."""
        return AnalyticFields(density, self.fields.kernel, self.fields.sigma_data)

    def function(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """f(x, σ), of the shape of x, for x (B, *), σ (B,) from 0 on, and label (B,) where the network is told it."""
        S, _ = self.fields.outputs(x, sigma.clamp_min(1e-6), label)
        return x + bcast(sigma.square(), x) * S

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
