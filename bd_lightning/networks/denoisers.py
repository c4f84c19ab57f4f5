r"""Trained denoisers of other people as networks, so that they are fields of the constant kernel.

A denoiser gives E[x | x̃] for x̃ = x + σn. In EDM's parametrisation it is a network,

    F = (D − c_skip x̃)/c_out,        c_skip = σ_d²/(σ² + σ_d²),   c_out = σσ_d/√(σ² + σ_d²),

and `LearnedFields(PretrainedDenoiser(…), Constant(), σ_d, d)` are its fields: s = 1, g = ½(D − x̃)/σ². Where others
noise by x_t = αx + βn, σ = β/α and x_t = αx̃.

References:
    | Karras et al., EDM, arXiv 2206.00364, Table 1
    | Ho et al., DDPM, arXiv 2006.11239 (ε), Salimans and Ho, arXiv 2202.00512 (v)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning.checks import one_of, positive
from bd_lightning.divergences import bcast
from bd_lightning.networks.base import Network
from bd_lightning.networks.foreign import diffusers_class

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x̃, σ), of the shape of x̃ (B, *), for noise levels (B,)."""


class AzulaDenoiser(nn.Module):
    """A denoiser of azula, asked at noise levels in place of times.

    Args:
        denoiser: an `azula.denoise.Denoiser`; its ratio σ_t/α_t rises with t from 0 to 1.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def time(self, sigma: Tensor) -> Tensor:
        """The times (B,) at which σ_t/α_t is sigma (B,), or the nearest, by bisection."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(40):
            middle = (low + high) / 2
            alpha, noise = self.denoiser.schedule(middle)  # type: ignore[operator, union-attr]
            above = noise > sigma * alpha
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x̃] (B, *) at x̃ (B, *) and noise levels sigma (B,)."""
        t = self.time(sigma)
        alpha, _ = self.denoiser.schedule(t)  # type: ignore[operator, union-attr]
        if (sigma == sigma[0]).all():
            t = t[0]  # every denoiser of azula takes one time
        return self.denoiser(bcast(alpha, x) * x, t).mean


class DiffusersDenoiser(nn.Module):
    """A model of diffusers with its noise schedule.

    Args:
        source: a local folder that `save_pretrained` wrote, or the id of a model on the hub, which is downloaded.
        kind: name of the model's class.
        subfolder: folder of the model inside it, e.g. "unet".
        scheduler: folder of the scheduler's config inside it.

    Raises:
        ValueError: if diffusers is not installed or one of the two cannot be had.
    """

    def __init__(
        self, source: str, kind: str = "UNet2DModel", subfolder: str | None = None, scheduler: str = "scheduler"
    ) -> None:
        super().__init__()
        cls = diffusers_class(kind)
        import diffusers

        try:
            model = cls.from_pretrained(source, subfolder=subfolder, use_safetensors=True)
            schedule = diffusers.DDPMScheduler.from_pretrained(source, subfolder=scheduler)
        except Exception as error:  # no such folder, no network, weights of another class
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"no {kind} with its scheduler could be loaded from {source!r} ({reason})") from error
        self.take(model, schedule.alphas_cumprod, schedule.config.prediction_type)

    def take(self, model: nn.Module, alphas: Tensor, prediction: str) -> None:
        """Take a model, ᾱ of its time steps (T,), and what it predicts.

        Raises:
            ValueError: for a prediction that is none of diffusers'.
        """
        one_of(("epsilon", "v_prediction", "sample"), prediction_type=prediction)
        self.model, self.prediction = model, prediction
        self.levels: Tensor
        self.register_buffer("levels", ((1 - alphas) / alphas).log().float() / 2, persistent=False)  # ln σ

    @classmethod
    def of(cls, model: nn.Module, scheduler: Any) -> "DiffusersDenoiser":
        """From a model and a scheduler in memory."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.take(model, scheduler.alphas_cumprod, scheduler.config.prediction_type)
        return made

    def time(self, sigma: Tensor) -> Tensor:
        """Time steps (B,), between whole ones, at noise levels sigma (B,); those beyond the schedule are its ends."""
        level = sigma.log().clamp(self.levels[0], self.levels[-1])
        above = torch.searchsorted(self.levels, level).clamp(1, len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        return above - 1 + (level - low) / (high - low)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x | x̃] (B, *) at x̃ (B, *) and noise levels sigma (B,)."""
        alpha = bcast((1 + sigma.square()).rsqrt(), x)
        noise, point = bcast(sigma, x) * alpha, alpha * x
        out = self.model(point, self.time(sigma)).sample[:, : x.shape[1]]
        if self.prediction == "epsilon":
            return x - bcast(sigma, x) * out
        return alpha * point - noise * out if self.prediction == "v_prediction" else out


class PretrainedDenoiser(Network):
    """A trained denoiser D(x̃, σ) as the network of fields of the constant kernel; its scalar head is zero.

    Args:
        denoiser: maps x̃ (B, *shape) and noise levels (B,) to E[x | x̃], both in units of the data: `AzulaDenoiser`,
            `DiffusersDenoiser`, or a network in EDM's convention.
        shape: shape of one sample, from the data module.
        sigma_data: standard deviation of the data, from the data module.
        check: probe the denoiser (see `refuse_other_noise`).

    Raises:
        ValueError: if the probe finds that it denoises by another convention.
    """

    parametrisations = ("factored",)

    def __init__(self, denoiser: nn.Module, shape: tuple[int, ...], sigma_data: float, check: bool = True) -> None:
        super().__init__()
        positive(sigma_data=sigma_data)
        self.denoiser, self.sigma_data = denoiser, sigma_data
        self.gradient_head, self.scalar_head = nn.Identity(), nn.Identity()
        if check:
            refuse_other_noise(denoiser, tuple(shape), sigma_data)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, *shape), c_noise (B,) and no label to F (B, *shape) and zeros (B,)."""
        sigma = (4 * c_noise).exp()
        total = (sigma.square() + self.sigma_data**2).sqrt()
        point = bcast(total, x) * x
        skip = bcast(self.sigma_data**2 / total.square(), x)
        out = bcast(total / (sigma * self.sigma_data), x)
        return out * (self.denoiser(point, sigma) - skip * point), x.new_zeros(len(x))


