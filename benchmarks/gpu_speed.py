"""A training step of gpu.py: its FLOP, its time and where that goes; `bench` is its `Bench`."""

import re
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bd_lightning.checks import UserError, reason_of
from benchmarks.common import now

MODES = {f"{p}{', compiled' * c}": (p == "bf16", c) for p in ("float32", "bf16") for c in (False, True)}
TIMED = 4.0
"""Seconds that each kind of step is timed for."""


PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A40": 150, "A30": 165, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""TFLOP/s of dense bf16 products summed in float32, by what the name of a card holds; from the makers' data sheets."""


def peak_of(card: str) -> int | None:
    """TFLOP/s of a card by its name, of which those of other cards are parts; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", card)), None)


def flops(bench: Any) -> dict[str, Any]:
    """FLOP of a training step, counted."""
    training, loss_of = bench.training("Bellman Diffusion", False, False)
    with FlopCounterMode(display=False) as counter:
        training.update(loss_of)
    parameters = sum(p.numel() for p in training.model.parameters())
    return {"batch": bench.batch, "flop": counter.get_total_flops(), "parameters": parameters}


def speed(bench: Any, name: str, mode: str) -> dict[str, Any]:
    """Seconds of a training step: the first, with compilation, and the median of those after; or why there are none."""
    try:
        training, loss_of = bench.training(name, *MODES[mode])
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        begun = now(bench.device)
        training.update(loss_of)
        first, seconds = now(bench.device) - begun, []
        while len(seconds) < 6 or sum(seconds[1:]) < TIMED:
            begun = now(bench.device)
            for _ in range(5):
                training.update(loss_of)
            seconds.append((now(bench.device) - begun) / 5)
        memory = torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None
        return {"seconds": median(seconds[1:]), "first": first, "batch": bench.batch, "memory": memory}
    except RuntimeError as error:  # no compiler, or too little memory
        return {"failed": " ".join(str(error).split())[:300]}
    finally:
        torch.compiler.reset()


def profile(bench: Any) -> dict[str, Any]:
    """Where the time of a bf16 step goes, in a file."""
    training, loss_of = bench.training("Bellman Diffusion", True, False)
    for _ in range(3):
        training.update(loss_of)
    with torch.profiler.profile() as found:
        for _ in range(3):
            training.update(loss_of)
        now(bench.device)
    where = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    text = found.key_averages().table(sort_by=where, row_limit=25, max_name_column_width=60)
    try:
        (bench.out / "profile.txt").write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {bench.out / 'profile.txt'} ({reason_of(error)}): make room") from error
    return {"file": "profile.txt"}
