"""Bellman Diffusion as a LightningModule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bd_lightning.augmentation import Augmentation
from bd_lightning.checks import UserError, in_range
from bd_lightning.dynamics import Sampler
from bd_lightning.fields import LearnedFields
from bd_lightning.kernels import Kernel
from bd_lightning.modules.generator import Generator
from bd_lightning.networks.base import Network
from bd_lightning.objectives import FieldDivergence, FieldObjective, Losses, NoiseLevels, Partners, queries


class BellmanDiffusion(Generator):
    """Learns the gradient and the scalar field of a data density and samples from them.

    The default is multi-scale: fields of p_σ at every noise level. With `noise` None it is the paper's model, fields of
    p alone, which needs the direct parametrisation.

    Args:
        network: trunk with two heads (see `networks`).
        kernel: pair kernel (see `kernels`); `Constant` is denoising score matching.
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        sigma_data: standard deviation of the data, from the data module.
        samplers: samplers by name, None where there is none; what they return lies in [−1, 1] for images.
        sampler: name of the one that prediction and metrics use.
        objective: what the fields are trained by.
        noise: noise levels that they are trained at; None for a single scale, σ = 0.
        partners: the pairs of the kernel estimate.
        augment: changes training images at random and tells the networks how (see `augmentation`); None for none.
        scalar_network: a separate network for the scalar field; None shares the trunk.
        parametrisation: "factored", "velocity" or "direct" (see `fields.preconditioning`).
        label_dropout: share of training points whose class a conditional network is not told, for guidance.
        guidance: scale of classifier-free guidance when classes are asked for; 1 is none. Or a mapping of the arguments
            of `fields.Guidance`: scale, interval, before, transition.
        guidance_interval: noise levels, in data units, between which guidance acts.
        compile: compile the networks with torch.compile at their first use; worth it on GPUs. Not for objectives that
            differentiate in forward mode, which the compiler does not take.
        options: `init`, a checkpoint whose weights a new run begins with (see `Generator`), and arguments of `Module`.

    Raises:
        ValueError: for values out of range and for combinations that have no meaning.

    References:
        | Li et al., Bellman Diffusion, arXiv 2410.01796
    """

    fields: LearnedFields
    fixed = ("parametrisation", "kernel")

    def __init__(
        self,
        network: Network,
        kernel: Kernel,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        samplers: dict[str, Sampler | None],
        sampler: str = "ode",
        objective: FieldObjective = FieldDivergence(),  # noqa: B008 (frozen)
        noise: NoiseLevels | None = NoiseLevels(),  # noqa: B008 (frozen)
        partners: Partners = Partners(),  # noqa: B008 (frozen)
        augment: Augmentation | None = None,
        scalar_network: Network | None = None,
        parametrisation: str = "factored",
        label_dropout: float = 0.0,
        guidance: float | dict[str, Any] = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(shape, num_classes, samplers, sampler, noise, guidance, guidance_interval, **options)
        self.kernel, self.objective, self.partners, self.augment = kernel, objective, partners, augment
        self.conditional = self.takes_labels = network.conditional
        self.label_dropout, self.guidable = label_dropout, bool(label_dropout)
        in_range(0, 1, label_dropout=label_dropout)
        if scalar_network is not None and scalar_network.conditional != self.conditional:
            raise ValueError(
                "network.conditional and scalar_network.conditional must be the same: set both, or neither"
            )
        if network.head_shape or (scalar_network is not None and scalar_network.head_shape):
            raise ValueError("network.per_class=true is for model=relative, whose fields it has heads for")
        if label_dropout and not self.conditional:
            raise ValueError("label_dropout needs network.conditional=true: this network is not told the class")
        if self.guidance.acts and not label_dropout:
            raise ValueError(
                "guidance needs a class-conditional model that knows the whole data too: train with "
                "network.conditional=true and label_dropout=0.1, or with model=relative"
            )
        for one in (network, scalar_network):
            if one is not None and one.told != (augment.size if augment else 0):
                raise ValueError(
                    f"augment tells the networks {augment.size if augment else 0} numbers, and one of them takes "
                    f"{one.told}: set network.told (of networks.UNet; others take none) and scalar_network.told to that"
                )
        if augment and len(shape) != 3:
            raise ValueError(f"augment is for images: this data has the shape {tuple(shape)}")
        no_class = num_classes if label_dropout else None
        self.fields = LearnedFields(network, kernel, sigma_data, self.dim, parametrisation, scalar_network, no_class)
        self.objective.check(self.fields, noise)
        if compile and self.objective.forward_mode:
            raise ValueError("compile=true needs objective.trace=stein: forward mode cannot be compiled")
        for one in (network, scalar_network) if compile else ():
            if one is not None:
                one.compile()  # in place: names in checkpoints stay as they are

    def refuse_changes(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Refuse guidance too for a model that was always told the class."""
        super().refuse_changes(was, now)
        if not was.get("label_dropout") and now.get("label_dropout"):
            raise UserError(
                f"'model.label_dropout' is {now['label_dropout']}, and this model was trained without: it was always "
                "told the class, and cannot be guided. Leave it out, or train anew with it"
            )

    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """The objective's losses at the queries of a batch, per sample; see `Generator.losses`."""
        told = None
        if self.augment and self.training:
            x, told = self.augment(x, generator)
        x, pool = self.partners(x, self.training)
        told = None if told is None else told[: len(x)]
        label = label[: len(x)] if self.conditional and label is not None else None
        if label is not None and self.training and self.label_dropout:
            dropped = torch.rand(len(x), device=x.device, generator=generator) < self.label_dropout
            label = label.masked_fill(dropped, self.num_classes)
        points, partners = queries(x, label, self.noise, self.fields.sigma_data, generator, pool, told)
        return self.objective(self.fields, points, partners, generator)
