"""Numbers for data in few dimensions: distances to held-out samples, weights of the modes, errors of the fields."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from bd_lightning.checks import UserError, positive
from bd_lightning.distances import mmd, relative_error, wasserstein2
from bd_lightning.kernels import Exact
from bd_lightning.targets import Density
from callbacks.drawing import append_record, check_sampler, draw_together, step_of


def need_vectors(trainer: L.Trainer, owner: str) -> None:
    """Refuse data that is not vectors.

    Raises:
        UserError: naming the callback and what to choose instead.
    """
    shape = trainer.datamodule.observed.shape  # type: ignore[attr-defined]
    if len(shape) != 1:
        raise UserError(f"{owner} is for vectors, and a sample has shape {shape}: choose callbacks=images")


def lattice(dim: int, extent: float) -> Tensor | None:
    """Points of a regular grid on [−extent, extent]^d: 601 in one dimension, 61² in two, None beyond."""
    if dim > 2:
        return None
    axis = torch.linspace(-extent, extent, {1: 601, 2: 61}[dim])
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)


def default_levels(pl_module: L.LightningModule) -> tuple[float, ...]:
    """Noise levels at which fields are looked at: three for a multi-scale model, σ = 0 otherwise."""
    return (0.1, 0.3, 1.0) if pl_module.multi_scale else (0.0,)


class PointMetrics(L.Callback):
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

    def __init__(
        self,
        n: int = 2000,
        repeats: int = 3,
        sampler: str | None = None,
        extent: float | None = None,
        seed: int = 1,
    ) -> None:
        positive(n=n, repeats=repeats, extent=1.0 if extent is None else extent)
        self.n, self.sampler, self.extent, self.repeats, self.seed = n, sampler, extent, repeats, seed
        self.floors: dict[str, tuple[float, float]] = {}
        self.truths: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that samples are vectors, and the name of the sampler."""
        need_vectors(trainer, type(self).__name__)
        check_sampler(pl_module, self.sampler, type(self).__name__)

    def _floor(self, data: Any, split: str) -> tuple[float, float]:
        """Mean distances between training and held-out points."""
        if split not in self.floors:
            train = data.split("train").x
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
            self.floors[split] = self._distances(train[order[: self._total(data)]], data, split)
        return self.floors[split]

    def _total(self, data: Any) -> int:
        """Number of samples: of every repeat, or as many as there are training points."""
        return min(self.n * self.repeats, len(data.split("train")))

    def _distances(self, x: Tensor, data: Any, split: str) -> tuple[float, float]:
        """W2 and MMD of x to held-out points, the mean over chunks of n."""
        held_out = data.split(split).x
        held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))]
        pairs = []
        for i, chunk in enumerate(x.split(self.n)):
            start = i * self.n if (i + 1) * self.n <= len(held_out) else 0
            real = held_out[start : start + self.n]
            pairs.append((wasserstein2(chunk, real), mmd(chunk, real)))
        w2, discrepancy = torch.tensor(pairs).mean(0).tolist()
        return w2, discrepancy

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        held_out = data.split(stage).x
        n = self._total(data)
        sampler = self.sampler or pl_module.sampler
        values: dict[str, float] = {}
        with isolate_rng():
            try:
                x = draw_together(trainer, pl_module, n, self.n, self.seed, sampler)
            except UserError as error:
                rank_zero_info(f"no distances at step {trainer.global_step}: {error}")
                values = {"w2": float("inf"), "mmd": float("inf")}
            if trainer.is_global_zero:
                density = getattr(data, "density", None)
                if not values:
                    w2, discrepancy = self._distances(x, data, stage)
                    values = {"w2": w2, "w2_ratio": w2 / self._floor(data, stage)[0], "mmd": discrepancy}
                    if density is not None and len(density.mode_weights) > 1:
                        values |= mode_shares(x, density)
                if density is not None:
                    values |= self._field_errors(pl_module, density, held_out, stage)
        values = trainer.strategy.broadcast(values)
        pl_module.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True
        )  # the same everywhere
        if trainer.is_global_zero:
            calls = pl_module.samplers[sampler].calls
            w2_floor, mmd_floor = self._floor(data, stage)
            row = {
                "step": step_of(trainer),
                **{f"{stage}/{name}": value for name, value in values.items()},
                "w2_floor": w2_floor,
                "mmd_floor": mmd_floor,
                "protocol": (
                    f"{n} samples ({sampler}, {calls} network calls, seed {self.seed}), {min(n, self.n)} at a time, "
                    f"against {min(self.n, len(held_out))} points of the {stage} split of {data.name}; "
                    f"floor: {n} training points in their place"
                ),
            }
            modes = f", largest error of a mode's weight {values['mode_error']:.3f}" if "mode_error" in values else ""
            row["summary"] = (
                f"W2 {values['w2']:.4f} (floor {w2_floor:.4f}), "
                f"MMD {values['mmd']:.4f} (floor {mmd_floor:.4f}){modes}: {row['protocol']}"
            )
            append_record(trainer, "distances.json", row)

    def _field_errors(
        self, pl_module: L.LightningModule, density: Density, held_out: Tensor, stage: str
    ) -> dict[str, float]:
        points = held_out[:2000]
        values = {}
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

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Distances to the validation split."""
        if not trainer.sanity_checking:
            self._run(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Distances to the test split."""
        self._run(trainer, pl_module, "test")


def mode_shares(x: Tensor, density: Density) -> dict[str, float]:
    """Share of points x (B, d) in each mode, as mode_<k>, and mode_error, the largest difference from the weights."""
    truth = density.mode_weights
    shares = torch.bincount(density.mode_of(x.double()), minlength=len(truth)) / len(x)
    values = {f"mode_{k}": share for k, share in enumerate(shares.tolist())}
    return values | {"mode_error": float((shares - truth).abs().max())}


def true_fields(pl_module: L.LightningModule, density: Density, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The minimisers s* (B,) and g* (B, d) of a module's losses at points x (B, d) and noise level σ."""
    x = x.double()
    return pl_module.analytic(density)(x, x.new_full((len(x),), level))


@torch.no_grad()
def fields_at(pl_module: L.LightningModule, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """A module's fields s (B,) and g (B, d) at points x (B, d) and noise level σ, on the CPU."""
    x = x.to(pl_module.device)
    s, g = pl_module.fields(x, x.new_full((len(x),), level))
    return s.cpu(), g.cpu()


def field_errors(
    pl_module: L.LightningModule, density: Density, x: Tensor, level: float, truth: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Relative errors s_error and g_error of a module's fields at points x (B, d) and noise level σ.

    A single-scale model of the exact kernel also has p_error and grad_p_error, against the paper's p and ∇p, where the
    density has them.
    """
    s, g = fields_at(pl_module, x, level)
    true_s, true_g = truth
    known = true_g.isfinite().all(1)  # a box has no score outside
    errors = {"s_error": relative_error(s, true_s), "g_error": relative_error(g[known], true_g[known])}
    if level == 0 and isinstance(pl_module.kernel, Exact):
        p, grad_p = density.smoothed(x.double())
        errors["p_error"] = relative_error(s, p)
        if grad_p.isfinite().all() and grad_p.any():
            errors["grad_p_error"] = relative_error(g, grad_p)
    return errors
