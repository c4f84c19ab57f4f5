"""Bellman Diffusion as a LightningModule."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bd_lightning import divergences, kernels
from bd_lightning.checks import in_range, interval, one_of, positive
from bd_lightning.dynamics import SampleNoise, Sampler
from bd_lightning.fields import AnalyticFields, Fields, Guided
from bd_lightning.modules.base import Module
from bd_lightning.networks.dual import refuse_fused
from bd_lightning.relative import Mixture, RelativeFields, calibrated
from bd_lightning.targets import Density

ESTIMATORS = ("denoising", "divergence", "regression")


def gathered(x: Tensor) -> Tensor:
    """The batches of all ranks, (W·B, *shape), this rank's first. All ranks call it, with batches of one size."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat([parts.pop(distributed.get_rank()), *parts])


class BellmanDiffusion(Module):
    """Learns the gradient and the scalar field of a data density and samples from them.

    The default is multi-scale: fields of p_σ at every noise level, log σ ~ N(noise_mean, noise_std²). With
    `multi_scale` False it is the paper's model, fields of p alone, which needs the direct parametrisation. Losses
    are weighted so that the gradient field's is EDM's, (2σ/m̂)²(1 + σ²/σ_d²)/d, and the scalar field's is relative to
    m_ref².

    Estimators (see `divergences`): "denoising", for noise levels above zero; "divergence", the paper's; "regression" of
    both fields on the exact kernel at query points off the data, for low dimension.

    With the kernel `Relative` the fields are those of every class relative to a Gaussian (see `relative`): the gradient
    field by denoising, the scalar field by the logistic loss. `combination` then says what is sampled.

    Args:
        network: trunk with two heads (see `networks`).
        kernel: pair kernel (see `kernels`); `Constant` is denoising score matching.
        shape: shape of one sample, from the data module.
        num_classes: number of classes, from the data module.
        sigma_data: standard deviation of the data, from the data module.
        samplers: samplers by name, None where there is none; what they return lies in [−1, 1] for images.
        sampler: name of the one that prediction and metrics use.
        scalar_network: a separate network for the scalar field; None shares the trunk.
        parametrisation: "factored" or "direct" (see `fields`).
        estimator: "denoising", "divergence" or "regression".
        trace: how the divergence estimator takes the trace: "hutchinson", "gaussian", "sliced" or "exact".
        pairs: "all" pairs of a batch except a point with itself, or a "single" partner for each point.
        queries: how many points of a batch the fields are trained at; the others are partners only, which cost little
            and make the mobility's estimate less noisy. None takes all.
        proposal: query points of the regression; None takes `divergences.Proposal()`.
        multi_scale: fields at every noise level, or at σ = 0 alone.
        noise_mean: mean of log σ, σ in data units.
        noise_std: standard deviation of log σ.
        scalar_weight: weight of the scalar field's loss.
        label_dropout: share of training points whose class a conditional network is not told, for guidance.
        guidance: scale of classifier-free guidance when classes are asked for; 1 is none.
        guidance_interval: noise levels, in data units, between which guidance acts.
        compile: compile the networks with torch.compile at their first use; worth it on GPUs. Not for the divergence
            estimator, whose forward-mode differentiation the compiler does not take.
        gather_partners: in training, take partners from the batches of all devices. A step is then that of one device
            with the joined batch; otherwise every device has its own, noisier, estimate of the mobility.
        options: arguments of `Module`.

    Attributes:
        combination: the mixture that a model with the kernel `Relative` samples; None is the density of its data.
        pilot: number of samples by which prediction first corrects its weights (see `relative.calibrated`).

    Raises:
        ValueError: for values out of range and for combinations that have no meaning.
    """

    def __init__(
        self,
        network: nn.Module,
        kernel: kernels.Kernel,
        shape: Sequence[int],
        num_classes: int,
        sigma_data: float,
        samplers: dict[str, Sampler | None],
        sampler: str = "ode",
        scalar_network: nn.Module | None = None,
        parametrisation: str = "factored",
        estimator: str = "denoising",
        trace: str = "hutchinson",
        pairs: str = "all",
        queries: int | None = None,
        proposal: divergences.Proposal | None = None,
        multi_scale: bool = True,
        noise_mean: float = -0.8,
        noise_std: float = 1.2,
        scalar_weight: float = 0.1,
        label_dropout: float = 0.0,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        compile: bool = False,
        gather_partners: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        one_of(ESTIMATORS, estimator=estimator)
        one_of(divergences.TRACES, trace=trace)
        one_of(("all", "single"), pairs=pairs)
        self.samplers = {name: one for name, one in samplers.items() if one is not None}
        one_of(tuple(self.samplers), sampler=sampler)
        positive(noise_std=noise_std)
        in_range(0, math.inf, scalar_weight=scalar_weight)
        if queries is not None and queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        if not multi_scale and (estimator == "denoising" or parametrisation != "direct"):
            raise ValueError(
                "multi_scale=false needs estimator=divergence or regression, and parametrisation=direct: "
                "without noise there is nothing to denoise"
            )
        if estimator == "regression" and not (isinstance(kernel, kernels.Exact) and parametrisation == "direct"):
            raise ValueError(
                "estimator=regression needs kernel=Exact and parametrisation=direct: only there are both fields means "
                "over partners"
            )
        if proposal is not None and estimator != "regression":
            raise ValueError(f"proposal belongs to estimator=regression; with {estimator} leave it out")
        self.relative = isinstance(kernel, kernels.Relative)
        if self.relative and not (
            estimator == "denoising" and parametrisation == "factored" and scalar_network is None
        ):
            raise ValueError(
                "kernel=Relative needs estimator=denoising and parametrisation=factored, and no scalar_network: "
                "its scalar field is a logit of the same network"
            )
        if trace == "sliced" and parametrisation == "factored":
            raise ValueError("trace=sliced is the paper's loss for parametrisation=direct; use hutchinson here")
        self.shape, self.num_classes = tuple(shape), num_classes
        self.dim = math.prod(self.shape)
        self.conditional = bool(getattr(network, "conditional", False))
        if scalar_network is not None and bool(getattr(scalar_network, "conditional", False)) != self.conditional:
            raise ValueError(
                "network.conditional and scalar_network.conditional must be the same: set both, or neither"
            )
        if gather_partners and self.relative:
            raise ValueError("gather_partners=true has no meaning with kernel=Relative, which has no partners")
        self.gather_partners = gather_partners
        self.kernel = kernel
        per_class = bool(getattr(network, "heads", ()))
        if self.relative and self.conditional:
            raise ValueError("kernel=Relative needs network.per_class=true instead of network.conditional=true")
        if per_class and not self.relative:
            raise ValueError("network.per_class=true needs kernel=Relative, whose fields it has heads for")
        in_range(0, 1, label_dropout=label_dropout)
        in_range(0, math.inf, guidance=guidance)
        interval(guidance_interval=guidance_interval)
        if label_dropout and not self.conditional:
            raise ValueError("label_dropout needs network.conditional=true: this network is not told the class")
        if guidance != 1 and not (label_dropout if self.conditional else per_class):
            raise ValueError(
                "guidance needs a class-conditional model that knows the whole data too: train with "
                "network.conditional=true and label_dropout=0.1, or with model=relative"
            )
        self.label_dropout, self.guidance, self.guidance_interval = label_dropout, guidance, guidance_interval
        self.fields: Any  # RelativeFields or Fields
        if self.relative:
            self.fields = RelativeFields(network, sigma_data, num_classes if per_class else 1)
        else:
            self.fields = Fields(network, kernel, sigma_data, self.dim, parametrisation, scalar_network)
        self.combination: Mixture | None = None
        self.pilot = 0
        self.sampler = sampler
        self.estimator, self.trace, self.pairs, self.queries = estimator, trace, pairs, queries
        self.proposal = proposal or divergences.Proposal()
        self.multi_scale, self.noise_mean, self.noise_std = multi_scale, noise_mean, noise_std
        self.scalar_weight = scalar_weight
        if estimator == "divergence":
            refuse_fused(network)
        if compile and estimator == "divergence":
            raise ValueError("compile=true needs estimator=denoising or regression: forward mode cannot be compiled")
        for one in (network, scalar_network) if compile else ():
            if one is not None:
                one.compile()  # in place: names in checkpoints stay as they are

    # ---- losses

    def mobility(self, x: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator | None = None):
        """m̂ (B,) and ∇m̂ (B, *shape) at x (B, *shape) from clean y (N, *shape), whose first B points x was made from."""
        pair = kernels.leave_one_out if self.pairs == "all" else kernels.single_partner
        weights = pair(len(x), len(y), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            m, grad_m = self.kernel(x.flatten(1).float(), y.flatten(1).float(), sigma.float(), weights, generator)
        return m, grad_m.reshape(x.shape)

    def losses(self, x: Tensor, label: Tensor | None = None, generator: torch.Generator | None = None):
        """Weighted losses of one batch, per sample.

        Args:
            x: clean data, shape (B, *shape).
            label: class indices (B,), used by a conditional network.
            generator: source of noise and of probing directions; the global one if None.

        Returns:
            A dictionary of vectors of shape (B,): "gradient" and "scalar" (the two weighted losses), "sigma", and
            "relative_s" (s/m_ref).
        """

        def randn(*size: int) -> Tensor:
            return torch.randn(size, device=x.device, generator=generator)

        if self.relative:
            return self._relative_losses(x, label, randn)
        pool = gathered(x) if self.gather_partners and self.training else x
        x = x[: self.queries]
        label = label[: self.queries] if self.conditional and label is not None else None
        d, fields = self.dim, self.fields
        if label is not None and self.training and self.label_dropout:
            dropped = torch.rand(len(x), device=x.device, generator=generator) < self.label_dropout
            label = label.masked_fill(dropped, self.num_classes)
        if self.multi_scale:
            sigma = (self.noise_mean + self.noise_std * randn(len(x))).exp()
        else:
            sigma = x.new_zeros(len(x))
        width = (fields.kernel.epsilon + sigma.square()).sqrt()
        noise = randn(*x.shape) if self.multi_scale else torch.zeros_like(x)
        if self.estimator == "regression":
            point = self.proposal(x, pool, width, generator)
        else:
            point = x + divergences.bcast(sigma, x) * noise
        m, grad_m = self.mobility(point, pool, sigma, generator)
        reference = fields.reference(sigma)
        if self.estimator == "regression":
            weight = 4 * width.square() / d
        elif self.multi_scale:
            weight = 4 * sigma.square() * (1 + sigma.square() / fields.sigma_data**2) / d
        else:
            weight = torch.full_like(sigma, 4 * fields.sigma_data**2 / d)

        if self.estimator == "divergence":
            v = divergences.probes(point, self.trace, generator)
            h, s, form = divergences.probe_jacobian(lambda p: fields.heads(p, sigma, label), point, v)
            if fields.factored:
                loss = divergences.factored_divergence_loss(h, form, m, grad_m)
            elif self.trace == "sliced":
                loss = divergences.sliced_divergence_loss(h, v[0], form, m)
            else:
                loss = divergences.divergence_loss(h, form, m)
            loss = loss / reference.square()
        else:
            h, s = fields.heads(point, sigma, label)
            if self.estimator == "regression":
                loss = divergences.regression_loss(h, grad_m) / reference.square()
            elif fields.factored:
                seen = m > 1e-6 * reference  # elsewhere m̂ underflows, and its logarithm says nothing
                loss = divergences.factored_denoising_loss(h, noise, sigma, m, grad_m)
                loss = torch.where(seen, loss / torch.where(seen, m, 1.0).square(), 0.0)
            else:
                loss = divergences.denoising_loss(h, noise, sigma, m, grad_m) / reference.square()
        scalar = divergences.scalar_loss(s / reference, m / reference)
        return {
            "gradient": weight * loss,
            "scalar": self.scalar_weight * scalar,
            "sigma": sigma,
            "relative_s": (s / reference).detach(),
        }

    def _relative_losses(self, x: Tensor, label: Tensor | None, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
        fields, rows = self.fields, torch.arange(len(x), device=x.device)
        if label is None or len(fields.counts) == 1:
            label = torch.zeros_like(rows)
        if self.training:
            fields.counts += torch.bincount(label, minlength=len(fields.counts))
        sigma = (self.noise_mean + self.noise_std * randn(len(x))).exp()
        total, noise = sigma.square() + fields.sigma_data**2, randn(*x.shape)
        point = x + divergences.bcast(sigma, x) * noise
        elsewhere = divergences.bcast(total.sqrt(), x) * randn(*x.shape)  # from the reference
        logits, slopes = fields.components(torch.cat([point, elsewhere]), sigma.repeat(2))
        data, reference = logits.chunk(2)
        slopes = slopes[: len(x)]
        own = slopes[rows, label]
        shares = data.softmax(1)  # of the classes at each point: the field of all of them is their weighted sum
        every = torch.einsum("bc,bc...->b...", shares, slopes)
        center, one, zero = point / divergences.bcast(total, x), torch.ones_like(sigma), torch.zeros_like(x)
        losses = [divergences.factored_denoising_loss(u - center, noise, sigma, one, zero) for u in (own, every)]
        loss = (losses[0] + losses[1]) / 2
        return {
            "gradient": 4 * sigma.square() * (total / fields.sigma_data**2) / self.dim * loss,
            "scalar": self.scalar_weight * divergences.ratio_loss(data, reference, label),
            "sigma": sigma,
            "relative_s": data.logsumexp(1).detach().exp(),
        }

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its two parts, means over the batch, and the vectors of `losses`."""
        x, label = batch
        terms = self.losses(x, label, generator)
        gradient, scalar = terms["gradient"].mean(), terms["scalar"].mean()
        return {"loss": gradient + scalar, "loss_gradient": gradient, "loss_scalar": scalar}, terms

    def analytic(self, density: Density) -> AnalyticFields:
        """The fields that these losses are minimised by, for data of a density in closed form."""
        return AnalyticFields(density, self.kernel, self.fields.sigma_data, smoothed=self.estimator == "regression")

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        sampler: str | None = None,
        seed: int = 0,
        label: Tensor | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        finite_part: bool = False,
    ) -> Tensor:
        """Draw samples. Sample i of a seed is the same in any batch and on any rank.

        Args:
            indices: indices of the samples, length B.
            sampler: name of a sampler of this module; its default if None.
            seed: seed of the whole set.
            label: class indices, shape (B,), for a conditional network.
            watch: called with (step, state) along the way.
            finite_part: leave lost chains out of the result instead of stopping.

        Returns:
            Samples in the model's units ([−1, 1] for images), shape (B, *shape).

        Raises:
            SamplingDiverged: when chains are lost.
        """
        noise = SampleNoise(indices, self.shape, seed, self.device)
        fields = self.combination or self._fields(label)
        if label is not None and self.guidance != 1:
            fields = Guided(fields, self._fields(None), self.guidance, self.guidance_interval)
        return self.samplers[sampler or self.sampler](fields, noise, watch, finite_part)

    def _fields(self, label: Tensor | None) -> Any:
        """The fields as a sampler takes them: of one class for each sample (B,), or of all the data."""
        if not self.relative:
            return _Conditioned(self.fields, label, self.num_classes if self.label_dropout else None)
        counts = self.fields.counts
        if label is None:
            return Mixture([(self.fields, torch.ones_like(counts))])
        return Mixture([(self.fields, torch.nn.functional.one_hot(label, len(counts)).to(counts))])

    def on_predict_start(self) -> None:
        """Correct the weights of the combination by `pilot` samples, if that is asked for."""
        if self.combination is not None and self.pilot:

            def draw(mixture: Mixture) -> Tensor:
                noise = SampleNoise(range(self.pilot), self.shape, seed=2**32, device=self.device)
                return self.samplers[self.sampler](mixture, noise)

            self.combination = calibrated(self.combination, draw)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Samples for a batch of requests: "index", "seed" and, if classes are asked for, "label"; each (B,)."""
        label = batch.get("label")
        return self.sample(batch["index"].tolist(), seed=int(batch["seed"][0]), label=label)


class _Conditioned:
    """Fields with the class filled in; where there is none, with the index that stands for no class."""

    def __init__(self, fields: Fields, label: Tensor | None, no_class: int | None = None) -> None:
        self.fields, self.label, self.reference, self.no_class = fields, label, fields.reference, no_class

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        label = self.label
        if label is None and self.no_class is not None:
            label = torch.full((len(x),), self.no_class, device=x.device)
        return self.fields(x, sigma, label)
