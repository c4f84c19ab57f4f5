"""Reading checkpoints: tensors and plain data only, with the config that rebuilds the model."""

from pathlib import Path
from typing import Any

import torch

from bd_lightning import build
from bd_lightning.checks import UserError
from bd_lightning.modules.base import Module


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project.

    Returns:
        The checkpoint; `hyper_parameters` holds the run's config and the facts of its data.

    Raises:
        UserError: if it is missing, broken, or not one of ours.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint not found: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"data", "model", "facts"} <= checkpoint["hyper_parameters"].keys():
            raise KeyError("facts")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a checkpoint of this project, or it is damaged ({reason})") from error
    return checkpoint


def load(path: str | Path, kind: type[Module] = Module) -> tuple[Any, dict[str, Any]]:
    """Build the module of a checkpoint with its (averaged) weights, frozen and in evaluation mode.

    Args:
        path: the checkpoint.
        kind: the class that the module has to be of.

    Returns:
        The module and the stored config, `facts` among it.

    Raises:
        UserError: as `read`, and for a module of another class.
    """
    checkpoint = read(path)
    stored = checkpoint["hyper_parameters"]
    module = build.instantiate(stored["model"], "model", stored["facts"])
    if not isinstance(module, kind):
        raise UserError(f"{path} holds a {type(module).__name__}; what is needed here is of class {kind.__name__}")
    module.load_state_dict(checkpoint["state_dict"])
    return module.requires_grad_(False).eval(), stored
