"""Configs: composed from files and the command line, checked against signatures, then turned into objects.

A config is a tree of plain values. A node with a `_target_` names a class, and its other keys are that class's
arguments. Layers are applied in order, each over the one before:

1. `configs/train.yaml`, and the group files that its `defaults` name;
2. for a run that starts from a checkpoint, the config stored in it;
3. `experiment=name`, then every `--config FILE`;
4. the command line.

A layer first chooses group files (`defaults: {data: mnist}` in a file, `data=mnist` on the command line), which starts
the group afresh from its values in `train.yaml`, and then sets single values.

Only OmegaConf is imported here; what needs torch is imported by `check` and `instantiate`.
"""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd_lightning.checks import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
COMMANDS = ("fit", "validate", "test", "predict")
GROUPS = ("data", "model", "trainer", "logger", "callbacks")
FACTS = ("shape", "num_classes", "sigma_data", "run_dir")
"""Arguments that a config leaves out: the data module knows the first three, `train.py` the last."""

OmegaConf.register_resolver("times", lambda a, b: a * b, replace=True)

TOP_LEVEL: dict[str, Any] = {
    "seed": int,
    "steps": int,
    "eval_every": int,
    "ckpt_path": str | None,
    "root": str,
    "project": str,
    "run_id": str | None,
    "n": int,
    "labels": list[int | str] | None,
}


class ConfigError(UserError):
    """A mistake in the config, said in one sentence."""


