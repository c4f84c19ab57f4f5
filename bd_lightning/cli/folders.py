"""Run folders: <root>/<logger.project>/<run id>."""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def run_folder(config: Mapping[str, Any]) -> Path:
    """The run folder that a checkpoint lies in, or that of the run id."""
    if config["ckpt_path"]:
        folder = Path(config["ckpt_path"]).resolve().parent.parent
        if (folder / "config.yaml").is_file():
            return folder
    return new_folder(config)


def new_folder(config: Mapping[str, Any]) -> Path:
    """The folder of the run id."""
    project = (config["logger"] or {}).get("project") or "bellman-diffusion"
    return Path(config["root"]).resolve() / project / choose_run_id(config["run_id"])


def run_name(checkpoint: str | Path) -> str:
    """The name of the run folder that a checkpoint lies in."""
    return Path(checkpoint).resolve().parent.parent.name


def short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)
