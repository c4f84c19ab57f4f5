"""What the LightningModules that learn and sample a density share."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError, one_of, plain_name
from bd_lightning.dynamics import SampleNoise, Sampler
from bd_lightning.facts import Facts
from bd_lightning.fields import FieldPair, Guidance
from bd_lightning.modules.base import Module, told
from bd_lightning.objectives import Losses, NoiseLevels, Objective
from bd_lightning.targets import Density


class Generator(Module):
    """Base of the models of a density: the objective's losses become training steps, the fields are sampled.

    Sub-classes set `fields` and `objective`, and compute `losses`.

    Args:
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        samplers: samplers by name, None where there is none; what they return lies in [−1, 1] for images.
        sampler: name of the one that prediction and metrics use.
        noise: noise levels that are trained at; None for a single scale, σ = 0.
        guidance: scale of classifier-free guidance when classes are asked for; 1 is none. Or a mapping of the arguments
            of `fields.Guidance`.
        guidance_interval: noise levels, in data units, between which guidance acts.
        init: checkpoint of the same networks, whose weights a new run begins with; None begins anew.
        options: arguments of `Module`.

    Attributes:
        fields: the pair of fields that is learned.
        objective: what it is trained by.
        conditional: whether samples are drawn class by class, one after the other, unless something else is asked for:
            where the network is told the class, and where classes are guided.
        has_score: whether S is the score of the noised data, which a flow or a student can follow.
        guidable: whether it knows all the data beside the classes, which guidance needs.
        learned: indices of the classes that it learned, where these are not all.
    """

    fields: Any
    objective: Objective
    conditional: bool = False
    has_score: bool = True
    guidable: bool = False
    learned: list[int] | None = None
    example = """import bd_lightning

