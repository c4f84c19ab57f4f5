"""Train, evaluate and sample: python train.py --help"""

import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bd_lightning import build
from bd_lightning import config as configs
from bd_lightning.checks import UserError

HELP = """Bellman Diffusion: train, evaluate and sample.

usage: train.py [COMMAND] [--config FILE ...] [GROUP=NAME ...] [KEY.SUB=VALUE ...]

commands
  fit        train (the default); with ckpt_path=… resume that run in its folder
  validate   losses, samples and FID of a checkpoint on the validation split
  test       losses and FID of a checkpoint on the test split
  predict    write n samples of a checkpoint: PNG files and a grid, or the rows of a CSV file

groups (choose a file from configs/GROUP)
{groups}

keys (defaults; any argument of a class in the config is a key too)
{keys}

`--key=value` is accepted as well. --config FILE sets values from a YAML file; config.yaml of a run folder repeats the
run. With ckpt_path=… the config starts from the one stored in the checkpoint.

examples
  train.py
  train.py data=mnist model=unet trainer.devices=4 trainer.strategy=ddp logger.project=mine
  train.py data=folder data.folder=~/pictures data.size=64 steps=20000
  train.py ckpt_path=runs/…/checkpoints/last.ckpt steps=2400
  train.py run_id=mine ckpt_path=last       # start, or go on if there is something to go on from
  train.py predict ckpt_path=runs/…/checkpoints/best.ckpt n=64 model.sampler=sde
"""


def help_text() -> str:
    """The text of --help, from the config files; torch is not imported."""
    groups = (*configs.GROUPS, "experiment")
    lines = [f"  {group:<11}{', '.join(configs.names(group))}" for group in groups]
    base = configs.load(configs.CONFIG_DIR / "train.yaml")
    keys = [f"  {key + '=' + ('null' if base[key] is None else str(base[key])):<31}" for key in configs.TOP_LEVEL]
    notes = dict.fromkeys(configs.TOP_LEVEL, "")
    for line in (configs.CONFIG_DIR / "train.yaml").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in notes and "#" in rest:
            notes[name] = rest.partition("#")[2].strip()
    keys = [f"{row}{notes[key]}".rstrip() for row, key in zip(keys, configs.TOP_LEVEL)]
    return HELP.format(groups="\n".join(lines), keys="\n".join(keys))


def quiet() -> None:
    """Silence remarks of the libraries that a user can do nothing about."""
    import logging
    import warnings

    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*will save all extracted features in buffer.*",
        ".*LeafSpec.*",
        ".*exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*your dataloader is not resumable.*",  # its sampler asks the trainer where to go on
        ".*`IterableDataset` has `__len__` defined.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)


def choose_run_id(given: str | None) -> str:
    """The run's id: given, or by W&B, the cluster or the parent process, or the time and a random suffix."""
    launched = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("BD_RUN_ID")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic == "none":  # torchrun without --rdzv-id: the workers of a node share their parent
        elastic = f"{time.strftime('%Y%m%d')}-{os.getppid()}"
    run_id = given or launched or os.environ.get("WANDB_RUN_ID") or elastic or os.environ.get("SLURM_JOB_ID")
    run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    os.environ["BD_RUN_ID"] = run_id
    return run_id


def choose_run_dir(config: dict[str, Any]) -> Path:
    """<root>/<logger.project>/<run id>, or the run folder that a checkpoint lies in."""
    if config["ckpt_path"]:
        folder = Path(config["ckpt_path"]).resolve().parent.parent
        if (folder / "config.yaml").is_file():
            return folder
    project = (config["logger"] or {}).get("project") or "bellman-diffusion"
    return Path(config["root"]).resolve() / project / choose_run_id(config["run_id"])


