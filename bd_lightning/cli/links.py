"""Links in run folders: none leads out, so that nothing outside is written over, or shown in a report.

Symbolic links, that is. A hard link is a file like any other, and nothing says where its other name is; that it has one
(`st_nlink`) is as true of every file of a backup made by hard links, so that it is no ground to refuse it. Files that
are replaced as a whole, checkpoints and config.yaml among them, leave the other name what it was.
"""

import os
from pathlib import Path

from bd_lightning.checks import UserError
from bd_lightning.cli.folders import first_process, folder_of, short


def refuse_links(folder: Path) -> None:
    """Refuse a run folder in which something leads out of it, or is neither file nor folder: it would be written to,
    or shown in a report. What W&B keeps for itself is passed over.

    Raises:
        UserError: naming the first such thing.
    """
    if first_process() and folder.is_dir():
        _refuse_links(folder, folder.resolve())


def _refuse_links(folder: Path, inside: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_symlink():
                if not Path(os.path.realpath(path)).is_relative_to(inside):
                    raise UserError(
                        f"{short(path)} is a link that leads out of its run folder, to {os.readlink(path)}, which "
                        "would be read or written instead: put the file in its place, or delete the link"
                    )
            elif entry.is_dir():
                if entry.name != "wandb":
                    _refuse_links(path, inside)
            elif not entry.is_file():
                raise UserError(f"{short(path)} is neither a file nor a folder: delete it")


def refuse_linked(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that seems to lie in a run folder, and is a link to that of another.

    Raises:
        UserError: with its real path.
    """
    seeming = Path(os.path.abspath(checkpoint)).parent.parent
    if (
        os.path.isfile(checkpoint)
        and (seeming / "config.yaml").is_file()
        and seeming.resolve() != folder_of(checkpoint)
    ):
        raise UserError(
            f"{checkpoint} is a link out of its run folder: give {Path(checkpoint).resolve()} if you mean it"
        )
