"""Configs checked against the signatures of the classes they name, and turned into objects.

A class can be named by `_target_` where one is expected, and nowhere else; it is of the kind that is expected there.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from bd_lightning.checks import suggest
from bd_lightning.cli import signatures
from bd_lightning.cli.config import GROUPS, TOP_LEVEL, ConfigError, names
from bd_lightning.upgrade import refuse_old

MOST_CALLS = 10_000
"""Network calls of a sampler that `test` is asked to judge at most."""
MOST_DRAWS = 1000
"""Draws of an image that `predict` takes the mean of at most."""
MOST_PILOTS = 1_000_000
"""Samples that weights of a mixture are calibrated by at most."""

FACTS = ("shape", "num_classes", "sigma_data", "actions", "v_min", "v_max", "run_dir")
"""Arguments that a config leaves out: the data module knows all but the last, `train.py` that one."""

KINDS = {
    "data": "datamodules.base.Data",
    "model": "bd_lightning.modules.base.Module",
    "trainer": "lightning.Trainer",
    "logger": "lightning.pytorch.loggers.Logger",
    "callbacks": "lightning.Callback",
}
"""What the classes of a group have to be."""

OWN = ("bd_lightning", "callbacks", "datamodules")
"""The packages of this suite."""
SHIPPED = (
    "lightning.Trainer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)
"""Classes of others that the configs of this suite name."""

PLAIN = (Any, type(None), object, dict, list, tuple, str, int, float, bool)
"""Types of plain values, where no class can be named."""


# ---- what may be named


def targets(node: Any) -> set[str]:
    """Every `_target_` of a config, at any depth."""
    if isinstance(node, list):
        return set().union(*map(targets, node))
    if not isinstance(node, Mapping):
        return set()
    own = {str(node["_target_"])} if "_target_" in node else set()
    return own.union(*map(targets, node.values()))


def strangers(node: Any) -> list[str]:
    """Every `_target_` of a config that is neither this suite's nor named by its configs."""
    return sorted(path for path in targets(node) if path.partition(".")[0] not in OWN and path not in SHIPPED)


def trust(config: Any) -> str:
    """What a command line needs more to load a checkpoint with this config: " trust=true", or nothing."""
    return " trust=true" if strangers(config) else ""


trusted: ContextVar[Collection[str] | None] = ContextVar("trusted", default=())
"""Classes beside the suite's own that stored configs may name, those that the command line names; None allows any."""


def refuse_strangers(node: Any, place: str) -> None:
    """Refuse a stored config that names a class that is not this suite's, before anything is imported.

    Args:
        node: the config, or a part of it.
        place: where it was stored, for the message.

    Raises:
        ConfigError: naming the class, and how to allow it.
    """
    named = trusted.get()
    for path in strangers(node):
        if named is not None and path not in named:
            raise ConfigError(
                f"{place} names '{path}', which is no class of this suite and could do anything: if you trust the "
                "file, name the class on the command line too, or add trust=true"
            )


# ---- checks


def check_keys(config: Mapping[str, Any]) -> None:
    """Check the keys at the top and their values; no class is imported.

    Raises:
        ConfigError: naming the first key that is unknown, of the wrong type, or out of range.
    """
    for key, value in config.items():
        if key not in (*TOP_LEVEL, *GROUPS):
            raise ConfigError(
                f"unknown key '{key}'.{suggest(str(key), (*TOP_LEVEL, *GROUPS, '--config', 'experiment'))}"
            )
        if key in TOP_LEVEL:
            _check_value(value, TOP_LEVEL[key], key)
    for key in ("steps", "eval_every", "n"):
        if config[key] < 1:
            raise ConfigError(f"'{key}' must be at least 1, got {config[key]}")
    if any(not 1 <= count <= MOST_CALLS for count in config["calls"] or ()):
        raise ConfigError(f"'calls' are numbers of network calls, from 1 to {MOST_CALLS:,}, got {config['calls']}")
    if config["upscale"] is not None and config["upscale"] < 2:
        raise ConfigError(f"'upscale' must be 2 or more, got {config['upscale']}")
    if config["draws"] is not None and not 1 <= config["draws"] <= MOST_DRAWS:
        raise ConfigError(f"'draws' must lie between 1 and {MOST_DRAWS:,}, got {config['draws']}")
    if config["likelihood"] not in (None, "ode", "fields"):
        raise ConfigError(
            f"'likelihood' is ode, by the probability flow, or fields, in one call; got {config['likelihood']!r}"
        )
    for key in ("mix", "remove", "merge"):
        if config[key] is not None and not config[key]:
            raise ConfigError(f"'{key}' is empty: name what it is for, or leave it out")
    if not 0 <= config["seed"] < 2**32:
        raise ConfigError(f"'seed' must lie between 0 and {2**32 - 1}, got {config['seed']}")
    if not 0 <= config["calibrate"] <= MOST_PILOTS:
        raise ConfigError(f"'calibrate' must lie between 0 and {MOST_PILOTS:,}, got {config['calibrate']}")


