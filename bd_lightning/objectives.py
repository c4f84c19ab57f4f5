r"""What the fields are trained by: each way to learn is one small class.

    losses = objective(fields, queries, pool, generator)

The queries are clean points with a noise level each (see `NoiseLevels`), or none at a single scale; the pool are their
partners in the kernel estimates (see `Partners`). The losses (see `Losses`) of multi-scale field divergences are
weighted so that the gradient field's is EDM's, (2σ/m)²(1 + σ²/σ_d²)/d, or flow matching's (`Velocity.weight`), with
m_ref(σ) for m, or the estimate for one m of the two (factored fields, traces by Stein's identity and combined); the
scalar field's is relative to m_ref(σ)².

| objective | learns | by |
|---|---|---|
| `FieldDivergence` | s* = m, g* = ½(m ∇log p_σ + ∇m) on the data | the two field divergences, the paper's |
| `KernelRegression` | m and ∇m themselves, off the data too | squared errors at query points |
| `DensityRatio` | ρ_c = p_c/r and ∇log ρ_c of every class c | Stein's identity and the logistic loss |

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §3
    | Karras et al., EDM, arXiv 2206.00364, §5 and Table 1 (weights and noise levels)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bd_lightning import divergences
from bd_lightning.checks import UserError, in_range, one_of, positive
from bd_lightning.divergences import bcast
from bd_lightning.fields import AnalyticFields, AnalyticRelative, FieldPair, LearnedFields, RelativeFields
from bd_lightning.networks.dual import refuse_fused
from bd_lightning.points import NoiseLevels, Partners, Pool, Proposal, Queries, queries
from bd_lightning.targets import Density

__all__ = [
    "DensityRatio",
    "FieldDivergence",
    "FieldObjective",
    "KernelRegression",
    "Losses",
    "NoiseLevels",
    "Objective",
    "Partners",
    "Pool",
    "Proposal",
    "Queries",
    "queries",
]
TRACES = ("stein", "combined", *divergences.PROBES)
CROSSOVER, PROBED = 0.35, 1 / 3


@dataclass(frozen=True)
class Losses:
    """The weighted losses of one batch, per sample.

    Args:
        gradient: of the gradient field, shape (B,).
        scalar: of the scalar field, shape (B,).
        sigma: noise level of each sample, in data units, shape (B,); 0 at a single scale.
        relative_s: s/m_ref, without gradient, shape (B,).
    """

    gradient: Tensor
    scalar: Tensor
    sigma: Tensor
    relative_s: Tensor

    def __post_init__(self) -> None:
        shapes = {name: list(value.shape) for name, value in vars(self).items()}
        if len(self.sigma.shape) != 1 or any(shape != shapes["sigma"] for shape in shapes.values()):
            said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise UserError(f"an objective's Losses are numbers of shape (B,), one for each point; got {said}")

    @property
    def total(self) -> Tensor:
        """What is minimised: the sum of both means, a scalar."""
        return self.gradient.mean() + self.scalar.mean()


@dataclass(frozen=True)
class Objective(ABC):
    """Base of the objectives.

    Args:
        scalar_weight: weight of the scalar field's loss.
    """

    scalar_weight: float = 0.1

    def __post_init__(self) -> None:
        in_range(0, 1e6, scalar_weight=self.scalar_weight)

    @property
    def forward_mode(self) -> bool:
        """Whether networks are differentiated in forward mode, which asks for the layers of `networks.dual`."""
        return False

    @abstractmethod
    def check(self, fields: Any, noise: NoiseLevels | None) -> None:
        """Refuse fields and noise levels that this objective cannot train.

        Raises:
            ValueError: saying what would go.
        """

    @abstractmethod
    def __call__(
        self,
        fields: Any,
        queries: Queries,
        pool: Pool | None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The losses of one batch, per query.

        Args:
            fields: what is trained.
            queries: clean points, with noise levels and classes.
            pool: partners of the kernel estimates.
            generator: source of noise and of probing directions; the global one if None.
        """

    @abstractmethod
    def minimiser(self, fields: Any, density: Density) -> FieldPair:
        """The fields that the losses are minimised by, for data of a density in closed form.

        Factored fields whose trace is by probes alone have those of a kernel without noise (see `preconditioning`).
        """


class FieldObjective(Objective):
    """Base of the objectives that train one pair of fields (`LearnedFields`) by pairs of points."""


