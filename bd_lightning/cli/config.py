"""Configs: composed from files and the command line.

A config is a tree of plain values. A node with a `_target_` names a class, and its other keys are that class's
arguments. Layers are applied in order, each over the one before:

1. `configs/train.yaml`, and the group files that its `defaults` name;
2. for a run that starts from a checkpoint, the config stored in it;
3. `experiment=name`, then every `--config FILE`;
4. the command line.

A layer first chooses group files (`defaults: {data: mnist}` in a file, `data=mnist` on the command line), which starts
the group afresh from its values in `train.yaml`, and then sets single values. The record of a run (`config.yaml` of its
folder) is a file whose groups are taken whole.

`build` checks a config against the signatures of its classes and turns it into objects. Torch is not imported here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd_lightning.checks import UserError, regular_file, suggest
from bd_lightning.cli import signatures
from bd_lightning.upgrade import is_record, upgrade

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
COMMANDS = ("fit", "validate", "test", "predict", "export", "average")
GROUPS = ("data", "model", "trainer", "logger", "callbacks")
TOP_LEVEL: dict[str, Any] = {
    "seed": int,
    "steps": int,
    "eval_every": int,
    "ckpt_path": str | None,
    "root": str,
    "run_id": str | None,
    "n": int,
    "labels": list[int | str] | None,
    "calls": list[int] | None,
    "likelihood": str | None,
    "mix": dict[int | str, float] | None,
    "remove": list[int | str] | None,
    "merge": dict[str, float] | None,
    "calibrate": int,
    "inpaint": str | None,
    "upscale": int | None,
    "draws": int | None,
    "images": str | None,
    "export": str | None,
    "to": str | None,
    "precision": str | None,
    "length": list[float] | None,
    "score": Literal["validate", "test"] | None,
    "trust": bool,
}
ONCE = {
    "to": "export", "precision": "export", "length": "average", "score": "average", "export": "test",
    "likelihood": "test", "inpaint": "predict", "upscale": "predict", "draws": "predict",
    "images": "predict", "labels": "predict", "mix": "predict", "remove": "predict", "merge": "predict",
    "calls": "test",
}  # fmt: skip
"""Keys that say what one command does, which no run keeps and no checkpoint says."""
NOT_KEPT = ("format", "facts", "trust")
"""Keys of a stored config that say nothing about the run: its format, its data, and what somebody trusted then."""


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


def names(group: str) -> list[str]:
    """Names of the files in a config group."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


def parse(argv: Sequence[str]) -> Request:
    """Read a command line: [command] [--config FILE …] [group=name] [key.sub=value …], `--` before keys optional.

    Raises:
        ConfigError: for words that are none of these.
    """
    request, words = Request(), list(argv)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        request.command = words.pop(0)
        if request.command not in COMMANDS:
            text = f"no command '{request.command}'.{suggest(request.command, (*COMMANDS, 'compare'))}"
            raise ConfigError(
                f"{text} A setting is written {request.command}=VALUE." if "." in request.command else text
            )
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            if word == "--config" and not words:
                raise ConfigError("--config needs the path of a YAML file")
            request.files.append(word.partition("=")[2] or words.pop(0))
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if word in (*COMMANDS, "compare"):
            raise ConfigError(f"the command comes first: train.py {word} …")
        if not equals or not key:
            raise ConfigError(f"cannot read '{word}': expected key=value, group=name or --config FILE")
        if not text.strip():  # of a variable that is not set, say
            raise ConfigError(
                f"'{key}' has no value: give it one, or leave it out ({key}=null is none, where it may have none)"
            )
        if key in (*GROUPS, "experiment"):
            request.choices[key] = text
        else:
            request.values.append((key, _parse_value(key, text)))
    return request


def _parse_value(key: str, text: str) -> Any:
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore
    except Exception as error:  # whatever the YAML reader raises, the text is at fault
        reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).partition("\n")[0]
        why = f" ({reason})" if reason else ""
        raise ConfigError(f"cannot read the value of '{key}': {text!r} is not valid YAML{why}") from error
    if isinstance(value, Mapping) and value and ": " not in text and all(one is None for one in value.values()):
        raise ConfigError(f"cannot read the value of '{key}': YAML wants a space after each colon of {text!r}")
    return value


