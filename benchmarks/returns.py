"""Fields of return distributions against C51 and QR-DQN: environment steps to a threshold, distance to true returns.

    uv run --group games benchmarks/returns.py night [--jobs 2] [--out runs/returns]     everything below but the peers
    uv run --group games benchmarks/returns.py control [--envs …] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py linear [--examples …] [--seeds 5] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py evaluate [--seeds 5] [--jobs 2] [--out runs/returns]
    uv run --group benchmarks benchmarks/returns.py peer [--script FOLDER/c51.py] [--python …] [--out runs/returns]
    uv run benchmarks/returns.py examples
    uv run benchmarks/returns.py table [--out runs/returns] [--figure docs/returns.png]

`control` trains `train.py experiment=rl_… model=returns|c51|qr_dqn`, at the common rate of 2.5e-4 and at the rate that
took each method the fewest steps on other seeds: all are tried with the same rates, and with more by factors of two
while the best is the smallest or largest. Seeds of one job are trained at once, with one batched product for each
layer; the steps are those of train.py, and `tests/test_returns.py` compares the two. `linear` is what linearity gives
in control (`benchmarks/returns_linearity.py`).

`evaluate` learns the returns of Markov reward processes and measures the 1-Wasserstein distance to 20,000 simulated
returns of each state, the mean over states, in units of the mean standard deviation of a state's return.

`peer` trains on CartPole: our QR-DQN and stable-baselines3-contrib's, our C51 and, with its script, cleanrl's as it is;
it compares the returns of the training episodes.

A job that is finished is kept in OUT/*.jsonl and not done again, so that the command can be stopped and repeated. At
most `--jobs` processes work at once, each with one thread.
"""

import argparse
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import returns_linearity
from benchmarks.common import Rows, optional, run
from benchmarks.returns_evaluation import LEARNERS, evaluate, examples
from benchmarks.returns_peer import PEERS, same_update, windows
from benchmarks.returns_tables import COMMON_RATE, ENVS, METHODS, SEEDS, TUNING_SEEDS, best_rate, beyond, table
from benchmarks.returns_training import build, learn


def work(job: tuple) -> tuple[tuple, list[dict]]:
    """The rows of one job, in a process of one thread."""
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
        env, method, rate, seeds, extra = arguments
        setting = ENVS[env]
        words = [f"experiment={env}", f"model={method}", f"model.lr={rate}", *extra]
        found = learn(words, seeds, setting.steps, setting.eval_every, stop=max(setting.thresholds))
        rows = [{"env": env, "method": method, "rate": rate, "seeds": list(seeds), "extra": list(extra), **found}]
    return job, [{**row, "wall": time.time() - start} for row in rows]


def carry_out(jobs: list[tuple], path: Path, processes: int) -> None:
    """Carry out the jobs that have no rows yet, and keep theirs as soon as they are there."""
    kept = Rows(path)
    done = {row["job"] for row in kept}
    todo = [job for job in jobs if repr(job) not in done]
    if not todo:
        return
    with get_context("spawn").Pool(processes) as pool:
        for job, rows in pool.imap_unordered(work, todo):
            for row in rows:
                kept.add(job=repr(job), **row)
            print(f"done: {job}", flush=True)


def evaluation_jobs(seeds: range) -> list[tuple]:
    """All methods everywhere; the other ways of learning fields at the longest horizon."""
    steps = 5000
    jobs = [
        ("evaluate", (rewards, gamma, learner, seeds, rate, steps))
        for gamma in (0.97, 0.95, 0.9)
        for rewards in ("continuous", "discrete")
        for learner in ("fields", "c51", "qr_dqn")
        for rate in ((1e-3, 3e-3) if (rewards, gamma) == ("continuous", 0.97) else (1e-3,))
    ]
    return jobs + [("evaluate", ("continuous", 0.97, learner, seeds, 1e-3, steps)) for learner in list(LEARNERS)[3:]]


def control(env: str, path: Path, processes: int) -> None:
    """Common rate, tuning on other seeds, tuned rates."""
    setting = ENVS[env]

    def row(method: str, rate: float, first: int) -> list[tuple]:
        count = setting.seeds if first == SEEDS else setting.tuning
        return [("control", (env, method, rate, chunk, ())) for chunk in setting.chunks(first, count)]

    jobs = [job for rate in setting.rates for method in METHODS for job in row(method, rate, TUNING_SEEDS)]
    while jobs:
        carry_out(jobs, path, processes)
        found = {method: best_rate(list(Rows(path)), env, method) for method in METHODS}
        more = {method: beyond(*best, setting) for method, best in found.items()}
        jobs = [job for method, rate in more.items() if rate is not None for job in row(method, rate, TUNING_SEEDS)]
    rates = {method: dict.fromkeys((best, COMMON_RATE)) for method, (best, _) in found.items()}
    carry_out([job for m in METHODS for rate in rates[m] for job in row(m, rate, SEEDS)], path, processes)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("night", "control", "linear", "evaluate", "peer", "examples", "table")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--script", type=Path, help="peer: cleanrl's c51.py, beside its cleanrl_utils")
    parser.add_argument("--python", default=sys.executable, help="peer: an interpreter that has what the script needs")
    parser.add_argument("--envs", nargs="+", default=list(ENVS), choices=list(ENVS))
    known = list(returns_linearity.EXAMPLES)
    parser.add_argument("--examples", nargs="+", default=known, choices=known, help="linear: which")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seeds", type=int, default=5, help="evaluate, linear: number of seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=Path("runs/returns"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.part in ("night", "control"):
        for env in options.envs:
            build([f"experiment={env}"], [0])  # a package that is missing is said now, not in the middle of the night
    if options.part in ("night", "linear"):
        jobs = [("linear", job) for job in returns_linearity.jobs(options.examples, range(options.seeds))]
        carry_out(jobs, options.out / "linear.jsonl", options.jobs)
    if options.part in ("night", "evaluate"):
        carry_out(evaluation_jobs(range(options.seeds)), options.out / "evaluate.jsonl", options.jobs)
    if options.part in ("night", "control"):
        for env in options.envs:
            control(env, options.out / "control.jsonl", options.jobs)
    if options.part == "examples":
        torch.set_num_threads(1)
        examples()
    if options.part == "peer":
        optional("sb3_contrib")
        names = list(PEERS) if options.script else [name for name in PEERS if "cleanrl" not in name]
        if options.script:
            print(
                "gradients of one update differ by {:.1e}, the largest is {:.1e}".format(*same_update(options.script))
            )
        jobs = [("peer", (name, seed, str(options.script), options.python)) for seed in range(5) for name in names]
        carry_out(jobs, options.out / "peer.jsonl", options.jobs)
    if options.part in ("night", "table"):
        table(options.out, options.figure)


if __name__ == "__main__":
    run(main)
