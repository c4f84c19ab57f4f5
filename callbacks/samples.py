"""Pictures of images: sample grids and the way of the sampler."""

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from bd_lightning.checks import UserError, positive
from bd_lightning.dynamics import SamplingDiverged
from callbacks.drawing import (
    check_sampler,
    draw_together,
    grid_image,
    need_images,
    publish_animation,
    publish_image,
    run_folder,
    step_of,
)
from datamodules.images import to_uint8


class SampleGrid(L.Callback):
    """A grid of samples of each sampler at every validation, always from the same seeds.

    Written to <run folder>/samples/<sampler>-<step>.png and logged as samples/<sampler>.

    Args:
        n: images in a grid.
        samplers: names of the module's samplers; empty for all of them.
        seed: seed of the samples.
    """

    def __init__(self, n: int = 64, samplers: Sequence[str] = (), seed: int = 0) -> None:
        positive(n=n)
        self.n, self.samplers, self.seed = n, tuple(samplers), seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the names of the samplers."""
        need_images(trainer, type(self).__name__)
        for name in self.samplers:
            check_sampler(pl_module, name, type(self).__name__)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the grids."""
        for name in self.samplers or pl_module.samplers:
            with isolate_rng():
                try:
                    images = draw_together(trainer, pl_module, self.n, self.n, self.seed, name)
                except UserError as error:
                    rank_zero_info(f"no grid of sampler '{name}' at step {trainer.global_step}: {error}")
                    continue
            if trainer.is_global_zero:
                path = run_folder(trainer) / "samples" / f"{name}-{step_of(trainer):07d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grid_image(to_uint8(images)).save(path)
                caption = f"{name}, {pl_module.samplers[name].calls} network calls, seed {self.seed}"
                publish_image(trainer, f"samples/{name}", path, caption)


class Trajectory(L.Callback):
    """The way of a sampler from noise to samples, as an animation, once training is over.

    Written to <run folder>/samples/trajectory-<sampler>.gif and logged as a video. Images are shown side by side;
    sub-classes say how other data is drawn.

    Args:
        n: number of samples.
        sampler: name of the module's sampler.
        frames: number of frames, spread over the steps.
        seconds: length of the animation.
        seed: seed of the samples.
    """

    def __init__(
        self, n: int = 16, sampler: str = "sde", frames: int = 40, seconds: float = 4.0, seed: int = 0
    ) -> None:
        positive(n=n, frames=frames, seconds=seconds)
        self.n, self.sampler, self.frames, self.seconds, self.seed = n, sampler, frames, seconds, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the name of the sampler."""
        need_images(trainer, type(self).__name__)
        check_sampler(pl_module, self.sampler, type(self).__name__)

    def picture(self, trainer: L.Trainer, x: torch.Tensor) -> Image.Image:
        """One frame for a state x, shape (n, *shape)."""
        scale = x.std().clamp_min(1.0)  # early states are far larger than data
        images = trainer.datamodule.decode(x / scale)  # type: ignore[attr-defined]
        return grid_image(to_uint8(images), columns=round(self.n**0.5))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the animation; the module holds averaged weights by now."""
        if not trainer.is_global_zero:
            return
        states: list[torch.Tensor] = []
        label = None
        if pl_module.conditional:
            label = torch.arange(self.n, device=pl_module.device) % pl_module.num_classes
        training = pl_module.training
        pl_module.eval()
        try:
            with isolate_rng():
                pl_module.sample(
                    range(self.n), self.sampler, self.seed, label, watch=lambda step, x: states.append(x.cpu())
                )
        except SamplingDiverged as error:
            rank_zero_info(f"no animation of sampler '{self.sampler}': {error}")
            return
        finally:
            pl_module.train(training)
        chosen = torch.linspace(0, len(states) - 1, min(self.frames, len(states))).round().int().tolist()
        publish_animation(trainer, self.sampler, [self.picture(trainer, states[i]) for i in chosen], self.seconds)
