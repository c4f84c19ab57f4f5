"""Whether samples are copies of training images."""

from typing import cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bd_lightning.checks import in_range, positive
from bd_lightning.progress import bar
from callbacks.drawing import SampleModule, data_of, draw_together, manner
from callbacks.evaluation import Evaluation, Findings
from callbacks.pictures import grid_image, publish_picture
from callbacks.records import step_of
from datamodules.images import ImageDataModule, to_uint8
from datamodules.subsets import random_subset


def nearest_two(x: Tensor, data: ImageDataModule, split: str = "train") -> tuple[Tensor, Tensor]:
    """The two nearest images of a split, each as near as it or its mirror image is where training mirrors (`flip`).

    Args:
        x: bytes, shape (n, C, H, W).
        data: where the split is from.
        split: name of the split.

    Returns:
        Distances (n, 2), root mean squares over the pixels in units of 1 (black to white), and indices (n, 2).
    """
    shown = [y.flatten(1).float() / 255 for y in ((x, x.flip(-1)) if data.flip else (x,))]
    flat, scale = shown[0], x[0].numel() ** -0.5
    best, index, seen = flat.new_full((len(x), 2), torch.inf), torch.zeros(len(x), 2, dtype=torch.long), 0
    known = data.load_split(split)
    with bar(f"distances to {split} images of {data.name}", len(known)) as progress:
        for rows, _ in DataLoader(known, 1000, collate_fn=data.collate):
            images = to_uint8(rows).flatten(1).float() / 255
            distance = scale * torch.stack([torch.cdist(one, images) for one in shown]).amin(0)
            found, column = torch.cat([best, distance], 1).topk(2, largest=False)
            number = torch.cat([index, torch.arange(seen, seen + len(rows)).expand(len(x), -1)], 1)
            best, index, seen = found, number.gather(1, column), seen + len(rows)
            progress.update(len(rows))
    return best, index


def memorisation(samples: Tensor, held_out: Tensor, ratio: float = 1 / 3) -> dict[str, float]:
    """How much nearer samples are to training images than images that were not trained on.

    Args:
        samples: distances to the two nearest training images, shape (n, 2).
        held_out: the same of held-out images, shape (m, 2).
        ratio: a copy is nearer to one training image than `ratio` times the distance to the next.

    Returns:
        "distance_ratio", the median distance as a share of the held-out images' (1 without memorisation);
        "close", the share of samples nearer than all but 1 % of the held-out images (0.01 without); "copies" and
        "copies_held_out", the shares that the ratio test finds.

    References:
        | Yoon et al., Diffusion Probabilistic Models Generalize when They Fail to Memorize, 2023 (the ratio test)
    """
    copies = [float((d[:, 0] < ratio * d[:, 1]).double().mean()) for d in (samples, held_out)]
    return {
        "distance_ratio": float(samples[:, 0].median() / held_out[:, 0].median()),
        "close": float((samples[:, 0] < held_out[:, 0].quantile(0.01)).double().mean()),
        "copies": copies[0],
        "copies_held_out": copies[1],
    }


class Memorisation(Evaluation):
    """Distances of samples to their nearest training images, against those of test images, at every test.

    Logged as memorisation/… (see `memorisation`), written to <run folder>/memorisation.json with its protocol, and
    drawn in <run folder>/samples/memorisation-<step>.png: both histograms, and the samples nearest to a training image
    above that image.

    Args:
        n: number of samples, and the largest number of test images, which are a random subset of the split.
        sampler: name of the module's sampler; None takes its default.
        batch_size: samples drawn at a time on each rank.
        ratio: of the ratio test.
        seed: seed of the samples.
    """

    record = "memorisation.json"
    subject = "memorisation"
    stages = ("test",)

    def __init__(
        self, n: int = 1000, sampler: str | None = None, batch_size: int = 500, ratio: float = 1 / 3, seed: int = 1
    ) -> None:
        positive(n=n, batch_size=batch_size)
        in_range(0, 1, ratio=ratio)
        self.n, self.sampler, self.batch_size, self.ratio, self.seed = n, sampler, batch_size, ratio, seed

    def evaluate(self, trainer: L.Trainer, pl_module: SampleModule, stage: str) -> None:
        """Evaluate, if some images are not trained on."""
        data = cast(ImageDataModule, data_of(trainer).observed)
        if stage in self.stages and "test" in data.trained_on:
            rank_zero_info(f"Memorisation: left out, {data.all_by} holds no images out that samples compare with")
            return
        super().evaluate(trainer, pl_module, stage)

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> Tensor:
        """The samples."""
        return draw_together(trainer, pl_module, self.n, self.batch_size, self.seed, sampler)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: Tensor | None
    ) -> Findings | None:
        """Distances to training images, said and drawn."""
        if drawn is None:
            return None
        data = cast(ImageDataModule, data_of(trainer).observed)
        samples, held_out = to_uint8(drawn), some_images(data, "test", self.n)
        ours, index = nearest_two(samples, data)
        theirs, _ = nearest_two(held_out, data)
        values = memorisation(ours, theirs, self.ratio)
        protocol = (
            f"{self.n} samples ({manner(pl_module, sampler, self.batch_size)}, seed {self.seed}), {len(held_out)} test "
            f"images of {data.name}, pixels{', training images mirrored or not' if data.flip else ''}"
        )
        summary = (
            f"median distance to the nearest training image {values['distance_ratio']:.2f} times that of test images; "
            f"{values['close']:.1%} of samples nearer than 99 % of test images (1.0% without memorisation); "
            f"{values['copies']:.2%} copies by the ratio test ({values['copies_held_out']:.2%} of test images): "
            + protocol
        )
        rank_zero_info(f"Memorisation: {summary}")
        self._draw(trainer, samples, ours[:, 0], index[:, 0], theirs[:, 0], data)
        named = {f"memorisation/{k}": v for k, v in values.items()}
        return Findings(named, {**named, "protocol": protocol, "summary": summary})

    def log_values(self, trainer: L.Trainer, pl_module: SampleModule, values: dict[str, float]) -> None:
        """Log values at the step that the weights come from; Lightning's own step is zero in a test."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step_of(trainer))

    def _draw(
        self,
        trainer: L.Trainer,
        samples: Tensor,
        ours: Tensor,
        index: Tensor,
        theirs: Tensor,
        data: ImageDataModule,
    ) -> None:
        nearest = ours.argsort()[:16]
        train = Subset(data.load_split("train"), index[nearest].tolist())
        twins, _ = next(iter(DataLoader(train, len(train), collate_fn=data.collate)))
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        top, bottom = figure.subplots(2, 1)
        bins = torch.linspace(0, float(torch.cat([ours, theirs]).max()), 50).tolist()
        for values, label in ((theirs, "test images"), (ours, "samples")):
            top.hist(values.tolist(), bins, density=True, alpha=0.5, label=label)
        top.set_xlabel("distance to the nearest training image")
        top.legend()
        bottom.imshow(grid_image(torch.cat([samples[nearest], to_uint8(twins)]), columns=16))
        bottom.set_title("the samples nearest to a training image, above it", fontsize=9)
        bottom.axis("off")
        caption = f"{self.n} samples, seed {self.seed}"
        publish_picture(trainer, "samples/memorisation", figure.savefig, caption, key="memorisation")


def some_images(data: ImageDataModule, split: str, n: int) -> Tensor:
    """At most n images of a split, a random subset with a fixed seed, bytes."""
    images = data.load_split(split)
    chosen = Subset(images, random_subset(len(images), n))
    return torch.cat([to_uint8(x) for x, _ in DataLoader(chosen, 500, collate_fn=data.collate)])
