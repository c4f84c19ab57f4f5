"""What the methods of images.py cost: time of a step, memory, time of samples; `suite` is its `Suite`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning.dynamics import SamplingDiverged
from benchmarks.common import Training, Turns, now


def step_memory(loss: Callable[[], Tensor], model: nn.Module) -> float:
    """Bytes of a training step: the peak on a GPU; on a CPU what autograd keeps for its backward pass."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        loss().backward()
        return float(torch.cuda.max_memory_allocated(device))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        try:
            key, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        except RuntimeError:  # inside forward-mode differentiation tensors do not show their storage
            key, size = -len(kept), t.nbytes
        if key not in own:
            kept[key] = size
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    value.backward()
    return float(sum(kept.values()))


def speed(suite: Any, names: list[str], rounds: int = 30) -> dict[str, dict[str, float]]:
    """Step time relative to that of `suite.base` (which must be there), memory, and sampling time per 1,000 images."""
    methods = {name: suite.build(name, 0) for name in names}
    trainings = {name: Training(method, suite.recipe_of(method)) for name, method in methods.items()}
    turns = Turns(names, suite.device, skip=3)
    source = suite.batches(0, suite.mirrored)
    for _ in range(rounds + turns.skip):
        x, label = next(source)
        for name in turns.next():
            loss = partial(trainings[name].model.loss, x, label)
            with turns.clock(name):
                trainings[name].update(loss)
    told = torch.zeros_like(label)
    return {
        name: {
            "step": turns.ratio(name, suite.base),
            "milliseconds": 1000 * turns.median(name),
            "sampling": sampling_time(suite, training.model.eval()),
            "memory": step_memory(partial(training.model.train().loss, x, told), training.model) / 2**20,
        }
        for name, training in trainings.items()
    }


@torch.no_grad()
def sampling_time(suite: Any, method: Any) -> float:
    """Seconds for 1,000 samples, the least of three times; NaN for an untrained model that loses chains."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) <= 60:
        start = now(suite.device)
        label = torch.zeros(1000, dtype=torch.long, device=suite.device) if method.conditional else None
        try:
            method.samplers[method.main](method, range(1000), label)
        except SamplingDiverged:
            break
        seconds.append(now(suite.device) - start)
    return min(seconds, default=math.nan)
