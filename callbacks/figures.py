"""Pictures of data in few dimensions: learned fields beside the true ones, samples over contours, marginals."""

import contextlib
import textwrap
from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.kernels import NoClosedForm
from bd_lightning.targets import Density
from callbacks.drawing import SampleModule, data_of, draw_together
from callbacks.evaluation import Evaluation
from callbacks.pictures import figure_image, publish_picture
from callbacks.points import default_levels, fields_at, lattice, true_fields
from callbacks.samples import Trajectory
from datamodules.splits import samples_of
from datamodules.subsets import random_subset


class FieldFigures(Evaluation):
    """Figures at every validation, written to <run folder>/figures/<name>-<step>.png and logged as figures/<name>.

    - `fields`, in one and two dimensions: both learned fields and, where the data is a density in closed form, the
      true ones beside them: curves, or heat maps and arrows.
    - `samples`: a histogram over the density in one dimension; points over its contours in two; in more, histograms
      of the columns of samples and held-out data.

    Args:
        n: number of samples shown.
        sampler: name of the module's sampler; None takes its default.
        level: noise level of the fields, in data units; None takes 0.3 for a multi-scale model and 0 otherwise.
        extent: half the side of what is shown, in data units; None takes 1.3 times the largest coordinate of the data.
        columns: at most so many columns of data in more than two dimensions; None shows all.
        seed: seed of the samples.
    """

    subject = "figure of samples"
    stages = ("val",)
    kind = "vectors"

    def __init__(
        self,
        n: int = 2000,
        sampler: str | None = None,
        level: float | None = None,
        extent: float | None = None,
        columns: int | None = None,
        seed: int = 1,
    ) -> None:
        positive(n=n, columns=1 if columns is None else columns, extent=1.0 if extent is None else extent)
        if level is not None and not level >= 0:
            raise ValueError(f"level must not be negative, got {level}")
        self.n, self.sampler, self.level, self.extent = n, sampler, level, extent
        self.columns, self.seed = columns, seed

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> Tensor:
        """The samples."""
        return draw_together(trainer, pl_module, self.n, self.n, self.seed, sampler)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: Tensor | None
    ) -> None:
        """Write the figures: that of the fields also if chains were lost."""
        data = data_of(trainer)
        real = samples_of(data.split("val"))
        extent = self.extent or 1.3 * float(real.abs().max())
        if pl_module.dim <= 2:
            level = self.level
            if level is None:
                level = sorted(default_levels(pl_module))[len(default_levels(pl_module)) // 2]
            figure = field_figure(pl_module, data.density, level, extent)
            publish_picture(trainer, "figures/fields", figure.savefig, f"fields at σ = {level:g}")
        if drawn is not None:
            names = column_names(trainer, self.columns)
            figure = sample_figure(drawn, real, data.density, extent, names)
            caption = f"{sampler}, {pl_module.samplers[sampler].calls} network calls"
            publish_picture(trainer, "figures/samples", figure.savefig, caption)


class PointTrajectory(Trajectory):
    """The way of a sampler from its start to the data, as an animation of points; see `Trajectory`.

    Args:
        n: number of samples.
        sampler: name of the module's sampler.
        frames: number of frames, spread over the steps.
        seconds: length of the animation.
        seed: seed of the samples.
        columns: at most so many columns of data in more than two dimensions; None shows all.
    """

    kind = "vectors"

    def __init__(
        self,
        n: int = 1000,
        sampler: str = "sde",
        frames: int = 40,
        seconds: float = 4.0,
        seed: int = 0,
        columns: int | None = 6,
    ) -> None:
        super().__init__(n, sampler, frames, seconds, seed)
        positive(columns=1 if columns is None else columns)
        self.columns = columns

    def picture(self, trainer: L.Trainer, x: Tensor) -> Image.Image:
        """One frame; the window follows the points in from afar."""
        data = data_of(trainer)
        real = samples_of(data.split("val"))
        extent = max(1.3 * float(real.abs().max()), 2 * float(x.square().mean().sqrt()))
        return figure_image(sample_figure(x, real, data.density, extent, column_names(trainer, self.columns)))


def column_names(trainer: L.Trainer, limit: int | None = None) -> tuple[str, ...]:
    """Names of the columns of the data, at most `limit`; data without names has its columns numbered."""
    data = data_of(trainer)
    names = data.facts.columns or tuple(f"column {i}" for i in range(data.shape[0]))
    return tuple(names[:limit])


def field_figure(pl_module: SampleModule, density: Density | None, level: float, extent: float) -> Figure:
    """Learned fields and, for a density in closed form, the minimisers of the losses beside them; d = 1 or 2."""
    x = lattice(pl_module.dim, extent)
    assert x is not None
    s, g = (field.numpy() for field in fields_at(pl_module, x, level))
    true: tuple[np.ndarray, np.ndarray] | None = None
    with contextlib.suppress(NoClosedForm):
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
    reaches = [float(np.nanmax(np.abs(arrows))) for _, _, arrows in reversed(rows)]  # NaN where p is zero
    reach = next((one for one in reaches if one > 0), 1.0)
    for (name, field, arrows), (left, right) in zip(rows, figure.subplots(len(rows), 2, squeeze=False)):
        box = (-extent, extent, -extent, extent)
        picture = left.imshow(field.reshape(side, side).T, origin="lower", extent=box, vmin=0, vmax=top)
        figure.colorbar(picture, ax=left, shrink=0.8)
        left.set_title(f"scalar field s, {name}, σ = {level:g}")
        few = np.arange(len(x)).reshape(side, side)[::3, ::3].ravel()
        right.quiver(x[few, 0], x[few, 1], arrows[few, 0], arrows[few, 1], scale=14 * reach)
        right.set(title=f"gradient field g, {name}", aspect="equal", xlim=box[:2], ylim=box[:2])
    return figure


def sample_figure(x: Tensor, real: Tensor, density: Density | None, extent: float, columns: Sequence[str]) -> Figure:
    """Samples (n, d) over the density, or over held-out data (m, d) where there is none in closed form.

    In more than two dimensions there is a histogram for each of the first columns that have a name in `columns`.
    """
    d = x.shape[1]
    if d == 1:
        figure = Figure(figsize=(4.5, 3), dpi=120, layout="constrained")
        axes = figure.subplots()
        parts = ([(real, "held out")] if density is None else []) + [(x, "samples")]
        for values, label in parts:
            axes.hist(values[:, 0], bins=100, range=(-extent, extent), density=True, alpha=0.5, label=label)
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
            some = real[random_subset(len(real), 2000)]
            axes.plot(some[:, 0], some[:, 1], "k.", ms=1, alpha=0.5)
        axes.plot(x[:, 0], x[:, 1], ".", ms=2, alpha=0.6)
        axes.set(aspect="equal", xlim=(-extent, extent), ylim=(-extent, extent))
        return figure
    shown = len(columns)
    wide = min(4, shown)
    figure = Figure(figsize=(2.2 * wide, 1.8 * -(-shown // wide)), dpi=120, layout="constrained")
    for i, name in enumerate(columns):
        axes = figure.add_subplot(-(-shown // wide), wide, i + 1)
        low, high = float(real[:, i].min()) - 0.5, float(real[:, i].max()) + 0.5
        for values, label in ((real, "held out"), (x, "samples")):
            axes.hist(values[:, i], bins=30, range=(low, high), density=True, alpha=0.5, label=label)
        axes.set_title(textwrap.fill(name, 26), fontsize=8, parse_math=False)
        axes.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=6)
    return figure
