"""Trained models that another one learns from: their weights as its first ones, or their flow as its target."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bd_lightning import checkpoints, combinations
from bd_lightning import facts as facts_of
from bd_lightning.checks import UserError
from bd_lightning.divergences import bcast
from bd_lightning.exported import checksum
from bd_lightning.facts import Facts
from bd_lightning.fields import FieldPair, Guidance
from bd_lightning.modules.generator import Generator


class Teacher:
    """The flow of a model, frozen.

    Args:
        model: the model.
        mixture: what it is asked for instead of its own fields.
        others: models that the mixture takes fields of besides.
        labels: classes that are asked for; empty for all.
    """

    def __init__(
        self, model: Any, mixture: FieldPair | None = None, others: Sequence[Any] = (), labels: Sequence[int] = ()
    ) -> None:
        self.model, self.mixture, self.others, self.labels = model, mixture, list(others), list(labels)
        self.exact = any(getattr(one, "exact_score", False) for one in model.samplers.values())

    def to(self, device: torch.device) -> None:
        """Move the models."""
        for model in (self.model, *self.others):
            model.to(device)

    def digest(self) -> str:
        """What the weights of all its models are known by."""
        parts = [model.state_dict() for model in (self.model, *self.others)]
        named = {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.items()}
        return checksum({name: value.cpu() for name, value in named.items()})

    def fields(self, label: Tensor | None = None) -> FieldPair:
        """What is learned from: the mixture, or the fields of classes (B,)."""
        return self.mixture or self.model.asked(label if self.model.takes_labels else None)

    def step(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        """Where the flow takes x (B, *) from noise level t to r, both (B,), with the denoiser as it is at t."""
        denoised = x + bcast(t.square(), x) * self.fields(label).score(x, t, self.exact)
        return denoised + bcast(r / t, x) * (x - denoised)


def check_space(path: str, theirs: Facts, mine: Facts) -> None:
    """Refuse weights to begin with that are of samples of another kind; facts are of the data of either.

    Raises:
        UserError: saying that they were trained elsewhere.
    """
    if theirs.space != mine.space:
        raise UserError(
            f"{path} does not fit: it was trained in another space (pixels, or the codes of one autoencoder)"
        )


def check_units(path: str, theirs: Facts, mine: Facts) -> None:
    """Refuse a model of samples whose numbers stand for something else; facts are of the data of either.

    Raises:
        UserError: naming what differs.
    """
    for what, value in mine.units.items():
        if theirs.units[what] != value:
            raise UserError(f"{path} does not fit: its {what} is {theirs.units[what]}, here it is {value}")


def check_fit(student: Any, model: Any, path: str, theirs: Facts, mine: Facts) -> None:
    """Refuse a model of other data or noise levels; facts are of the data of either.

    Raises:
        UserError: naming what differs.
    """
    if not model.multi_scale:
        raise UserError(f"{path} has fields at a single scale: a consistency model needs those of every noise level")
    here: dict[str, Any] = {"shape of a sample": list(student.shape), "sigma_data": student.fields.sigma_data}
    its: dict[str, Any] = {"shape of a sample": list(model.shape), "sigma_data": model.fields.sigma_data}
    for what, value in here.items():
        if its[what] != value:
            raise UserError(f"{path} does not fit: its {what} is {its[what]}, here it is {value}")
    check_units(path, theirs, mine)
    first = max(one.start_scale for one in model.samplers.values())
    if first < student.sigma_max:
        raise UserError(
            f"{path} is sampled from noise level {first:g} down, the samplers here begin at {student.sigma_max:g}: "
            f"set sigma_max of every one in model.samplers to {first:g}, and levels between below it"
        )


def say_where_it_begins(student: Any, model: Any, path: str) -> None:
    """Say that a student begins below the noise level that its model, from a path, is sampled from."""
    first = max(one.start_scale for one in model.samplers.values())
    if first > student.sigma_max:
        rank_zero_info(
            f"{path} is sampled from noise level {first:g} down, and this model begins at {student.sigma_max:g}: where "
            f"{first:g} was needed, set sigma_max of every one in model.samplers to it"
        )


def begin_from(model: Generator, path: str, facts: Facts) -> None:
    """Give a model, of data with some facts, the (averaged) weights of the networks of a checkpoint.

    Raises:
        UserError: if they are those of other networks, of fields of another kind, or of another space.
    """
    other, stored = checkpoints.load(path, Generator)  # type: ignore[type-abstract]
    model.check_init(other, path, facts_of.read(stored["facts"]), facts)
    if other.fields.learned != model.fields.learned:
        raise UserError(
            f"{path} has learned {other.fields.learned}, and {model.fields.learned} are learned here: fields of one "
            "kind are set by model.parametrisation, as it is there"
        )
    known, names = facts_of.read(stored["facts"]).class_names, facts.class_names
    theirs = dict(other.fields.named_children())
    weights = {name: theirs[name].state_dict() if name in theirs else {} for name, _ in model.fields.named_children()}
    for name, part in model.fields.named_children():
        if reason := checkpoints.misfit(weights[name], part.state_dict()):
            same = other.shape == model.shape and len(known) == len(names)
            data = f"samples {list(other.shape)} of {len(known)} classes, here {list(model.shape)} of {len(names)}"
            what = f"set model.{name} as it is there" if same else f"it is of {data}"
            raise UserError(f"the {name} in {path} is another one ({reason}): {what}, or leave model.init out")
    for name, part in model.fields.named_children():
        part.load_state_dict(weights[name])
    network = model.fields.network
    others = [f"{mine} with {its}" for mine, its in zip(names, known) if mine != its]
    if others and (network.conditional or network.head_shape):
        rank_zero_info(f"classes begin with the weights of others in {path}: {', '.join(others)}")


def load(
    student: Any,
    path: str,
    own: Facts,
    guidance: float = 1.0,
    mix: Mapping[int | str, float] | None = None,
    remove: Sequence[int | str] | None = None,
    merge: Mapping[str, float] | None = None,
    calibrate: int = 0,
    labels: Sequence[int | str] | None = None,
) -> Teacher:
    """The teacher that a student, of data with its own facts, asks for; the keys are those of `predict`.

    Raises:
        UserError: as `predict` refuses these keys, and for a checkpoint that does not fit the student.
    """
    model, stored = checkpoints.load(path, Generator)  # type: ignore[type-abstract]
    facts = facts_of.read(stored["facts"])
    check_fit(student, model, path, facts, own)
    say_where_it_begins(student, model, path)
    if not model.has_score:
        raise UserError(f"{path} is a consistency model, no score to learn from: give the checkpoint it was tuned from")
    chosen = combinations.choose_labels(labels or [], facts, model)
    if guidance != 1:
        if not model.takes_labels or not student.conditional:
            raise UserError("guidance needs a teacher with classes, and network.conditional=true here")
        if not model.guidable:
            raise UserError(f"{path} cannot be guided: it was trained with label_dropout=0")
    model.guidance = Guidance(guidance, student.guidance.interval)  # from the beginning: its steps are of no chain
    if mix or remove or merge:
        if student.conditional:
            raise UserError("a mixture has no classes to be told: set model.network.conditional=false")
        if labels:
            raise UserError("labels asks for classes one by one, mix and remove for a mixture: give one of the two")
        mixture, others = combinations.combined(model, facts, path, mix, remove, merge)
        return Teacher(model, combinations.corrected(model, mixture, calibrate), others)
    if student.conditional and not model.takes_labels:
        raise UserError(f"{path} knows no classes: set model.network.conditional=false")
    if model.conditional and not model.guidable and not student.conditional:
        raise UserError(f"{path} is told the class: set model.network.conditional=true here too")
    return Teacher(model, labels=chosen if labels else ())