@dataclass(frozen=True)
class FieldDivergence(FieldObjective):
    """The two field divergences, E[‖g‖² + m̂ tr ∇g] and E[s² − 2m̂s] (arXiv 2410.01796, §3); see `divergences`.

    Args:
        scalar_weight: weight of the scalar field's loss.
        trace: how tr ∇g is taken. "stein": by Stein's identity, the denoising form, without a derivative and for noise
            levels above zero. "hutchinson", "gaussian": one probe by forward-mode differentiation. "exact": d of them.
            "combined": by Stein's identity, and at the lowest noise levels of a batch by both, weighted so that the
            noise of the sum is least (see `divergences.stein_weight`). "sliced": the paper's, whose probe stands in
            ‖g‖² too; for direct fields.
        crossover: of the combined trace, the noise level at which both count alike, in units of the data's standard
            deviation; None is 0.35.
        probed: of the combined trace, the share of a batch, from the lowest noise levels up, that is probed; the others
            cost no derivative. None is a third.
    """

    trace: str = "stein"
    crossover: float | None = None
    probed: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(TRACES, trace=self.trace)
        if self.crossover is not None:
            positive(crossover=self.crossover)
        if self.probed is not None:
            positive(probed=self.probed)
            in_range(0, 1, probed=self.probed)
        if self.trace != "combined" and (self.crossover, self.probed) != (None, None):
            raise ValueError(
                f"crossover and probed are of trace=combined: leave them out with trace={self.trace}, or set both to "
                "null"
            )

    @property
    def forward_mode(self) -> bool:
        """With any probe."""
        return self.trace != "stein"

    def check(self, fields: LearnedFields, noise: NoiseLevels | None) -> None:
        """Refuse a trace that the fields or the noise levels have no form for."""
        if noise is None and not fields.parametrisation.single_scale:
            raise ValueError("noise=null needs parametrisation=direct: the factored one divides by the noise level")
        if noise is None and self.trace in ("stein", "combined"):
            others = ", ".join(divergences.PROBES)
            raise ValueError(f"noise=null needs objective.trace={others}: without noise there is nothing to denoise")
        if self.trace not in fields.parametrisation.traces:
            raise ValueError("objective.trace=sliced is the paper's loss for parametrisation=direct; use hutchinson")
        if self.forward_mode:
            refuse_fused(fields.network)

    def __call__(self, fields, queries, pool, generator=None):
        if queries.sigma is None:
            self.check(fields, None)
        point, noise, level = queries.perturbed(generator)
        m, grad_m = pool.mobility(fields.kernel, point, level, generator)
        m_ref, form = fields.reference(level), fields.parametrisation
        if self.trace == "stein":
            h, s = fields.outputs(point, level, queries.label, queries.told)
            loss = form.stein_loss(h, noise, level, m, grad_m, m_ref)
        elif self.trace == "combined":
            h, s, trace, weight = self._probed(fields, point, level, queries, generator)
            loss = form.stein_loss(h, noise, level, m, grad_m, m_ref)
            loss = loss + weight * form.control(h, trace, noise, level, m, grad_m, m_ref)
        else:
            v = divergences.probes(point, self.trace, generator)
            h, s, trace = divergences.probe_jacobian(
                lambda p: fields.outputs(p, level, queries.label, queries.told), point, v
            )
            if self.trace == "sliced":
                loss = divergences.sliced_divergence_loss(h, v[0], trace, m) / m_ref.square()
            else:
                loss = form.probed_loss(h, trace, m, grad_m, m_ref)
        if queries.sigma is None:
            weight = torch.full_like(level, 4 * fields.sigma_data**2 / fields.dim)
        else:
            weight = form.weight(level, fields.sigma_data, fields.dim)
        return Losses(
            gradient=weight * loss,
            scalar=self.scalar_weight * divergences.scalar_loss(s / m_ref, m / m_ref),
            sigma=level,
            relative_s=(s / m_ref).detach(),
        )

    def _probed(
        self,
        fields: LearnedFields,
        point: Tensor,
        level: Tensor,
        queries: Queries,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs (h, s) at all points, and the probed trace and its weight where it is probed, zeros elsewhere."""
        order = level.argsort()
        low, high = order.tensor_split([max(1, round((self.probed or PROBED) * len(order)))])
        v = divergences.probes(point[low], "hutchinson", generator)
        known = [[None if v is None else v[rows] for v in (queries.label, queries.told)] for rows in (low, high)]
        h, s, trace = divergences.probe_jacobian(lambda p: fields.outputs(p, level[low], *known[0]), point[low], v)
        weight = 1 - divergences.stein_weight(level[low], (self.crossover or CROSSOVER) * fields.sigma_data)
        if len(high):
            rest = fields.outputs(point[high], level[high], *known[1])
            h, s = torch.cat([h, rest[0]]), torch.cat([s, rest[1]])
        back, none = order.argsort(), level.new_zeros(len(high))
        return h[back], s[back], torch.cat([trace, none])[back], torch.cat([weight, none])[back]

    def minimiser(self, fields, density):
        return AnalyticFields(density, fields.kernel, fields.sigma_data)


@dataclass(frozen=True)
class KernelRegression(FieldObjective):
    """Squared errors (s − m̂)² and ‖g − ∇m̂‖² at query points off the data, for low dimension.

    With the exact kernel these are the fields of p smoothed by the kernel, wherever the proposal reaches.

    Args:
        scalar_weight: weight of the scalar field's loss.
        proposal: draws the query points.
    """

    proposal: Proposal = field(default_factory=Proposal)

    def check(self, fields: LearnedFields, noise: NoiseLevels | None) -> None:
        """Refuse all but direct fields of the exact kernel, antithetic pairs and classes."""
        if not (fields.kernel.mobility_is_density and fields.parametrisation.at_any_point):
            raise ValueError(
                "objective=KernelRegression needs kernel=Exact and parametrisation=direct: only there are both fields "
                "means over partners"
            )
        if fields.network.conditional:
            raise ValueError(
                "objective=KernelRegression has the density of all the data at its query points, whatever the class: "
                "leave network.conditional out"
            )
        if noise is not None and noise.antithetic:
            raise ValueError(
                "objective=KernelRegression draws its own query points, which have no opposite: noise.antithetic=0"
            )

    def __call__(self, fields, queries, pool, generator=None):
        x = queries.x
        level = x.new_zeros(len(x)) if queries.sigma is None else queries.sigma
        width = (fields.kernel.epsilon + level.square()).sqrt()
        point = self.proposal(x, pool.y, width, generator)
        m, grad_m = pool.mobility(fields.kernel, point, level, generator)
        m_ref = fields.reference(level)
        h, s = fields.outputs(point, level, queries.label, queries.told)
        return Losses(
            gradient=4 * width.square() / fields.dim * divergences.regression_loss(h, grad_m) / m_ref.square(),
            scalar=self.scalar_weight * divergences.scalar_loss(s / m_ref, m / m_ref),
            sigma=level,
            relative_s=(s / m_ref).detach(),
        )

    def minimiser(self, fields, density):
        return AnalyticFields(density, fields.kernel, fields.sigma_data, smoothed=True)


@dataclass(frozen=True)
class DensityRatio(Objective):
    """Fields of every class relative to a base Gaussian r_σ (see `fields.RelativeFields`).

    U_c by Stein's identity (m̂ = 1) at points of class c, and the weighted sum of all U_c at all points, half each; ρ_c
    by the logistic loss that tells each noised point apart from the other classes and from as many points of r_σ.

    Args:
        scalar_weight: weight of the logistic loss.
    """

    scalar_weight: float = 3.0

    def __call__(self, fields, queries, pool=None, generator=None):
        x, sigma = queries.x, queries.sigma
        rows = torch.arange(len(x), device=x.device)
        label = torch.zeros_like(rows) if queries.label is None else queries.label
        total = sigma.square() + fields.sigma_data**2
        point, noise, _ = queries.perturbed(generator)
        elsewhere = bcast(total.sqrt(), x) * torch.randn(x.shape, device=x.device, generator=generator)
        logits, slopes = fields.components(torch.cat([point, elsewhere]), sigma.repeat(2))
        data, base = logits.chunk(2)
        slopes = slopes[: len(x)]
        own = slopes[rows, label]
        shares = data.softmax(1)  # of the classes at each point: the field of all of them is their weighted sum
        every = torch.einsum("bc,bc...->b...", shares, slopes)
        center, one, zero = point / bcast(total, x), torch.ones_like(sigma), torch.zeros_like(x)
        losses = [divergences.factored_stein_loss(u - center, noise, sigma, one, zero) for u in (own, every)]
        return Losses(
            gradient=4 * sigma.square() * (total / fields.sigma_data**2) / x[0].numel() * (losses[0] + losses[1]) / 2,
            scalar=self.scalar_weight * divergences.ratio_loss(data, base, label),
            sigma=sigma,
            relative_s=data.logsumexp(1).detach().exp(),
        )

    def check(self, fields: RelativeFields, noise: NoiseLevels | None) -> None:
        """Refuse a single scale."""
        if noise is None:
            raise ValueError("relative densities need noise levels: leave noise as it is")

    def minimiser(self, fields, density):
        return AnalyticRelative(density, fields.sigma_data)
