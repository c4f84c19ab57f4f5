"""Checkpoints that are damaged or doctored: each is refused by one sentence, or is good enough to sample from.

    uv run python -m tests.fuzz_checkpoints [-n 200]

Mutations of the checkpoints of format 1 in tests/checkpoints, and of the same in today's format, drawn from a seed that
is the file's name: cut short, bytes changed, values of the config and the facts replaced or left out, strangers named,
other weights, other formats. Each goes through `train.main predict`; an autoencoder is loaded as data modules load it.
A fault is a traceback, more or less than one sentence, a call of a stranger, or a file outside the folder of runs.
"""

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import train
from bd_lightning.latents import TrainedLatents
from bd_lightning.upgrade import upgrade

ROOT = Path(__file__).resolve().parent.parent
V1 = ROOT / "tests" / "checkpoints" / "v1"
KINDS = ("cut", "bytes", "value", "missing", "stranger", "weights", "format", "part")
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), "", "banana", "../../x", "${oc.env:HOME}", "~", [],
    [1, "a"], {}, {"a": 1},
    {1: 2}, {"_target_": "datamodules.Digits"}, 10**30, "x" * 300, torch.zeros(3), b"bytes", (1, 2), {None: 1},
]  # fmt: skip
TARGETS = [
    "os.system",
    "subprocess.Popen",
    "faults.Stranger",
    "builtins.eval",
    "torch.load",
    "datamodules.Digits",
    ".",
    "",
]


def shipped() -> list[str]:
    """Names of the checkpoints that are changed."""
    return sorted(path.stem for path in V1.glob("*.ckpt"))


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Every place of plain data, mappings and lists among them."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in pairs for place in ((*path, key), *places(value, (*path, key)))]


def put(node: Any, path: tuple, value: Any) -> Any:
    """A copy of plain data with another value at a place; `put` itself as the value leaves the place out."""
    copied = dict(node) if isinstance(node, dict) else list(node)
    if len(path) > 1:
        copied[path[0]] = put(copied[path[0]], path[1:], value)
    elif value is put:
        del copied[path[0]]
    else:
        copied[path[0]] = value
    return copied


def mutate(name: str, kind: str, draw: random.Random, path: Path) -> str:
    """Write a changed checkpoint; returns what was done."""
    source = V1 / f"{name}.ckpt"
    if kind in ("cut", "bytes"):
        data = bytearray(source.read_bytes())
        if kind == "cut":
            end = draw.choice([0, 1, draw.randrange(len(data)), len(data) - draw.randrange(1, 100)])
            path.write_bytes(data[:end])
            return f"cut to {end} bytes"
        ends = [(0, len(data)), (0, 4000), (len(data) - 4000, len(data))]
        spots = [draw.randrange(*draw.choice(ends)) for _ in range(draw.choice([1, 3, 30]))]
        for spot in spots:
            data[spot] = draw.randrange(256)
        path.write_bytes(data)
        return f"bytes at {spots[:3]}…"
    checkpoint = torch.load(source, weights_only=True)
    if draw.random() < 0.5:
        checkpoint["hyper_parameters"] = upgrade(checkpoint["hyper_parameters"])
    stored = checkpoint["hyper_parameters"]
    place = draw.choice(places(stored))
    said = f"{'.'.join(map(str, place))}"
    if kind == "value":
        value = draw.choice(VALUES)
        said, stored = f"{said} = {str(value)[:40]!r}", put(stored, place, value)
    elif kind == "missing":
        said, stored = f"no {said}", put(stored, place, put)
    elif kind == "stranger":
        target = draw.choice(TARGETS)
        value = {"_target_": target, "command": "true"} if draw.random() < 0.7 else target
        said, stored = f"{said} = {value}", put(stored, place, value)
    elif kind == "format":
        value = draw.choice([*VALUES, 3, 2, 1, 99])
        said, stored = f"format {str(value)[:40]!r}", {**stored, "format": value}
    elif kind == "weights":
        weights = checkpoint["state_dict"]
        key = draw.choice(list(weights))
        value = draw.choice([put, weights[key].reshape(-1)[:-1], torch.full_like(weights[key], 1), *VALUES])
        said, checkpoint["state_dict"] = f"weights {key}", put(weights, (key,), value)
        if draw.random() < 0.3:
            other = draw.choice(shipped())
            said += f", those of {other}"
            checkpoint["state_dict"] = torch.load(V1 / f"{other}.ckpt", weights_only=True)["state_dict"]
    else:
        key = draw.choice(list(checkpoint))
        value = draw.choice([put, *VALUES])
        said, checkpoint = f"{key} of the file", put({**checkpoint, "hyper_parameters": stored}, (key,), value)
        torch.save(checkpoint, path)
        return said
    torch.save({**checkpoint, "hyper_parameters": stored}, path)
    return said


