"""Images per second of a folder of image files: decoded at every use, and decoded once (`data.cache`).

    uv run benchmarks/decoding.py FOLDER [--size 64] [--n 5000] [--batches 40] [--workers 0]

Takes at most N images of the folder, by links in a folder of its own. Prints a Markdown table: batches of 128 of the
training split, shuffled, as training gets them, medians of three rounds in which both ways take turns; and the seconds
that decoding once took.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

import torch

from bd_lightning.checks import UserError
from benchmarks import common
from benchmarks.common import Turns
from benchmarks.rows import table
from datamodules import ImageFolder
from datamodules.image_files import find
from datamodules.subsets import random_subset


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=common.count, default=64)
    parser.add_argument("--n", type=common.count, default=5000)
    parser.add_argument("--batches", type=common.count, default=40)
    parser.add_argument("--workers", type=common.at_least(0), default=0)
    options = parser.parse_args()
    files = list(find(options.folder, set()))
    if len(files) < 256:
        raise UserError(f"{options.folder} has {len(files)} images, at least 256 are needed")
    with tempfile.TemporaryDirectory() as place:
        some = Path(place, "some")
        some.mkdir()
        for i, row in enumerate(random_subset(len(files), options.n)):
            (some / f"{i}{files[row].suffix}").symlink_to(files[row].resolve())
        ways = {
            name: ImageFolder(
                str(some), options.size, val_fraction=0, sigma_data=0.5, cache=cache, root=place,
                num_workers=options.workers,
            )
            for name, cache in (("decoded at every use", False), ("decoded once", True))
        }  # fmt: skip
        start = time.perf_counter()
        ways["decoded once"].prepare_data()
        once = time.perf_counter() - start
        turns = Turns(ways)
        for _ in range(3):
            for name in turns.next():
                batches = iter(itertools.islice(common.batches(ways[name], 0), options.batches + 1))
                next(batches)  # workers start
                with turns.clock(name):
                    for _ in batches:
                        pass
        images = 128 * options.batches
        lines = [[name, f"{images / turns.median(name):,.0f}"] for name in ways]
        cores = f"{torch.get_num_threads()} threads, {options.workers} workers, {os.cpu_count()} cores"
        size = sum(path.stat().st_size for path in Path(place, ".cache").glob("*decoded*")) / 2**20
        print(f"{len(ways['decoded once'].files['train'])} images to {options.size}×{options.size}; {cores}")
        print(table(["", "images/s"], lines))
        print(f"\ndecoding once took {once:.1f} s and {size:.0f} MiB; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    common.run(main)
