"""Pictures of images: sample grids and the way of the sampler."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import lightning as L
import torch
from PIL import Image

from bd_lightning.checks import positive
from callbacks.drawing import SampleModule, check, classes_of, data_of, draw_together, precision_of
from callbacks.evaluation import Evaluation, unless_lost
from callbacks.pictures import grid_image, publish_animation, publish_picture
from datamodules.images import to_uint8


class SampleGrid(Evaluation):
    """A grid of samples of each sampler at every validation, always from the same seeds.

    Written to <run folder>/samples/<sampler>-<step>.png and logged as samples/<sampler>.

    Args:
        n: images in a grid.
        samplers: names of the module's samplers; empty for all of them.
        seed: seed of the samples.
    """

    subject = "grid of sampler '{sampler}'"
    stages = ("val",)

    def __init__(self, n: int = 64, samplers: Sequence[str] = (), seed: int = 0) -> None:
        positive(n=n)
        self.n, self.samplers, self.seed = n, tuple(samplers), seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that samples are images, and the names of the samplers."""
        check(trainer, pl_module, type(self).__name__, self.kind, self.samplers)

    def chosen(self, pl_module: SampleModule) -> Sequence[str]:
        """The samplers that are shown."""
        return self.samplers or tuple(pl_module.samplers)

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> torch.Tensor:
        """The samples."""
        return draw_together(trainer, pl_module, self.n, self.n, self.seed, sampler)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: torch.Tensor | None
    ) -> None:
        """Write the grid."""
        if drawn is not None:
            caption = f"{sampler}, {pl_module.samplers[sampler].calls} network calls, seed {self.seed}"
            publish_picture(trainer, f"samples/{sampler}", grid_image(to_uint8(drawn)).save, caption)


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

    kind = "images"

    def __init__(
        self, n: int = 16, sampler: str = "sde", frames: int = 40, seconds: float = 4.0, seed: int = 0
    ) -> None:
        positive(n=n, frames=frames, seconds=seconds)
        self.n, self.sampler, self.frames, self.seconds, self.seed = n, sampler, frames, seconds, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the kind of the samples and the name of the sampler."""
        check(trainer, pl_module, type(self).__name__, self.kind, (self.sampler,))

    def picture(self, trainer: L.Trainer, x: torch.Tensor) -> Image.Image:
        """One frame for a state x, shape (n, *shape)."""
        scale = x.std().clamp_min(1.0)  # early states are far larger than data
        images = data_of(trainer).decode(x / scale)
        return grid_image(to_uint8(images), columns=round(self.n**0.5))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the animation; the module holds averaged weights by now."""
        if not trainer.is_global_zero:
            return
        training = pl_module.training
        pl_module.eval()
        try:
            subject = f"animation of sampler '{self.sampler}'"
            with precision_of(trainer):
                states = unless_lost(trainer, subject, partial(self.draw, cast(SampleModule, pl_module)))
        finally:
            pl_module.train(training)
        if states is not None:
            chosen = torch.linspace(0, len(states) - 1, min(self.frames, len(states))).round().int().tolist()
            publish_animation(trainer, self.sampler, [self.picture(trainer, states[i]) for i in chosen], self.seconds)

    def draw(self, pl_module: SampleModule) -> list[torch.Tensor]:
        """The states of the sampler, each (n, *shape), on the CPU."""
        states: list[torch.Tensor] = []
        label = classes_of(pl_module, range(self.n))
        pl_module.sample(range(self.n), self.sampler, self.seed, label, watch=lambda step, x: states.append(x.cpu()))
        return states
