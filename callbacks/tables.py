"""Vectors that `predict` writes."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter


class TableWriter(BasePredictionWriter):
    """Writes predicted vectors as <folder>/samples.csv, a row each, in the units of the data.

    Batches are kept as files of their own until all are there, so that those of an interrupted run are not lost.

    Args:
        folder: where to write.
        columns: names of the columns; None numbers them x0, x1, ….
        center: what is added to each column after scaling; None adds nothing.
        scale: what each column is multiplied by; None leaves it.
    """

    def __init__(
        self,
        folder: str | Path,
        columns: Sequence[str] | None = None,
        center: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.columns, self.center, self.scale = Path(folder), columns, center, scale

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
        """Write one batch; each rank its own."""
        rows = prediction.double().cpu()
        if self.scale is not None:
            rows = rows * torch.tensor(self.scale, dtype=torch.float64)
        if self.center is not None:
            rows = rows + torch.tensor(self.center, dtype=torch.float64)
        with (self.folder / f"part-{int(batch['index'][0]):08d}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([i, *row] for i, row in zip(batch["index"].tolist(), rows.tolist()))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the batches together, in the order of the samples."""
        trainer.strategy.barrier("samples written")
        if not trainer.is_global_zero:
            return
        n = len(trainer.predict_dataloaders.dataset)
        rows: dict[int, list[str]] = {}  # ranks may have drawn a sample twice to have equal shares
        parts = sorted(self.folder.glob("part-*.csv"))
        for part in parts:
            with part.open(newline="") as file:
                rows |= {int(row[0]): row[1:] for row in csv.reader(file)}
        with (self.folder / "samples.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns or [f"x{k}" for k in range(pl_module.dim)])
            writer.writerows(rows[i] for i in range(n))
        for part in parts:
            part.unlink()
