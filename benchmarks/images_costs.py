"""What the methods of images.py cost: time of a step, memory, time of samples; `suite` is its `Suite`."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bd_lightning.dynamics import SamplingDiverged
from benchmarks.common import Training, Turns, now


def step_memory(suite: Any, name: str) -> float:
    """Bytes of a training step: the peak on a GPU, of a method alone; on a CPU what autograd keeps for its backward."""
    on_card = suite.device.type == "cuda"
    before = torch.cuda.memory_allocated(suite.device) if on_card else 0
    method = suite.build(name, 0)
    training = Training(method, suite.recipe_of(method))
    x, label = next(suite.batches(0, suite.mirrored))
    loss = partial(training.model.loss, x, torch.zeros_like(label))
    if on_card:
        training.update(loss)  # from here on there are gradients and the optimiser's states
        torch.cuda.reset_peak_memory_stats(suite.device)
        training.update(loss)
        return float(torch.cuda.max_memory_allocated(suite.device) - before)
    own = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        try:
            key, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        except RuntimeError:  # inside forward-mode differentiation tensors do not show their storage
            key, size = -len(kept), t.nbytes
        if key not in own:
            kept[key] = size
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), suite.precision():
        loss()
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
    return {
        name: {
            "step": turns.ratio(name, suite.base),
            "milliseconds": 1000 * turns.median(name),
            "sampling": sampling_time(suite, training.model.eval()),
            "memory": step_memory(suite, name) / 2**20,
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
            with suite.precision():
                method.samplers[method.main](method, range(1000), label)
        except SamplingDiverged:
            break
        seconds.append(now(suite.device) - start)
    return min(seconds, default=math.nan)
