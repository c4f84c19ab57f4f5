"""Samples of a test as a file that other evaluators read."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
from torch import Tensor

from bd_lightning.checks import UserError, reason_of
from callbacks.moments import Gaussian, save_statistics

BLOCK = 2**22
"""Bytes copied at a time."""


class Export:
    """FILE.npz with samples as `arr_0`, bytes of shape (n, H, W, 3), and FILE.stats.npz with their mu and sigma.

    guided-diffusion's evaluator reads the first; it takes a file with mu for one that has the statistics of its spatial
    features too, so that ours stand beside it, where `callbacks.metrics.reference` reads them. Grey images are repeated
    into three channels. Sample i is row i on any number of ranks, which share a file system.

    Samples are written to a hidden file as they come; under its name the file appears when it is whole.

    Args:
        path: the file, ending in .npz.

    Attributes:
        lost: why there is no file, in a sentence; empty if nothing went wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.statistics = self.path.with_suffix(".stats.npz")
        self.raw = self.path.with_name(f".{self.path.name}.raw")
        self.part = self.path.with_name(f".{self.path.name}.part")
        self.whole = self.path.with_name(f".{self.statistics.name}.part")
        self.shape: tuple[int, int, int, int] = (0, 0, 0, 3)
        self.rank, self.world, self.written, self.lost, self.made = 0, 1, 0, "", False

    def expect(self, n: int, shape: tuple[int, ...]) -> None:
        """Say, on every rank, that n samples of a shape (channels, height, width) will come."""
        self.shape = (n, shape[1], shape[2], 3)

    def check(self, num_features: int) -> None:
        """Refuse a place that the expected samples cannot be written to, before anything is computed. On rank 0.

        Args:
            num_features: size of a feature vector.

        Raises:
            UserError: saying what is wrong with it.
        """
        if self.path.suffix != ".npz":
            raise UserError(f"export must be the name of an .npz file, got {str(self.path)!r}")
        for path in (self.path, self.statistics, self.raw):
            if path.exists():
                raise UserError(f"export: {path} is there already; delete it, or choose another name")
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"export: nothing can be written to {folder} ({reason_of(error)})") from error
        need = 2 * int(np.prod(self.shape)) + 8 * num_features * (num_features + 1)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"export of {self.shape[0]} samples needs {need / 1e9:.3g} GB in {folder}, which has {free / 1e9:.3g} "
                "GB left: choose another place, or fewer by callbacks.metrics.n_test"
            )

    def begin(self, trainer: L.Trainer) -> None:
        """Make room, on rank 0 first."""
        self.rank, self.world, self.written = trainer.global_rank, trainer.world_size, 0
        self.lost, self.made = "", False
        if trainer.is_global_zero:
            with self.writing(), self.raw.open("xb"):
                self.made = True
        if not trainer.strategy.reduce_boolean_decision(not self.lost, all=True):
            self.lost = self.lost or f"export: rank 0 cannot write to {self.path.parent}"

    def add(self, images: Tensor) -> None:
        """Write the next of this rank's samples, bytes (B, 1 or 3, H, W), unless room was lacking before."""
        if self.lost:
            return
        size = int(np.prod(self.shape[1:]))
        with self.writing(), self.raw.open("r+b") as file:
            for sample in images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy():
                file.seek(size * (self.rank + self.world * self.written))
                file.write(sample.tobytes())
                self.written += 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside may find no room: that is kept, so that the samples are judged all the same."""
        try:
            yield
        except FileExistsError:
            self.lost = f"export: {self.raw} is there, another test writes to it, or was killed: delete it then"
        except OSError as error:
            self.lost = (
                f"export: cannot write to {self.path.parent} ({reason_of(error)}): make room, or choose another place"
            )

    def finish(self, trainer: L.Trainer, statistics: Gaussian, features: str) -> None:
        """Put the files in place, on rank 0, when all ranks are through; none if one of them found no room."""
        if not trainer.strategy.reduce_boolean_decision(not self.lost, all=True):
            self.lost = self.lost or f"export: another rank cannot write to {self.path.parent}: make room"
        elif trainer.is_global_zero and self.path.exists():
            self.lost = f"export: {self.path} is there by now, of another test: choose another name"
        elif trainer.is_global_zero:
            with self.writing():
                with self.raw.open("rb") as raw, zipfile.ZipFile(self.part, "w") as archive:
                    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                        np.lib.format.write_array_header_1_0(file, header)
                        shutil.copyfileobj(raw, file, BLOCK)
                save_statistics(self.whole, statistics, features)
                self.whole.replace(self.statistics)
                self.part.replace(self.path)

    def abandon(self) -> None:
        """Leave nothing behind but whole files, on rank 0."""
        for path in (self.raw, self.part, self.whole) if self.made else ():
            path.unlink(missing_ok=True)
