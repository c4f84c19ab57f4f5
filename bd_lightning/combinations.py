"""What mix, remove, merge and labels ask of trained models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bd_lightning import checkpoints, fields
from bd_lightning import facts as facts_of
from bd_lightning.checks import UserError, suggest
from bd_lightning.facts import Facts

PILOT_SEED = 2**32
"""Seed of the samples that weights of mixtures are corrected by, one that no user can give."""


def class_name(label: int | str, names: Sequence[str]) -> str:
    """The class that a label means, given by name or by index. Where names are numbers, a number is a name.

    Raises:
        UserError: for a label that does not exist.
    """
    if str(label) in names:
        return str(label)
    numbers = any(name.isdecimal() for name in names)
    if isinstance(label, int) and 0 <= label < len(names) and not numbers:
        return names[label]
    if not names:
        raise UserError(f"this data set has no classes, so '{label}' is none of them: leave classes out")
    known = f" The classes are {', '.join(names)}." if numbers else suggest(str(label), names)
    raise UserError(f"no class '{label}' was learned.{known}")


def choose_labels(asked: Sequence[int | str], facts: Facts, model: Any) -> list[int]:
    """Indices of the classes that are asked for; all of them in turn for a conditional model that is asked for none.

    Raises:
        UserError: for classes that do not exist, and for models that do not know any.
    """
    labels = [facts.class_names.index(class_name(label, facts.class_names)) for label in asked]
    if labels and not model.takes_labels:
        raise UserError("labels need a class-conditional model: train one with model.network.conditional=true")
    if unknown := [facts.class_names[label] for label in labels if label not in model.drawn_classes]:
        known = ", ".join(facts.class_names[label] for label in model.drawn_classes)
        raise UserError(f"class {unknown[0]} was not learned: this model was asked for {known} alone")
    return labels or (model.drawn_classes if model.conditional else [])


def identity(model: Any, facts: Facts) -> dict[str, Any]:
    """What has to agree for two models to be merged."""
    return {**model.mixture_identity(), **facts.units}


def misfit(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What does not agree of two identities, with both values; empty if all does."""
    other = [f"{what} {value} against {mine[what]}" for what, value in theirs.items() if value != mine[what]]
    return other[0] if other else ""


def combined(
    model: Any,
    facts: Facts,
    path: str,
    mix: Mapping[int | str, float] | None = None,
    remove: Sequence[int | str] | None = None,
    merge: Mapping[str, float] | None = None,
) -> tuple[fields.Mixture, list[Any]]:
    """The mixture that is asked for, and the further models that it takes fields of.

    Args:
        model: the model of the checkpoint at `path`.
        facts: facts of the data that it was trained on.
        path: that checkpoint, for messages.
        mix: weights of classes.
        remove: classes to leave out.
        merge: further checkpoints and their weights.

    Raises:
        UserError: for models without classes, checkpoints that do not fit each other, and weights without a meaning.
    """
    sources = [(model.mixture_source(), facts.class_names, 1.0)]
    if mix and any(weight != 1 for weight in (merge or {}).values()):
        raise UserError(
            "mix says the weights of all classes, of merged models too: give the models in merge the weight 1"
        )
    if model.guidance.acts:
        raise UserError("guidance goes from all the data towards a class, a mixture has none: add model.guidance=1")
    mine, others = identity(model, facts), []
    networks = [checkpoints.read(path)["hyper_parameters"]["model"]["network"]]
    for other_path, weight in (merge or {}).items():
        other, stored = checkpoints.load(other_path, type(model))
        its = facts_of.read(stored["facts"])
        if different := misfit(mine, identity(other, its)):
            raise UserError(f"{other_path} cannot be merged with {path}: {different}")
        others.append(other)
        networks.append(stored["model"]["network"])
        sources.append((other.mixture_source(), its.class_names, weight))
    names = list(dict.fromkeys(name for _, known, _ in sources for name in known))
    weights: dict[str, float] = {}
    for label, weight in (mix or {}).items():
        if (name := class_name(label, names)) in weights:
            raise UserError(f"mix names class '{name}' twice, by its name and by its index: leave one of them out")
        weights[name] = weight
    removed = [class_name(label, names) for label in remove or []]
    if again := [name for name in removed if removed.count(name) > 1]:
        raise UserError(f"remove names class '{again[0]}' twice: leave one of them out")
    mixture = fields.combine(sources, weights or None, removed)
    alike = all(network == networks[0] for network in networks) and not any(
        checkpoints.misfit(source.state_dict(), sources[0][0].state_dict()) for source, _, _ in sources
    )
    return fields.batched(mixture) if others and alike else mixture, others


def corrected(model: Any, mixture: fields.Mixture, pilot: int) -> fields.Mixture:
    """A mixture, its weights corrected by so many pilot samples (see `fields.calibrated`); 0 leaves them.

    Args:
        model: the model whose sampler draws.
        mixture: what is asked for.
        pilot: number of samples.
    """
    if not pilot:
        return mixture
    parts = torch.arange(pilot).split(fields.shares.PILOTS)

    def draw(one: fields.Mixture) -> torch.Tensor:
        return torch.cat([model.sample(part.tolist(), seed=PILOT_SEED, fields=one) for part in parts])

    return fields.calibrated(mixture, draw)
