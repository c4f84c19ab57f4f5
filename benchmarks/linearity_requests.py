"""What `linearity.py` asks for, and the models that it is asked of, trained when they are needed."""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bd_lightning import checkpoints, combinations, facts
from bd_lightning.addresses import digest
from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.fields import FieldPair, Mixture, batched, combine
from bd_lightning.modules import RelativeDensities
from bd_lightning.modules.generator import Generator
from benchmarks import common

DIGITS = [str(c) for c in range(10)]
HALVES = {"low": DIGITS[:5], "high": DIGITS[5:]}
PARTS = {"all": DIGITS, **HALVES} | {f"expert{digit}": [digit] for digit in DIGITS}
THINNED = {digit: round(0.01 ** (c / 9), 4) for c, digit in enumerate(DIGITS)}  # shares kept, from 1 to 0.01
QUIET = ["logger=none", "callbacks.progress=null", "trainer.enable_progress_bar=false", "callbacks.trajectory=null"]
UNJUDGED = ["callbacks.metrics=null", "callbacks.best=null"]


def checkpoint(options: argparse.Namespace, seed: int, name: str, *words: str) -> str:
    """The last checkpoint of a run by these words, which is trained if it is not there."""
    if name == "autoencoder" and options.autoencoder:
        return options.autoencoder
    run_id = f"{name}-{seed}-{hashlib.sha256(repr(common.contents(words)).encode()).hexdigest()[:8]}"
    own = [f"run_id={run_id}", f"seed={seed}", "ckpt_path=last"]
    own += [f"root={options.out}", f"data.root={options.data}"]
    folder = options.out / "bellman-diffusion" / run_id / "checkpoints"
    if (last := folder / "last.ckpt").exists():
        try:
            checkpoints.read(last)
        except UserError as error:
            raise UserError(f"{error}: delete it, and the model is trained anew") from error
    common.train_py(*words, *QUIET, *own)
    return str(folder / ("best.ckpt" if name == "autoencoder" else "last.ckpt"))


