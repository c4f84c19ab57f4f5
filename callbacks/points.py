"""Numbers for data in few dimensions: distances to held-out samples, weights of the modes, errors of the fields."""

import math

import lightning as L
import torch
from torch import Tensor

from bd_lightning.checks import positive
from bd_lightning.distances import mmd, relative_error, wasserstein2
from bd_lightning.kernels import NoClosedForm
from bd_lightning.targets import Density
from callbacks.drawing import SampleModule, data_of, draw_together, manner
from callbacks.evaluation import Evaluation, Findings, Metric
from datamodules.base import DataModule
from datamodules.splits import samples_of


def lattice(dim: int, extent: float) -> Tensor | None:
    """Points of a regular grid on [−extent, extent]^d: 601 in one dimension, 61² in two, None beyond."""
    if dim > 2:
        return None
    axis = torch.linspace(-extent, extent, {1: 601, 2: 61}[dim])
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)


def default_levels(pl_module: SampleModule) -> tuple[float, ...]:
    """Noise levels at which fields are looked at: three for a multi-scale model, σ = 0 otherwise."""
    return (0.1, 0.3, 1.0) if pl_module.multi_scale else (0.0,)


class PointMetrics(Evaluation):
    """Distances between samples and held-out data, at every validation and test.

    Logged under <stage>/: `w2` and `mmd`, the 2-Wasserstein distance and the maximum mean discrepancy to held-out
    points, in the model's units; `w2_ratio`, w2 over its floor, the distance of as many training points; and, where the
    data is a density in closed form,

    - `mode_<k>`, the share of samples in each mode, and `mode_error`, the largest difference from the true weights;
    - `s_error_<where>` and `g_error_<where>`, relative errors ‖f − f*‖/‖f*‖ of the two fields against the minimisers of
      their losses, on held-out data and, in one and two dimensions, on a surrounding grid; a multi-scale model has them
      at several noise levels, on data with that noise;
    - `p_error_<where>` and `grad_p_error_<where>`, for the exact kernel of a single-scale model, against p and ∇p
      themselves.

    Every row goes to <run folder>/distances.json with its protocol.

    Args:
        n: samples, and held-out points, of one distance; no more samples than training points.
        repeats: distances that `w2`, `mmd` and their floors are the mean of, over disjoint sets of samples where there
            is data enough. Modes are counted over all samples.
        sampler: name of the module's sampler; None takes its default.
        extent: half the side of the grid, in data units; None takes 1.3 times the largest coordinate of the data.
        seed: seed of the samples.
    """

    metrics = (Metric("w2"), Metric("w2_ratio"), Metric("mmd"))
    more = ("mode_*", "*_error_*")
    record = "distances.json"
    subject = "distances"
    kind = "vectors"

    def __init__(
        self,
        n: int = 2000,
        repeats: int = 3,
        sampler: str | None = None,
        extent: float | None = None,
        seed: int = 1,
    ) -> None:
        positive(n=n, repeats=repeats, extent=1.0 if extent is None else extent)
        if n < 2:
            raise ValueError("n must be at least 2: distances are between sets of points")
        self.n, self.sampler, self.extent, self.repeats, self.seed = n, sampler, extent, repeats, seed
        self.floors: dict[str, tuple[float, float]] = {}
        self.truths: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def _floor(self, data: DataModule, split: str) -> tuple[float, float]:
        """Mean distances between training and held-out points."""
        if split not in self.floors:
            train = samples_of(data.split("train")).cpu()
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
            self.floors[split] = self._distances(train[order[: self._total(data)]], data, split)
        return self.floors[split]

    def _total(self, data: DataModule) -> int:
        """Number of samples: of every repeat that there are training points for, or of all those if they are fewer."""
        known = len(data.split("train"))
        return min(known, self.n * min(self.repeats, max(1, known // self.n)))

    def _distances(self, x: Tensor, data: DataModule, split: str) -> tuple[float, float]:
        """W2 and MMD of x to held-out points, the mean over chunks of n."""
        held_out = samples_of(data.split(split))
        held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))]
        pairs = []
        for i, chunk in enumerate(x.split(self.n)):
            start = i * self.n if (i + 1) * self.n <= len(held_out) else 0
            real = held_out[start : start + self.n]
            pairs.append((wasserstein2(chunk, real), mmd(chunk, real)))
        w2, discrepancy = torch.tensor(pairs).mean(0).tolist()
        return w2, discrepancy

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> Tensor:
        """The samples."""
        return draw_together(trainer, pl_module, self._total(data_of(trainer)), self.n, self.seed, sampler)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: Tensor | None
    ) -> Findings:
        """Distances, which are infinite if chains were lost, and errors of the fields."""
        data = data_of(trainer)
        n, held_out, unknown = self._total(data), samples_of(data.split(stage)), ""
        w2_floor, mmd_floor = self._floor(data, stage)
        if drawn is None:
            values = {"w2": math.inf, "mmd": math.inf}
        else:
            w2, discrepancy = self._distances(drawn, data, stage)
            values = {"w2": w2, "w2_ratio": w2 / w2_floor if w2_floor else math.inf, "mmd": discrepancy}
            if data.density is not None and len(data.density.mode_weights) > 1:
                values |= mode_shares(drawn, data.density)
        if data.density is not None:
            try:
                values |= self._field_errors(pl_module, data.density, held_out, stage)
            except NoClosedForm as error:
                unknown = f"; no errors of the fields: {error}"
        modes = f", largest error of a mode's weight {values['mode_error']:.3f}" if "mode_error" in values else ""
        protocol = (
            f"{n} samples ({manner(pl_module, sampler, self.n)}, seed {self.seed}), "
            f"{min(n, self.n)} at a time, "
            f"against {min(self.n, len(held_out))} points of the {stage} split of {data.name}; "
            f"floor: {n} training points in their place{unknown}"
        )
        summary = (
            f"W2 {values['w2']:.4f} (floor {w2_floor:.4f}), "
            f"MMD {values['mmd']:.4f} (floor {mmd_floor:.4f}){modes}: {protocol}"
        )
        logged = {f"{stage}/{name}": value for name, value in values.items()}
        more = {"w2_floor": w2_floor, "mmd_floor": mmd_floor, "protocol": protocol, "summary": summary}
        return Findings(logged, {**logged, **more})

    def _field_errors(
        self, pl_module: SampleModule, density: Density, held_out: Tensor, stage: str
    ) -> dict[str, float]:
        points = held_out[:2000]  # independent samples of the density
        values: dict[str, float] = {}
        for level in default_levels(pl_module):
            generator = torch.Generator().manual_seed(2)
            places = {"data": points + level * torch.randn(points.shape, generator=generator)}
            grid = lattice(density.dim, self.extent or 1.3 * float(points.abs().max()))
            if grid is not None:
                places["grid"] = grid
            for where, x in places.items():
                name = where if level == 0 else f"{where}_sigma_{level:g}"
                if (stage, name) not in self.truths:
                    self.truths[stage, name] = true_fields(pl_module, density, x, level)
                errors = field_errors(pl_module, density, x, level, self.truths[stage, name])
                values |= {f"{kind}_{name}": value for kind, value in errors.items()}
        return values