def load_autoencoder(path: Path) -> int:
    """The exit status that a run on its codes would have."""
    try:
        TrainedLatents(str(path)).decode(torch.zeros(1, 3))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def attempt(path: Path, root: Path, autoencoder: bool) -> SimpleNamespace:
    """`predict` of a checkpoint: "refused", "runs" or "FAULT", with its words and seconds."""
    import faults

    out, begun, called = io.StringIO(), time.perf_counter(), faults.Stranger.calls
    note, status = "", None
    words = [
        "predict",
        f"ckpt_path={path}",
        f"root={root}",
        "run_id=x",
        "n=1",
        "trainer=cpu",
        "callbacks.progress=null",
    ]
    system = mock.patch.object(os, "system", side_effect=AssertionError("a stranger was called"))
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()), system as systems:
        try:
            if autoencoder:
                status = load_autoencoder(path)
            else:
                status = train.main([*words, "trainer.enable_progress_bar=false"])
        except BaseException:
            note = traceback.format_exc()
    os.environ.pop("BD_RUN_ID", None)
    seconds, said = time.perf_counter() - begun, out.getvalue()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if systems.called or faults.Stranger.calls > called:
        note = f"a stranger was called: {said}"
    if status == 0 and not note:
        return SimpleNamespace(outcome="runs", note="", seconds=seconds)
    if note or status != 2 or len(errors) != 1 or seconds > 30:
        return SimpleNamespace(
            outcome="FAULT", note=note or f"status {status}, {seconds:.0f} s: {said}", seconds=seconds
        )
    return SimpleNamespace(outcome="refused", note=errors[0], seconds=seconds)


def check(name: str, place: Path, n: int) -> list[tuple[str, SimpleNamespace]]:
    """Outcomes of n changes of a checkpoint; a file that appears anywhere but among the runs is a fault."""
    draw, results = random.Random(name), []
    inside = place / "deep" / "deeper" / "runs"
    inside.mkdir(parents=True, exist_ok=True)
    path = place / "a.ckpt"
    for k in range(n):
        said = mutate(name, KINDS[k % len(KINDS)], draw, path)
        result = attempt(path, inside, name == "autoencoder")
        outside = [
            p for p in place.rglob("*") if p != path and inside not in (p, *p.parents) and p not in inside.parents
        ]
        if outside:
            result = SimpleNamespace(outcome="FAULT", note=f"wrote {outside}", seconds=result.seconds)
            for file in outside:
                file.unlink() if file.is_file() else None
        results.append((said, result))
    return results


def main() -> int:
    """Fuzz, count, and print every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="changes of each checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    total: Counter[str] = Counter()
    for name in shipped():
        with tempfile.TemporaryDirectory() as folder:
            count: Counter[str] = Counter()
            os.chdir(folder)
            for said, result in check(name, Path(folder).resolve(), options.n):
                count[result.outcome] += 1
                if result.outcome == "FAULT":
                    print(f"FAULT {name} {said}: {result.note}", flush=True)
            os.chdir(ROOT)
        total += count
        print(f"{name}: {dict(count)}", flush=True)
    print(f"all: {dict(total)}")
    return int(total["FAULT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
