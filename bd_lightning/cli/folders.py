"""Run folders: <root>/<logger.project>/<run id>. A run writes in one alone, and never over another run."""

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from bd_lightning.checks import UserError, plain_name

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not POSIX: runs are not told apart
    fcntl = None

LOCK, SETTINGS = ".lock", "settings.json"
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables that launchers give the processes of a run."""
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTEMPTY),
)
"""Reasons for which a file or folder cannot be written, which a user can do something about."""


# ---- names

METRIC = re.compile(r"\{\w+(/\w+)*(:[^{}/\\]*)?\}")
"""A metric in the name of a checkpoint's file, such as {val/loss:.3f}, which may make a folder in the run's."""


def leads_elsewhere(filename: str) -> bool:
    """Whether the name of a checkpoint's file has separators beside those of metrics."""
    return any(c in METRIC.sub("", filename) for c in "/\\")


def choose_run_id(given: str | None) -> str:
    """The run's id: given, or by W&B, the cluster or the parent process, or the time and a random suffix.

    Raises:
        UserError: if it cannot be the name of a folder and of a W&B run.
    """
    launched = os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get("BD_RUN_ID")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic == "none":  # torchrun without --rdzv-id: the workers of a node share their parent
        elastic = f"{time.strftime('%Y%m%d')}-{os.getppid()}"
    run_id = launched or os.environ.get("WANDB_RUN_ID") or elastic or os.environ.get("SLURM_JOB_ID")
    run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_id = run_id if given is None else given
    _refuse_name(run_id, "run_id")
    os.environ["BD_RUN_ID"] = run_id
    return run_id


def run_folder(config: Mapping[str, Any], training: bool, root: str | None = None) -> Path:
    """The run folder that a checkpoint lies in, or that of the run id.

    Training that goes on from a checkpoint under another run id leaves the checkpoint's run as it is, and so does all
    that is asked for under another `root`.
    """
    if config["ckpt_path"] and not Path(config["ckpt_path"]).is_dir():
        folder = folder_of(config["ckpt_path"])
        branches = training and config["run_id"] not in (None, folder.name)
        branches |= root is not None and Path(root).resolve() not in folder.parents
        if (folder / "config.yaml").is_file() and not branches:
            return folder
    return new_folder(config)


def new_folder(config: Mapping[str, Any]) -> Path:
    """The folder of the run id.

    Raises:
        UserError: if the project or the run id cannot be names of a folder, and of W&B's.
    """
    logger = config["logger"] if isinstance(config["logger"], Mapping) else {}
    project = logger.get("project") or "bellman-diffusion"
    _refuse_name(project, "logger.project")
    if logger.get("entity") is not None:
        _refuse_name(logger["entity"], "logger.entity")
    folder = Path(config["root"]).resolve() / project / choose_run_id(config["run_id"])
    with writing(folder):  # a path may be too long to ask for
        folder.exists()
    return folder


def _refuse_name(name: Any, key: str) -> None:
    try:
        plain_name(**{key: name})
    except ValueError as error:
        raise UserError(f"{error}: it names a folder, and what W&B shows") from error


def folder_of(checkpoint: str | Path) -> Path:
    """The run folder that a checkpoint lies in; an exported model is a folder of its own."""
    path = Path(checkpoint).resolve()
    return path if path.is_dir() else path.parent.parent


def called(checkpoint: str | Path) -> str:
    """The name of the run or export that a checkpoint is of; its own where it lies in no run folder."""
    path = Path(checkpoint).resolve()
    return folder_of(path).name if path.is_dir() or path.parent.name == "checkpoints" else path.stem


def newest(run: str | Path) -> str:
    """The last checkpoint of a run folder; a checkpoint is given back as it is.

    Raises:
        UserError: if the folder has none.
    """
    path = Path(run) / "checkpoints" / "last.ckpt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{run} is no run folder with checkpoints/last.ckpt, and no checkpoint of one")
    return str(path)


def short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


# ---- nothing is lost


def first_process() -> bool:
    """Whether this is the process of a run that writes its folder; others share it."""
    return all((os.environ.get(name) or "0") == "0" for name in RANKS)


def refuse_existing(folder: Path) -> None:
    """Refuse to begin a run in a folder that has something in it.

    Raises:
        UserError: saying both ways on.
    """
    if first_process() and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(
            f"the run {short(folder)} is there already: give ckpt_path=last to go on with it, or another run_id"
        )


def refuse_lost_steps(folder: Path, checkpoint: Path, step: int, steps: int) -> None:
    """Refuse to go on from a checkpoint with nothing to do, or where later steps of its run would be overwritten.

    Args:
        folder: where the run is to go on.
        checkpoint: what it goes on from.
        step: the step of it.
        steps: the last step of the run.

    Raises:
        UserError: saying the ways on.
    """
    if steps < step:
        raise UserError(
            f"{checkpoint} is at step {step} and 'steps' is {steps}: nothing is left to train, give more steps"
        )
    last = folder / "checkpoints" / "last.ckpt"
    if not first_process() or not last.is_file() or last.samefile(checkpoint):
        return
    from bd_lightning import checkpoints

    try:
        reached = int(checkpoints.read(last)["global_step"])
    except UserError:  # a damaged one is no loss
        return
    if reached > step:
        raise UserError(
            f"{checkpoint} is at step {step} and its run has gone on to step {reached}: give ckpt_path={short(last)} "
            "to go on from there, or a run_id for another run that starts from this checkpoint"
        )


