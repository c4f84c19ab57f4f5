"""Fields of return distributions against C51: environment steps to a threshold, and distance to Monte-Carlo returns.

    uv run benchmarks/returns.py control [--envs …] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py evaluate [--seeds 5] [--jobs 2] [--out runs/returns]
    uv run benchmarks/returns.py peer --script FOLDER/c51.py [--python …] [--out runs/returns]
    uv run benchmarks/returns.py examples
    uv run benchmarks/returns.py table [--out runs/returns] [--figure docs/returns.png]

`control` trains `train.py experiment=rl_… model=returns|c51` for ten seeds, at the common rate of 2.5e-4 and at the
rate that took each method the fewest steps on five other seeds. All seeds of a row are trained at once, with one
batched product for each layer; the steps are those of train.py, and `tests/test_returns.py` compares the two.

`evaluate` learns the returns of Markov reward processes and measures the 1-Wasserstein distance to 20,000 simulated
returns of each state, the mean over states, in units of the mean standard deviation of a state's return.

`peer` trains C51 on CartPole, ours and cleanrl's script as it is, and compares the returns of the training episodes.

A row that is finished is kept in OUT/*.jsonl and not computed again, so that the command can be stopped and repeated.
"""

import argparse
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.returns_evaluation import LEARNERS, evaluate, examples
from benchmarks.returns_peer import own, peer, same_update, windows
from benchmarks.returns_tables import COMMON_RATE, ENVS, METHODS, RATES, SEEDS, TUNING_SEEDS, best_rates, read, table
from benchmarks.returns_training import learn


def work(job: tuple) -> list[dict]:
    """One row of `control`, or the rows of one `evaluate`, in a process of one thread."""
    torch.set_num_threads(1)
    kind, arguments = job
    start = time.time()
    if kind == "peer":
        name, seed, script, python = arguments
        episodes = own(seed) if name == "ours" else peer(Path(script), python, seed)
        return [{"name": name, "seed": seed, "windows": windows(episodes), "wall": time.time() - start}]
    if kind == "evaluate":
        rewards, gamma, learner, rate, steps, seeds = arguments
        return evaluate(rewards, gamma, learner, seeds, rate, steps)
    env, method, rate, seeds, extra = arguments
    thresholds, steps, eval_every = ENVS[env]
    words = [f"experiment={env}", f"model={method}", f"model.lr={rate}", *extra]
    found = learn(words, seeds, steps, eval_every, stop=max(thresholds))
    row = {"env": env, "method": method, "rate": rate, "seeds": list(seeds), "extra": list(extra)}
    return [{**row, **found, "wall": time.time() - start}]


def run(jobs: list[tuple], path: Path, processes: int) -> None:
    """Carry out the jobs that have no rows yet, and append theirs."""
    done = {row["job"] for row in read(path)}
    todo = [job for job in jobs if repr(job) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(processes) as pool, path.open("a") as file:
        for job, rows in zip(todo, pool.imap(work, todo)):
            for row in rows:
                print(json.dumps({"job": repr(job), **row}), file=file, flush=True)
            print(f"done: {job}", flush=True)


def evaluation_jobs(seeds: range) -> list[tuple]:
    """Both methods everywhere; the other ways of learning fields at the longest horizon."""
    steps = 5000
    jobs = [
        ("evaluate", (rewards, gamma, learner, rate, steps, seeds))
        for gamma in (0.97, 0.95, 0.9)
        for rewards in ("continuous", "discrete")
        for learner in ("fields", "c51")
        for rate in ((1e-3, 3e-3) if (rewards, gamma) == ("continuous", 0.97) else (1e-3,))
    ]
    return jobs + [("evaluate", ("continuous", 0.97, learner, 1e-3, steps, seeds)) for learner in list(LEARNERS)[2:]]


def control(env: str, path: Path, processes: int) -> None:
    """Common rate, tuning on other seeds, tuned rates."""
    jobs = [("control", (env, method, COMMON_RATE, SEEDS, ())) for method in METHODS]
    jobs += [("control", (env, method, rate, TUNING_SEEDS, ())) for rate in RATES[env] for method in METHODS]
    run(jobs, path, processes)
    best = best_rates(read(path), env)
    run([("control", (env, method, best[method], SEEDS, ())) for method in METHODS], path, processes)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("control", "evaluate", "peer", "examples", "table"))
    parser.add_argument("--script", type=Path, help="peer: cleanrl's c51.py, beside its cleanrl_utils")
    parser.add_argument("--python", default=sys.executable, help="peer: an interpreter that has what the script needs")
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="evaluate: number of seeds, from 0 on")
    parser.add_argument("--out", type=Path, default=Path("runs/returns"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.part == "evaluate":
        run(evaluation_jobs(range(options.seeds)), options.out / "evaluate.jsonl", options.jobs)
    elif options.part == "control":
        for env in options.envs:
            control(env, options.out / "control.jsonl", options.jobs)
    elif options.part == "examples":
        torch.set_num_threads(1)
        examples()
    elif options.part == "peer":
        names = ("ours", "cleanrl") if options.script else ("ours",)
        if options.script:
            print(
                "gradients of one update differ by {:.1e}, the largest is {:.1e}".format(*same_update(options.script))
            )
        jobs = [("peer", (name, seed, str(options.script), options.python)) for seed in range(5) for name in names]
        run(jobs, options.out / "peer.jsonl", options.jobs)
    else:
        table(options.out, options.figure)


if __name__ == "__main__":
    main()