@torch.no_grad()
def refuse_other_noise(
    denoise: Denoise, shape: tuple[int, ...], sigma_data: float, data: Tensor | None = None, slack: float = 1.5
) -> None:
    """Probe a denoiser at little and at much noise, and, given data, between.

    At σ = σ_d/50 what comes back is near what went in. At σ = 50 σ_d it is of the size of the data and has next to
    nothing of the noise. On data the error is no more than that of the best linear denoiser of data of that size,
    σ²σ_d²/(σ² + σ_d²), at every noise level.

    Args:
        denoise: D(x̃, σ).
        shape: shape of one sample.
        sigma_data: standard deviation of the data.
        data: samples of the data (B, *shape) for the strict test; None probes at noise of their size.
        slack: factor of the linear denoiser's root mean square error that is let pass.

    Raises:
        ValueError: saying at which noise level it is no denoiser, and by how much.
    """
    generator = torch.Generator().manual_seed(0)
    given = data is not None
    count = max(8, 8192 // math.prod(shape))  # so that chance makes no correlation with the noise
    x = torch.randn((count, *shape), generator=generator) * sigma_data if data is None else data
    noise = torch.randn(x.shape, generator=generator).to(x)
    for ratio in (0.02, 0.5, 2.0, 50.0) if given else (0.02, 50.0):
        sigma = ratio * sigma_data
        try:
            found = denoise(x + sigma * noise, x.new_full((len(x),), sigma))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the denoiser cannot be called with x {tuple(x.shape)} and sigma (B,): {reason}"
            ) from error
        if found.shape != x.shape:
            raise ValueError(f"the denoiser gives {tuple(found.shape)} for x of shape {tuple(x.shape)}")
        if given or ratio < 1:
            size, most = float((found - x).square().mean().sqrt()), slack * sigma / math.hypot(1, ratio)
            what, most = "is off the data by", most if given else sigma_data / 4
        else:
            kept = float((found * noise).mean())  # of the noise; a share of 1/(50 σ_d) would be a linear denoiser's
            size, most, what = max(float(found.square().mean().sqrt()), 50 * abs(kept)), 4 * sigma_data, "is of size"
        if not size <= most:
            raise ValueError(
                f"this is no denoiser of data of standard deviation {sigma_data:g} in units of the data: at noise "
                f"level {sigma:g} what it gives {what} {size:.3g}, more than {most:.3g}; see that its noise levels, "
                "scaling of x and what it predicts (x, ε or v) are what its wrapper says (check=false leaves this out, "
                "as a schedule needs that ends below that level)"
            )
