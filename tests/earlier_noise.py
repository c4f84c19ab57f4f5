"""The noise of samples before it was drawn on the device, for comparisons with samples that were stored then."""

from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch


class EarlierNoise:
    """`SampleNoise` by numpy's Philox and ziggurat, sample by sample."""

    def __init__(self, indices, shape, seed=0, device="cpu"):
        self.shape, self.device = tuple(shape), torch.device(device)
        self.streams = [np.random.Generator(np.random.Philox(key=[seed, int(i)])) for i in indices]

    def __len__(self):
        return len(self.streams)

    def __call__(self):
        draws = np.stack([stream.standard_normal(self.shape, dtype=np.float32) for stream in self.streams])
        return torch.from_numpy(draws)

    def uniform(self):
        draws = np.stack([stream.random(self.shape, dtype=np.float32) for stream in self.streams])
        return torch.from_numpy((2 * draws - 1) * np.float32(3**0.5))


def earlier_noise() -> ExitStack:
    """A context in which models draw their samples from it."""
    stack = ExitStack()
    for place in ("bd_lightning.modules.generator", "bd_lightning.returns.sampling"):
        stack.enter_context(mock.patch(f"{place}.SampleNoise", EarlierNoise))
    return stack
