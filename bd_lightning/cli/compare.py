"""compare: runs beside each other. Run folders alone are read; torch is not imported."""

import os
from collections.abc import Sequence
from pathlib import Path

from bd_lightning import addresses, report
from bd_lightning.checks import UserError, regular_file

USAGE = "compare needs two or more run folders: train.py compare RUN RUN … [out=compare.html]"


def run(words: Sequence[str]) -> None:
    """Print the last and best numbers of runs, and write a page with their curves.

    Args:
        words: run folders, exported folders or addresses of them, and `out=FILE` for the page.

    Raises:
        UserError: for a folder that is no run, a damaged file, and words that are neither.
    """
    out = "compare.html"
    folders, fetched = [], {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if key == "out" and equals:
            out = value
        elif "://" in word:
            folders.append(Path(addresses.local(word)))
            fetched[folders[-1]] = word
        elif equals and not Path(word).exists():
            raise UserError(f"cannot read '{word}': {USAGE}")
        else:
            folders.append(Path(word))
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError(USAGE if len(folders) < 2 else "compare was given the same run folder twice")
    path = Path(out)
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise UserError(f"out must be the path of an HTML file, got '{out}'")
    refuse_other(path)
    called = [fetched.get(folder, name) for folder, name in zip(folders, names(folders))]
    runs = [report.read(folder, name, folder in fetched) for folder, name in zip(folders, called)]
    print(report.compare_text(runs))
    try:
        report.write(report.compare_page(runs), path)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    print(f"\ncurves are in {out}")


def refuse_other(path: Path) -> None:
    """Refuse to write over what is no comparison.

    Raises:
        UserError: asking for another name.
    """
    if not os.path.lexists(path):
        return
    regular_file(path, "the comparison to replace")
    if path.is_symlink() or report.COMPARISON not in path.read_bytes()[:1000].decode(errors="replace"):
        raise UserError(f"{path} is there already and is no comparison of runs: give out=FILE another name")


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({one[-length:] for one in parts}) < len(parts):
        length += 1
    return ["/".join(one[-length:]) for one in parts]
