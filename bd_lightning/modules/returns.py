"""Return distributions of state-action pairs, learned from replayed transitions: control and policy evaluation."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bd_lightning.checks import UserError, in_range, one_of, positive
from bd_lightning.dynamics import SampleNoise
from bd_lightning.modules.base import Module
from bd_lightning.returns import (
    GaussianFields,
    Representation,
    bellman_target,
    mixed_policy,
    normal,
    quantile,
    sample_by_sde,
)


def trunk(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """A plain MLP with ReLU, (B, inputs) to (B, outputs), linear at the end."""
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def td_loss(representation: Representation, y: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Losses (B,) of outputs y (B, A, outputs) at the actions taken (B,) against targets (B, outputs)."""
    return representation.loss(
        y.gather(-2, action[..., None, None].expand(*action.shape, 1, y.shape[-1]))[..., 0, :], target
    )


class ReturnLearner(Module):
    """Learns the distribution of returns of every state-action pair, with a target network.

    Swapping `representation` swaps the method and leaves network, replay and schedule alone: `returns.GaussianFields`
    is Bellman Diffusion's fields, `returns.Categorical` is C51.

    Args:
        shape: shape of an observation, from the data module.
        num_classes: number of actions, from the data module.
        representation: how distributions are represented and backed up.
        hidden: widths of the network's hidden layers.
        uniform: share of the uniform policy in the policy whose returns are learned: 0 is greedy control, 1 evaluates
            the uniform policy. Targets are taken over all actions exactly.
        target_every: optimiser steps between copies of the network to the target network.
        sampler: how `predict` draws returns: "inverse_cdf", or "sde" (`returns.sample_by_sde`).
        options: arguments of `Module`; here the learning rate is constant unless they say otherwise.

    References:
        | Li et al., Bellman Diffusion, arXiv 2410.01796, §6
        | Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning, arXiv 1707.06887
        | Mnih et al., Human-level control through deep reinforcement learning, 2015 (replay, target network)
    """

    network: Any
    target_network: Any
    representation: Any
    probes: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        representation: Representation,
        hidden: Sequence[int] = (64, 64),
        uniform: float = 0.0,
        target_every: int = 50,
        sampler: str = "inverse_cdf",
        **options: Any,
    ) -> None:
        super().__init__(**{"lr": 1e-3, "betas": (0.9, 0.999), "warmup_steps": 0, "lr_decay": "none", **options})
        positive(target_every=target_every, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        in_range(0, 1, uniform=uniform)
        one_of(("inverse_cdf", "sde"), sampler=sampler)
        if num_classes < 1:
            raise ValueError("the data has no actions: choose an environment, e.g. data=frozen_lake")
        self.shape, self.actions, self.conditional, self.sampler = tuple(shape), num_classes, False, sampler
        self.representation, self.uniform, self.target_every = representation, uniform, target_every
        self.network = trunk(int(np.prod(self.shape)), hidden, num_classes * representation.outputs)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("probes", torch.zeros(1, *self.shape))

    def heads(self, network: nn.Module, observation: Tensor) -> Tensor:
        """Outputs (B, A, outputs) at observations (B, *shape)."""
        return network(observation.flatten(1)).unflatten(1, (self.actions, -1))

    def weights(self, observation: Tensor) -> Tensor:
        """Weights (B, A, N) of the representation's components at observations (B, *shape)."""
        return self.representation.read(self.heads(self.network, observation))

    def values(self, observation: Tensor) -> Tensor:
        """Expected returns (B, A) at observations (B, *shape)."""
        return self.representation.mean(self.weights(observation))

    @torch.no_grad()
    def greedy(self, observation: np.ndarray) -> np.ndarray:
        """Best actions (B,) at observations (B, *shape)."""
        return self.values(torch.from_numpy(observation).to(self.device)).argmax(1).cpu().numpy()

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss on a batch of transitions (observation, action, reward, discount, next observation)."""
        observation, action, reward, discount, following = batch
        with torch.no_grad():
            y = self.heads(self.target_network, following)
        target = bellman_target(self.representation, y, reward, discount, self.uniform)
        y = self.heads(self.network, observation)
        loss = td_loss(self.representation, y, action, target)
        with torch.no_grad():
            w = self.representation.read(y)
            outside = self.representation.outside(w[range(len(w)), action], reward, discount).mean()
            value = self.representation.mean(w).amax(1).mean()
        return {"loss": loss.mean(), "outside": outside, "value": value}, {}

    def on_fit_start(self) -> None:
        """Keep the states that figures and samples are for."""
        self.probes = self.trainer.datamodule.probes.to(self.device)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of probes from the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.probes = torch.zeros_like(checkpoint["state_dict"]["probes"], device=self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Copy the network to the target network when it is due."""
        if self.global_step % self.target_every == 0:
            self.target_network.load_state_dict(self.network.state_dict())

    @torch.no_grad()
    def sample(self, w: Tensor, indices: Sequence[int], seed: int = 0, sampler: str | None = None) -> Tensor:
        """Returns drawn from distributions; sample i of a seed is the same in any batch.

        Args:
            w: weights, shape (K, N).
            indices: indices of the samples, length n.
            seed: seed of the whole set.
            sampler: "inverse_cdf", or "sde" with `dynamics.MultistepDynamics`; the module's default if None.

        Returns:
            Returns, shape (n, K).

        Raises:
            UserError: if the SDE is asked for and the representation is not `GaussianFields`.
        """
        rep = self.representation
        if (sampler or self.sampler) == "inverse_cdf":
            levels = (SampleNoise(indices, (len(w),), seed, self.device).uniform() / 3**0.5 + 1) / 2
            x = rep.grid()
            return quantile(x, rep.cdf(w, x), levels.T).T
        if not isinstance(rep, GaussianFields):
            raise UserError("the sde needs fields: sample with model.sampler=inverse_cdf, or train GaussianFields")
        draws = [sample_by_sde(rep, row, SampleNoise(indices, (1,), seed, self.device)) for row in w]
        return torch.stack(draws, 1)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns (B, A) of every action in the state that episodes start from, for requests "index" and "seed"."""
        return self.sample(self.weights(self.probes[:1])[0], batch["index"].tolist(), int(batch["seed"][0]))


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
        self.low, self.high, self.waves = low, high, waves
        self.state = nn.ModuleList(trunk(inputs, hidden[:-1], hidden[-1]) for _ in range(2))
        self.place = nn.ModuleList(nn.Linear(2 * waves, hidden[-1]) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(hidden[-1], actions) for _ in range(2))

    def forward(self, observation: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and g (B, Q, A) at observations (B, inputs) and points (B, Q) or (Q,); 0 outside [low, high]."""
        span = self.high - self.low
        turns = (x - self.low)[..., None] / span * np.pi * torch.arange(1, self.waves + 1, device=x.device)
        waves = torch.cat([turns.sin(), turns.cos()], -1)
        a, b = (
            out((state(observation)[:, None] + place(waves)).relu())
            for state, place, out in zip(self.state, self.place, self.out)
        )
        inside = ((x >= self.low) & (x <= self.high))[..., None]
        return inside * nn.functional.softplus(a) / span, inside * b / span**2


class FreeReturnLearner(ReturnLearner):
    """The paper's parametrisation: networks s(x; z, a) and g(x; z, a), trained at free query points.

    At points x uniform over the range, the targets are s'((x + n − r)/γ)/γ and g'((x + n − r)/γ)/γ² of the target
    network, with noise n of variance h²(1 − γ²) in place of the exact re-smoothing; N(x; r, h²) and its slope where the
    episode ended. Values, samples and figures read s at the representation's nodes.

    Args:
        shape: shape of an observation, from the data module.
        num_classes: number of actions, from the data module.
        representation: `GaussianFields` with learn="density"; `positive` rescales s to mass one in values and targets.
        hidden: as for `ReturnLearner`.
        queries: points x for each transition.
        gradient_weight: weight of the error of g, whose unit is h.
        options: arguments of `ReturnLearner`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        representation: GaussianFields,
        hidden: Sequence[int] = (64, 64),
        queries: int = 32,
        gradient_weight: float = 0.1,
        **options: Any,
    ) -> None:
        if representation.learn != "density":
            raise ValueError("networks in x give densities: set representation.learn=density")
        super().__init__(shape, num_classes, representation, hidden, **options)
        positive(queries=queries)
        in_range(0, float("inf"), gradient_weight=gradient_weight)
        self.queries, self.gradient_weight = queries, gradient_weight
        ends = float(representation.x[0]), float(representation.x[-1])
        self.network = FieldNetworks(int(np.prod(self.shape)), num_classes, hidden, *ends)
        self.target_network = copy.deepcopy(self.network).requires_grad_(False)

    def heads(self, network: nn.Module, observation: Tensor) -> Tensor:
        """What the representation reads (B, A, outputs): s at the nodes."""
        rep = self.representation
        return network(observation.flatten(1), rep.x)[0].mT * rep.spacing - rep.start

    def compute(self, batch: Any, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Squared errors of both fields on a batch of transitions."""
        observation, action, reward, discount, following = batch
        rep, size = self.representation, (len(action), self.queries)
        rand = torch.rand(size, generator=generator, device=self.device)
        noise = torch.randn(size, generator=generator, device=self.device)
        x = self.network.low + (self.network.high - self.network.low) * rand
        r, gamma, ended = reward[:, None], discount[:, None].clamp_min(1e-6), (discount == 0)[:, None]
        with torch.no_grad():
            y = self.heads(self.target_network, following)
            policy = mixed_policy(rep.mean(rep.read(y)), self.uniform)
            if rep.positive:
                policy = policy / (y + rep.start).sum(-1).clamp_min(1e-6)
            before = (x + rep.h * (1 - discount[:, None] ** 2).sqrt() * noise - r) / gamma
            s, g = ((field * policy[:, None]).sum(-1) for field in self.target_network(following.flatten(1), before))
            kernel = normal(x - r, rep.h**2)
            target_s = torch.where(ended, kernel, s / gamma)
            target_g = torch.where(ended, -(x - r) / rep.h**2 * kernel, g / gamma**2)
        fields = self.network(observation.flatten(1), x)
        s, g = (field.gather(2, action[:, None, None].expand(*size, 1))[..., 0] for field in fields)
        scalar = ((s - target_s) * rep.spacing).square().mean() * rep.outputs
        gradient = ((g - target_g) * rep.spacing * rep.h).square().mean() * rep.outputs
        loss = scalar + self.gradient_weight * gradient
        return {"loss": loss, "loss_scalar": scalar, "loss_gradient": gradient}, {}
