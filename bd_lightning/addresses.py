"""Where a checkpoint or an exported folder lies: a path, or an address of one on a hub.

`hf://owner/name[@revision]` is a repository of the Hugging Face hub, `wandb://entity/project/artifact:alias` an
artifact of Weights & Biases; their own clients fetch them, into their own caches, and use what is there when they
cannot be reached. Torch is not imported.
"""

import contextlib
import functools
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bd_lightning.checks import UserError, suggest

WEIGHTS, CONFIG, AUTOENCODER = "model.safetensors", "config.yaml", "autoencoder"
"""Names in an exported folder: the weights, the config, and the folder of the autoencoder in whose codes it learned."""
RECORDS = ("fid.json", "distances.json", "returns.json", "likelihood.json", "densities.json", "memorisation.json")
PARTS = (
    CONFIG,
    WEIGHTS,
    "README.md",
    "samples.png",
    "samples.csv",
    *RECORDS,
    f"{AUTOENCODER}/{CONFIG}",
    f"{AUTOENCODER}/{WEIGHTS}",
)
"""The files of an exported folder that are fetched; no others are."""

TIMEOUT = 20
"""Seconds that an answer of W&B is waited for."""

PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
FORMS = {
    "hf": (re.compile(rf"({PART}/{PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?"), "hf://owner/name[@revision]"),
    "wandb": (re.compile(rf"({PART})/({PART})/({PART}):({PART})"), "wandb://entity/project/artifact:alias"),
}
"""Kinds of addresses: what follows `kind://`, and how that is spelt for people."""


def local(place: str | Path) -> str:
    """The path of what an address names, fetched if it is not here yet; a path is given back as it is.

    Raises:
        UserError: for an address that is not one, does not exist or is private, and for a hub that cannot be reached.
    """
    if not str(place):
        raise UserError("a checkpoint has the empty path '': give a file, a folder or an address")
    scheme, marked, rest = str(place).partition("://")
    if not marked:
        kind, colon, _ = str(place).partition(":")
        if colon and kind in FORMS and not Path(place).exists():
            raise UserError(f"cannot read the address '{place}': it is written {FORMS[kind][1]}")
        return str(place)
    if scheme not in FORMS:
        raise UserError(f"no address '{place}': it begins with hf:// or wandb://.{suggest(scheme, FORMS)}")
    pattern, form = FORMS[scheme]
    match = pattern.fullmatch(rest)
    if match is None or ".." in rest:
        raise UserError(f"cannot read the address '{place}': it is written {form}")
    return {"hf": _hugging_face, "wandb": _wandb}[scheme](str(place), *match.groups())


def every(pattern: str, but: str) -> list[str]:
    """The paths of all checkpoints that a pattern such as experts/*/checkpoints/last.ckpt stands for, in order.

    Args:
        pattern: a pattern, a path or an address.
        but: a path that is left out of what a pattern stands for.

    Raises:
        UserError: where a pattern stands for nothing, and as `local` does.
    """
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [local(pattern)]
    found = [path for path in sorted(glob.glob(pattern)) if not Path(but).exists() or not os.path.samefile(path, but)]
    if not found:
        raise UserError(f"no checkpoint but {but} is at '{pattern}': check the pattern, or name them one by one")
    return found


def each(weights: Mapping[str, float], but: str) -> dict[str, float]:
    """The checkpoints that patterns, paths and addresses stand for (see `every`), with their weights.

    Raises:
        UserError: for a checkpoint that is named twice, and as `every` does.
    """
    found: dict[str, float] = {}
    places: set[Path] = set()
    for pattern, weight in weights.items():
        for path in every(pattern, but):
            if Path(path).resolve() in places:
                raise UserError(f"merge names {path} twice: leave it out of one of the patterns")
            places.add(Path(path).resolve())
            found[path] = weight
    return found


def weights_of(path: str | Path) -> Path:
    """The file that holds the weights of a checkpoint or an exported folder, and by whose content it is known."""
    path = Path(local(path))
    return path / WEIGHTS if path.is_dir() else path


def digest(path: str | Path) -> str:
    """What the weights of a checkpoint or an exported folder are known by: SHA-256 of their file, in hexadecimal."""
    with weights_of(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the Hugging Face hub


@functools.cache
def _hugging_face(place: str, name: str, revision: str | None) -> str:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(f"{place} needs the package huggingface_hub: uv sync --group hub") from error
    try:
        with _no_bars():
            return snapshot_download(name, revision=revision, allow_patterns=list(PARTS))
    except errors.GatedRepoError as error:
        raise UserError(f"{place} is open to some alone: ask for access on its page, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{place} does not exist, or is private: check the name, or log in with hf auth login (or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{place}: the repository has no revision '{revision or 'main'}'") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{place} is not in the local cache, and the hub cannot be reached: connect first") from error
    except Exception as error:  # whatever the network does; what has come is kept, and gone on from the next time
        raise UserError(
            f"{place} could not be fetched whole ({_said(error)}): try again, it goes on from there"
        ) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the client's progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


# ---- Weights & Biases


@functools.cache
def _wandb(place: str, entity: str, project: str, name: str, alias: str) -> str:
    try:
        import wandb
        from wandb.env import get_cache_dir
    except ImportError as error:
        raise UserError(f"{place} needs the package wandb: uv sync --group suite") from error
    base = Path(get_cache_dir()) / "bellman-diffusion" / entity / project / name
    alias_file = base / "aliases" / alias
    if re.fullmatch(r"v\d+", alias) and (base / alias).is_dir():  # a version does not change
        return str(base / alias)
    try:
        artifact = _artifact(wandb, place, f"{entity}/{project}/{name}:{alias}")
        folder = base / artifact.version
        if not folder.is_dir():
            _download(artifact, folder)
        alias_file.parent.mkdir(parents=True, exist_ok=True)
        alias_file.write_text(artifact.version)
        return str(folder)
    except UserError:
        raise
    except Exception as error:  # no answer, no key, no such artifact: the client has several kinds for each
        known = alias_file.read_text() if alias_file.is_file() else alias
        if re.fullmatch(PART, known) and (base / known).is_dir() and not _denied(error):
            return str(base / known)
        raise UserError(_refusal(place, error)) from error


def _artifact(wandb: Any, place: str, name: str) -> Any:
    """The artifact of a name; without a key nobody is asked for one."""
    if not wandb.login(prompt=False, verify=False):
        raise PermissionError("no API key")
    return wandb.Api(timeout=TIMEOUT).artifact(name)


def _download(artifact: Any, folder: Path) -> None:
    """Fetch the files of an exported folder beside their place, and move them there when all have come."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, entry in artifact.manifest.entries.items():
            if name in PARTS and entry.ref is None:  # a reference could be to any file, or any place
                artifact.get_entry(name).download(root=str(part))
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _denied(error: BaseException) -> bool:
    """Whether an answer came, and it was no."""
    said = re.sub(r"\w+://\S+", "", _said(error).lower())  # the port of an address is no status
    return bool(re.search(r"not found|permission|does not exist|\b40[134]\b", said))


def _refusal(place: str, error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return f"{place} is not in the local cache, and W&B has no key here: wandb login, or set WANDB_API_KEY"
    if _denied(error):
        return f"{place} does not exist, or is private: check its name and alias, or log in as somebody who may read it"
    return f"{place} is not in the local cache, and could not be fetched whole ({_said(error)}): try again"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
