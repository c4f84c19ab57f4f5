"""The text of --help, from the config files; torch is not imported."""

import json

from bd_lightning.cli import config as configs

HELP = """Bellman Diffusion: train, evaluate and sample.

usage: train.py [COMMAND] [--config FILE ...] [GROUP=NAME ...] [KEY.SUB=VALUE ...]
       train.py compare RUN RUN ... [out=compare.html]

commands
  fit        train (the default); with ckpt_path=… resume that run in its folder
  validate   losses, samples and FID of a checkpoint on the validation split
  test       losses and FID of a checkpoint on the test split
  predict    write n samples of a checkpoint: PNG files and a grid, or the rows of a CSV file
  export     the weights of a checkpoint as a folder for others: to=FOLDER, read back by ckpt_path=FOLDER
  average    checkpoints of a run with averages of other lengths: ckpt_path=RUN length=0.05,0.1
  compare    run folders beside each other: last and best numbers, and a page of curves

groups (choose a file from configs/GROUP)
{groups}

keys (defaults; any argument of a class in the config is a key too)
{keys}

`--key=value` is accepted as well. --config FILE sets values from a YAML file; config.yaml of a run folder repeats the
run. With ckpt_path=… the config starts from the one stored in the checkpoint, which is a file, an exported folder,
hf://owner/name[@revision] or wandb://entity/project/artifact:alias.

examples
  train.py
  train.py data=mnist model=unet trainer.devices=4 trainer.strategy=ddp logger.project=mine
  train.py data=folder data.folder=~/pictures data.size=64 steps=20000
  train.py ckpt_path=runs/…/checkpoints/last.ckpt steps=2400
  train.py run_id=mine ckpt_path=last       # start, or go on if there is something to go on from
  train.py predict ckpt_path=runs/…/checkpoints/best.ckpt n=64 model.sampler=sde
"""


def help_text() -> str:
    """Commands, groups with their files, and keys with their defaults and what `train.yaml` says of them."""
    groups = [f"  {group:<11}{', '.join(configs.names(group))}" for group in (*configs.GROUPS, "experiment")]
    base, notes = configs.load(configs.CONFIG_DIR / "train.yaml"), _notes()
    keys = []
    for key in configs.TOP_LEVEL:
        word = f"{key}={json.dumps(base[key])}".replace('"', "")
        keys.append(f"  {word:<31}{notes.get(key, '')}".rstrip())
    return HELP.format(groups="\n".join(groups), keys="\n".join(keys))


def _notes() -> dict[str, str]:
    """The comment behind each key of `train.yaml`."""
    lines = (configs.CONFIG_DIR / "train.yaml").read_text().splitlines()
    return {line.partition(":")[0]: line.partition("#")[2].strip() for line in lines if "#" in line}
