r"""How likely data is: log densities by the probability flow and in one call, and statistics of them.

The flow dx/dσ = −σ ∇log p_σ carries p_σ from level to level, and log p changes along it by the divergence of its
velocity. With t = ln σ, c² = σ² + σ_d², y = x/c and U = ∇log p_σ + x/c², the slope of log p_σ over the base Gaussian,

    dy/dt = −σ² U/c,        log p_σ₀(x₀) = log N(y_T; 0, I) − d ln c₀ − ∫ σ² tr ∇U dt,

in which a Gaussian of standard deviation σ_d has U = 0 and is exact. p at the last noise level is taken to be the base
Gaussian. Fields relative to that Gaussian need no flow: log p_c,σ = log ρ_c + log r_σ.

References:
    | Song et al., Score-Based Generative Modeling through SDEs, arXiv 2011.13456, §4.3 and D.2
    | Grathwohl et al., FFJORD, arXiv 1810.01367 (one probe for the whole of a path)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import in_range, positive
from bd_lightning.divergences import bcast, inner
from bd_lightning.fields.base import FieldPair, log_gradient
from bd_lightning.fields.mixture import Source


def base_log_density(x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """log r_σ(x) (B,) of the base Gaussian N(0, (σ² + σ_d²)I) at x (B, *) and noise levels sigma (B,)."""
    total = sigma.square() + sigma_data**2
    return -(inner(x, x) / total + x[0].numel() * (2 * math.pi * total).log()) / 2


def class_log_densities(source: Source, x: Tensor, sigma: Tensor) -> Tensor:
    """log(π_c p_c,σ) of every class c, (B, C), in one call of the network, at x (B, *) and noise levels sigma (B,).

    Its logsumexp over the classes is log p_σ, its softmax their posterior.
    """
    log, _ = source.components(x, sigma)
    return log + base_log_density(x, sigma, source.sigma_data)[:, None]


def slope_and_trace(
    fields: FieldPair, x: Tensor, sigma: Tensor, sigma_data: float, probes: Sequence[Tensor] | None, exact: bool
) -> tuple[Tensor, Tensor]:
    """U (B, *) and tr ∇U (B,), or an estimate of it, at x (B, *) and noise levels sigma (B,).

    Args:
        fields: the fields.
        x: points.
        sigma: noise levels.
        sigma_data: σ_d of the base Gaussian.
        probes: directions v of Hutchinson's estimate, (B, *) each; None takes the exact trace, d derivatives.
        exact: differentiate log s for ∇log p_σ = S − ∇log s (see `FieldPair.log_gradients`).
    """
    with torch.inference_mode(False), torch.enable_grad():
        point, sigma = x.clone().requires_grad_(True), sigma.clone()
        s, g = fields(point, sigma)
        U = log_gradient(s, g) + point / bcast(sigma.square() + sigma_data**2, point)
        if exact and s.requires_grad:  # a constant mobility has no gradient
            log = s.clamp_min(torch.finfo(s.dtype).tiny).log()
            U = U - torch.autograd.grad(log.sum(), point, create_graph=True)[0]
        directions = list(probes) if probes is not None else _axes(x)
        trace = torch.zeros_like(sigma)
        for v in directions:
            pulled = torch.autograd.grad(inner(U, v.clone()).sum(), point, retain_graph=True)[0]
            trace = trace + inner(pulled, v)
        return U.detach(), trace if probes is None else trace / len(directions)


def _axes(x: Tensor) -> list[Tensor]:
    """The unit vectors of a space of shape (*), each as (B, *)."""
    eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    return [axis.reshape(1, *x.shape[1:]).expand_as(x) for axis in eye]


def flow_log_densities(
    fields: FieldPair,
    x: Tensor,
    sigma_data: float,
    sigma_min: float = 0.02,
    sigma_max: float = 20.0,
    steps: int = 20,
    probes: Sequence[Tensor] | None = None,
    exact: bool = True,
) -> Tensor:
    """log p_σ at σ = sigma_min by Runge and Kutta's method of fourth order on equal steps of ln σ, (steps, B).

    Each row is the density of a flow that ends after one step more: the last at sigma_max, row k at
    sigma_min · (sigma_max/sigma_min)^((k+1)/steps). All of them are densities. Early ones miss what of the data is
    no Gaussian at their noise level, late ones have the errors of fields at levels that few were trained at.

    Args:
        fields: the fields, of all the data or of a class for each point.
        x: points, shape (B, *).
        sigma_data: standard deviation σ_d of the data, in data units; the flow ends in N(0, (σ_max² + σ_d²)I).
        sigma_min: noise level of the density, in data units.
        sigma_max: the last noise level at which it is a Gaussian, in data units.
        steps: steps; four calls of the fields each, with `probes` or the exact trace.
        probes: directions of Hutchinson's estimate, (B, *) each, kept along the path; None takes the exact trace.
        exact: differentiate log s; for low dimension.

    Returns:
        Nats per point, in the units of x.

    Raises:
        ValueError: for values out of range.
    """
    positive(sigma_min=sigma_min, sigma_max=sigma_max, steps=steps, sigma_data=sigma_data)
    in_range(0, sigma_max, sigma_min=sigma_min)

    def velocity(y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        level = math.exp(t)
        c = math.hypot(level, sigma_data)
        U, trace = slope_and_trace(fields, c * y, y.new_full((len(y),), level), sigma_data, probes, exact)
        return -(level**2) / c * U, level**2 * trace

    start = math.hypot(sigma_min, sigma_data)
    y, change = x / start, x.new_zeros(len(x))
    h, d, found = math.log(sigma_max / sigma_min) / steps, x[0].numel(), []
    for k in range(steps):
        t = math.log(sigma_min) + k * h
        dy, dl = velocity(y, t)
        total_y, total_l = dy, dl
        for weight, part in ((2, h / 2), (2, h / 2), (1, h)):
            dy, dl = velocity(y + part * dy, t + part)
            total_y, total_l = total_y + weight * dy, total_l + weight * dl
        y, change = y + h / 6 * total_y, change + h / 6 * total_l
        found.append(-(inner(y, y) + d * math.log(2 * math.pi)) / 2 - d * math.log(start) - change)
    return torch.stack(found)


def flow_log_density(fields: FieldPair, x: Tensor, sigma_data: float, **options: Any) -> Tensor:
    """log p_σ at σ = sigma_min, (B,): the last of `flow_log_densities`, whose options are keywords here."""
    return flow_log_densities(fields, x, sigma_data, **options)[-1]


class FlowSource:
    """Pairs of fields of whole densities as a source of mixtures (see `fields.Source`): ρ comes from the flow.

    Each call integrates the flow of every pair up to sigma_max, hundreds of network calls. Of more than `exact`
    dimensions the trace is estimated by a probe, the same for every call.

    Args:
        pairs: the fields p_c, such as those of trained denoisers.
        shares: π_c.
        sigma_data: σ_d of the base Gaussian.
        sigma_max: noise level at which they are Gaussians, in data units.
        steps: steps of the flow.
        exact: dimensions up to which the trace is exact.
    """

    def __init__(
        self,
        pairs: Sequence[FieldPair],
        shares: Sequence[float],
        sigma_data: float = 1.0,
        sigma_max: float = 20.0,
        steps: int = 20,
        exact: int = 16,
    ) -> None:
        if len(pairs) != len(shares):
            raise ValueError(f"there are {len(pairs)} pairs of fields and {len(shares)} shares: give one for each")
        self.pairs, self.sigma_data, self.sigma_max, self.steps = pairs, sigma_data, sigma_max, steps
        self.exact, self._shares = exact, torch.tensor(shares, dtype=torch.float64)

    @property
    def shares(self) -> Tensor:
        """π_c, shape (C,)."""
        return self._shares

    def components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(π_c ρ_c) (B, C) and U_c (B, C, *) at x (B, *) and noise levels sigma (B,), which are one."""
        level, low = float(sigma[0]), x[0].numel() <= self.exact
        generator = torch.Generator().manual_seed(0)
        probe = torch.where(torch.rand(x[0].shape, generator=generator) < 0.5, -1.0, 1.0).to(x).expand_as(x)
        base = base_log_density(x, sigma, self.sigma_data)
        logs, slopes = [], []
        for fields, share in zip(self.pairs, self._shares.log().tolist()):
            log = x.new_zeros(len(x))
            if level < self.sigma_max:
                log = flow_log_densities(
                    fields, x, self.sigma_data, level, self.sigma_max, self.steps, None if low else [probe], low
                )
                log = log[-1] - base
            logs.append(log + share)
            slopes.append(fields.score(x, sigma, low) + x / bcast(sigma.square() + self.sigma_data**2, x))
        return torch.stack(logs, 1), torch.stack(slopes, 1)


