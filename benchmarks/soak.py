"""A long run in two processes, watched from outside: does anything grow, and is anything left behind?

    uv run benchmarks/soak.py [--steps 2000] [--every 50] [--signals 20] [key=value …]

Trains a small MLP on the 8×8 digits with `trainer=ddp_cpu`; samples, FID, checkpoints and the offline W&B run at every
validation. Resident memory and open file handles of both processes are read from /proc twice a second. The memory of
the last fifth of the run is compared with that of the fifth after the first (medians). Linux only.

With `--signals N` it is another question: is a run that is stopped N times the same as one that is not? One process
trains undisturbed; another is sent SIGINT, SIGTERM and SIGKILL in turn, at a random step of every Nth of the run, and
goes on with `ckpt_path=last` after each. Losses of every step, FIDs, weights and averages are compared at the end.
"""

import argparse
import csv
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model=mlp", "model.network.width=64", "model.network.depth=1", "model.samplers.sde.levels=8",
    "model.samplers.ode.steps=5", "data.batch_size=64", "callbacks.metrics.n=200", "callbacks.metrics.kid_subset=100",
    "callbacks.grid.n=16", "callbacks.trajectory=null", "callbacks.progress=null", "trainer=ddp_cpu",
    "trainer.enable_progress_bar=false", "run_id=soak",
]  # fmt: skip


def children(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def trains(pid: int) -> bool:
    """Whether a process is one of the run's two (and not W&B's)."""
    try:
        return "train.py" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def launch(place: Path, run_id: str, options: argparse.Namespace, words: list[str]) -> subprocess.Popen:
    """Start a run of one process, or go on with it."""
    command = [
        sys.executable, "train.py", *SMALL, "trainer=cpu", "logger=none", f"steps={options.steps}",
        f"eval_every={2 * options.every}", f"callbacks.last.every={options.every}", "trainer.log_every_n_steps=1",
        f"root={place}/runs", f"data.root={place}/data", f"run_id={run_id}", "ckpt_path=last", *words,
    ]  # fmt: skip
    log = (place / f"{run_id}.log").open("a")
    heard: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in a shell's job too
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, **heard
    )


def last_step(metrics: Path) -> int:
    """The last step in a table of metrics, whose only whole numbers are epochs and steps; 0 if there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4000))
        rows = file.read().decode(errors="ignore").splitlines()
    return max((int(cell) for cell in rows[-1].split(",") if cell.isdigit()), default=0) if rows else 0


def outcome(folder: Path) -> dict[str, Any]:
    """Losses by step, FIDs by step, and the tensors of the last checkpoint."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "losses": {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]},
        "FIDs": {row["step"]: row["val/fid"] for row in json.loads((folder / "fid.json").read_text())},
        "averages": state["state_dict"],
        "weights": state["current_model_state"],
    }


def disturbed(options: argparse.Namespace, words: list[str]) -> None:
    """Compare a run that is stopped again and again with one that is not."""
    draw, sent, steps = random.Random(0), [], []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if launch(place, "whole", options, words).wait():
            raise SystemExit((place / "whole.log").read_text()[-3000:])
        folders = [place / "runs" / "bellman-diffusion" / run_id for run_id in ("whole", "stopped")]
        spell = options.steps / options.signals
        while True:
            run = launch(place, "stopped", options, words)
            until = spell * (len(sent) + draw.random()) if len(sent) < options.signals else math.inf
            while run.poll() is None and last_step(folders[1] / "metrics.csv") < until:
                time.sleep(draw.uniform(0.0, 0.05))
            if run.poll() is None:
                number = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[len(sent) % 3]
                run.send_signal(number)
                sent.append((number.name, run.wait()))
                last = folders[1] / "checkpoints" / "last.ckpt"
                steps.append(torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0)
            elif run.returncode:
                raise SystemExit((place / "stopped.log").read_text()[-3000:])
            else:
                break
        one, other = (outcome(folder) for folder in folders)
        for what in ("losses", "FIDs", "averages", "weights"):
            mine, theirs = one[what], other[what]
            if mine.keys() != theirs.keys():
                print(f"{what}: not of the same steps or names: {len(mine)} and {len(theirs)}")
            worst = max(float(abs(mine[k] - theirs[k]).max()) if what in ("averages", "weights") else
                        abs(mine[k] - theirs[k]) for k in mine.keys() & theirs.keys())  # fmt: skip
            apart = [k for k in mine.keys() & theirs.keys() if what in ("losses", "FIDs") and mine[k] != theirs[k]]
            first = f", first at step {min(apart)}" if apart else ""
            print(f"{what}: {len(mine)} compared, largest difference {worst:g}{first}")
        counts = {kind: sum(name == kind for name, _ in sent) for kind in ("SIGINT", "SIGTERM", "SIGKILL")}
        print(f"{options.steps} steps, {len(sent)} signals: {counts}; went on from steps {steps}")


