r"""A generator of one or two network calls that learns the ends of a teacher's chains.

The chains of a sampler without noise of its own take every start to one end. So f at all their states is known without
a target that is learned beside it, and is fitted by regression. The first noise level, where a single call has to
decide everything, gets as many of the pairs as one likes.

References:
    | Luhman and Luhman, Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed,
      arXiv 2101.02388
    | Zhou et al., Inductive Moment Matching, arXiv 2503.07565 (a distance matches the distribution of few-step samples)
    | Song et al., Consistency Models, arXiv 2303.01469 (f, and the levels between two calls)
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.distances import energy_distance
from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.modules.few_steps import FewStepGenerator
from bd_lightning.objectives import Losses

FLOW = MultistepDynamics(levels=12, order=3, corrector=True, relaxation=0.0, sigma_min=0.1)


@dataclass(frozen=True)
class Chains:
    """Chains of a teacher.

    Args:
        levels: their noise levels, shape (L,).
        states: their states there, shape (L, N, *).
        ends: where they end, shape (N, *).
        label: their classes, shape (N,), if they have any.
    """

    levels: Tensor
    states: Tensor
    ends: Tensor
    label: Tensor | None


class DistilledModel(FewStepGenerator):
    r"""Learns the map from the states of a teacher's chains to their ends.

    With x_σ a state of a chain at its noise level σ, and y the chain's end,

        loss = (√(‖f(x_σ, σ) − y‖² + c²) − c) / min(σ, σ_d),        c = huber · √d · σ_d,

    and `energy` times the energy distance between samples of one call, half as many as pairs, and the chains' ends
    (classes are further coordinates). A regression draws f to means, most at the first noise level, where f is what a
    single call returns; the distance keeps the distribution of these samples as wide as it should be.

    The chains begin with noise, so that no data is asked for but the classes of a conditional student's batches. New
    ones are drawn every `every` steps, and are the same again when a run is resumed.

    Args:
        flow: the sampler of the chains; its first noise level is that of `samplers`.
        chains: how many are drawn at once.
        every: steps between.
        first: share of the pairs at the first noise level; the other levels have equal shares.
        energy: weight of the energy distance; 0 leaves it out.
        options: arguments of `FewStepGenerator`.

    Raises:
        ValueError: without a teacher, and for values out of range.
    """

    def __init__(
        self,
        flow: MultistepDynamics = FLOW,
        chains: int = 2048,
        every: int = 100,
        first: float = 0.3,
        energy: float = 3.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        in_range(2, math.inf, chains=chains)
        positive(every=every)
        in_range(0, 1, first=first)
        in_range(0, math.inf, energy=energy)
        if self.teacher_path is None:
            raise ValueError("a distilled model learns from another one alone: give teacher=<checkpoint>")
        if self.noise is not None:
            raise ValueError("noise is that of data, and a distilled model learns at the levels of flow: leave it out")
        if flow.levels < 2:
            raise ValueError("flow.levels must be 2 at least")
        if flow.relaxation:
            raise ValueError("flow.relaxation must be 0: chains with noise of their own have no single end")
        if len(first_levels := sorted({one.start_scale for one in self.samplers.values()})) > 1:
            raise ValueError(f"samplers begin at noise levels {first_levels}: the chains have one first level")
        self.flow, self.count, self.every, self.first = flow, chains, every, first
        self.energy = energy
        self.drawn: tuple[int, Chains] | None = None
        self.place = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note which chains this step learns from."""
        super().on_train_batch_start(batch, batch_idx)
        self.place = self.trainer.global_step // self.every

    def chains(self, place: int, count: int) -> Chains:
        """Chains number `place` of this run and rank."""
        (teacher,) = self.frozen
        seed = np.random.SeedSequence((getattr(self, "seed", 0), self.global_rank, place)).generate_state(1)[0]
        flow = replace(self.flow, sigma_max=self.sigma_max, exact_score=teacher.exact)
        label = None
        if self.conditional:
            known = torch.tensor(teacher.labels or range(self.num_classes), device=self.device)
            label = known[torch.arange(count, device=self.device) % len(known)]
        with torch.no_grad():
            states = list(
                flow.path(teacher.fields(label), SampleNoise(range(count), self.shape, int(seed), self.device))
            )
        levels = torch.tensor(flow.ladder()[:-1], device=self.device)
        return Chains(levels, torch.stack(states[:-1]), states[-1], label)

    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """The regression's loss for as many pairs as x (B, *) has rows; see `Generator`."""
        if self.drawn is None or self.drawn[0] != self.place:
            self.drawn = self.place, self.chains(self.place, self.count)
        chains = self.drawn[1]

        def below(count: int) -> Tensor:
            return torch.randint(count, (len(x),), device=x.device, generator=generator)

        def classes(rows: Tensor) -> Tensor | None:
            return None if chains.label is None else chains.label[rows]

        first = torch.rand(len(x), device=x.device, generator=generator) < self.first
        level = torch.where(first, 0, 1 + below(len(chains.levels) - 1))
        rows, others = below(len(chains.ends)), below(len(chains.ends))
        t = chains.levels[level]
        error = self.function(chains.states[level, rows], t, classes(rows)) - chains.ends[rows]
        loss = self.distance(error) / t.clamp_max(self.fields.sigma_data)
        added = self.matching(chains.ends[others], classes(others), generator)
        return Losses(loss, added.expand(len(t)), t, torch.ones_like(t))

    def matching(self, real: Tensor, label: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The weighted energy distance of samples of one call to real (B, *) of classes label (B,), a scalar."""
        if not self.energy:
            return real.new_zeros(())
        count = max(2, len(real) // 2)
        start = self.sigma_max * torch.randn(count, *self.shape, device=real.device, generator=generator)
        drawn = self.function(start, start.new_full((count,), self.sigma_max), None if label is None else label[:count])
        parts = [drawn.flatten(1), real.flatten(1)]
        if label is not None:
            width = math.sqrt(self.dim) * self.fields.sigma_data
            classes = width * torch.nn.functional.one_hot(label, self.num_classes).to(real)
            parts = [torch.cat([part, classes[: len(part)]], 1) for part in parts]
        return self.energy * energy_distance(*parts)

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its parts, means over the batch, and the vectors of `losses`."""
        x, label = batch
        losses = self.losses(x, label, generator)
        parts = {"loss_ends": losses.gradient.mean(), "loss_energy": losses.scalar.mean()}
        return {"loss": losses.total, **parts}, dict(vars(losses))
