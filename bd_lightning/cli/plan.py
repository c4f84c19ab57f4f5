"""From words to a plan: everything that is decided before the first object is built."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd_lightning import addresses, facts
from bd_lightning.checks import UserError
from bd_lightning.cli import build, folders, links
from bd_lightning.cli import config as configs
from bd_lightning.facts import Facts
from bd_lightning.report.comparison import flat
from bd_lightning.upgrade import FORMAT, is_record


@dataclass(frozen=True)
class Plan:
    """What a command line comes to.

    Args:
        command: "fit", "validate", "test", "predict", "export" or "average".
        config: the config, resolved and checked.
        run_dir: the run folder.
        new: whether the run begins in a folder of its own, which must not be there yet.
        checkpoint: the checkpoint that `config["ckpt_path"]` names, as `checkpoints.read` gives it.
        done: whether nothing is left to train.
        remark: what the user may not expect of the words, in a sentence; empty for nothing.
    """

    command: str
    config: Mapping[str, Any]
    run_dir: Path
    new: bool = False
    checkpoint: Mapping[str, Any] | None = None
    done: bool = False
    remark: str = ""

    @property
    def facts(self) -> Facts | None:
        """Facts of the data that the checkpoint was trained on."""
        return facts.read(self.checkpoint["hyper_parameters"]["facts"]) if self.checkpoint else None

    @property
    def step(self) -> int:
        """The step of the checkpoint; 0 without one."""
        return self.checkpoint["global_step"] if self.checkpoint else 0

    @property
    def resumed_at(self) -> int:
        """The step that training goes on from, 0 for a new run and for an evaluation, which begins anew."""
        return self.step if self.command == "fit" else 0

    @property
    def record(self) -> dict[str, Any]:
        """The config as it is kept: what repeats the run."""
        own = {**dict.fromkeys((*configs.ONCE, "ckpt_path", "run_id")), "trust": False}
        return {"format": FORMAT, **self.config, **own}


def resolve(argv: Sequence[str]) -> Plan:
    """Read a command line, and the checkpoint that it starts from.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    request = configs.parse(argv)
    if request.command in ("predict", "export") and "data" in request.choices:
        does = {"predict": "draws", "export": "writes"}[request.command]
        raise UserError(f"{request.command} {does} what the checkpoint has learned: leave data= out")
    asked = config = configs.compose(request)
    build.check_keys(config)
    if config["export"] and request.command != "test":
        raise UserError("export keeps the samples of a test: train.py test ckpt_path=… export=FILE.npz")
    for key, command in configs.ONCE.items():
        if config[key] is not None and command != request.command:
            other = ", what a run computes in is trainer.precision" if key == "precision" else ""
            raise UserError(f"'{key}' is for train.py {command}{other}")
    for key in ("n", "calibrate"):  # a run may keep them for its predictions
        if request.value(key) is not None and request.command not in ("fit", "predict"):
            more = (
                "; samples to be judged are callbacks.metrics.n_test" if (key, request.command) == ("n", "test") else ""
            )
            raise UserError(f"'{key}' is for train.py predict{more}")
    build.trusted.set(None if config["trust"] else frozenset(build.targets(config)))
    path = _existing(config) if config["ckpt_path"] == "last" else config["ckpt_path"]
    checkpoint = None
    if path:
        from bd_lightning import checkpoints

        path = folders.newest(path) if request.command == "average" else addresses.local(path)
        links.refuse_linked(path)
        checkpoint = checkpoints.read(path)
        config = configs.compose(request, checkpoint["hyper_parameters"])
        build.refuse_strangers(config, path)
        if not asked["trust"]:
            refuse_elsewhere(config, asked, path)
    elif request.command != "fit":
        raise UserError(f"{request.command} needs ckpt_path=<run folder>/checkpoints/best.ckpt")
    repeated, config["ckpt_path"] = config["ckpt_path"] == "last", path
    training, root = request.command == "fit", request.value("root")
    if path and folders.folder_of(path) != folders.run_folder(config, training, root):
        config["root"] = asked["root"]  # a stored config does not say where a new folder goes
    build.check(config)
    if config["merge"]:
        config["merge"] = addresses.each(config["merge"], str(path))
    refuse_numbers(config["trainer"])
    if request.command == "fit" and config["steps"] % config["eval_every"]:
        raise UserError(
            f"'steps' must be a multiple of 'eval_every', so that the run ends with a validation and a checkpoint; "
            f"got {config['steps']} and {config['eval_every']}"
        )
    run_dir = folders.run_folder(config, training, root)
    new = training and not repeated and (not path or folders.folder_of(path) != run_dir)
    if new:
        folders.refuse_existing(run_dir)
    links.refuse_links(run_dir)
    done = False
    if path and checkpoint and request.command == "fit":
        folders.refuse_lost_steps(run_dir, Path(path), checkpoint["global_step"], config["steps"])
        done = folders.finished(run_dir, checkpoint, config["steps"])
        if not done:
            checkpoints.refuse_stateless(checkpoint, path)
    return Plan(request.command, config, run_dir, new, checkpoint, done, dropped(request, config))