def mode_shares(x: Tensor, density: Density) -> dict[str, float]:
    """Share of points x (B, d) in each mode, as mode_<k>, and mode_error, the largest difference from the weights."""
    truth = density.mode_weights
    shares = torch.bincount(density.mode_of(x.double()), minlength=len(truth)) / len(x)
    values = {f"mode_{k}": share for k, share in enumerate(shares.tolist())}
    return values | {"mode_error": float((shares - truth).abs().max())}


def true_fields(pl_module: SampleModule, density: Density, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The minimisers s* (B,) and g* (B, d) of a module's losses at points x (B, d) and noise level σ.

    Raises:
        NoClosedForm: for a kernel that knows none.
    """
    x = x.double()
    return pl_module.analytic(density)(x, x.new_full((len(x),), level))


@torch.no_grad()
def fields_at(pl_module: SampleModule, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """A module's fields s (B,) and g (B, d) at points x (B, d) and noise level σ, on the CPU."""
    x = x.to(pl_module.device)
    s, g = pl_module.fields(x, x.new_full((len(x),), level))
    return s.cpu(), g.cpu()


def field_errors(
    pl_module: SampleModule, density: Density, x: Tensor, level: float, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Relative errors s_error and g_error of a module's fields at points x (B, d) and noise level σ.

    A single-scale model of the exact kernel also has p_error and grad_p_error, against the paper's p and ∇p, where the
    density has them.
    """
    s, g = fields_at(pl_module, x, level)
    true_s, true_g = truth
    known = true_g.isfinite().all(1)  # a box has no score outside
    errors = {"s_error": relative_error(s, true_s), "g_error": relative_error(g[known], true_g[known])}
    if level == 0 and pl_module.fields.mobility_is_density:
        p, grad_p = density.smoothed(x.double())
        errors["p_error"] = relative_error(s, p)
        if grad_p.isfinite().all() and grad_p.any():
            errors["grad_p_error"] = relative_error(g, grad_p)
    return errors
