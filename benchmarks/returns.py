"""Fields of return distributions against C51 and QR-DQN: environment steps to a threshold, distance to true returns.

    uv run --group games benchmarks/returns.py night [--jobs 2] [--out runs/returns]   all below but peers and examples
    uv run --group games benchmarks/returns.py night --smoke       a rehearsal of it, in OUT/smoke
    uv run --group games benchmarks/returns.py control [--envs …] [--only …] [--rates …] [--seeds …] [--out …]
    uv run benchmarks/returns.py linear [--examples …] [--seeds 5] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py evaluate [--seeds 5] [--jobs 2] [--out runs/returns]
    uv run --group benchmarks benchmarks/returns.py peer [--script FOLDER/c51.py] [--python …] [--out runs/returns]
    uv run benchmarks/returns.py examples
    uv run benchmarks/returns.py table [--out runs/returns] [--figure docs/returns.png]

`control` trains `train.py experiment=rl_…` with the representations of model=returns, returns_positive, c51 and qr_dqn
(--only some of them), at the common rate of 2.5e-4 and at the rate that took each method the fewest steps on other
seeds: all are tried with the same rates, and with more by factors of two while the best is the smallest or largest
(with --rates, with these alone). Seeds of one job are trained at once, with one batched product for each layer; the
steps are those of train.py, and `tests/test_returns_benchmark.py` compares the two. `linear` is what
linearity gives in control (`benchmarks/returns_linearity.py`).

`evaluate` learns the returns of Markov reward processes and measures the 1-Wasserstein distance to 20,000 simulated
returns of each state, the mean over states, in units of the mean standard deviation of a state's return.

`peer` trains on CartPole: our QR-DQN and stable-baselines3-contrib's, our C51 and, with its script, cleanrl's as it is;
it compares the returns of the training episodes.

A line of OUT/*.jsonl is a finished job with all its rows, which is not done again, so that the command can be stopped
and repeated; a job that was cut short leaves nothing and is done anew. At most `--jobs` processes work at once, each
with one thread; with one it is this one. `table` takes the same --envs, --rates, --seeds and --smoke as the
runs of `control`.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from bd_lightning.checks import UserError, regular_file, suggest
from benchmarks import arguments, returns_linearity
from benchmarks.common import Work, optional, parser, run, workers
from benchmarks.returns_evaluation import LEARNERS, evaluate, examples
from benchmarks.returns_peer import PEERS, same_update, windows
from benchmarks.returns_tables import (
    COMMON_RATE,
    ENVS,
    METHODS,
    SEEDS,
    TUNING_SEEDS,
    Setting,
    best_rate,
    beyond,
    finished,
    table,
)
from benchmarks.returns_training import build, learn, words_of
from benchmarks.rows import Rows, sound

SMOKE = 20
"""Optimiser steps of a training in a rehearsal."""
RUNS = ("night", "control", "table")
READ = {
    "smoke": ("night", "control", "linear", "evaluate", "peer", "table"), "script": ("peer",), "python": ("peer",),
    "envs": RUNS, "examples": ("night", "linear"), "rates": RUNS, "only": ("night", "control"),
    "jobs": ("night", "control", "linear", "evaluate", "peer"), "figure": ("night", "table"),
    "seeds": ("night", "control", "linear", "evaluate", "peer", "table"),
    "out": ("night", "control", "linear", "evaluate", "peer", "table"),
}  # fmt: skip
"""The parts that read an option."""
USUAL = {
    "envs": list(ENVS), "examples": list(returns_linearity.EXAMPLES), "only": list(METHODS), "jobs": 2,
    "python": sys.executable, "out": Path("runs/returns"),
}  # fmt: skip
"""What options are where they are not given."""


def work(job: tuple) -> tuple[tuple, list[dict], float]:
    """The job, its rows and the seconds that it took, with one thread."""
    torch.set_num_threads(1)
    kind, arguments = job
    start = time.time()
    if kind == "peer":
        name, seed, script, python = arguments
        episodes = PEERS[name](seed, Path(script), python)
        rows = [{"name": name, "seed": seed, "windows": windows(episodes)}]
    elif kind == "evaluate":
        rows = evaluate(*arguments)
    elif kind == "linear":
        rows = returns_linearity.example(*arguments)
    else:
        env, method, rate, seeds, steps, eval_every = arguments
        found = learn(words_of(env, method, rate), seeds, steps, eval_every, stop=max(ENVS[env].thresholds))
        rows = [{"env": env, "method": method, "rate": rate, "seeds": list(seeds), **found}]
    return job, rows, time.time() - start


def carry_out(jobs: list[tuple], path: Path, do: Work) -> None:
    """Carry out the jobs that are not in the file yet, and keep each as soon as it is finished."""
    finished(path)  # refuses a file of another format before anything is done
    kept = Rows(path)
    done = {row["job"] for row in kept}
    todo = [job for job in jobs if repr(job) not in done]
    left = len(todo)
    try:
        for job, rows, seconds in do(work, todo):
            kept.add(job=repr(job), seconds=seconds, rows=rows)
            left -= 1
            print(f"done: {job}, {left} left in {path}", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(jobs) - left} of {len(jobs)} jobs of {path} are finished and kept; the same command does the others"
        ) from None


def evaluation_jobs(seeds: range, smoke: bool) -> list[tuple]:
    """All methods everywhere; the other ways of learning fields at the longest horizon."""
    steps, simulated, gammas = (SMOKE, 500, (0.9,)) if smoke else (5000, 20_000, (0.97, 0.95, 0.9))
    longest = gammas[0]
    jobs = [
        ("evaluate", (rewards, gamma, learner, seeds, rate, steps, simulated))
        for gamma in gammas
        for rewards in ("continuous", "discrete")
        for learner in ("fields", "positive fields", "c51", "qr_dqn")
        for rate in ((1e-3, 3e-3) if (rewards, gamma) == ("continuous", longest) else (1e-3,))
    ]
    others = list(LEARNERS)[4:]
    return jobs + [("evaluate", ("continuous", longest, other, seeds, 1e-3, steps, simulated)) for other in others]


def control(setting: Setting, path: Path, do: Work, methods: Iterable[str] = METHODS) -> None:
    """Common rate, tuning on other seeds, tuned rates."""

    def row(method: str, rate: float, first: int) -> list[tuple]:
        count = setting.seeds if first == SEEDS else setting.tuning
        chunks = setting.chunks(first, count)
        return [("control", (setting.name, method, rate, c, setting.steps, setting.eval_every)) for c in chunks]

    jobs = [job for rate in setting.rates for method in methods for job in row(method, rate, TUNING_SEEDS)]
    while jobs:
        carry_out(jobs, path, do)
        with sound(path):
            found = {method: best_rate(finished(path), setting, method) for method in methods}
        more = {method: beyond(*best, setting) for method, best in found.items()}
        jobs = [job for method, rate in more.items() if rate is not None for job in row(method, rate, TUNING_SEEDS)]
    rates = {method: dict.fromkeys((best, COMMON_RATE)) for method, (best, _) in found.items()}
    carry_out([job for m in methods for rate in rates[m] for job in row(m, rate, SEEDS)], path, do)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be run.

    Raises:
        UserError: in one sentence.
    """
    known_of = {"envs": list(ENVS), "examples": list(returns_linearity.EXAMPLES), "only": list(METHODS)}
    for name, known in known_of.items():
        for one in getattr(options, name):
            if one not in known:
                raise UserError(f"--{name}: there is no {one!r}.{suggest(one, known)}")
    for name in ("jobs", "seeds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for rate in options.rates or []:
        if not 0 < rate < 1:
            raise UserError(f"--rates must lie between 0 and 1, got {rate:g}")
    if options.script:
        regular_file(options.script, "cleanrl's c51.py")
        if not shutil.which(options.python):
            raise UserError(f"--python {options.python} is no program that runs: give an interpreter's path")
        options.python = os.path.abspath(shutil.which(options.python))  # it is run beside the script
    try:
        arguments.folder(str(options.out))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--out: {error}") from error


def asked(options: argparse.Namespace) -> list[Setting]:
    """The settings of `control`, with the seeds and rates that were asked for, or as in a rehearsal."""
    settings = [ENVS[name] for name in dict.fromkeys(options.envs)]
    if options.smoke:
        settings = [replace(s, steps=SMOKE, eval_every=SMOKE // 2, rates=(1e-3,), wider=0) for s in settings]
    if options.rates:
        settings = [replace(s, rates=tuple(sorted(set(options.rates))), wider=0) for s in settings]
    if options.seeds:
        settings = [replace(s, seeds=options.seeds, tuning=min(s.tuning, options.seeds)) for s in settings]
    return settings


def main() -> None:
    """Run and print."""
    words = parser(__doc__)
    parts = ("night", "control", "linear", "evaluate", "peer", "examples", "table")
    words.add_argument("part", choices=parts)
    rehearsal = f"{SMOKE} optimiser steps, one seed, one rate: a rehearsal"
    words.add_argument("--smoke", action="store_true", default=None, help=rehearsal)
    words.add_argument("--script", type=Path, help="peer: cleanrl's c51.py, beside its cleanrl_utils")
    words.add_argument("--python", help="peer: an interpreter that has what the script needs")
    words.add_argument("--envs", nargs="+", help=f"control: which of {', '.join(ENVS)}")
    words.add_argument("--examples", nargs="+", help=f"linear: which of {', '.join(returns_linearity.EXAMPLES)}")
    words.add_argument("--rates", nargs="+", type=float, help="control: the rates that all methods are tried with")
    words.add_argument("--only", nargs="+", help=f"control: which of {', '.join(METHODS)}")
    words.add_argument("--jobs", type=int, help="processes, of one thread each; 2 if left out")
    words.add_argument(
        "--seeds", type=int, help="seeds from 0 on; 5, but for control, where experiments have their own"
    )
    words.add_argument("--out", type=Path, help="runs/returns if left out")
    words.add_argument("--figure", type=arguments.picture(".png", ".jpg", ".pdf", ".svg"))
    options = words.parse_args()
    given = {name: value for name, value in vars(options).items() if name in READ and value is not None}
    if unread := [f"--{name}" for name in given if options.part not in READ[name]]:
        readers = ", ".join(READ[unread[0][2:]])
        words.error(f"{options.part} does not read {', '.join(unread)} ({readers} would): leave it out")
    vars(options).update(USUAL | given)
    check(options)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.smoke:
        options.seeds, options.out = 1, options.out / "smoke"
    settings, seeds = asked(options), range(options.seeds or 5)
    if options.part == "examples":
        torch.set_num_threads(1)
        examples()
        return
    if options.part in ("night", "control"):
        for setting in settings:
            build([f"experiment={setting.name}"], [0])  # a package that is missing is said now, not in the night
    if options.part == "peer":
        optional("sb3_contrib")
        if options.script:
            print(
                "gradients of one update differ by {:.1e}, the largest is {:.1e}".format(*same_update(options.script))
            )
    if options.part != "table":
        with workers(options.jobs) as do:
            carry_out_parts(options, settings, seeds, do)
    if options.part in ("night", "table"):
        table(options.out, settings, options.figure)


def carry_out_parts(options: argparse.Namespace, settings: list[Setting], seeds: range, do: Work) -> None:
    """The jobs of the part that was asked for, or of all but the peers'."""
    if options.part in ("night", "linear"):
        jobs = returns_linearity.jobs(options.examples, seeds, SMOKE if options.smoke else None)
        carry_out([("linear", job) for job in jobs], options.out / "linear.jsonl", do)
    if options.part in ("night", "evaluate"):
        carry_out(evaluation_jobs(seeds, options.smoke), options.out / "evaluate.jsonl", do)
    if options.part in ("night", "control"):
        for setting in settings:
            control(setting, options.out / "control.jsonl", do, dict.fromkeys(options.only))
    if options.part == "peer":
        names = list(PEERS) if options.script else [name for name in PEERS if "cleanrl" not in name]
        jobs = [("peer", (name, seed, str(options.script), options.python)) for seed in seeds for name in names]
        carry_out(jobs, options.out / "peer.jsonl", do)


if __name__ == "__main__":
    run(main)