def check(config: Mapping[str, Any]) -> None:
    """Check every key and type against the signatures of the classes, before data or networks are built.

    Raises:
        ConfigError: naming the first key that is unknown, missing, of the wrong type, or out of range.
        UserError: for words of an earlier version, with their new spelling.
    """
    check_keys(config)
    refuse_old(config)
    for group in GROUPS:
        check_names(config.get(group), group)
    for group in GROUPS:
        node = config.get(group)
        if group == "callbacks":
            if node is not None and not isinstance(node, Mapping):
                raise ConfigError(f"'callbacks' must be a mapping of names to callbacks, got {node!r}")
            for name, sub in (node or {}).items():
                if sub is not None:
                    check_kind(sub, f"{group}.{name}", KINDS[group])
        elif node or group != "logger":
            check_kind(node, group, KINDS[group])
    for group in ("data", "model"):
        for name, sub in config[group].items():
            _try(sub, f"{group}.{name}")


def check_names(node: Any, key: str) -> None:
    """Refuse a misspelt key of a class whose source tells its arguments; no class is imported.

    Raises:
        ConfigError: naming the first such key.
    """
    if isinstance(node, list):
        for i, sub in enumerate(node):
            check_names(sub, f"{key}[{i}]")
    if not isinstance(node, Mapping):
        return
    path = str(node.get("_target_", ""))
    known = signatures.arguments(path)
    for name, sub in node.items():
        if known is not None and name != "_target_" and name not in known:
            raise _unknown(key, name, path.rpartition(".")[2], known)
        check_names(sub, f"{key}.{name}")


def _unknown(key: str, name: Any, owner: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"unknown key '{key}.{name}' for {owner}.{suggest(str(name), known)}")


def check_kind(node: Any, key: str, kind: str) -> None:
    """Check a node and all inside it against the signature of its class, which has to be of a kind.

    Raises:
        ConfigError: as `check`.
    """
    cls, base = _class_of(node, key), locate(kind, key)
    if not issubclass(cls, base):
        raise ConfigError(f"'{key}._target_' must be a {base.__name__}, got {node['_target_']!r}")
    _check_arguments(cls, node, key)


def _try(node: Any, key: str) -> None:
    """Build what needs no facts (kernels, samplers, densities), so that values out of range are refused at once."""
    if isinstance(node, Mapping):
        if "_target_" not in node:
            for name, sub in node.items():
                _try(sub, f"{key}.{name}")
        elif not set(FACTS) & signature_of(locate(node["_target_"], key)).keys():
            instantiate(node, key)


def locate(path: str, key: str) -> Any:
    """Import a class by its dotted path.

    Raises:
        ConfigError: if there is no such class.
    """
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ConfigError(f"'{key}._target_': {path!r} must be a whole path, as bd_lightning.optimizers.Muon is one")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a module of the user's own may do anything while it is imported
        reason = str(error) if isinstance(error, (ImportError, SyntaxError)) else repr(error)
        if isinstance(error, ModuleNotFoundError) and error.name == module and module not in OWN:
            reason += f": {module}.py has to be beside train.py, or in a folder of PYTHONPATH"
        raise ConfigError(f"'{key}._target_': cannot import {path!r} ({reason})") from error
    own = module.partition(".")[0] in OWN
    if not inspect.isclass(found) or own and found.__module__.partition(".")[0] not in OWN:
        offers = [n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)]
        raise ConfigError(f"'{key}._target_': {module!r} has no class {name!r}.{suggest(name, offers)}")
    return found


def signature_of(cls: type) -> dict[str, tuple[Any, bool]]:
    """Arguments of a class, name → (type, required); **options stands for the arguments of the class it inherits."""
    known: dict[str, tuple[Any, bool]] = {}
    for constructor in (vars(c)["__init__"] for c in cls.__mro__ if "__init__" in vars(c)):
        parameters = inspect.signature(constructor).parameters
        try:
            hints = typing.get_type_hints(constructor)
        except Exception:  # hints that only a type checker can resolve
            hints = {}
        kinds = {p.kind for p in parameters.values()}
        for name, p in parameters.items():
            if name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                known.setdefault(name, (hints.get(name, Any), p.default is p.empty))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return known


def _class_of(node: Any, key: str) -> type:
    if not isinstance(node, Mapping):
        file = f": the file configs/{key}/{node}.yaml is chosen by {key}={node} on the command line, or under defaults"
        known = key in GROUPS and node in names(key)
        raise ConfigError(f"'{key}' must be a mapping with a _target_, got {node!r}{file if known else ''}")
    if "_target_" not in node:
        raise ConfigError(f"'{key}' has no _target_: name the class it configures, or choose a file with {key}=name")
    return locate(node["_target_"], key)


