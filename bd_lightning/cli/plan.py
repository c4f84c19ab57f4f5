"""From words to a plan: everything that is decided before the first object is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd_lightning import facts
from bd_lightning.checks import UserError
from bd_lightning.cli import build, folders
from bd_lightning.cli import config as configs
from bd_lightning.facts import Facts
from bd_lightning.upgrade import FORMAT


@dataclass(frozen=True)
class Plan:
    """What a command line comes to.

    Args:
        command: "fit", "validate", "test" or "predict".
        config: the config, resolved and checked.
        run_dir: the run folder.
        named: classes beside the suite's own that configs of checkpoints may name; None allows any.
        checkpoint: the checkpoint that `config["ckpt_path"]` names, as `checkpoints.read` gives it.
    """

    command: str
    config: Mapping[str, Any]
    run_dir: Path
    named: frozenset[str] | None
    checkpoint: Mapping[str, Any] | None = None

    @property
    def facts(self) -> Facts | None:
        """Facts of the data that the checkpoint was trained on."""
        return facts.read(self.checkpoint["hyper_parameters"]["facts"]) if self.checkpoint else None

    @property
    def resumed_at(self) -> int | None:
        """The step that a run goes on from; None for a new one."""
        return self.checkpoint["global_step"] if self.checkpoint and self.command == "fit" else None

    @property
    def record(self) -> dict[str, Any]:
        """The config as it is kept: what repeats the run."""
        own = {"ckpt_path": None, "run_id": None, "trust": False}
        return {"format": FORMAT, **self.config, **own}


def resolve(argv: Sequence[str]) -> Plan:
    """Read a command line, and the checkpoint that it starts from.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    request = configs.parse(argv)
    config = configs.compose(request)
    build.check_keys(config)
    named = None if config["trust"] else frozenset(build.targets(config))
    path = _existing(config) if config["ckpt_path"] == "last" else config["ckpt_path"]
    checkpoint = None
    if path:
        from bd_lightning import checkpoints

        checkpoint = checkpoints.read(path)
        config = configs.compose(request, checkpoint["hyper_parameters"])
        if named is not None:
            build.refuse_strangers(config, path, named)
    elif request.command != "fit":
        raise UserError(f"{request.command} needs ckpt_path=<run folder>/checkpoints/best.ckpt")
    config["ckpt_path"] = path
    build.check(config)
    return Plan(request.command, config, folders.run_folder(config), named, checkpoint)


def _existing(config: Mapping[str, Any]) -> str | None:
    """The last checkpoint of the run id, if it has one."""
    last = folders.new_folder(config) / "checkpoints" / "last.ckpt"
    return str(last) if last.is_file() else None