model = bd_lightning.load("FOLDER")
samples = model.sample(16)  # model.fields and model.samplers are what it draws by"""

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        samplers: dict[str, Sampler | None],
        sampler: str,
        noise: NoiseLevels | None,
        guidance: float | dict[str, Any],
        guidance_interval: tuple[float, float],
        init: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.init = init
        self.samplers = {name: one for name, one in samplers.items() if one is not None}
        for name in self.samplers:  # their pictures are files of that name
            plain_name(**{"the name of a sampler": name})
        if not self.samplers:
            raise ValueError("samplers are all null: at least one is needed")
        one_of(tuple(self.samplers), sampler=sampler)
        self.noise = noise
        calls_once = next((name for name, one in self.samplers.items() if one.consistency), None)
        if self.has_score and calls_once is not None:
            raise ValueError(
                f"samplers.{calls_once} takes a function that ends chains, which model=consistency and model=distilled "
                "learn, and this model is a score: leave it out"
            )
        for name, one in self.samplers.items() if not self.multi_scale else ():
            if one.noise_levels:
                raise ValueError(
                    f"samplers.{name} goes down noise levels, and with noise=null the fields have none: take "
                    "bd_lightning.dynamics.BellmanDynamics, or null; model=paper has all that a single scale needs"
                )
        self.shape, self.num_classes, self.dim = tuple(shape), num_classes, math.prod(shape)
        self.sampler = sampler
        self.guidance = Guidance.read(guidance, guidance_interval)

    def prepare(self, fresh: bool, facts: Facts) -> None:
        """Take the weights of `init`, if the run is new.

        Raises:
            UserError: for a checkpoint that does not fit this model.
        """
        if fresh and self.init is not None:
            from bd_lightning import teachers  # which builds models

            teachers.begin_from(self, self.init, facts)

    def refuse_changes(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse weights to begin with for a model that is trained, and noise levels for one that knows none."""
        if was.get("init") != now.get("init"):
            raise UserError(f"'model.init' says what a training begins with, got {now.get('init')}: leave it out")
        if [node.get("noise", {}) is None for node in (was, now)] == [True, False]:
            raise UserError("this model was trained with noise=null, at a single scale: leave model.noise out")

    def check_init(self, other: "Generator", path: str, theirs: Facts, mine: Facts) -> None:
        """Refuse to begin with the weights of another model, from a path; facts are of the data of either.

        Raises:
            UserError: naming what differs.
        """
        from bd_lightning import teachers

        teachers.check_space(path, theirs, mine)

    @property
    def drawn_classes(self) -> list[int]:
        """Indices of the classes that samples are drawn of where none are asked for."""
        return self.learned or list(range(self.num_classes))

    @property
    def multi_scale(self) -> bool:
        """Whether the fields are those of every noise level, not of σ = 0 alone."""
        return self.noise is not None

    @abstractmethod
    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """Weighted losses of one batch, per sample.

        Args:
            x: clean data, shape (B, *shape).
            label: class indices (B,), used where the model has classes.
            generator: source of noise and of probing directions; the global one if None.
        """

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its two parts, means over the batch, and the vectors of `losses`."""
        x, label = batch
        losses = self.losses(x, label, generator)
        parts = {"loss_gradient": losses.gradient.mean(), "loss_scalar": losses.scalar.mean()}
        return {"loss": losses.total, **parts}, dict(vars(losses))

    def analytic(self, density: Density) -> FieldPair:
        """The fields that the losses are minimised by, for data of a density in closed form."""
        return self.objective.minimiser(self.fields, density)

    def asked(self, label: Tensor | None) -> FieldPair:
        """The fields of classes, label (B,), or of all the data for None, guided if this model is to be."""
        fields = self.fields.conditioned(label)
        return fields if label is None else self.guidance.guided(fields, self.fields.conditioned(None))

    def describe(self) -> str:
        """How it is guided."""
        return f", guided with scale {self.guidance.scale:g}" if self.guidance.acts else ""

    def interacting(self) -> bool:
        """Whether chains of its sampler are resampled among each other."""
        return bool(self.samplers[self.sampler].interacting)

    def drawing(self, sampler: str) -> str:
        """All that samples by a sampler of this name depend on beside weights and noise, to be compared."""
        return f"{told(self.samplers[sampler])}, {told(self.guidance)}"

    def drawings(self) -> list[str]:
        """Those of all samplers."""
        return [self.drawing(name) for name in self.samplers]

    def check_calls(self) -> None:
        """Samplers can be judged wherever they can draw."""
        self.check_predict()

    def check_likelihood(self) -> None:
        """Refuse fields that are no score, or that know a single noise level."""
        if not self.has_score:
            raise UserError(
                f"likelihood needs a score, and {type(self).__name__} has none: take the checkpoint that it was tuned "
                "from, or its teacher"
            )
        if self.guidance.acts:
            raise UserError(
                "likelihood is that of the model's own density, which guidance changes: add model.guidance=1"
            )
        if not self.multi_scale:
            raise UserError("likelihood needs fields of every noise level, and this model was trained with noise=null")

    @torch.inference_mode(False)  # as losses are evaluated, so that a compiled network is compiled once for both
    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        sampler: str | None = None,
        seed: int = 0,
        label: Tensor | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        finite_part: bool = False,
        fields: FieldPair | None = None,
    ) -> Tensor:
        """Draw samples. Sample i of a seed is the same in any batch and on any rank, unless the sampler is interacting.

        Args:
            indices: indices of the samples, length B.
            sampler: name of a sampler of this module; its default if None.
            seed: seed of the whole set.
            label: class indices, shape (B,), where the model has classes.
            watch: called with (step, state) along the way.
            finite_part: leave lost chains out of the result instead of stopping.
            fields: what to sample instead of the model's own fields, e.g. a mixture.

        Returns:
            Samples in the model's units ([−1, 1] for images), shape (B, *shape).

        Raises:
            SamplingDiverged: when chains are lost.
            UserError: for several classes by a sampler whose chains depend on each other.
        """
        noise, by = SampleNoise(indices, self.shape, seed, self.device), self.samplers[sampler or self.sampler]
        if by.interacting and label is not None and bool((label != label[0]).any()):
            raise UserError("FeynmanKac resamples chains of one class among each other: give one, labels=[3], say")
        drawn = self.asked(label) if fields is None else fields
        samples = by(drawn, noise, watch, finite_part)
        if remark := drawn.remark():
            warnings.warn(remark, stacklevel=2)
        return samples

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Samples for a batch of requests: "index", "seed" and, if classes are asked for, "label"; each (B,)."""
        label = batch.get("label")
        return self.sample(batch["index"].tolist(), seed=int(batch["seed"][0]), label=label)
