"""Networks of return distributions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bd_lightning.checks import positive


def trunk(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """A plain MLP with ReLU, (B, inputs) to (B, outputs), linear at the end; `hidden` are the widths between."""
    positive(inputs=inputs, outputs=outputs, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Features(ABC):
    """What reads an observation before the hidden layers: a recipe, which makes layers for a shape."""

    @abstractmethod
    def __call__(self, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
        """Layers from flat observations (B, prod(shape)) to features (B, F), and F."""


@dataclass(frozen=True)
class Flat(Features):
    """The numbers of an observation as they are."""

    def __call__(self, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
        """No layers, and as many features as numbers."""
        return [], math.prod(shape)


class ChannelsFirst(nn.Module):
    """(B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, channels first."""
        return x.movedim(-1, 1)


@dataclass(frozen=True)
class Convolutions(Features):
    """Convolutions with ReLU over a grid (H, W, C), stride 1, without padding; the defaults are those of MinAtar's DQN.

    Args:
        channels: output channels of each convolution.
        size: side of the kernels.

    References:
        | Young and Tian, MinAtar, arXiv 1903.03176 (one convolution of 16 kernels 3×3, then 128 hidden units)
    """

    channels: Sequence[int] = (16,)
    size: int = 3

    def __post_init__(self) -> None:
        positive(size=self.size, **{f"channels[{i}]": count for i, count in enumerate(self.channels)})

    def __call__(self, shape: tuple[int, ...]) -> tuple[list[nn.Module], int]:
        """The convolutions.

        Raises:
            ValueError: for observations that are no grid, or too small a one.
        """
        less = len(self.channels) * (self.size - 1)
        if len(shape) != 3 or min(shape[:2]) <= less:
            raise ValueError(
                f"convolutions read grids of shape (H, W, C) with sides above {less}, and observations have the shape "
                f"{tuple(shape)}: set model.features._target_=bd_lightning.returns.Flat"
            )
        layers: list[nn.Module] = [nn.Unflatten(1, shape), ChannelsFirst()]
        for a, b in zip([shape[2], *self.channels], self.channels):
            layers += [nn.Conv2d(a, b, self.size), nn.ReLU()]
        return [*layers, nn.Flatten()], [shape[2], *self.channels][-1] * (shape[0] - less) * (shape[1] - less)


class FieldNetworks(nn.Module):
    """Two networks in (observation, x): s ≥ 0 and g for every action at any points x.

    Each adds a linear map of sines and cosines of x to features of the observation, before a last hidden layer.

    Args:
        inputs: numbers in an observation.
        actions: number of actions A.
        hidden: widths of the hidden layers that read the observation; the last is that of the layer that reads x too.
        low: smallest x.
        high: largest x.
        waves: frequencies of x, 1 to `waves` half turns over [low, high].
    """

    def __init__(
        self, inputs: int, actions: int, hidden: Sequence[int], low: float, high: float, waves: int = 16
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden needs at least one width: that of the layer that reads x too")
        self.low, self.high, self.waves = low, high, waves
        self.state = nn.ModuleList(trunk(inputs, hidden[:-1], hidden[-1]) for _ in range(2))
        self.place = nn.ModuleList(nn.Linear(2 * waves, hidden[-1]) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(hidden[-1], actions) for _ in range(2))

    def forward(self, observation: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and g (B, Q, A) at observations (B, inputs) and points (B, Q) or (Q,); 0 outside [low, high]."""
        span = self.high - self.low
        turns = (x - self.low)[..., None] / span * math.pi * torch.arange(1, self.waves + 1, device=x.device)
        waves = torch.cat([turns.sin(), turns.cos()], -1)
        a, b = (
            out((state(observation)[:, None] + place(waves)).relu())
            for state, place, out in zip(self.state, self.place, self.out)
        )
        inside = ((x >= self.low) & (x <= self.high))[..., None]
        return inside * nn.functional.softplus(a) / span, inside * b / span**2
