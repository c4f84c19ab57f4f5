"""Streams of random numbers: the published generator, and one stream for each sample."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from bd_lightning.dynamics import SampleNoise
from bd_lightning.dynamics.noise import WORD, philox
from counted import Counted

KNOWN = [  # kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_is_philox(counter, key, expected):
    assert [int(word) for word in philox([torch.tensor([c]) for c in counter], key)] == list(expected)


def test_one_number_of_each_stream_is_uniform_and_the_same_in_any_company():
    together = SampleNoise(range(20_000), (3, 4), seed=7)
    first, noise, second = together.fraction(), together(), together.fraction()
    assert first.shape == (20_000,) and 0 < float(first.min()) and float(first.max()) < 1
    assert np.histogram(first.numpy(), 10, (0, 1))[0] == pytest.approx([2000] * 10, abs=170)  # four standard errors
    assert abs(float(torch.corrcoef(torch.stack([first, second, noise[:, 0, 0]])).triu(1).abs().max())) < 0.03
    apart = SampleNoise([5, 19_999], (3, 4), seed=7)
    assert torch.equal(apart.fraction(), first[[5, 19_999]])
    assert torch.equal(apart(), noise[[5, 19_999]])
    assert torch.equal(apart.fraction(), second[[5, 19_999]])


@pytest.mark.parametrize("shape", [(), (1,), (2,), (7,), (3, 32, 32)])
def test_a_stream_is_the_same_in_any_company(shape):
    together = SampleNoise(range(100), shape, seed=2**32 + 5)
    draws = [together(), together.uniform(), together()]
    assert [x.shape for x in draws] == [(100, *shape)] * 3 and draws[0].dtype == torch.float32
    for rows in (range(31, 32), range(99, 0, -7), [3, 3, 64]):
        apart = SampleNoise(rows, shape, seed=2**32 + 5)
        for x in draws:
            y = apart.uniform() if x is draws[1] else apart()
            assert torch.equal(y, x[list(rows)])
    assert not torch.equal(draws[0], draws[2])
    for other in (SampleNoise(range(100), shape, seed=5), SampleNoise(range(2**32, 2**32 + 100), shape, 2**32 + 5)):
        assert float((other() - draws[0]).abs().min()) > 0
    assert SampleNoise([], shape)().shape == (0, *shape)


def test_numbers_are_normal_and_uniform():
    noise = SampleNoise(range(400), (3, 16, 16), seed=1)
    x, u = (draw().double().flatten() for draw in (noise, noise.uniform))
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * (variance / n) ** 0.5
    counts = np.histogram(x.numpy(), [-np.inf, *np.linspace(-4, 4, 33), np.inf])[0]
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64)
    shares = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)]).diff().numpy()
    assert ((counts - n * shares) ** 2 / (n * shares)).sum() < 34 + 5 * (2 * 34) ** 0.5
    assert abs(float(u.mean())) < 5 / n**0.5 and abs(float(u.square().mean()) - 1) < 5 * (0.8 / n) ** 0.5
    assert 1.73 < float(u.max()) <= 3**0.5 and -(3**0.5) <= float(u.min()) < -1.73


def test_a_draw_on_a_gpu_is_one_pass_for_all_samples():
    """The operations do not grow with the number of samples, and nothing crosses to the device while drawing."""
    found = []
    with FakeTensorMode():
        for n in (10, 5000):
            noise = SampleNoise(range(n), (3, 32, 32), device="cuda")
            with Counted() as counted:
                x = noise()
            assert x.device.type == "cuda" and x.shape == (n, 3, 32, 32)
            found.append(counted)
    assert found[0].names == found[1].names and len(found[0].names) < 150
    assert found[1].bytes < 5000 * 3072 * 250  # 250 bytes a number: 0.5 µs a sample at 1.5 TB/s