def dropped(request: configs.Request, config: Mapping[str, Any]) -> str:
    """What an experiment and files say that is not in the config, though no later word says otherwise.

    A choice of a group replaces what was said of the group before, and so does the record of a run.

    Args:
        request: the command line.
        config: what it comes to.

    Returns:
        A sentence for each of them, or "".
    """
    layers: list[tuple[str, dict[str, Any], configs.Request]] = []
    before = configs.Request(choices={key: name for key, name in request.choices.items() if key == "experiment"})
    for name in before.choices.values():
        layers.append((f"experiment={name}", configs.named("experiment", name), before))
    for path in request.files:
        before = configs.Request(files=[*before.files, path], choices=before.choices)
        layers.append((f"--config {path}", configs.load(path), before))
    said, now, found = [key for key, _ in request.values], flat(config), []
    for place, layer, upto in reversed(layers):
        try:
            then = flat(configs.compose(upto))
        except configs.ConfigError:  # it needs what comes later
            continue
        own = flat({key: value for key, value in layer.items() if key in configs.GROUPS or key in ("seed", "steps")})
        lost = {
            key: f"{key}={value}" + (f" (now {now[key]})" if key in now else "")
            for key, value in then.items()
            if key in own and value != now.get(key) and not any(_says(word, key) for word in said)
        }
        more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
        if lost:
            found.append(f"{place} is left out where it says {', '.join(list(lost.values())[:6])}{more}")
        said += [] if is_record(layer) else list(own)
    return "; ".join(reversed(found)) + (": choices of whole groups replace what is said before" if found else "")


def _says(word: str, key: str) -> bool:
    """Whether a key of a command line decides on another key: on it, something in it, or what it is in."""
    node = word.removesuffix("_target_") if word.endswith("._target_") else f"{word}."
    return word == key or key.startswith(node) or word.startswith(f"{key}.")


def settings_of(plan: Plan, *keys: str) -> dict[str, Any]:
    """All that samples or an evaluation depend on, as plain values; checkpoints by their content.

    Args:
        plan: the plan.
        keys: keys of the config beside the seed, the model, the data and the precision.
    """
    from bd_lightning.dynamics.noise import STREAMS

    config = plan.config
    files = [config["ckpt_path"], *(config["merge"] or {}), (config["data"].get("autoencoder") or {}).get("ckpt_path")]
    return {
        "checkpoints": [addresses.digest(file) for file in files if file],  # in order: names may be the same
        **{key: config[key] for key in ("seed", *keys, "model", "data")},
        "precision": config["trainer"].get("precision"),
        "noise": STREAMS,
    }


def refuse_elsewhere(config: Mapping[str, Any], asked: Mapping[str, Any], place: str) -> None:
    """Refuse a stored config that has callbacks write outside the run folder.

    Args:
        config: the config, with the stored one in it.
        asked: what the command line says without it.
        place: the checkpoint, for the message.

    Raises:
        UserError: naming the key, and how to allow it.
    """
    callbacks = config["callbacks"] if isinstance(config["callbacks"], Mapping) else {}
    for name, node in callbacks.items():
        mine = (asked["callbacks"] or {}).get(name)
        for key in ("dirpath", "filename"):
            value = node.get(key) if isinstance(node, Mapping) else None
            own = isinstance(mine, Mapping) and mine.get(key) == value
            if isinstance(value, str) and not own and (key == "dirpath" or folders.leads_elsewhere(value)):
                raise UserError(
                    f"{place} has 'callbacks.{name}.{key}' {value!r}, which leads out of the run folder: leave it out "
                    f"by callbacks.{name}.{key}=null"
                )


AT_LEAST = {
    **dict.fromkeys(("accumulate_grad_batches", "log_every_n_steps", "limit_train_batches", "limit_val_batches"), 1),
    **dict.fromkeys(("min_steps", "min_epochs", "gradient_clip_val"), 0),
}
"""Smallest numbers of `lightning.Trainer` that have a meaning; of batches, a share of one is meant by a fraction."""


LAUNCHED = ("NODE_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID")
"""Variables of which one at least is set where a run has several nodes."""


def refuse_numbers(trainer: Mapping[str, Any]) -> None:
    """Refuse what Lightning takes and that stop it later, or make it do nothing.

    Raises:
        UserError: naming the key.
    """
    for key, least in AT_LEAST.items():
        value = trainer.get(key)
        if isinstance(value, (int, float)) and not (value >= least or isinstance(value, float) and value > 0):
            raise UserError(f"'trainer.{key}' must be at least {least}, got {value}")
    devices = trainer.get("devices")
    if isinstance(devices, int) and devices > 4096:
        raise UserError(f"'trainer.devices' is the number of devices of one machine, got {devices}")
    if trainer.get("barebones"):
        raise UserError(
            "'trainer.barebones' leaves out loggers and checkpoints, which a run is made of: set it to false"
        )
    strategy = str(trainer.get("strategy"))
    if any(word in strategy for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"'trainer.strategy' is {strategy}, which copies what has been built into new processes; set "
            f"trainer.strategy={strategy.split('_')[0]}, whose processes build it themselves"
        )
    if isinstance(nodes := trainer.get("num_nodes"), int) and nodes > 1 and not any(map(os.environ.get, LAUNCHED)):
        raise UserError(
            f"'trainer.num_nodes' is {nodes}, and nothing has launched this process on several nodes: use torchrun or "
            "SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each; trainer.num_nodes=1 for this one alone"
        )
    if str(trainer.get("precision")).startswith("64"):
        raise UserError("'trainer.precision' must be 32-true or lower: data and noise are in single precision")
    if str(trainer.get("precision")) in ("16-true", "bf16-true"):
        raise UserError(
            f"'trainer.precision' must not be {trainer['precision']}: noise levels and averaged weights are lost in "
            "half precision; take bf16-mixed, whose weights are in single"
        )


def _existing(config: Mapping[str, Any]) -> str | None:
    """The last checkpoint of the run id, if it has one.

    Raises:
        UserError: if it has others alone.
    """
    folder = folders.new_folder(config) / "checkpoints"
    last = folder / "last.ckpt"
    if last.is_file():
        return str(last)
    others = sorted(path.name for path in folder.glob("*.ckpt")) if folders.first_process() else []
    if others:
        raise UserError(f"{folders.short(folder)} has no last.ckpt but {', '.join(others)}: name one with ckpt_path=")
    return None
