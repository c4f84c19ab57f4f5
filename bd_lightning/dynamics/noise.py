"""Noise of samples: one random stream for each, drawn where it is needed.

References:
    | Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011 (Philox)
    | Box and Muller, A Note on the Generation of Random Normal Deviates, 1958
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STREAMS = "philox-1"
"""Which numbers a seed stands for. It changes with them, so that samples of before are not taken for those of now."""
WORD = 0xFFFFFFFF
CACHED = 1 << 15
"""Counters worked on at a time on a CPU, whose caches they fit; a GPU takes all at once."""

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: Sequence[int], rounds: int = 10) -> list[Tensor]:
    """Philox4x32: four words of 32 random bits for every counter.

    A product of two words may pass 2⁶³; its bits are the right ones, because integers wrap around.

    Args:
        counter: four words, each int64 in [0, 2³²), of shapes that broadcast.
        key: two words.
        rounds: 10 is the standard.

    Returns:
        Four words, each int64 in [0, 2³²), of the broadcast shape.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(rounds):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = ((q >> 32) ^ b ^ low) & WORD, q & WORD
        c, d = ((p >> 32) ^ d ^ high) & WORD, p & WORD
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    return [a, b, c, d]


def normal(words: list[Tensor]) -> list[Tensor]:
    """Standard normal numbers of four random words, by two pairs; single precision."""
    parts = []
    for radius, angle in (words[:2], words[2:]):
        length = ((radius.float() + 0.5) * 2**-32).log().mul(-2).sqrt()
        turn = angle.float() * (2 * math.pi * 2**-32)
        parts += [length * turn.cos(), length * turn.sin()]
    return parts


class SampleNoise:
    """Gaussian noise with one random stream per sample, so that sample i is the same in any batch, on any rank.

    The streams are counter-based: number j of draw k of sample i is a function of (seed, i, k, j) alone, so that no two
    of them overlap, and the numbers are drawn where they are needed, all samples in one pass. The bits are the same on
    every device; the normal numbers, by Box and Muller's logarithm, root, sine and cosine in single precision, may
    differ between devices (and between processors with other vector instructions) in the last digits.

    Args:
        indices: index of each sample, length B.
        shape: shape of one sample.
        seed: seed of the whole set of samples, below 2⁶⁴.
        device: where the noise is drawn.
    """

    def __init__(
        self, indices: Sequence[int], shape: Sequence[int], seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.device = tuple(shape), torch.device(device)
        self.key = (seed & WORD, seed >> 32 & WORD)
        index = torch.tensor([int(i) for i in indices], dtype=torch.int64).to(self.device)[:, None]
        self.index, self.draws = (index & WORD, index >> 32 & WORD), 0
        self.blocks = torch.arange(-(-math.prod(self.shape) // 4), device=self.device)[None]

    def __len__(self) -> int:
        return len(self.index[0])

    def _drawn(self, numbers: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        """The next draw, made of four words for every fourth coordinate of each sample, (B, ⌈d/4⌉)."""
        draw = torch.full_like(self.blocks[:, :1], self.draws)
        self.draws += 1
        rows = len(self)
        if self.device.type == "cpu":
            rows = max(1, CACHED // max(1, self.blocks.numel()))
        parts = [
            torch.cat(numbers(philox((self.blocks, draw, low, high), self.key)), 1)
            for low, high in zip(*(word.split(max(1, rows)) for word in self.index))
        ]
        return torch.cat(parts)[:, : math.prod(self.shape)].reshape(len(self), *self.shape)

    def __call__(self) -> Tensor:
        """The next standard normal draw, shape (B, *shape), single precision."""
        return self._drawn(normal)

    def uniform(self) -> Tensor:
        """The next uniform draw, of mean zero and variance one, shape (B, *shape), single precision."""
        return self._drawn(lambda words: [((word >> 8).float() + 0.5) * (2**-23 * 3**0.5) - 3**0.5 for word in words])

    def fraction(self) -> Tensor:
        """The next draw of one number for each sample, uniform between 0 and 1, shape (B,), single precision."""
        draw = torch.full_like(self.blocks[:, :1], self.draws)
        self.draws += 1
        first, *_ = philox((torch.zeros_like(draw), draw, *self.index), self.key)
        return ((first[:, 0] >> 8).float() + 0.5) * 2**-24
