"""Mixtures that have the shares of named classes that are asked for."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.fields.mixture import ROUNDING, Mixture, Source

LARGEST = 1e30
"""Weights above it are no weights that single precision could add."""
PILOTS = 500
"""Pilot samples that a network is asked for at once."""


@torch.no_grad()
def calibrated(
    mixture: Mixture, draw: Callable[[Mixture], Tensor], sigma: float = 0.1, rounds: int = 3, floor: float = 1e-4
) -> Mixture:
    """The mixture with weights corrected so that its samples have the shares that were asked for.

    With exact fields the mean of the classes' posterior is the same at every noise level, namely what was asked for.
    Errors of learned fields let it drift on the way down, mostly towards the training data's shares. Each round draws
    pilot samples, takes the mean posterior at the end, by the fields themselves, and multiplies the weights by what is
    missing. No classifier is involved.

    Args:
        mixture: what is asked for.
        draw: draws pilot samples of a mixture, shape (N, *).
        sigma: noise level at which the posterior is taken, in data units.
        rounds: how often the weights are corrected.
        floor: shares below it are not corrected.

    Returns:
        The corrected mixture.

    Raises:
        UserError: for a negative weight: the posterior is that of densities that are added.
    """
    if any((weights < 0).any() for _, weights in mixture.terms):
        raise UserError(
            "calibrate corrects the shares of densities that are added, and here one is taken away: leave calibrate out"
        )
    asked = [(weights * source.shares.to(weights)).clamp_min(0) for source, weights in mixture.terms]
    total = sum(part.sum() for part in asked)
    current = mixture
    for _ in range(rounds):
        x = draw(current)
        parts = [mixture.posterior(part, part.new_full((len(part),), sigma)) for part in x.split(PILOTS)]
        found = [torch.cat(part).mean(0) for part in zip(*parts)]
        terms = []
        for (source, weights), wanted, have in zip(current.terms, asked, found):
            wanted = (wanted / total).to(have)
            factor = torch.where((wanted > floor) & (have > floor), wanted / have.clamp_min(floor), 1.0)
            terms.append((source, weights * factor.to(weights)))
        current = Mixture(terms, mixture.mobility, mixture.floor)
    return current


def _cancel(parts: Sequence[tuple[Sequence[str], list[float], list[float]]], known: Sequence[str]) -> None:
    """Scale weights, in place, so that no class is both added and taken. Parts are names, shares and weights."""
    for name in known:
        places = [
            (weights, c, weights[c] * shares[c]) for names, shares, weights in parts for c, own in enumerate(names)
            if own == name
        ]  # fmt: skip
        plus, minus = sum(max(held, 0.0) for *_, held in places), -sum(min(held, 0.0) for *_, held in places)
        left = plus - minus
        if plus and minus:
            left = 0.0 if abs(left) <= ROUNDING * max(plus, minus) else left
            for weights, c, held in places:
                weights[c] *= max(0.0, left / plus if held > 0 else -left / minus)


def _weights(
    names: Sequence[str], shares: list[float], weight: float, mix: Mapping[str, float] | None, remove: Sequence[str]
) -> list[float]:
    """Weights of a source's classes; those in mix are already divided by the number of sources that have them."""
    found = [weight] * len(shares)
    for c, name in enumerate(names):
        if mix is not None:
            wanted = mix.get(name, 0.0)
            found[c] = wanted / shares[c] if wanted and shares[c] > 0 else 0.0
        if name in remove:
            found[c] = 0.0
    return found


