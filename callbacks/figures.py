"""Pictures of data in few dimensions: learned fields beside the true ones, samples over contours, marginals."""

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bd_lightning.checks import UserError, positive
from callbacks.drawing import check_sampler, draw_together, publish_image, run_folder, step_of
from callbacks.points import default_levels, fields_at, lattice, need_vectors, true_fields
from callbacks.samples import Trajectory


class FieldFigures(L.Callback):
    """Figures at every validation, written to <run folder>/figures/<name>-<step>.png and logged as figures/<name>.

    - `fields`, in one and two dimensions: both learned fields and, where the data is a density in closed form, the
      true ones beside them: curves, or heat maps and arrows.
    - `samples`: a histogram over the density in one dimension; points over its contours in two; in more, histograms
      of the first columns of samples and held-out data.

    Args:
        n: number of samples shown.
        sampler: name of the module's sampler; None takes its default.
        level: noise level of the fields, in data units; None takes 0.3 for a multi-scale model and 0 otherwise.
        extent: half the side of what is shown, in data units; None takes 1.3 times the largest coordinate of the data.
        columns: at most so many columns of data in more than two dimensions.
        seed: seed of the samples.
    """

    def __init__(
        self,
        n: int = 2000,
        sampler: str | None = None,
        level: float | None = None,
        extent: float | None = None,
        columns: int = 12,
        seed: int = 1,
    ) -> None:
        positive(n=n, columns=columns, extent=1.0 if extent is None else extent)
        if level is not None and not level >= 0:
            raise ValueError(f"level must not be negative, got {level}")
        self.n, self.sampler, self.level, self.extent = n, sampler, level, extent
        self.columns, self.seed = columns, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that samples are vectors, and the name of the sampler."""
        need_vectors(trainer, type(self).__name__)
        check_sampler(pl_module, self.sampler, type(self).__name__)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and write the figures."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        sampler = self.sampler or pl_module.sampler
        with isolate_rng():
            try:
                x = draw_together(trainer, pl_module, self.n, self.n, self.seed, sampler)
            except UserError as error:
                x = None
                rank_zero_info(f"no figure of samples at step {trainer.global_step}: {error}")
        if not trainer.is_global_zero:
            return
        real = data.split("val").x
        extent = self.extent or 1.3 * float(real.abs().max())
        if pl_module.dim <= 2:
            level = self.level
            if level is None:
                level = sorted(default_levels(pl_module))[len(default_levels(pl_module)) // 2]
            figure = field_figure(pl_module, getattr(data, "density", None), level, extent)
            self._publish(trainer, "fields", figure, f"fields at σ = {level:g}")
        if x is not None:
            figure = sample_figure(x, real, getattr(data, "density", None), extent, self.columns)
            self._publish(trainer, "samples", figure, f"{sampler}, {pl_module.samplers[sampler].calls} network calls")

    def _publish(self, trainer: L.Trainer, name: str, figure: Figure, caption: str) -> None:
        path = run_folder(trainer) / "figures" / f"{name}-{step_of(trainer):07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        publish_image(trainer, f"figures/{name}", path, caption)


class PointTrajectory(Trajectory):
    """The way of a sampler from its start to the data, as an animation of points; see `Trajectory`."""

    def __init__(
        self, n: int = 1000, sampler: str = "sde", frames: int = 40, seconds: float = 4.0, seed: int = 0
    ) -> None:
        super().__init__(n, sampler, frames, seconds, seed)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that samples are vectors, and the name of the sampler."""
        need_vectors(trainer, type(self).__name__)
        check_sampler(pl_module, self.sampler, type(self).__name__)

    def picture(self, trainer: L.Trainer, x: Tensor) -> Image.Image:
        """One frame; the window follows the points in from afar."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        extent = max(1.3 * float(data.split("val").x.abs().max()), 2 * float(x.square().mean().sqrt()))
        figure = sample_figure(x, data.split("val").x, getattr(data, "density", None), extent, columns=6)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def field_figure(pl_module, density, level: float, extent: float) -> Figure:
    """Learned fields and, for a density in closed form, the minimisers of the losses beside them; d = 1 or 2."""
    x = lattice(pl_module.dim, extent)
    assert x is not None
    s, g = (field.numpy() for field in fields_at(pl_module, x, level))
    true: tuple[np.ndarray, np.ndarray] | None = None
    if density is not None:
        true_s, true_g = true_fields(pl_module, density, x, level)
        true = true_s.numpy(), true_g.numpy()
    if pl_module.dim == 1:
        figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
        for axes, title, learned, exact in zip(
            figure.subplots(1, 2), ("scalar field s", "gradient field g"), (s, g[:, 0]), (true or (None, None))
        ):
            if exact is not None:
                axes.plot(x[:, 0], exact, "k--", lw=1, label="closed form")
            axes.plot(x[:, 0], learned, lw=1.5, label="learned")
            axes.set(title=f"{title}, σ = {level:g}", xlabel="x")
            axes.legend()
        return figure
    rows = [("learned", s, g)] + ([("closed form", *true)] if true is not None else [])
    figure = Figure(figsize=(7, 3.4 * len(rows)), dpi=120, layout="constrained")
    side = round(len(x) ** 0.5)
    top = float(rows[-1][1].max())
    for (name, field, arrows), (left, right) in zip(rows, figure.subplots(len(rows), 2, squeeze=False)):
        box = (-extent, extent, -extent, extent)
        picture = left.imshow(field.reshape(side, side).T, origin="lower", extent=box, vmin=0, vmax=top)
        figure.colorbar(picture, ax=left, shrink=0.8)
        left.set_title(f"scalar field s, {name}, σ = {level:g}")
        few = np.arange(len(x)).reshape(side, side)[::3, ::3].ravel()
        reach = float(np.abs(rows[-1][2]).max())
        right.quiver(x[few, 0], x[few, 1], arrows[few, 0], arrows[few, 1], scale=14 * reach)
        right.set(title=f"gradient field g, {name}", aspect="equal", xlim=box[:2], ylim=box[:2])
    return figure


def sample_figure(x: Tensor, real: Tensor, density, extent: float, columns: int) -> Figure:
    """Samples (n, d) over the density, or over held-out data (m, d) where there is none in closed form."""
    d = x.shape[1]
    if d == 1:
        figure = Figure(figsize=(4.5, 3), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.hist(x[:, 0], bins=100, range=(-extent, extent), density=True, alpha=0.5, label="samples")
        if density is not None:
            line = torch.linspace(-extent, extent, 1000, dtype=torch.float64)[:, None]
            axes.plot(line[:, 0], density.log_density(line).exp(), "k", lw=1, label="density")
        axes.legend()
        return figure
    if d == 2:
        figure = Figure(figsize=(4, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        if density is not None:
            grid = lattice(2, extent)
            assert grid is not None
            side = round(len(grid) ** 0.5)
            heights = density.log_density(grid.double(), 0.05).exp().reshape(side, side)
            top = float(heights.max())
            line = grid[::side, 0]
            levels = [top * share for share in (0.02, 0.1, 0.3, 0.6, 0.9)]
            axes.contour(line, line, heights.T, levels=levels, colors="k", linewidths=0.6)
        else:
            axes.plot(real[:2000, 0], real[:2000, 1], "k.", ms=1, alpha=0.5)
        axes.plot(x[:, 0], x[:, 1], ".", ms=2, alpha=0.6)
        axes.set(aspect="equal", xlim=(-extent, extent), ylim=(-extent, extent))
        return figure
    shown = min(d, columns)
    wide = min(4, shown)
    figure = Figure(figsize=(2.2 * wide, 1.8 * -(-shown // wide)), dpi=120, layout="constrained")
    for i, axes in zip(range(shown), figure.subplots(-(-shown // wide), wide, squeeze=False).flat):
        low, high = float(real[:, i].min()) - 0.5, float(real[:, i].max()) + 0.5
        for values, name in ((real, "held out"), (x, "samples")):
            axes.hist(values[:, i], bins=30, range=(low, high), density=True, alpha=0.5, label=name)
        axes.set_title(f"column {i}", fontsize=8)
        axes.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=6)
    return figure