class Models(dict[str, Any]):
    """Models of all digits, of the halves, of thinned classes and of each digit, trained when they are asked for.

    "whole" is one of all digits that knows no classes, by the default objective, and "tuned" what it becomes when it is
    trained on, for an eighth of the steps, without 5–9.

    Args:
        options: the command line.
        seed: of the trainings; the autoencoder's is 0.

    Attributes:
        names: names of the classes.
        known: what the models that were given are known by, their weights.
        given: their fields with the names of the classes of each.

    Raises:
        UserError: for models that cannot be drawn by "sde", share a class, or know none.
    """

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed, self.names, self.known = options, seed, DIGITS, None
        self.given: list[tuple[Any, Sequence[str], float]] = []
        if options.model:
            loaded = [checkpoints.load(path, RelativeDensities) for path in options.model]
            self.given = [(one.fields, facts.read(stored["facts"]).class_names, 1.0) for one, stored in loaded]
            self["all"], self.names = loaded[0][0], [name for _, names, _ in self.given for name in names]
            if twice := {name for name in self.names if self.names.count(name) > 1}:
                raise UserError(f"--model: several have the class {min(twice)}: give models of different classes")
            identities = [combinations.identity(one, facts.read(stored["facts"])) for one, stored in loaded]
            for path, theirs in zip(options.model, identities):
                if different := combinations.misfit(identities[0], theirs):
                    raise UserError(f"--model: {path} does not fit {options.model[0]}: {different}")
            if "sde" not in (has := loaded[0][0].samplers):
                path, own = options.model[0], ", ".join(has)
                raise UserError(f"--model {path}: samples are drawn by its sampler sde, and it has {own}")
            combine(self.given, dict.fromkeys(self.names, 1.0))  # refuses those that cannot be asked for their classes
            self.config = replaced(loaded[0][1]["data"], "keep", None) if len(loaded) > 1 else loaded[0][1]["data"]
            known = [digest(path) for path in options.model]
            self.known = known[0] if len(known) == 1 else hashlib.sha256(" ".join(known).encode()).hexdigest()

    @cached_property
    def code(self) -> str:
        """The checkpoint of the autoencoder, which is trained when it is first asked for."""
        return checkpoint(self.options, 0, "autoencoder", "experiment=autoencoder")

    @cached_property
    def data(self) -> Any:
        """The data, of the models that were given, or in the autoencoder's codes."""
        if not self.given:
            words = "experiment=mnist_latent", f"data.autoencoder.ckpt_path={self.code}"
            self.config = common.compose(*words)["data"]
        return build.instantiate(replaced(self.config, "root", str(self.options.data)), "data")

    @property
    def sources(self) -> list[tuple[Any, Sequence[str], float]]:
        """What mixtures are made of: the models that were given, or that of all classes."""
        return self.given or [(self["all"].fields, self.names, 1.0)]

    def __missing__(self, name: str) -> Generator:
        if name in ("whole", "tuned"):
            self[name] = checkpoints.load(self._nameless(name), Generator)[0]  # type: ignore[type-abstract]
            return self[name]
        if name == "thin":
            keep = "{" + ", ".join(f"{digit}: {share}" for digit, share in THINNED.items()) + "}"
        else:
            keep = f"[{','.join(PARTS[name])}]"
        steps = self.options.steps // (2 if name == "thin" else 1)
        words = ["experiment=mnist_latent_relative", f"data.autoencoder.ckpt_path={self.code}"]
        words += [*UNJUDGED, *lasting(steps), f"data.images.keep={keep}"]
        words += ["model.network.width=64"] if name.startswith("expert") else []
        self[name] = checkpoints.load(checkpoint(self.options, self.seed, name, *words), RelativeDensities)[0]
        return self[name]

    def _nameless(self, name: str) -> str:
        """The checkpoint of a model without classes."""
        words = ["experiment=mnist_latent", f"data.autoencoder.ckpt_path={self.code}", *UNJUDGED]
        whole = checkpoint(self.options, self.seed, "whole", *words, *lasting(self.options.steps))
        if name == "whole":
            return whole
        words += [f"model.init={whole}", f"data.images.keep=[{','.join(HALVES['low'])}]"]
        return checkpoint(self.options, self.seed, name, *words, *lasting(self.options.steps // 8))


def lasting(steps: int) -> list[str]:
    """The words for a number of steps."""
    return [f"steps={steps}", f"eval_every={steps}"]


def replaced(node: Any, key: str, value: Any) -> Any:
    """A node of the config with another value of a key, wherever it stands: where the data lie, say."""
    if not isinstance(node, Mapping):
        return node
    return {name: value if name == key else replaced(found, key, value) for name, found in node.items()}


def requests(found: Models) -> dict[str, Callable[[], tuple[FieldPair, Tensor]]]:
    """What is asked for: fields, mostly those of a mixture, and the histogram that they should have."""
    names = found.names

    def weighted(parts: Callable[[], list[Any]], weights: Tensor | None = None) -> tuple[Mixture, Tensor]:
        weights = found["all"].fields.shares if weights is None else weights
        return combine(parts(), dict(zip(names, weights.tolist()))), weights

    def without(one_class: str) -> tuple[Mixture, Tensor]:
        shares = torch.cat([fields.shares for fields, _, _ in one()])
        left = shares * torch.tensor([name != one_class for name in names])
        return combine(one(), remove=[one_class]), left / left.sum()

    def low(fields: Callable[[], FieldPair]) -> tuple[FieldPair, Tensor]:
        left = found["all"].fields.shares * (torch.arange(10) < 5)
        return fields(), left / left.sum()

    def minus() -> Mixture:
        taken = float(found["all"].fields.shares[5:].sum())
        return combine(one()) - taken * combine([(found["high"].fields, HALVES["high"], 1.0)])

    def minus_by_name() -> Mixture:
        taken = float(found["all"].fields.shares[5:].sum())
        return combine([*one(), (found["high"].fields, HALVES["high"], -taken)])

    def merged() -> tuple[Mixture, Tensor]:
        return combine(both()), torch.cat([found[name].fields.shares for name in HALVES]) / 2

    def together(weights: Tensor | None = None) -> tuple[Mixture, Tensor]:
        mixture, wanted = weighted(experts, weights)
        return batched(mixture), wanted

    def one() -> list[Any]:
        return found.sources

    def both() -> list[Any]:
        return [(found[name].fields, digits, 1.0) for name, digits in HALVES.items()]

    def experts() -> list[Any]:
        return [(found[f"expert{digit}"].fields, [digit], 1.0) for digit in DIGITS]

    def thin() -> list[Any]:
        return [(found["thin"].fields, DIGITS, 1.0)]

    torch.manual_seed(0)
    drawn = [torch.distributions.Dirichlet(torch.full((len(names),), 0.5)).sample() for _ in range(10)]
    uniform = torch.full((10,), 0.1)
    asked: dict[str, Callable[[], tuple[FieldPair, Tensor]]] = {
        f"weighting {i}": partial(weighted, one, weights) for i, weights in enumerate(drawn)
    }
    asked |= {f"only {digit}": partial(weighted, one, row) for digit, row in zip(names, torch.eye(len(names)))}
    asked |= {f"without {digit}": partial(without, digit) for digit in names[1::3][:3]}
    if found.options.model:
        return asked
    asked |= {
        "all minus 5–9": partial(low, minus),
        "all minus 5–9, by name": partial(low, minus_by_name),
        "trained on 0–4": partial(low, lambda: combine([(found["low"].fields, HALVES["low"], 1.0)])),
        "trained on all": partial(low, lambda: found["whole"].fields),
        "trained on all, tuned to 0–4": partial(low, lambda: found["tuned"].fields),
        "merge": merged,
        "merge, uniform": partial(weighted, both, uniform),
    }
    asked |= {"union": partial(weighted, one), "ten experts": together}
    asked |= {f"experts, weighting {i}": partial(together, drawn[i]) for i in range(3)}
    asked["thinned, as trained"] = lambda: (combine(thin()), found["thin"].fields.shares)
    asked["thinned, asked for uniform"] = partial(weighted, thin, uniform)
    return asked