def load(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping, interpolations left as they are.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping.
    """
    path = Path(path).expanduser()
    regular_file(path, "config file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"cannot read {path}: expected a mapping of keys to values")
    return dict(content)  # type: ignore[arg-type]


def named(group: str, name: str) -> dict[str, Any]:
    """The content of a group's file.

    Raises:
        ConfigError: with the name that may be meant, if there is none.
    """
    if name.startswith("{"):
        raise ConfigError(f"{group}= chooses a file of configs/{group}; a class is {group}._target_=module.Class")
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


def compose(request: Request, stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Put the layers together and resolve interpolations.

    Args:
        request: the command line.
        stored: the config of the checkpoint that the run starts from, in today's format.

    Returns:
        The config as plain dictionaries, lists and values.

    Raises:
        ConfigError: for missing files and names, for references to keys that do not exist, and for two batch sizes.
        UserError: for the record of a later version.
    """
    given: list[dict[str, Any]] = []
    base = load(CONFIG_DIR / "train.yaml")
    config = _choose({}, base, {key: value for key, value in base.items() if key not in GROUPS}, "train.yaml")
    if stored is not None and _interpolates(dict(stored)):
        raise ConfigError(
            "the config of the checkpoint refers to something outside it by '${': it is not one of this suite's"
        )
    if stored is not None:  # a callback that is not among the stored ones was not part of the run
        config = _repeat(config, {key: value for key, value in stored.items() if key not in ONCE})
    if "experiment" in request.choices:
        experiment = request.choices["experiment"]
        given.append(named("experiment", experiment))
        config = _choose(config, base, given[-1], f"experiment '{experiment}'")
    for path in request.files:
        layer = load(path)
        if is_record(layer):
            config = _repeat(config, upgrade(layer, path))
        else:
            upgrade(layer, path)  # refuses a later format; words of an earlier one are answered by `build.check`
            given.append(layer)
            config = _choose(config, base, {key: value for key, value in layer.items() if key != "format"}, path)
    choices = {group: name for group, name in request.choices.items() if group != "experiment"}
    config = _choose(config, base, {"defaults": choices}, "the command line")
    words: dict[str, Any] = {}
    for key, value in _classes_first(request.values):
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        words = merge(words, nested)
        if value is None and (stored is not None or not request.value("ckpt_path")):
            _refuse_unknown_callback(key, config)
        config = _choose(config, base, nested, "the command line")
    if "data" in config:
        said: Any = {}
        for layer in (*given, words):
            said = merge(said, layer.get("data") or {})
        config = {**config, "data": _rooted(config["data"], said)}
    _refuse_two_sizes(config, [*given, words])
    return _at_home(_resolved(_normalised(config)))


def _classes_first(values: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Words with each class ahead of those that say something of its node, which it would replace; later words win."""
    found: list[tuple[str, Any]] = []
    for key, value in values:
        node, _, last = key.rpartition(".")
        place = len(found)
        if last == "_target_":
            settles = [i for i, word in enumerate(found) if _settles(word, node)]
            start = settles[-1] + 1 if settles else 0
            found = found[:start] + [word for word in found[start:] if word[0] != key]
            place = next((i for i in range(start, len(found)) if _within(found[i], node)), len(found))
        found.insert(place, (key, value))
    return found


def _said(word: tuple[str, Any], node: str) -> Any:
    """What a word says of a node: a mapping of what is in it, or what takes its place; None for nothing."""
    key, value = word
    if key.startswith(f"{node}."):
        for part in reversed(key.removeprefix(f"{node}.").split(".")):
            value = {part: value}
    elif key != node:
        for part in node.removeprefix(f"{key}.").split(".") if node.startswith(f"{key}.") else [""]:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _within(word: tuple[str, Any], node: str) -> bool:
    """Whether a word says something of a node, and not of which class it is."""
    said = _said(word, node)
    return isinstance(said, dict) and "_target_" not in said


def _settles(word: tuple[str, Any], node: str) -> bool:
    """Whether a word, itself a value of a node or of one above it, says what class it is, or that it is none."""
    key, value = word
    if not f"{node}.".startswith(f"{key}."):
        return False
    return not isinstance(value, dict) or (_said(word, node) is not None and not _within(word, node))


def _takes_root(node: dict[str, Any]) -> bool:
    """Whether the class of a node has an argument `root`, as far as its source tells."""
    target = node.get("_target_")
    return isinstance(target, str) and signatures.takes(target, "root")


def _rooted(data: Any, words: Any) -> Any:
    """What a data.root that was asked for says to data sets within a data set, whose root was written out or, with
    another class, left out."""
    if not (isinstance(data, dict) and isinstance(words, dict) and "root" in words):
        return data
    found = dict(data)
    for key, value in data.items():
        if isinstance(value, dict) and ("root" in value or _takes_root(value)):
            said = words.get(key)
            own = said if isinstance(said, dict) else {}
            found[key] = _rooted({**value, "root": own.get("root", words["root"])}, {"root": words["root"], **own})
    return found


def _choose(config: dict[str, Any], base: dict[str, Any], layer: dict[str, Any], where: str) -> dict[str, Any]:
    """A config with one more layer: the files that it chooses, then its values."""
    layer = dict(layer)
    choices = layer.pop("defaults", None) or {}
    if not isinstance(choices, dict):
        raise ConfigError(f"'defaults' in {where} must be a mapping of groups to files, got {choices!r}")
    chosen = {}
    for group, name in choices.items():
        if group not in GROUPS:
            raise ConfigError(f"{where} chooses from an unknown group '{group}'.{suggest(str(group), GROUPS)}")
        chosen[group] = merge(base.get(group) or {}, named(group, str(name)))
    return merge({**config, **chosen}, layer)


def _refuse_unknown_callback(key: str, config: Mapping[str, Any]) -> None:
    """Refuse to leave out a callback that neither this config nor any of the suite's has.

    Raises:
        ConfigError: with the name that may be meant.
    """
    group, _, name = key.partition(".")
    here = config.get(group)
    if group != "callbacks" or "." in name or not isinstance(here, Mapping) or name in here:
        return
    known = {*here, *(name for file in names(group) for name in load(CONFIG_DIR / group / f"{file}.yaml"))}
    if name not in known:
        raise ConfigError(f"no callback '{name}' to leave out.{suggest(name, known)}")


def _refuse_two_sizes(config: Mapping[str, Any], given: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a batch size that is given beside, or after, an effective one, which it would follow from.

    Args:
        config: the config.
        given: what the user has set, layer by layer.

    Raises:
        ConfigError: saying what to do.
    """
    total = config["data"].get("total_batch_size") if isinstance(config.get("data"), dict) else None
    for layer in reversed(given if total is not None else []):
        data = layer.get("data")
        if isinstance(data, dict) and data.get("batch_size") is not None:
            raise ConfigError(
                f"'data.batch_size' {data['batch_size']} is not used beside 'data.total_batch_size' {total}, which is "
                "shared out over devices: leave one out (data.total_batch_size=null for the other)"
            )
        if isinstance(data, dict) and "total_batch_size" in data:
            return


def _repeat(config: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A config with that of a run over it, whose groups are taken whole."""
    return {**config, **{key: value for key, value in stored.items() if key not in NOT_KEPT}}


def _normalised(config: dict[str, Any]) -> dict[str, Any]:
    """A config with values whose meaning is plain in the form that is meant: labels=3, steps=1e3."""
    config = dict(config)
    for key, kind in TOP_LEVEL.items():
        value = config.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            config[key] = int(value)
        if key == "length":
            config[key] = _numbers(value)
        if key in ("labels", "remove", "calls") and isinstance(value, (int, str)) and not isinstance(value, bool):
            config[key] = [value]
    config["logger"] = config["logger"] or None  # so that a config repeated from its record stays without one
    if isinstance(config["steps"], int) and isinstance(config["eval_every"], int):
        config["eval_every"] = min(config["steps"], config["eval_every"])
    return config


def _numbers(value: Any) -> Any:
    """A list of numbers that was written as one, or as 0.05,0.1; what is neither is left to be refused."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        return None if value is None else [float(word) for word in words]
    except (TypeError, ValueError):
        return value


def _interpolates(node: Any) -> bool:
    """Whether a config has references left, to environment variables say; a stored one has none."""
    if isinstance(node, dict):
        return any(_interpolates(key) or _interpolates(value) for key, value in node.items())
    if isinstance(node, (list, tuple)):
        return any(map(_interpolates, node))
    return isinstance(node, str) and "${" in node


def _at_home(node: Any) -> Any:
    """A config with ~ at the beginning of paths in full, among them the keys of `merge`."""
    if isinstance(node, dict):
        return {_at_home(key): _at_home(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value) for value in node]
    return os.path.expanduser(node) if isinstance(node, str) and node.startswith("~") else node


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        full_key = getattr(error, "full_key", None)
        place = f"'{full_key}'" if full_key else "the config"
        raise ConfigError(f"cannot resolve {place}: {str(error).splitlines()[0]}") from error
