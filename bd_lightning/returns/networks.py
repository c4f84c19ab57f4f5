"""Networks of return distributions."""

import math
from collections.abc import Sequence

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
