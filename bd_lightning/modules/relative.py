"""Fields of every class relative to a base Gaussian, as a LightningModule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.dynamics import Sampler
from bd_lightning.fields import RelativeFields
from bd_lightning.modules.generator import Generator
from bd_lightning.networks.base import Network
from bd_lightning.objectives import DensityRatio, Losses, NoiseLevels, queries


class RelativeDensities(Generator):
    """Learns ρ_c = p_c/r and its slope for every class c, so that mixtures of classes need no retraining.

    Args:
        network: trunk with a pair of heads for every class (`per_class`), or with one pair for all the data.
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        sigma_data: standard deviation of the data, from the data module, and of the base Gaussian r at σ = 0.
        samplers: samplers by name, None where there is none.
        sampler: name of the one that prediction and metrics use.
        objective: what the fields are trained by.
        noise: noise levels that they are trained at.
        guidance: scale of classifier-free guidance when classes are asked for; 1 is none. Or a mapping of the arguments
            of `fields.Guidance`: scale, interval, before, transition.
        guidance_interval: noise levels, in data units, between which guidance acts.
        compile: compile the network with torch.compile at its first use; worth it on GPUs.
        options: `init`, a checkpoint whose weights a new run begins with (see `Generator`), and arguments of `Module`.

    Raises:
        ValueError: for values out of range and for combinations that have no meaning.

    References:
        | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 (linearity of the modelling operator)
    """

    fields: RelativeFields

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        samplers: dict[str, Sampler | None],
        sampler: str = "sde",
        objective: DensityRatio = DensityRatio(),  # noqa: B008 (frozen)
        noise: NoiseLevels = NoiseLevels(-0.5, 1.5),  # noqa: B008 (frozen)
        guidance: float | dict[str, Any] = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(shape, num_classes, samplers, sampler, noise, guidance, guidance_interval, **options)
        if network.conditional:
            raise ValueError("relative densities need network.per_class=true instead of network.conditional=true")
        self.objective = objective
        self.takes_labels = self.guidable = bool(network.head_shape)
        if self.guidance.acts and not self.takes_labels:
            raise ValueError("guidance needs fields of the classes: train with network.per_class=true")
        self.conditional = self.guidance.acts
        self.fields = RelativeFields(network, sigma_data, num_classes if self.takes_labels else 1)
        self.objective.check(self.fields, noise)
        if compile:
            network.compile()  # in place: names in checkpoints stay as they are

    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """The objective's losses of a batch, per sample; see `Generator.losses`."""
        if label is None or not self.takes_labels:
            label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if self.training:
            self.fields.count(label)
        assert self.noise is not None  # refused before
        points, _ = queries(x, label, self.noise, self.fields.sigma_data, generator)
        return self.objective(self.fields, points, None, generator)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at the counts of classes, which are the weights of mixtures.

        Raises:
            UserError: if one of them is negative.
        """
        super().on_load_checkpoint(checkpoint)
        if (checkpoint["state_dict"]["fields.counts"] < 0).any():
            raise UserError("the checkpoint is damaged: it has seen a class less often than never (fields.counts)")

    def mixture_source(self) -> RelativeFields:
        """The fields that mixtures are made of."""
        return self.fields

    def mixture_identity(self) -> dict[str, Any]:
        """What has to agree for two models to be merged."""
        assert self.noise is not None
        return {
            "shape of a sample": list(self.shape),
            "base Gaussian, sigma_data =": self.fields.sigma_data,
            "noise.mean and noise.std": [self.noise.mean, self.noise.std],
        }