def finished(folder: Path, checkpoint: Mapping[str, Any], steps: int) -> bool:
    """Whether a run has done all its steps, the last validation, and what comes after it.

    Args:
        folder: the run folder; a lock that is still in it was left by a process that was killed.
        checkpoint: the checkpoint that training is to go on from.
        steps: the last step of the run.
    """
    if checkpoint["global_step"] != steps or not (folder / "checkpoints" / "last.ckpt").is_file():
        return False
    try:
        validated = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
        whole = validated["ready"] == validated["completed"] > 0
    except (KeyError, TypeError):
        return False
    return bool(whole) and not (folder / LOCK).exists()


@contextmanager
def claimed(folder: Path, new: bool) -> Iterator[None]:
    """The run folder, made if it is not there, for one run alone.

    A lock that a living process holds refuses others; the system drops it with the process, however it ends. Where the
    file system knows no locks there is none. If a run fails before it begins, a folder that was made for it is removed.

    Args:
        folder: the run folder.
        new: whether it must hold nothing yet.

    Raises:
        UserError: if another process has it, or it cannot be written.
    """
    if not first_process():
        yield
        return
    with writing(folder), made(folder, lambda: (folder / "config.yaml").is_file()), _locked(folder):
        if new:
            refuse_existing(folder)
        yield


@contextmanager
def writing(folder: Path, key: str = "root") -> Iterator[None]:
    """Says in a sentence what cannot be written inside.

    Args:
        folder: where it is written.
        key: the key of the command line that says so.

    Raises:
        UserError: with the system's reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = short(Path(os.fsdecode(error.filename))) if isinstance(error.filename, (str, bytes)) else short(folder)
        reason = os.strerror(error.errno)
        raise UserError(f"cannot write {place} ({reason}): make room there, or give {key}= another place") from error


@contextmanager
def made(folder: Path, begun: Callable[[], bool], key: str = "root") -> Iterator[None]:
    """A folder, made if it is not there, and removed again if an exception comes before anything has begun.

    Args:
        folder: the folder.
        begun: whether anything has.
        key: the key of the command line that says where it is.

    Raises:
        UserError: if it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
            reason = f"{short(file)} is a file" if file else os.strerror(error.errno or 0)
            raise UserError(f"cannot make the folder {short(folder)} ({reason}): give {key}= another place") from error
        yield
    except BaseException:
        if folder in missing and not (folder.is_dir() and begun()):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in missing[1:]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


@contextmanager
def _locked(folder: Path, leave: bool = False) -> Iterator[None]:
    """The lock of a folder; `leave` leaves its file as it was."""
    path = folder / LOCK
    with path.open("a+") as file:  # closing it gives the lock back; processes that are forked do not inherit it
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{short(folder)} is in use by {file.read().strip() or 'another process'}: "
                    "wait until it has ended, or give another run_id"
                ) from error
        if leave:
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def evaluating(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """The folder of an evaluation, made if it is not there, for one process alone; see `claimed`.

    Args:
        folder: as `folder_for` gives it.
        settings: all that its files depend on.

    Raises:
        UserError: if another process has it, or it cannot be written.
    """
    with writing(folder), made(folder, lambda: any(path.name not in (LOCK, SETTINGS) for path in folder.iterdir())):
        keep_settings(settings, folder)  # first: to the other processes the folder is either empty or this one
        with _locked(folder) if first_process() else contextlib.nullcontext():
            yield


def in_use(folder: Path) -> bool:
    """Whether a living process trains in a run folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with _locked(folder, leave=True):
            return False
    except (UserError, OSError):
        return True


def folder_for(settings: Mapping[str, Any], parent: Path, name: str) -> Path:
    """The folder, among <name>, <name>-2, <name>-3, … of a parent, that was made with these settings, or is free.

    Args:
        settings: plain values, all that the files in it depend on; `keep_settings` writes them.
        parent: where the folder lies.
        name: its name, of which 150 characters at most are taken.
    """
    name = "".join("_" if c in "/\\:" or not c.isprintable() else c for c in name)
    name = name.encode()[:150].decode(errors="ignore")
    wanted = json.loads(json.dumps(settings))
    for folder in (parent / (name if k == 1 else f"{name}-{k}") for k in itertools.count(1)):
        if not folder.is_dir() or not any(folder.iterdir()):
            return folder
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / SETTINGS).read_text()) == wanted:
                return folder
    raise AssertionError


def keep_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Write down what the files of a folder are made with, before the first of them."""
    if first_process():
        part = folder.with_name(f".{folder.name}.part")  # the folder holds all of it or nothing
        part.write_text(json.dumps(settings, indent=1))
        part.replace(folder / SETTINGS)