def main() -> None:
    """Run, watch, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=common.count, default=2000)
    parser.add_argument("--every", type=common.count, default=50)
    parser.add_argument("--signals", type=common.at_least(0), default=0)
    options, words = parser.parse_known_args()
    if options.signals:
        disturbed(options, words)
        return
    with tempfile.TemporaryDirectory() as place:
        temporary = Path(place) / "tmp"
        temporary.mkdir()
        command = [
            sys.executable, "train.py", *SMALL, f"steps={options.steps}", f"eval_every={options.every}",
            f"callbacks.last.every={options.every}", f"root={place}/runs", f"data.root={place}/data", *words,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        begun, rows, seen = time.time(), [], set()
        with (Path(place) / "log").open("w+") as log:
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
            while run.poll() is None:
                alive = children(run.pid)
                seen.update(alive)
                pids = [pid for pid in alive if trains(pid)]
                try:
                    if len(pids) == 2:
                        handles = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
                        rows.append((time.time() - begun, [resident(pid) for pid in pids], handles))
                except OSError:  # it has just ended
                    pass
                time.sleep(0.5)
            log.seek(0)
            text = log.read()
        if run.returncode:
            raise SystemExit(f"the run failed ({run.returncode}):\n{text[-3000:]}")
        time.sleep(5)
        folder = Path(place) / "runs" / "bellman-diffusion" / "soak"
        records = json.loads((folder / "fid.json").read_text())
        started = (folder / "config.yaml").stat().st_mtime - begun
        times = [row[0] for row in rows]
        first = started + 0.2 * (times[-1] - started)
        fifth = 0.2 * (times[-1] - started)
        print(f"{options.steps} steps, {len(records)} validations with FID, in {times[-1]:.0f} s")
        print(f"the last: {records[-1]['summary']}")
        for rank in range(2):
            early = [row[1][rank] for row in rows if first <= row[0] <= first + fifth]
            late = [row[1][rank] for row in rows if row[0] >= times[-1] - fifth]
            before, after = statistics.median(early), statistics.median(late)
            sizes = f"{before / 2**20:.0f} MiB early, {after / 2**20:.0f} MiB late"
            print(f"process {rank}: {sizes}, ratio {after / before:.3f}")
            early, late = (
                [row[2][rank] for row in rows if keep(row[0])]
                for keep in (lambda t: first <= t <= first + fifth, lambda t: t >= times[-1] - fifth)
            )
            print(f"process {rank}: at most {max(early)} open file handles early, {max(late)} late")
        left = [pid for pid in seen if Path(f"/proc/{pid}").exists()]
        parts = [str(p.relative_to(place)) for p in Path(place).rglob("*") if p.suffix == ".part"]
        print(f"left behind: processes {left}, temporary files {[p.name for p in temporary.iterdir()]}, parts {parts}")


if __name__ == "__main__":
    main()