def combine(
    sources: Sequence[tuple[Source, Sequence[str], float]],
    mix: Mapping[str, float] | None = None,
    remove: Sequence[str] = (),
) -> Mixture:
    """The mixture that is asked for by the names of classes.

    What has one name is one density. So a class that is added by one source and taken by another is taken from the
    former's own fields, where nothing is left of it, and not as the difference of two estimates.

    Args:
        sources: each with the names of its classes and a weight for its whole density. A source of one density, of data
            with several classes, knows none of them one by one.
        mix: weight of each class, all others zero, where sources have the weight 1; a class that several sources have
            seen is their average. None takes each source's density as it was trained.
        remove: classes whose weight becomes zero.

    Returns:
        The mixture. With a warning where a class would have a negative share, so that the sum is not a density: what is
        sampled then is its positive part. Where a source knows no classes it is not known whether one would.

    Raises:
        UserError: for unknown classes, for those that no source has seen, for one in both mix and remove, for classes
            asked of a source that knows none, and for weights that are not numbers or whose sum is not positive.
        ValueError: for another number of names than of classes, and for a name that a source has twice.
    """
    for what in [*(weight for *_, weight in sources), *(mix or {}).values()]:
        held = isinstance(what, (int, float)) and (what == 0 or 1 / LARGEST <= abs(what) <= LARGEST)
        if not held:  # by single precision
            raise UserError(
                f"weights of a mixture are numbers between {1 / LARGEST:g} and {LARGEST:g} in size, or 0, got {what}"
            )
    if mix and any(weight != 1 for *_, weight in sources):
        raise UserError("mix says the weights of all classes: give every source the weight 1")
    parts: list[tuple[Sequence[str], list[float], list[float]]] = []
    known = list(dict.fromkeys(name for _, names, _ in sources for name in names))
    for name in [*(mix or ()), *remove]:
        if name not in known:
            raise UserError(f"no class '{name}': the classes are {', '.join(known) or 'not known'}")
    if twice := [name for name in remove if (mix or {}).get(name)]:
        raise UserError(f"class '{twice[0]}' is asked for in mix and left out in remove: name it in one of them")
    learned = [source.shares.nan_to_num(0).tolist() for source, *_ in sources]
    having = [{name for name, share in zip(own, shares) if share > 0} for shares, (_, own, _) in zip(learned, sources)]
    each = {}
    for name, wanted in (mix or {}).items():
        holders = sum(name in own for own in having)
        if wanted and not holders and all(len(shares) == len(own) for shares, (_, own, _) in zip(learned, sources)):
            raise UserError(f"class '{name}' was not seen in training")
        each[name] = wanted / max(1, holders)
    for shares, (_, names, weight) in zip(learned, sources):
        if len(set(names)) < len(names):
            raise ValueError(f"a source names a class twice: {', '.join(names)}")
        own = names if len(shares) == len(names) else ()  # one density of several classes
        if len(shares) not in (1, len(names)) and names:
            raise ValueError(f"{len(names)} names for the {len(shares)} classes of a source")
        if (mix or remove) and not own:
            raise UserError(
                "a model of all its data as one density knows no class that mix or remove could ask for: train it with "
                "model.network.per_class=true on data with classes"
            )
        parts.append((own, shares, _weights(own, shares, weight, each if mix else None, remove)))
    size = sum(abs(w * share) for _, shares, weights in parts for w, share in zip(weights, shares))
    _cancel(parts, known)
    asked = dict.fromkeys(known, 0.0)
    for names, shares, weights in parts:
        for name, w, share in zip(names, weights, shares):
            asked[name] += w * share
    total = sum(w * share for _, shares, weights in parts for w, share in zip(weights, shares))
    if not total > ROUNDING * size:
        shown = 0.0 if abs(total) <= ROUNDING * size else total
        taken = ", and a class in remove has none" if remove else ""
        raise UserError(f"the weights of the mixture sum to {shown:.3g}; they must sum to a positive number{taken}")
    whole = all(names for names, *_ in parts)  # else what a class has in a source without names is not known
    for name, part in asked.items():
        if whole and part < -0.01 * total:
            warnings.warn(
                f"class '{name}' has the negative share {part / total:.3g}: that is not a density; its positive "
                "part is sampled",
                stacklevel=2,
            )
    return Mixture([(source, source.shares.new_tensor(weights)) for (source, *_), (*_, weights) in zip(sources, parts)])