def bits_per_dimension(log_density: Tensor, dim: int, width: float) -> Tensor:
    """−log₂ of the probability of a cell, divided by the number of dimensions; shape of log_density.

    Args:
        log_density: log density in nats, at points spread evenly over cells.
        dim: number of dimensions d.
        width: width of a cell in every dimension, in the units of the density.

    References:
        | Theis et al., A Note on the Evaluation of Generative Models, arXiv 1511.01844, §3.1
    """
    return -(log_density / dim + math.log(width)) / math.log(2)


def ranks(x: Tensor) -> Tensor:
    """Ranks of x (N,) from 1, the mean of them for equal values; double precision."""
    order = x.sort().values
    below = torch.searchsorted(order, x.contiguous())
    return (below + torch.searchsorted(order, x.contiguous(), right=True) + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of a and b, each (N,)."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def spearman_error(correlation: float, n: int) -> float:
    """Standard error of Spearman's correlation of n > 3 pairs.

    References:
        | Bonett and Wright, Sample Size Requirements for Estimating Pearson, Kendall and Spearman Correlations, 2000
    """
    return (1 - correlation**2) * math.sqrt((1 + correlation**2 / 2) / (n - 3)) if n > 3 else math.nan


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Share of pairs in which a score of `inside` (N,) is above one of `outside` (M,), with half of equal ones."""
    n, m = len(inside), len(outside)
    return float((ranks(torch.cat([inside, outside]))[:n].sum() - n * (n + 1) / 2) / (n * m))
