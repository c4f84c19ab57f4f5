"""What Bellman Diffusion is compared with on images, around the same network: DDPM and flow matching.

Each peer is an `nn.Module` with `loss(x, label)`, a mean over a batch (B, *), with `samplers`, functions of
(the peer, rows, label) that return samples (B, *), with `main`, the name of the one to look at first, and with
`trained_as`, the model of this suite whose optimiser it is trained by; None for the experiment's. Samples start from
the noise of `seed`.

References:
    | Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239
    | Tong et al., Improving and Generalizing Flow-Based Generative Models (torchcfm), arXiv 2302.00482
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning.cli import build
from bd_lightning.divergences import bcast
from bd_lightning.dynamics import SampleNoise
from bd_lightning.fields import AnalyticFields
from bd_lightning.fields.preconditioning import PARAMETRISATIONS, Factored
from bd_lightning.networks.base import Network
from bd_lightning.objectives import FieldObjective, Losses, NoiseLevels
from benchmarks.common import optional

CALLS = 35
"""Network calls for one sample."""

Draw = Callable[[Any, range, Tensor | None], Tensor]


def alphas_cumprod(
    steps: int = 1000, first: float = 1e-4, last: float = 0.02, device: torch.device | str = "cpu"
) -> Tensor:
    """ᾱ_t of DDPM's linear betas, shape (steps,)."""
    return (1 - torch.linspace(first, last, steps, device=device)).cumprod(0)