def class_name(label: int | str, names: list[str]) -> str:
    """The class that a label means, given by name or by index.

    Raises:
        UserError: for a label that does not exist.
    """
    if str(label) in names:
        return str(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    raise UserError(f"no class '{label}' in this data set.{configs.suggest(str(label), names)}")


def combination(config: dict[str, Any], facts: dict[str, Any], model: Any) -> Any:
    """The mixture that mix, remove and merge ask for, or None.

    Raises:
        UserError: for models without classes, checkpoints that do not fit each other, and weights without a meaning.
    """
    from bd_lightning import checkpoints, relative

    mix, remove, merge = (config[key] or {} for key in ("mix", "remove", "merge"))
    if not (mix or remove or merge):
        return None
    if not getattr(model, "relative", False):
        raise UserError("mix, remove and merge need fields relative to a reference: train with model=relative")
    if config["labels"]:
        raise UserError("labels asks for classes one by one, mix and remove for a mixture of them: give one of the two")
    first = checkpoints.read(config["ckpt_path"])
    model.load_state_dict(first["state_dict"])
    sources = [(model.fields, facts["class_names"], 1.0)]
    for path, weight in merge.items():
        other, stored = checkpoints.load(path, type(model))
        for what, mine, theirs in (
            ("shape of a sample", list(model.shape), list(other.shape)),
            ("reference, sigma_data =", model.fields.sigma_data, other.fields.sigma_data),
            ("kernel", type(model.kernel).__name__, type(other.kernel).__name__),
            ("noise_mean and noise_std", [model.noise_mean, model.noise_std], [other.noise_mean, other.noise_std]),
            ("space (pixels, or the codes of one autoencoder)", facts.get("space"), stored["facts"].get("space")),
        ):
            if mine != theirs:
                raise UserError(f"{path} cannot be merged with {config['ckpt_path']}: {what} {theirs} against {mine}")
        sources.append((other.fields, stored["facts"]["class_names"], weight))
    names = list(dict.fromkeys(name for _, known, _ in sources for name in known))
    wanted = {class_name(label, names): weight for label, weight in mix.items()} if mix else None
    return relative.combine(sources, wanted, [class_name(label, names) for label in remove])


def build_callbacks(config: dict[str, Any], command: str, run_dir: Path) -> list[Any]:
    """Callbacks in the order they have to run: averaging after everything that looks at averaged weights."""
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

    built = []
    for name, node in (config["callbacks"] or {}).items():
        if node is None:
            continue
        cls = build.locate(node["_target_"], f"callbacks.{name}")
        saves = issubclass(cls, ModelCheckpoint)
        if command != "fit" and (saves or issubclass(cls, WeightAveraging)):
            continue
        extra = {"dirpath": str(run_dir / "checkpoints")} if saves and "dirpath" not in node else {}
        built.append(build.instantiate(node, f"callbacks.{name}", **extra))
    monitored = {c.monitor for c in built if isinstance(c, ModelCheckpoint)}
    monitored &= {"val/fid", "val/kid", "val/w2", "val/mmd"}
    if monitored and not (config["callbacks"] or {}).get("metrics"):
        raise UserError(
            f"without callbacks.metrics there is no {monitored.pop()} to choose the best checkpoint by: "
            "set callbacks.best=null too, or callbacks.best.monitor=val/loss"
        )
    return sorted(built, key=lambda callback: isinstance(callback, WeightAveraging))


def run(request: configs.Request) -> None:
    """Carry out a command line.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    config = configs.compose(request)
    stored: dict[str, Any] | None = None
    resumed_at: int | None = None
    if config["ckpt_path"] == "last":
        last = choose_run_dir({**config, "ckpt_path": None}) / "checkpoints" / "last.ckpt"
        config["ckpt_path"] = str(last) if last.is_file() else None
        request.values.append(("ckpt_path", config["ckpt_path"]))
    if config["ckpt_path"]:
        from bd_lightning import checkpoints

        checkpoint = checkpoints.read(config["ckpt_path"])
        stored = checkpoint["hyper_parameters"]
        resumed_at = checkpoint["global_step"] if request.command == "fit" else None
        config = configs.compose(request, {k: v for k, v in stored.items() if k != "facts"})
    elif request.command != "fit":
        raise UserError(f"{request.command} needs ckpt_path=<run folder>/checkpoints/best.ckpt")
    build.check(config)

    import lightning as L
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from omegaconf import OmegaConf

    from bd_lightning.checkpoints import WholeCheckpoints
    from bd_lightning.loggers import MetricsCSV, WandB

    quiet()
    gpus = torch.cuda.is_available() or torch.backends.mps.is_available()
    if config["trainer"].get("accelerator") in ("gpu", "cuda", "mps") and not gpus:
        raise UserError(
            f"'trainer.accelerator' is {config['trainer']['accelerator']}, and PyTorch finds no GPU here; "
            "set trainer=cpu, and to train choose an experiment of that size, e.g. experiment=mnist_small"
        )
    L.seed_everything(config["seed"], workers=True, verbose=False)
    run_dir = choose_run_dir(config)
    if request.command == "predict" and stored is not None:
        data, facts = None, stored["facts"]
    else:
        data = build.instantiate(config["data"], "data")
        facts = data.facts
        for name, value in (stored or {}).get("facts", {}).items():
            if facts[name] != value:
                raise UserError(
                    f"the checkpoint was trained on data with {name} {value}, this data has {facts[name]}: "
                    "leave data as it was, or start a new run"
                )
    model = build.instantiate(config["model"], "model", facts)
    if request.command == "predict":
        predict(config, facts, model, run_dir)
        return

    record = {**config, "ckpt_path": None, "run_id": None}
    model.save_hyperparameters({**record, "facts": facts})
    loggers = [MetricsCSV(run_dir, config["trainer"].get("log_every_n_steps") or 50, resumed_at)]
    if config["logger"]:
        loggers.append(build.instantiate(config["logger"], "logger", {"run_dir": run_dir}))
    callbacks = build_callbacks(config, request.command, run_dir)
    trainer = build.instantiate(
        config["trainer"],
        "trainer",
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=str(run_dir),
        max_steps=config["steps"],
        max_epochs=-1,
        val_check_interval=config["eval_every"] * config["trainer"].get("accumulate_grad_batches", 1),  # in batches
        check_val_every_n_epoch=None,
    )
    if request.command == "fit" and trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(record), run_dir / "config.yaml")
        print(f"run folder: {short(run_dir)}", flush=True)
        batch, devices, accumulated = data.batch_size, trainer.world_size, trainer.accumulate_grad_batches
        effective = f"{batch} × {devices} devices × {accumulated} accumulated = {batch * devices * accumulated}"
        print(f"effective batch: {effective}; lr_scaling={model.lr_scaling}", flush=True)
    failed = True
    try:
        if request.command == "fit":
            trainer.fit(model, datamodule=data, ckpt_path=config["ckpt_path"], weights_only=True)
        else:
            loop = trainer.validate if request.command == "validate" else trainer.test
            loop(model, datamodule=data, ckpt_path=config["ckpt_path"], weights_only=True)
        failed = False
    except SIGTERMException as stop:
        stop.code = 128 + signal.SIGTERM  # not the 0 of a run that is finished
        raise
    except MisconfigurationException as error:  # e.g. a monitor that is never logged
        raise UserError(" ".join(str(error).split())) from error
    finally:
        last = run_dir / "checkpoints" / "last.ckpt"
        if failed and trainer.is_global_zero and last.is_file():
            print(f"stopped at step {trainer.global_step}; to resume: train.py ckpt_path={short(last)}", flush=True)
        for logger in loggers:
            if isinstance(logger, WandB):
                logger.close(failed)
    if trainer.is_global_zero:
        finish(run_dir)


def predict(config: dict[str, Any], facts: dict[str, Any], model: Any, run_dir: Path) -> None:
    """Write samples to <run folder>/predict-<sampler>-seed<seed>[-<mixture>]/."""
    from torch.utils.data import DataLoader

    from callbacks import ImageWriter, TableWriter
    from datamodules import SampleRequests

    names = facts["class_names"]
    labels = [names.index(class_name(label, names)) for label in config["labels"] or []]
    if labels and not (model.conditional or getattr(model, "relative", False)):
        raise UserError("labels need a class-conditional model: train one with model.network.conditional=true")
    model.combination, model.pilot = combination(config, facts, model), config["calibrate"]
    if model.conditional and not labels:
        labels = list(range(facts["num_classes"]))
    words = [f"{label}x{weight:g}" for label, weight in (config["mix"] or {}).items()]
    words += [f"without-{label}" for label in config["remove"] or []]
    words += [
        f"{Path(path).resolve().parent.parent.name}x{weight:g}" for path, weight in (config["merge"] or {}).items()
    ]
    folder = run_dir / "-".join([f"predict-{model.sampler}-seed{config['seed']}", *words])
    progress = [c for n, c in (config["callbacks"] or {}).items() if n == "progress" and c]
    latents = build.instantiate(config["data"].get("autoencoder"), "data.autoencoder")
    if latents or len(facts["shape"]) == 3:
        writer: Any = ImageWriter(folder, latents.decode if latents else None)
    else:
        writer = TableWriter(folder, facts.get("columns"), facts.get("center"), facts.get("scale"))
    callbacks = [writer, *(build.instantiate(c, "callbacks.progress") for c in progress)]
    trainer = build.instantiate(
        config["trainer"], "trainer", logger=False, callbacks=callbacks, default_root_dir=str(run_dir)
    )
    requests = SampleRequests(config["n"], config["seed"], labels)
    loader = DataLoader(requests, batch_size=min(500, config["n"]))
    trainer.predict(model, loader, ckpt_path=config["ckpt_path"], weights_only=True, return_predictions=False)
    if trainer.is_global_zero:
        what = "images and grid.png" if isinstance(writer, ImageWriter) else "rows of samples.csv"
        print(f"{config['n']} {what} in {short(folder)}")


def short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return min(relative, str(path), key=len)


def finish(run_dir: Path) -> None:
    """Say where everything is and how to sample from it."""
    import json

    for path in (run_dir / "fid.json", run_dir / "distances.json", run_dir / "returns.json"):
        if path.is_file():
            print(json.loads(path.read_text())[-1]["summary"])
    best, last = (run_dir / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    checkpoint = best if best.is_file() else last
    print(f"everything is in {short(run_dir)}; to sample: train.py predict ckpt_path={short(checkpoint)} n=64")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(), end="")
        return 0
    try:
        run(configs.parse(argv))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
