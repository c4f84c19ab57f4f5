"""An autoencoder of images as a LightningModule; `datamodules.Latents` makes data of its codes."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning import addresses
from bd_lightning.checks import UserError, in_range
from bd_lightning.modules.base import Module
from bd_lightning.networks.autoencoder import Decoder, Encoder, check_latent

CODES: dict[tuple[int, ...], str] = {
    (1, 8, 8): "data=digits_latent model=mlp",
    (1, 28, 28): "experiment=mnist_latent",
    (3, 32, 32): "experiment=cifar10_latent",
}
"""Words that learn in the codes of images of a shape: those of the data set that has it."""


class Autoencoder(Module):
    r"""A variational autoencoder, trained on squared error and a KL term.

    With codes z = μ(x) + e^{½l(x)} n, n ~ N(0, I), the loss is ‖x − x̂(z)‖² + β KL(N(μ, e^l) ‖ N(0, I)), sums over
    pixels and code. Batch normalisation gives μ mean zero and variance one, each channel (or entry of a vector) by
    itself, so that codes are standardised and β says how precise they are.

    Args:
        shape: (channels, height, width) of one image, from the data module.
        latent: shape of a code: [d], or [c, h, w] with h and w those of the image halved once per entry of channels.
        channels: channels after each halving.
        blocks: residual blocks at each resolution.
        kl_weight: β above.
        options: arguments of `Module`.

    Attributes:
        codes: what its codes were known by (`LatentSpace.space`) before it was exported; empty if it never was.

    References:
        | Kingma and Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114
        | Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752
    """

    example = """from bd_lightning.latents import TrainedLatents

latents = TrainedLatents("FOLDER")
codes = latents.encode(images)  # (B, C, H, W) in [−1, 1]; latents.decode(codes) gives them back"""

    def __init__(
        self,
        shape: Sequence[int],
        latent: Sequence[int] = (16,),
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        kl_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_latent(shape, latent, channels)
        in_range(0, float("inf"), kl_weight=kl_weight)
        self.shape, self.latent, self.kl_weight = tuple(shape), tuple(latent), kl_weight
        self.encoder, self.decoder = (part(shape, latent, channels, blocks) for part in (Encoder, Decoder))
        norm = nn.BatchNorm1d if len(latent) == 1 else nn.BatchNorm2d
        self.standardise = norm(latent[0], affine=False, momentum=0.05)
        self.sampler, self.samplers = "reconstruction", {"reconstruction": SimpleNamespace(calls=1, interacting=False)}
        self.conditional, self.codes = False, ""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take note of what its codes are known by."""
        super().on_load_checkpoint(checkpoint)
        self.codes = str(checkpoint.get("codes") or "")

    def codes_of(self, path: str) -> str:
        """Those of the file that was trained, also where this one was exported from it."""
        return self.codes or str(["trained", addresses.digest(path)])

    def encode(self, x: Tensor) -> Tensor:
        """Standardised mean codes (B, *latent) of images (B, C, H, W) in [−1, 1]."""
        return self.standardise(self.encoder(x)[0])

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), in [−1, 1] up to overshoot, of standardised codes (B, *latent)."""
        return self.decoder(z)

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its two parts, means over the batch."""
        x, _ = batch
        mean, log_variance = self.encoder(x)
        mean, log_variance = self.standardise(mean), log_variance.clamp(-12, 4)
        noise = torch.randn(mean.shape, device=x.device, generator=generator)
        error = (x - self.decoder(mean + (log_variance / 2).exp() * noise)).square().flatten(1).sum(1)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
        loss = error + self.kl_weight * kl
        return {"loss": loss.mean(), "squared_error": error.mean(), "kl": kl.mean()}, {}

    def check_predict(self) -> None:
        """An autoencoder has no samples of its own."""
        raise UserError(
            "an autoencoder draws no samples: learn in its codes, with experiment=mnist_latent (cifar10_latent, or "
            "data=digits_latent) data.autoencoder.ckpt_path=<this checkpoint>, and predict from that run"
        )

    def next_step(self, checkpoint: str) -> str:
        """Its codes are data for another run."""
        words = CODES.get(self.shape, "experiment=mnist_latent data.images=<what data was here>")
        own = " (of images of one's own with data.images=<what data was here> too)" if self.shape in CODES else ""
        return f"to learn in its codes{own}: train.py {words} data.autoencoder.ckpt_path={checkpoint}"

    def available(self, n: int, stage: str) -> int:
        """As many reconstructions as there are held-out images."""
        return min(n, len(self.trainer.datamodule.split(stage)))  # type: ignore[attr-defined]

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        sampler: str | None = None,
        seed: int = 0,
        label: Tensor | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Reconstructions of held-out images, in a fixed random order, for callbacks that show or judge samples.

        Args:
            indices: which images of the running stage's split, shuffled, modulo its size.
            sampler: "reconstruction".
            seed: not used.
            label: not used.
            watch: not used.

        Returns:
            Images in [−1, 1], shape (B, C, H, W).
        """
        rows = self.trainer.datamodule.split("test" if self.trainer.testing else "val")  # type: ignore[attr-defined]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        x = torch.stack([rows[order[i % len(rows)]][0] for i in indices]).to(self.device)
        return self.decode(self.encode(x))