def _check_arguments(cls: type, node: Mapping[str, Any], key: str) -> None:
    signature = signature_of(cls)
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in signature:
            raise _unknown(key, name, cls.__name__, signature)
        _check_value(value, signature[name][0], f"{key}.{name}")
    for name, (_, required) in signature.items():
        if required and name not in node and name not in FACTS:
            raise ConfigError(f"'{key}.{name}' is missing: {cls.__name__} needs it")


def _check_value(value: Any, hint: Any, key: str) -> None:
    if not _fits(value, hint, key):
        raise ConfigError(f"'{key}' must be {_spell(hint)}, got {value!r}{_how_to_name(hint, key)}")


def _fits(value: Any, hint: Any, key: str) -> bool:
    """Whether a plain value can be passed where a type is asked for. Nodes are checked as a whole on the way."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option, key) for option in args)
    if origin is typing.Literal:
        return value in args and type(value) in {type(a) for a in args}
    if hint is typing.Annotated or origin is typing.Annotated:
        return _fits(value, args[0], key)
    if isinstance(value, Mapping) and "_target_" in value:
        if origin is not None or not inspect.isclass(hint) or hint in PLAIN:
            return False
        cls = _class_of(value, key)
        if issubclass(cls, hint):
            _check_arguments(cls, value, key)
        return issubclass(cls, hint)
    if hint is Any:
        return not targets(value)
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, Mapping):
        if (origin or hint) not in (dict, Mapping):
            return False
        if args and not all(_fits(name, args[0], key) for name in value):
            return False
        for name, sub in value.items():
            _check_value(sub, args[1] if args else Any, f"{key}.{name}")
        return True
    if isinstance(value, list):
        kind = origin or hint
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(args) == len(value) and all(_fits(v, a, key) for v, a in zip(value, args))
        if kind not in (list, tuple, Sequence, Iterable):
            return False
        return all(_fits(v, args[0] if args else Any, key) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return inspect.isclass(hint) and isinstance(value, hint)


def _how_to_name(hint: Any, key: str) -> str:
    """How a class is named where one is asked for, with those that this package has of it, and a mapping written."""
    weighted = [kind for kind in typing.get_args(hint) if typing.get_args(kind)[1:] == (float,)]
    if weighted:
        return f": write {key}='{{NAME: 1.0}}', say"
    asked = [c for c in (typing.get_args(hint) or (hint,)) if inspect.isclass(c) and c not in (*PLAIN, Path)]
    known = [c for kind in asked for c in (kind, *kind.__subclasses__()) if c.__module__.startswith("bd_lightning.")]
    names = [f"{c.__module__}.{c.__qualname__}" for c in known if not inspect.isabstract(c)]
    return f": name it by {key}._target_, such as {', '.join(names)}" if names else ""


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spell(a) for a in args))
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if hint is type(None):
        return "null"
    if origin is not None:
        inner = ", ".join(_spell(a) for a in args if a is not Ellipsis)
        return f"{getattr(origin, '__name__', origin)} of {inner}" if inner else str(origin)
    return getattr(hint, "__name__", str(hint))


def instantiate(node: Any, key: str, facts: Mapping[str, Any] | None = None, **extra: Any) -> Any:
    """Build the object that a node describes, nodes inside it first.

    Args:
        node: a plain value, a list, a mapping, or a mapping with a `_target_`.
        key: its place in the config, for messages.
        facts: what the data module knows; given to every class that has an argument of that name and no value for it.
        extra: further arguments for the outermost class.

    Returns:
        The object; plain values are returned as they are.

    Raises:
        ConfigError: with the class's own sentence if it refuses its arguments.
    """
    if isinstance(node, list):
        return [instantiate(sub, f"{key}[{i}]", facts) for i, sub in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    built = {name: instantiate(sub, f"{key}.{name}", facts) for name, sub in node.items() if name != "_target_"}
    if "_target_" not in node:
        return built
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    cls = locate(node["_target_"], key)
    signature = signature_of(cls)
    for name in extra:
        if name in built:
            raise ConfigError(f"'{key}.{name}' is set by train.py; leave it out (steps and eval_every say how long)")
    known = {name: value for name, value in (facts or {}).items() if name in signature and name not in built}
    lacking = [name for name, (_, required) in signature.items() if required and name in FACTS]
    lacking = [name for name in lacking if name not in {*built, *known, *extra}]
    if lacking:
        raise ConfigError(f"'{key}' ({cls.__name__}) needs {' and '.join(lacking)}, which this data does not have")
    try:
        return cls(**built, **known, **extra)
    except (
        ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError, MisconfigurationException,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        if isinstance(error, MemoryError) or "can't allocate memory" in reason:
            reason = "it asks for more memory than this machine has: make it, or the data it is for, smaller"
        raise ConfigError(f"'{key}' ({cls.__name__}): {reason}") from error
