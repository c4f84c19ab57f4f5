"""Exported models: a folder with weights as numbers alone, the config that rebuilds the module, and no more.

    FOLDER/model.safetensors     the averaged weights; its metadata has the step, the precision and a checksum
           config.yaml           the config of the run and the facts of its data, without paths of the machine
           autoencoder/          the same two files of the autoencoder in whose codes the model learned, if there is one
           README.md, samples.*, fid.json …   for people: a model card, what it draws, and what was measured

`write` makes the first three, `read` gives what `checkpoints.read` gives for a checkpoint.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from bd_lightning.addresses import AUTOENCODER, CONFIG, WEIGHTS
from bd_lightning.checks import UserError, one_of, reason_of, regular_file

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What parameters can be stored in. Buffers (counts, running moments) are stored as they are."""

MACHINE = ("accelerator", "devices", "num_nodes", "strategy")
"""Keys of the trainer that say where a run was, not what it did."""
OURS = {"root": "runs", "run_id": None, "ckpt_path": None, "merge": None, "export": None, "to": None, "trust": False}
"""Keys of a config that are the command's, not the model's, and what is written instead."""


# ---- out


def write(
    folder: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    step: int,
    precision: str,
    rounded: str = "",
    codes: str = "",
) -> None:
    """Write weights and config into a folder.

    Args:
        folder: the folder, which is there.
        module: the module, with the weights that are to be written.
        config: the config of the run with the facts of its data, in today's format.
        step: the optimiser step of the weights.
        precision: "float32", "bf16" or "fp16", of the parameters.
        rounded: the coarser one that they were rounded to before, if they were.
        codes: of an autoencoder, what its codes are known by (`LatentSpace.space`), here and in other precisions.

    Raises:
        ValueError: if the precision is none, or cannot hold a weight.
        UserError: if safetensors is not installed or the disk is full.
    """
    one_of(tuple(PRECISIONS), precision=precision)
    metadata = {"format": "pt", "step": str(step), "precision": precision, "rounded": rounded or precision}
    metadata |= {"codes": codes} if codes else {}
    try:
        stored = _stored(module, precision)
        weights = _safetensors().torch.save(stored, metadata | {"sha256": checksum(stored)})
        words = OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode()
        for name, content in ((WEIGHTS, weights), (CONFIG, words)):
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {folder} ({reason_of(error)}): make room, or choose another place") from error


def _stored(module: nn.Module, precision: str) -> dict[str, Tensor]:
    """The weights of a module as they are stored.

    Raises:
        ValueError: naming the first that is not finite, or too large for the precision.
    """
    parameters = dict(module.named_parameters())
    stored = {}
    for name, value in module.state_dict().items():
        value = value.detach().cpu()
        kept = value.to(PRECISIONS[precision]) if name in parameters else value
        if name in parameters and not kept.isfinite().all():
            largest = float(value.abs().max())
            raise ValueError(f"{name} cannot be stored in {precision}: its largest entry is {largest:g}")
        stored[name] = kept.contiguous().clone()
    return stored


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values, on the CPU, in the order of the names, in hexadecimal."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {weights[name].dtype} {list(weights[name].shape)}".encode())
        found.update(weights[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what belongs to a machine: folders of paths, its devices, W&B's project, what it began with.

    A callback that is null is left out: in a stored config that is what it means.
    """
    kept = _without_folders({key: value for key, value in config.items() if key not in OURS})
    kept |= {key: value for key, value in OURS.items() if key in config}
    kept["trainer"] = {key: value for key, value in (config.get("trainer") or {}).items() if key not in MACHINE}
    kept["model"] = {key: value for key, value in kept["model"].items() if key != "init"}  # the weights have moved on
    kept["callbacks"] = {name: node for name, node in (kept.get("callbacks") or {}).items() if node is not None}
    return _with_data_root({**kept, "logger": None})


def _without_folders(node: Any) -> Any:
    """A config whose absolute paths, and those of checkpoints, have become names."""
    if isinstance(node, Mapping):
        return {key: _without_folders(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_without_folders(value) for value in node]
    if isinstance(node, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|.*[/\\].*\.ckpt$", node):
        return re.split(r"[/\\]", node.rstrip("/\\"))[-1]
    return node


def _with_data_root(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose data lie where `train.yaml` has them."""
    data = dict(config["data"])
    for node in (data, data.get("images")):
        if isinstance(node, dict) and "root" in node:
            node["root"] = "data"
    return {**config, "data": data}


# ---- in


def read(folder: str | Path) -> dict[str, Any]:
    """What a folder holds, as a checkpoint: `state_dict`, `hyper_parameters`, `global_step`, `precision`, `codes`.

    Raises:
        UserError: if a file is missing, was cut off, or is something else.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).exists():
            raise UserError(
                f"checkpoint not found: {folder} has no {name}, is no exported model or was not fetched whole; of a "
                "run take RUN/checkpoints/best.ckpt"
            )
        regular_file(folder / name, name)
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        if "sha256" in metadata and metadata["sha256"] != checksum(weights):  # earlier versions wrote none
            raise ValueError("bytes have changed: its checksum is another one")
    except Exception as error:  # the package's own kinds
        raise UserError(f"{folder / WEIGHTS} is damaged, or was cut off ({_said(error)}): fetch it again") from error
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
        step = int(metadata.get("step", "0"))
        if not isinstance(config, dict):
            raise ValueError("no mapping of keys to values")
    except Exception as error:  # whatever the YAML reader raises
        raise UserError(f"{folder / CONFIG} is damaged ({_said(error)}): fetch it again") from error
    plain = {str(key): value for key, value in config.items()}
    kept = {"state_dict": weights, "hyper_parameters": _at(folder, plain), "global_step": step}
    kept["precision"] = str(metadata.get("rounded", metadata.get("precision", "float32")))
    return {**kept, "codes": metadata.get("codes", "")}


def _at(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config whose autoencoder is the one in the folder.

    Raises:
        UserError: for an autoencoder that lies elsewhere: a folder is whole.
    """
    data = config.get("data")
    node = data.get("autoencoder") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(node, dict) or "ckpt_path" not in node:
        return config
    if node["ckpt_path"] != AUTOENCODER or (folder / AUTOENCODER).is_symlink():
        raise UserError(f"{folder / CONFIG} names an autoencoder outside its folder: it is not whole, export it again")
    return {**config, "data": {**data, "autoencoder": {**node, "ckpt_path": str(folder / AUTOENCODER)}}}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UserError("exported models need the package safetensors: uv sync, or pip install safetensors") from error
    return safetensors


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