def noised(x: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """√ᾱ x + √(1 − ᾱ) n for x and noise n (B, *) and ᾱ (B,), DDPM's forward process."""
    alpha = alpha.reshape(-1, *(1,) * (x.ndim - 1))
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


def straight_path(noise: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 − t) n + t x and its velocity x − n, for noise n and x (B, *) and times t (B,).

    As torchcfm's ConditionalFlowMatcher(sigma=0).
    """
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return (1 - t) * noise + t * x, x - noise


class Peer(nn.Module):
    """Base of the peers. Data are scaled to unit variance.

    Args:
        config: a config, whose network is taken.
        facts: what its data module knows, `facts.arguments`.
    """

    samplers: dict[str, Draw]
    main: str
    trained_as: Any = None
    seed: int = 1

    def __init__(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.network: Network = build.instantiate(config["model"]["network"], "model.network", facts)
        self.conditional = self.network.conditional
        self.shape, self.scale = tuple(facts["shape"]), facts["sigma_data"]

    def start(self, rows: range) -> Tensor:
        """The noise that samples start from, (B, *), the same as that of Bellman Diffusion."""
        return SampleNoise(rows, self.shape, seed=self.seed, device=next(self.parameters()).device)()

    def told(self, label: Tensor) -> Tensor | None:
        """The classes that the network is told."""
        return label if self.conditional else None


class DDPM(Peer):
    """DDPM's loss on the noise; sampled by diffusers' own DPM-Solver++ and DDIM."""

    alphas: Tensor

    def __init__(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        super().__init__(config, facts)
        self.register_buffer("alphas", alphas_cumprod(), persistent=False)
        self.samplers = {
            "DPM-Solver++": diffusers_solver("DPMSolverMultistepScheduler"),
            "DDIM": diffusers_solver("DDIMScheduler"),
        }
        self.main = "DPM-Solver++"

    def predict(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The noise in x (B, *) at time steps t (B,). The network is told ¼ ln σ, as Bellman Diffusion tells it."""
        alpha = self.alphas[t]
        return self.network(x, ((1 - alpha) / alpha).log() / 8, label)[0]

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """Mean squared error of the noise over a batch (B, *)."""
        noise, t = torch.randn_like(x), torch.randint(0, len(self.alphas), (len(x),), device=x.device)
        noisy = noised(x / self.scale, noise, self.alphas[t])
        return nn.functional.mse_loss(self.predict(noisy, t, self.told(label)), noise)


def diffusers_solver(kind: str, calls: int = CALLS, **options: Any) -> Draw:
    """A scheduler of diffusers as a sampler of `DDPM`.

    Args:
        kind: the scheduler's class.
        calls: network calls, for schedulers that make one a step.
        options: what it is set to beside the training's schedule.
    """

    def draw(owner: DDPM, rows: range, label: Tensor | None) -> Tensor:
        diffusers = optional("diffusers")
        trained = diffusers.DDPMScheduler(num_train_timesteps=len(owner.alphas), clip_sample=False)
        scheduler, x = getattr(diffusers, kind).from_config(trained.config, **options), owner.start(rows)
        scheduler.set_timesteps(calls, device=x.device)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(owner.predict(x, t.expand(len(x)), label), t, x).prev_sample
        return x * owner.scale

    return draw


class FlowMatching(Peer):
    """Flow matching with independent coupling; sampled by Heun's method."""

    def __init__(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        super().__init__(config, facts)
        self.samplers, self.main = {"Heun": _heun}, "Heun"

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The velocity at x (B, *) and times t (B,), 0 noise and 1 data."""
        return self.network(x, ((1 - t).clamp_min(1e-3) / t.clamp_min(1e-3)).log() / 4, label)[0]

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """Mean squared error of the velocity over a batch (B, *)."""
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        point, target = straight_path(noise, x / self.scale, t)
        return nn.functional.mse_loss(self.velocity(point, t, self.told(label)), target)


class Noise(Factored):
    """h = S of a network F that predicts the noise: S = −F/σ."""

    def output(self, out, x, sigma, sigma_data, kernel, m_ref):
        """S (B, *)."""
        return -out / bcast(sigma, x)


PARAMETRISATIONS["noise"] = Noise()


@dataclass(frozen=True)
class LinearBetas(NoiseLevels):
    """The noise levels σ_d √((1 − ᾱ)/ᾱ) of DDPM's steps, all as likely; mean and std are not used.

    Args:
        scale: standard deviation σ_d of the data.
    """

    scale: float = 0.5

    def __call__(self, n, device="cpu", generator=None, pairs=0):
        """n of them, shape (n,)."""
        alphas = alphas_cumprod(device=device)
        alpha = alphas[torch.randint(0, len(alphas), (n,), device=device, generator=generator)]
        return self.scale * ((1 - alpha) / alpha).sqrt()


@dataclass(frozen=True)
class NoiseError(FieldObjective):
    """DDPM's loss as an objective of the suite, for `train.py` to train, average, sample and judge as the others.

    For fields of the parametrisation "noise" with the constant kernel: the scalar field then stays one, and samplers
    follow the score. The network is told the noise level as it is in this suite.
    """

    def check(self, fields, noise):
        """Refuse other fields."""
        if fields.parametrisation is not PARAMETRISATIONS["noise"] or noise is None:
            raise ValueError("objective=NoiseError needs parametrisation=noise, and noise levels")

    def __call__(self, fields, queries, pool, generator=None):
        """The squared error of the noise, per sample."""
        point, noise, level = queries.perturbed(generator)
        S, s = fields.outputs(point, level, queries.label)
        error = (bcast(level, S) * S + noise).square().flatten(1).mean(1)
        return Losses(gradient=error, scalar=torch.zeros_like(error), sigma=level, relative_s=s.detach())

    def minimiser(self, fields, density):
        """The score."""
        return AnalyticFields(density, fields.kernel, fields.sigma_data)


def _heun(owner: FlowMatching, rows: range, label: Tensor | None) -> Tensor:
    x = owner.start(rows)
    times = torch.linspace(0, 1, (CALLS + 1) // 2 + 1).tolist()
    for here, there in zip(times, times[1:]):
        slope = owner.velocity(x, x.new_full((len(x),), here), label)
        euler = x + (there - here) * slope
        if there < 1:  # the last step is Euler's, as in EDM's sampler: CALLS in all
            slope = (slope + owner.velocity(euler, x.new_full((len(x),), there), label)) / 2
        x = x + (there - here) * slope
    return x * owner.scale


class Bellman(nn.Module):
    """A model of this suite with the surface of `Peer`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.conditional = model, model.conditional
        self.samplers = {name: self._sampler(name) for name in model.samplers}
        self.main = model.sampler

    @property
    def trained_as(self) -> Any:
        """The model itself."""
        return self.model

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """The weighted losses of both fields, a mean over the batch (B, *)."""
        return self.model.losses(x, label if self.conditional else None).total

    def _sampler(self, name: str) -> Draw:
        return lambda owner, rows, label: owner.model.sample(rows, name, seed=1, label=label)
