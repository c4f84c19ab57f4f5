"""average: checkpoints with averages of other lengths, from the snapshots that callbacks.PowerAverages kept."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bd_lightning import averages, checkpoints
from bd_lightning.averages import Profile, Snapshot
from bd_lightning.checks import UserError
from bd_lightning.cli import fit
from bd_lightning.cli.folders import folder_of, short, writing
from bd_lightning.cli.plan import Plan

FURTHEST = 0.1
"""The largest relative error of the weights over time that an average is made with."""


def run(plan: Plan) -> None:
    """Write RUN/checkpoints/length-<length>.ckpt for every length, and score them if that is asked for.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    lengths = plan.config["length"]
    if not lengths:
        raise UserError("average needs length=0.05,0.1,…: lengths of averages, as shares of the training")
    folder = folder_of(plan.config["ckpt_path"])
    parts = averages.snapshots(folder)
    if not parts:
        raise UserError(
            f"{short(folder)} has no snapshots of averages: train with callbacks.ema._target_=callbacks.PowerAverages"
        )
    fits = {length: fitted(parts, length) for length in lengths}
    assert plan.checkpoint is not None  # a plan to average has one
    for length, found in fits.items():
        path = folder / "checkpoints" / f"length-{length:g}.ckpt"
        with writing(folder):
            made = checkpoint(plan.checkpoint, parts, found)
            checkpoints.save(made, path, f"{os.getpid()}.part")  # each of several processes writes it
        step = made["global_step"]
        print(f"{short(path)}: at step {step}, of {kept(parts)} snapshots, weights over time to {found.error:.2%}")
        if plan.config["score"]:
            score(plan, path)


def kept(parts: list[Snapshot]) -> int:
    """How many times averages were kept, several at each."""
    return len({part.path for part in parts})


def fitted(parts: list[Snapshot], length: float) -> averages.Fit:
    """How snapshots make the average of a length, at the step of the last.

    Raises:
        UserError: for a length that they cannot make.
    """
    profiles = [part.profile for part in parts]
    try:
        found = averages.fit(profiles, Profile(profiles[-1].step, averages.gamma_of(length)))
    except ValueError as error:
        raise UserError(f"length {length:g}: {error}") from error
    if found.error > FURTHEST:
        raise UserError(
            f"length {length:g} cannot be made of these {kept(parts)} snapshots (its weights over time would be off by "
            f"{found.error:.0%}): take one nearer to those that were followed, or keep more callbacks.ema.snapshots"
        )
    return found


def checkpoint(base: Mapping[str, Any], parts: list[Snapshot], found: averages.Fit) -> dict[str, Any]:
    """A checkpoint with an average in place of the weights of another of its run.

    Raises:
        UserError: if the snapshots are of another model.
    """
    weights = dict(base["state_dict"])
    total = averages.combined(parts, found.coefficients.tolist())
    floating = {name: value for name, value in weights.items() if value.is_floating_point()}
    if reason := checkpoints.misfit(total, floating):
        raise UserError(f"the snapshots are of another model than the checkpoint ({reason})")
    weights |= {name: total[name].to(value.dtype) for name, value in floating.items()}
    own = {"hyper_parameters": base["hyper_parameters"], "state_dict": weights}
    return {**own, "global_step": parts[-1].profile.step, "made_by": "average"}


def score(plan: Plan, path: Path) -> None:
    """Evaluate a checkpoint as validate or test does, and print what came of it."""
    config = {**plan.config, "ckpt_path": str(path)}
    fit.run(replace(plan, command=plan.config["score"], config=config, checkpoint=checkpoints.read(path)))