@dataclass
class Request:
    """What a command line asks for."""

    command: str = "fit"
    files: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, Any]] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """The last value given to a top-level key, or None."""
        return next((v for k, v in reversed(self.values) if k == key), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for a close match, else the choices."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def names(group: str) -> list[str]:
    """Names of the files in a config group."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


# ---- reading


def parse(argv: Sequence[str]) -> Request:
    """Read a command line: [command] [--config FILE …] [group=name] [key.sub=value …], `--` before keys optional.

    Raises:
        ConfigError: for words that are none of these.
    """
    request, words = Request(), list(argv)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        request.command = words.pop(0)
        if request.command not in COMMANDS:
            raise ConfigError(f"no command '{request.command}'.{suggest(request.command, COMMANDS)}")
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            if word == "--config" and not words:
                raise ConfigError("--config needs the path of a YAML file")
            request.files.append(word.partition("=")[2] or words.pop(0))
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read '{word}': expected key=value, group=name or --config FILE")
        if key in (*GROUPS, "experiment"):
            request.choices[key] = text
        else:
            request.values.append((key, _parse_value(key, text)))
    return request


def _parse_value(key: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except Exception as error:  # whatever the YAML reader raises, the text is at fault
        raise ConfigError(f"cannot read the value of '{key}': {text!r} is not valid YAML") from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, interpolations left as they are.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"cannot read {path}: expected a mapping of keys to values")
    return dict(content)  # type: ignore[arg-type]


def _named(group: str, name: str) -> dict[str, Any]:
    if name not in names(group):
        raise ConfigError(f"no {group} config named '{name}'.{suggest(name, names(group))}")
    return load(CONFIG_DIR / group / f"{name}.yaml")


def merge(old: Any, new: Any) -> Any:
    """Set new values over old ones, mappings key by key. A node of another class replaces the old one whole."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "_target_" in new and "_target_" in old and new["_target_"] != old["_target_"]:
        return new
    return {**old, **{key: merge(old.get(key), value) for key, value in new.items()}}


def compose(request: Request, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Put the layers together and resolve interpolations.

    Args:
        request: the command line.
        stored: the config of the checkpoint that the run starts from.

    Returns:
        The config as plain dictionaries, lists and values.

    Raises:
        ConfigError: for missing files and names, and for references to keys that do not exist.
    """
    base = load(CONFIG_DIR / "train.yaml")
    config: dict[str, Any] = {}

    def apply(layer: dict[str, Any], where: str) -> None:
        nonlocal config
        choices = layer.pop("defaults", None) or {}
        chosen = {}
        for group, name in choices.items():
            if group not in GROUPS:
                raise ConfigError(f"{where} chooses from an unknown group '{group}'.{suggest(str(group), GROUPS)}")
            chosen[group] = merge(base.get(group) or {}, _named(group, str(name)))
        config = merge({**config, **chosen}, layer)

    apply(dict(base), "train.yaml")
    if stored is not None:
        apply(dict(stored), "the checkpoint")
    if "experiment" in request.choices:
        experiment = request.choices["experiment"]
        apply(_named("experiment", experiment), f"experiment '{experiment}'")
    for path in request.files:
        apply(load(path), path)
    choices = {group: name for group, name in request.choices.items() if group != "experiment"}
    apply({"defaults": choices}, "the command line")
    for key, value in request.values:
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        apply(nested, "the command line")
    if isinstance(config["steps"], int) and isinstance(config["eval_every"], int):
        config["eval_every"] = min(config["steps"], config["eval_every"])
    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        full_key = getattr(error, "full_key", None)
        place = f"'{full_key}'" if full_key else "the config"
        raise ConfigError(f"cannot resolve {place}: {str(error).splitlines()[0]}") from error


# ---- checking


def check(config: Mapping[str, Any]) -> None:
    """Check every key and type against the signatures of the classes, before anything is built.

    Raises:
        ConfigError: naming the first key that is unknown, missing, or of the wrong type.
    """
    for key, value in config.items():
        if key not in (*TOP_LEVEL, *GROUPS):
            raise ConfigError(f"unknown key '{key}'.{suggest(key, (*TOP_LEVEL, *GROUPS))}")
        if key in TOP_LEVEL:
            _check_value(value, TOP_LEVEL[key], key)
    for key in ("steps", "eval_every", "n"):
        if config[key] < 1:
            raise ConfigError(f"'{key}' must be at least 1, got {config[key]}")
    if config["steps"] % config["eval_every"]:
        raise ConfigError(
            f"'steps' must be a multiple of 'eval_every', so that the run ends with a validation and a checkpoint; "
            f"got {config['steps']} and {config['eval_every']}"
        )
    for group in GROUPS:
        node = config.get(group)
        if group == "callbacks":
            _check_value(node, dict[str, Any] | None, group)
            for name, sub in (node or {}).items():
                if sub is not None:
                    _check_node(sub, f"{group}.{name}")
        elif node or group != "logger":
            _check_node(node, group)


def locate(path: str, key: str) -> Any:
    """Import a class by its dotted path.

    Raises:
        ConfigError: if there is no such class.
    """
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"'{key}._target_': cannot import {path!r} ({error})") from error
    if not callable(found):
        offers = [n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)]
        raise ConfigError(f"'{key}._target_': {module!r} has no class {name!r}.{suggest(name, offers)}")
    return found


def _signature(cls: Any) -> dict[str, tuple[Any, bool]]:
    """Arguments of a class: name → (type, required)."""
    parameters = inspect.signature(cls).parameters
    owner = cls.__init__ if inspect.isclass(cls) else cls
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # hints that only a type checker can resolve
        hints = {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: (hints.get(name, Any), p.default is inspect.Parameter.empty)
        for name, p in parameters.items()
        if p.kind not in variadic
    }


def _check_node(node: Any, key: str) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"'{key}' must be a mapping with a _target_, got {node!r}")
    if "_target_" not in node:
        raise ConfigError(f"'{key}' has no _target_: name the class it configures, or choose a file with {key}=name")
    cls = locate(node["_target_"], key)
    signature = _signature(cls)
    for name, value in node.items():
        if name == "_target_":
            continue
        if name not in signature:
            raise ConfigError(f"unknown key '{key}.{name}' for {cls.__name__}.{suggest(str(name), signature)}")
        _check_value(value, signature[name][0], f"{key}.{name}")
    for name, (_, required) in signature.items():
        if required and name not in node and name not in FACTS:
            raise ConfigError(f"'{key}.{name}' is missing: {cls.__name__} needs it")
    return cls


def _check_value(value: Any, hint: Any, key: str) -> None:
    if not _fits(value, hint, key):
        raise ConfigError(f"'{key}' must be {_spell(hint)}, got {value!r}")


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
        cls = _check_node(value, key)
        return hint is Any or not inspect.isclass(hint) or (inspect.isclass(cls) and issubclass(cls, hint))
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, Mapping):
        if (origin or hint) not in (dict, Mapping):
            return False
        for name, sub in value.items():
            if args:
                _check_value(sub, args[1], f"{key}.{name}")
        return True
    if isinstance(value, list):
        kind = origin or hint
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(args) == len(value) and all(_fits(v, a, key) for v, a in zip(value, args))
        if kind not in (list, tuple, Sequence, Iterable):
            return False
        return not args or all(_fits(v, args[0], key) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return inspect.isclass(hint) and isinstance(value, hint)


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


# ---- building


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
    cls = locate(node["_target_"], key)
    signature = _signature(cls)
    for name in extra:
        if name in built:
            raise ConfigError(f"'{key}.{name}' is set by train.py; leave it out")
    known = {name: value for name, value in (facts or {}).items() if name in signature and name not in built}
    try:
        return cls(**built, **known, **extra)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigError(f"'{key}' ({cls.__name__}): {' '.join(str(error).split())}") from error
