"""Trained models from Python: fields and samplers of a checkpoint, an exported folder, or an address of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bd_lightning import checkpoints
from bd_lightning import facts as facts_of
from bd_lightning.checks import UserError, positive
from bd_lightning.cli import build
from bd_lightning.combinations import choose_labels
from bd_lightning.dynamics import Sampler
from bd_lightning.facts import Facts
from bd_lightning.fields import FieldPair
from bd_lightning.latents import LatentSpace, check_codes
from bd_lightning.modules.generator import Generator


@dataclass(frozen=True)
class Pretrained:
    """A trained model, frozen.

    Args:
        model: the module.
        facts: what it knows of its data.
        latents: the autoencoder in whose codes it learned; None if it learned in the data.
    """

    model: Generator
    facts: Facts
    latents: LatentSpace | None = None

    @property
    def fields(self) -> FieldPair:
        """The fields of all the data: (s, g) of points (B, *shape) and noise levels (B,)."""
        return self.model.fields

    @property
    def samplers(self) -> Mapping[str, Sampler]:
        """Its samplers by name; each is called with fields and noise."""
        return self.model.samplers

    def sample(
        self,
        n: int,
        labels: int | str | Sequence[int | str] = (),
        seed: int = 0,
        sampler: str | None = None,
        batch_size: int = 500,
    ) -> Tensor:
        """Draw the samples that `train.py predict` draws.

        Args:
            n: their number.
            labels: class names or indices, one after the other, or one for all; empty takes what predict takes.
            seed: seed of the whole set; sample i is the same for any n and batch size, but by `FeynmanKac`.
            sampler: name of a sampler; its default if None.
            batch_size: samples at a time.

        Returns:
            Images in [−1, 1] up to overshoot, (n, C, H, W), rows of a table in its units, or points; on the CPU.

        Raises:
            ValueError: if n is not positive.
            UserError: for classes and samplers that do not exist, and when chains are lost.
        """
        positive(n=n, batch_size=batch_size)
        if sampler is not None and sampler not in self.samplers:
            raise UserError(f"no sampler {sampler!r}; there are {', '.join(self.samplers)}")
        chosen = choose_labels([labels] if isinstance(labels, int | str) else labels, self.facts, self.model)
        drawn = []
        for start in range(0, n, batch_size):
            indices = range(start, min(n, start + batch_size))
            label = torch.tensor([chosen[i % len(chosen)] for i in indices]) if chosen else None
            label = label if label is None else label.to(self.model.device)
            drawn.append(self.decode(self.model.sample(indices, sampler, seed, label)).cpu())
        return torch.cat(drawn)

    def decode(self, x: Tensor) -> Tensor:
        """What is shown of samples x (B, *shape): images of codes, rows of a table in its units, else x itself."""
        if self.latents is not None:
            return self.latents.decode(x)
        if self.facts.scale is not None:
            x = x.double() * torch.tensor(self.facts.scale, dtype=torch.float64, device=x.device)
        if self.facts.center is not None:
            x = x.double() + torch.tensor(self.facts.center, dtype=torch.float64, device=x.device)
        return x


def load(place: str | Path, trust: bool = False) -> Pretrained:
    """Load a trained model.

    Args:
        place: a checkpoint, an exported folder, `hf://owner/name[@revision]`, or
            `wandb://entity/project/artifact:alias`.
        trust: build classes that are not this suite's, if the config in it names some; they can do anything.

    Returns:
        Its fields and samplers, with averaged weights.

    Raises:
        UserError: if there is none, it is damaged, names classes that are not this suite's, or draws no samples.
    """
    before = build.trusted.set(None if trust else ())
    try:
        return _load(place)
    finally:
        build.trusted.reset(before)


def _load(place: str | Path) -> Pretrained:
    model, stored = checkpoints.load(place, Generator)  # type: ignore[type-abstract]
    if not isinstance(stored["data"], dict):
        raise UserError(f"{place} is damaged, the data of its config are no mapping: fetch it again")
    node = stored["data"].get("autoencoder")
    latents = None
    if node:
        build.refuse_strangers(node, str(place))
        build.check_kind(node, "data.autoencoder", "bd_lightning.latents.LatentSpace")
        latents = build.instantiate(node, "data.autoencoder")
    facts = facts_of.read(stored["facts"])
    if latents:
        check_codes(latents, facts.shape, facts.space)
    return Pretrained(model, facts, latents)
