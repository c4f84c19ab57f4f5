"""Many trained networks of one architecture as one source, asked in one batched call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from bd_lightning.checks import at_hand
from bd_lightning.fields import preconditioning
from bd_lightning.fields.mixture import Mixture
from bd_lightning.fields.relative import RelativeFields

FEW = 100
"""Points that a CPU is not busy enough with for one network at a time."""


class Experts:
    """The densities of several `RelativeFields` side by side, from one call of their stacked networks.

    The weights are stacked at the first call on a device, where the networks are then, and not looked at again. On a
    CPU that pays for few points; more than `FEW` are given to one network after the other.

    Args:
        members: trained fields, whose networks differ in their weights alone.

    Attributes:
        sigma_data: σ_d of the base Gaussian.

    Raises:
        ValueError: if the base Gaussians differ, and for what is no `RelativeFields`.
    """

    def __init__(self, members: Sequence[RelativeFields]) -> None:
        if other := [type(one).__name__ for one in members if not isinstance(one, RelativeFields)]:
            raise ValueError(f"batched takes learned fields (RelativeFields) one by one, not {other[0]}")
        bases = {one.sigma_data for one in members}
        if len(bases) != 1:
            raise ValueError(f"the base Gaussians differ: sigma_data is {' and '.join(map(str, sorted(bases)))}")
        shapes = [{name: value.shape for name, value in one.network.state_dict().items()} for one in members]
        if any(one != shapes[0] for one in shapes):
            raise ValueError("the networks differ in more than their weights: use the mixture itself, not batched")
        self.members, self.sigma_data = list(members), bases.pop()
        self.stacked: dict[str, Tensor] | None = None

    @property
    def shares(self) -> Tensor:
        """π_c of every member one after the other, shape (C,); their sum is the number of members."""
        return torch.cat([one.shares for one in self.members])

    def components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(π_c ρ_c) (B, C) and U_c (B, C, *) at x (B, *) and noise levels sigma (B,)."""
        out, a = preconditioning.call(self._networks, x, sigma, preconditioning.unit_scale(sigma, self.sigma_data))
        return a, preconditioning.relative_slope(out, sigma, self.sigma_data)

    def _networks(self, x: Tensor, c_noise: Tensor, label: None) -> tuple[Tensor, Tensor]:
        """F (B, C, *) and a (B, C) of all networks at their inputs x (B, *) and c_noise, (B,) or (1,)."""
        networks = [one.network for one in self.members]

        def whole(out: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
            return out.reshape(len(x), -1, *x.shape[1:]), a.reshape(len(x), -1)

        if at_hand(x) and len(x) > FEW:
            parts = [whole(*network(x, c_noise, None)) for network in networks]
            return torch.cat([out for out, _ in parts], 1), torch.cat([a for _, a in parts], 1)
        if self.stacked is None or next(iter(self.stacked.values())).device != x.device:
            states = [{**dict(one.named_parameters()), **dict(one.named_buffers())} for one in networks]
            self.stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        out, a = torch.vmap(lambda state: whole(*functional_call(networks[0], state, (x, c_noise, None))))(self.stacked)
        return out.transpose(0, 1).flatten(1, 2), a.transpose(0, 1).flatten(1)


def batched(mixture: Mixture) -> Mixture:
    """The same mixture of learned fields whose networks differ in their weights alone, with one call for all.

    Raises:
        ValueError: for networks that differ in more than that, and for a mixture without a positive weight.
    """
    mixture.check()
    members, weights = zip(*mixture.terms)
    points = torch.broadcast_shapes(*(w.shape[:-1] for w in weights))
    joined = torch.cat([w.expand(*points, -1) for w in weights], -1)
    return Mixture([(Experts(members), joined)], mixture.mobility, mixture.floor)
