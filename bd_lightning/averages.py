r"""Averages of weights along a training run, of any length, after the run.

The power-function average of weights θ(τ) at step t gives τ the weight τ^γ:

    θ̂_γ(t) = ∫₀ᵗ p_{t,γ}(τ) θ(τ) dτ,        p_{t,γ}(τ) = (γ + 1) τ^γ / t^{γ+1}  for τ ≤ t,

so that its length is a share of the training, whatever the training is long: the standard deviation of p_{t,γ} is
σ_rel t, σ_rel = (γ + 1)^{1/2} (γ + 2)^{−1} (γ + 3)^{−1/2}. It is followed with θ̂_γ(t) = β θ̂_γ(t − 1) + (1 − β) θ(t),
β = (1 − 1/t)^{γ+1}, exactly, for weights that are constant within a step.

Averages are linear in θ. From snapshots of averages with profiles p_i, the average with another profile p is
Σ_i x_i θ̂_i, where x minimises ∫ (p − Σ_i x_i p_i)² dτ: A x = b with A_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, p⟩.

References:
    | Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696, §3 and
      appendix C
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bd_lightning.checks import UserError, reason_of

SNAPSHOTS = "averages"
"""The folder of a run's snapshots."""
LONGEST = 1 / math.sqrt(12)
"""σ_rel of an average that gives all steps the same weight, γ = 0; it is not reached."""


class Profile(NamedTuple):
    """The weights p_{t,γ} of an average.

    Args:
        step: t.
        gamma: γ.
    """

    step: int
    gamma: float


def gamma_of(length: float) -> float:
    """γ of an average of relative length σ_rel.

    Raises:
        ValueError: if σ_rel is not positive, or not below that of equal weights.
    """
    if not 0 < length < LONGEST:
        raise ValueError(f"the length of an average is a share of the training, above 0 and below {LONGEST:.3f}")
    low, high = 0.0, 2 / length  # σ_rel falls in γ, and is less than 1/γ
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length_of(middle) > length else (low, middle)
    return (low + high) / 2


def length_of(gamma: float) -> float:
    """σ_rel of an average with the exponent γ."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def kept(step: int, gamma: float) -> float:
    """β: the weight of the past when the weights of a step, counted from 1, come in."""
    return (1 - 1 / step) ** (gamma + 1)


def products(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """⟨p_i, p_j⟩ = (γ_i + 1)(γ_j + 1) m^{γ_i+γ_j+1} / ((γ_i + γ_j + 1) t_i^{γ_i+1} t_j^{γ_j+1}) with m = min(t_i, t_j).

    Returns:
        Shape (len(first), len(second)).
    """
    t, g = (np.array([p[k] for p in first], dtype=np.float64)[:, None] for k in (0, 1))
    u, h = (np.array([p[k] for p in second], dtype=np.float64)[None] for k in (0, 1))
    both = g + h + 1
    logs = both * np.log(np.minimum(t, u)) - (g + 1) * np.log(t) - (h + 1) * np.log(u)
    return (g + 1) * (h + 1) / both * np.exp(logs)


class Fit(NamedTuple):
    """How an average is put together.

    Args:
        coefficients: x, of shape (n,).
        error: ‖p − Σ x_i p_i‖ / ‖p‖.
        noise: √(Σ x_i²), by which independent errors of the snapshots' rounding grow.
    """

    coefficients: np.ndarray
    error: float
    noise: float


def fit(snapshots: Sequence[Profile], wanted: Profile) -> Fit:
    """The coefficients of snapshots in an average.

    They are scaled to the sum of one, so that weights that stand still stay where they are.

    Raises:
        ValueError: if there are no snapshots, or none up to the step that is wanted.
    """
    past = [one.step <= wanted.step for one in snapshots]
    if not any(past):
        raise ValueError(f"there is no snapshot up to step {wanted.step}")
    matrix = products(snapshots, snapshots)
    target = products(snapshots, [wanted])[:, 0]
    scale = 1 / np.sqrt(np.diag(matrix))  # profiles of length one: early ones are narrow and high
    solution = np.linalg.lstsq(matrix * scale * scale[:, None], target * scale, rcond=1e-13)[0] * scale
    solution /= solution.sum()
    norm = float(products([wanted], [wanted])[0, 0])
    left = norm - 2 * solution @ target + solution @ matrix @ solution
    return Fit(solution, math.sqrt(max(0.0, left) / norm), math.sqrt(float(solution @ solution)))


# ---- snapshots


class Snapshot(NamedTuple):
    """An average that was kept.

    Args:
        profile: what it is an average by.
        path: the file.
        place: which average of the file it is.
    """

    profile: Profile
    path: Path
    place: int


def save_snapshot(
    path: Path, profiles: Sequence[Profile], averages: Sequence[Mapping[str, Tensor]], averaged: Collection[str]
) -> None:
    """Write averages of one step, whole or not at all.

    Args:
        path: the file.
        profiles: of each average.
        averages: weights by name, for each, and what else belongs to the model at that step.
        averaged: names of the weights. They are kept in half precision, but for those that it cannot hold.

    Raises:
        UserError: if it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    weights = [
        {name: _half(value) if name in averaged else value.cpu() for name, value in one.items()} for one in averages
    ]
    stored = {"profiles": [list(profile) for profile in profiles], "weights": weights, "averaged": sorted(averaged)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns some failures to write into a RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the snapshot {path} ({reason_of(error)}): make room, then resume from checkpoints/last.ckpt"
        ) from error


def _half(value: Tensor) -> Tensor:
    half = value.to("cpu", torch.float16)
    return half if half.isfinite().all() else value.cpu()


def _load(path: Path) -> dict[str, Any]:
    """A file of snapshots, which holds numbers alone.

    Raises:
        UserError: if it is damaged.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        profiles = [Profile(int(step), float(gamma)) for step, gamma in stored["profiles"]]
        if not profiles or any(one.step < 1 or not 0 <= one.gamma < math.inf for one in profiles):
            raise ValueError("no profiles of averages")
        sound = all(isinstance(value, Tensor) for one in stored["weights"] for value in one.values())
        if len(stored["weights"]) != len(profiles) or not sound:
            raise ValueError("not a mapping of tensors for every profile")
        averaged = stored.get("averaged", list(stored["weights"][0]))  # files of before do not say
        return {"profiles": profiles, "weights": stored["weights"], "averaged": frozenset(averaged)}
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is no snapshot of averages, or it is damaged ({reason}): delete it") from error


def snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a run's folder, in order of their steps.

    Raises:
        UserError: if one is damaged.
    """
    paths = sorted((folder / SNAPSHOTS).glob("*.pt"))
    return [Snapshot(profile, path, i) for path in paths for i, profile in enumerate(_load(path)["profiles"])]


def combined(parts: Sequence[Snapshot], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ_i x_i θ̂_i of snapshots, in double precision; what is no weight is that of the last.

    Raises:
        UserError: if they are not of one model.
    """
    total: dict[str, Tensor] = {}
    for part, x in zip(parts, coefficients):
        stored = _load(part.path)
        weights, averaged = stored["weights"][part.place], stored["averaged"]
        shapes = {name: value.shape for name, value in weights.items()}
        if total and shapes != {name: value.shape for name, value in total.items()}:
            raise UserError(f"{part.path} is a snapshot of another model than those before it: delete it")
        for name, value in weights.items():
            term = value.double() * (float(x) if name in averaged else 1.0)
            total[name] = total[name] + term if name in total and name in averaged else term
    return total
