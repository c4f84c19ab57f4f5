"""What `predict` writes: images as PNG files, vectors as the rows of a CSV file."""

import csv
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from callbacks.pictures import grid_image
from datamodules.images import to_uint8


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes its name when it is whole; what a full disk or a signal cut does not stay."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class SampleWriter(BasePredictionWriter):
    """Writes samples batch by batch, each rank its own, and puts them together at the end.

    Args:
        folder: where to write.

    Attributes:
        product: what it is called that lies there in the end.
    """

    product: str

    def __init__(self, folder: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)

    @abstractmethod
    def write(self, indices: list[int], x: Tensor) -> None:
        """Write samples x (B, *shape), in the model's units, with the given indices."""

    @abstractmethod
    def finish(self, n: int, pl_module: L.LightningModule) -> None:
        """Put n samples together, on rank 0. Ranks may have drawn a sample twice to have equal shares."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        self.write(batch["index"].tolist(), prediction.cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for all ranks, then put the samples together."""
        trainer.strategy.barrier("samples written")
        if trainer.is_global_zero:
            loader: Any = trainer.predict_dataloaders
            self.finish(len(loader.dataset), pl_module)


class ImageWriter(SampleWriter):
    """Writes predicted images as <folder>/<index>.png, and a grid of the first ones as grid.png.

    Args:
        folder: where to write.
        decode: makes images of what is predicted; None if it is images.
        grid: at most so many images in grid.png.
    """

    product = "images and grid.png"

    def __init__(self, folder: str | Path, decode: Callable[[Tensor], Tensor] | None = None, grid: int = 64) -> None:
        super().__init__(folder)
        self.decode, self.grid = decode, grid

    def write(self, indices, x):
        for index, image in zip(indices, to_uint8(self.decode(x) if self.decode else x)):
            array = image.permute(1, 2, 0).squeeze(-1).numpy()
            path = self.folder / f"{index:06d}.png"
            with whole(path) as part:
                Image.fromarray(array).save(part, "png")

    def finish(self, n, pl_module):
        images = [pil_to_tensor(Image.open(self.folder / f"{i:06d}.png")) for i in range(min(self.grid, n))]
        grid_image(torch.stack(images)).save(self.folder / "grid.png")


class TableWriter(SampleWriter):
    """Writes predicted vectors as <folder>/samples.csv, a row each, in the units of the data.

    Batches are kept as files of their own until all are there, so that those of an interrupted run are not lost.

    Args:
        folder: where to write.
        columns: names of the columns; None numbers them x0, x1, ….
        center: what is added to each column after scaling; None adds nothing.
        scale: what each column is multiplied by; None leaves it.
    """

    product = "rows of samples.csv"

    def __init__(
        self,
        folder: str | Path,
        columns: Sequence[str] | None = None,
        center: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__(folder)
        self.columns, self.center, self.scale = columns, center, scale

    def write(self, indices, x):
        x = x.double()
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=torch.float64)
        if self.center is not None:
            x = x + torch.tensor(self.center, dtype=torch.float64)
        path = self.folder / f"part-{indices[0]:08d}.csv"
        with whole(path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([i, *row] for i, row in zip(indices, x.tolist()))

    def finish(self, n, pl_module):
        rows: dict[int, list[str]] = {}
        parts = sorted(self.folder.glob("part-*.csv"))
        for path in parts:
            with path.open(newline="") as file:
                rows |= {int(row[0]): row[1:] for row in csv.reader(file)}
        with whole(self.folder / "samples.csv") as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns or [f"x{k}" for k in range(pl_module.dim)])
            writer.writerows(rows[i] for i in range(n))
        for path in parts:
            path.unlink()
