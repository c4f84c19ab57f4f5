"""Return distributions of state-action pairs, learned from replayed transitions: control and policy evaluation."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bd_lightning.checks import UserError, in_range, one_of, positive
from bd_lightning.facts import PROBES
from bd_lightning.modules.base import Module, told
from bd_lightning.optimizers import AdamW
from bd_lightning.returns import (
    SAMPLERS,
    Features,
    FieldNetworks,
    Flat,
    GaussianFields,
    MeanReturn,
    Policy,
    Preference,
    Representation,
    bellman_target,
    lambda_shares,
    normal,
    td_loss,
    trunk,
)

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Transitions: observation (B, *shape), action (B,), reward (B,), discount (B,), next observation (B, *shape)."""


def refuse_lengths(reward: Tensor) -> None:
    """Refuse transitions of several lengths, rewards (B, n).

    Raises:
        UserError: saying what reads them.
    """
    if reward.ndim != 1:
        raise UserError(
            "these transitions are of 1 to n steps, for λ-returns: choose model=returns_lambda, or data that is no "
            "datamodules.LambdaEnvironment, such as data=frozen_lake"
        )


class DistributionalLearner(Module):
    """Base: learning the distribution of returns of every state-action pair, with a target network.

    A sub-class builds its network and hands it over by `learn_with`; `outputs` and `compute` say what it is for.

    Args:
        shape: shape of an observation, from the data module.
        actions: number of actions, from the data module.
        representation: how distributions are represented and backed up.
        uniform_policy: share of the uniform policy in the policy whose returns are learned: 0 is greedy control, 1
            evaluates the uniform policy. Targets are taken over all actions exactly.
        preference: what that policy is greedy in: the mean, or a risk measure (see `returns.policies`).
        exploration: what the policy that collects experience is greedy in; None takes `preference`.
        target_every: optimiser steps between copies of the network to the target network.
        sampler: how `predict` draws returns: "inverse_cdf", or "sde" (see `returns.SAMPLERS`).
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
    fixed = ("representation",)
    conditional = False

    def __init__(
        self,
        shape: Sequence[int],
        actions: int,
        representation: Representation,
        uniform_policy: float = 0.0,
        preference: Preference = MeanReturn(),  # noqa: B008 (frozen)
        exploration: Preference | None = None,
        target_every: int = 50,
        sampler: str = "inverse_cdf",
        **options: Any,
    ) -> None:
        super().__init__(
            **{"lr": 1e-3, "optimizer": AdamW((0.9, 0.999)), "warmup_steps": 0, "lr_decay": "none", **options}
        )
        positive(actions=actions, target_every=target_every)
        one_of(tuple(SAMPLERS), sampler=sampler)
        representation.check()
        self.shape, self.actions, self.sampler = tuple(shape), actions, sampler
        self.representation, self.target_every = representation, target_every
        self.policy, self.exploration = Policy(preference, uniform_policy), exploration or preference
        self.register_buffer("probes", torch.zeros(PROBES, *self.shape))

    def learn_with(self, network: nn.Module) -> None:
        """Take the network, and a copy of it as the target network."""
        self.network = network
        self.target_network = copy.deepcopy(network).requires_grad_(False)

    @abstractmethod
    def outputs(self, network: nn.Module, observation: Tensor) -> Tensor:
        """What the representation reads, (B, A, outputs), of a network at observations (B, *shape)."""

    @abstractmethod
    def compute(self, batch: Batch, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses on a batch of transitions."""

    def weights(self, observation: Tensor) -> Tensor:
        """Weights (B, A, N) of the representation's components at observations (B, *shape)."""
        return self.representation.read(self.outputs(self.network, observation))

    def values(self, observation: Tensor) -> Tensor:
        """Expected returns (B, A) at observations (B, *shape)."""
        return self.representation.mean(self.weights(observation))

    def drawings(self):
        """What its policy is greedy in."""
        return [told(self.policy.preference)]

    @torch.no_grad()
    def _best(self, preference: Preference, observation: np.ndarray) -> np.ndarray:
        """The best actions by a preference.

        Raises:
            UserError: if it gives other scores than one number for each action.
        """
        w = self.weights(torch.from_numpy(observation).to(self.device))
        scores = preference(self.representation, w)
        if scores.shape != w.shape[:2]:
            raise UserError(
                f"{type(preference).__name__} gives scores of the shape {list(scores.shape)}, not one of each action, "
                f"{list(w.shape[:2])}"
            )
        if not scores.amax(1).isfinite().all():  # of one that is left out −inf
            raise UserError(
                f"{type(preference).__name__} gives scores that are no numbers: the network's weights are not finite, "
                "or its arguments have no meaning"
            )
        return scores.argmax(1).cpu().numpy()

    def greedy(self, observation: np.ndarray) -> np.ndarray:
        """Best actions (B,) at observations (B, *shape)."""
        return self._best(self.policy.preference, observation)

    def explore(self, observation: np.ndarray) -> np.ndarray:
        """Actions (B,) at observations (B, *shape) by which experience is collected."""
        return self._best(self.exploration, observation)

    def on_fit_start(self) -> None:
        """Keep the states that figures and samples are for."""
        self.probes = self.trainer.datamodule.probes.to(self.device)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of probes, one at least, from the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        self.probes = self.probes.new_zeros(max(1, len(checkpoint["state_dict"]["probes"])), *self.shape)

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
            sampler: a key of `returns.SAMPLERS`; the module's default if None.

        Returns:
            Returns, shape (n, K).

        Raises:
            UserError: if the SDE is asked for and the representation has no fields.
        """
        return SAMPLERS[sampler or self.sampler](self.representation, w, indices, seed)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns (B, A) of every action in the state that episodes start from, for requests "index" and "seed"."""
        return self.sample(self.weights(self.probes[:1])[0], batch["index"].tolist(), int(batch["seed"][0]))


class ReturnLearner(DistributionalLearner):
    """One network that gives the outputs of every action: weights of fixed components.

    Swapping `representation` swaps the method and leaves network, replay and schedule alone: `returns.GaussianFields`
    is Bellman Diffusion's fields, `returns.Categorical` is C51.

    Args:
        shape: shape of an observation, from the data module.
        actions: number of actions, from the data module.
        representation: how distributions are represented and backed up.
        hidden: widths of the network's hidden layers.
        features: what reads an observation before them: nothing, or convolutions of a grid.
        options: arguments of `DistributionalLearner`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        actions: int,
        representation: Representation,
        hidden: Sequence[int] = (64, 64),
        features: Features = Flat(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> None:
        super().__init__(shape, actions, representation, **options)
        layers, width = features(self.shape)
        found = nn.Sequential(*layers)(torch.zeros(1, math.prod(self.shape))).shape
        if found != (1, width):
            raise ValueError(f"{type(features).__name__} says {width} features, and its layers give {list(found[1:])}")
        self.learn_with(nn.Sequential(*layers, *trunk(width, hidden, actions * representation.outputs)))

    def outputs(self, network: nn.Module, observation: Tensor) -> Tensor:
        """Outputs (B, A, outputs) at observations (B, *shape)."""
        return network(observation.flatten(1)).unflatten(1, (self.actions, -1))

    def backup(self, y: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Targets (B, outputs) for the target network's outputs (B, A, outputs) and rewards and discounts (B,).

        Raises:
            UserError: for transitions of several lengths.
        """
        refuse_lengths(reward)
        return bellman_target(self.representation, y, reward, discount, self.policy)

    def compute(self, batch: Batch, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of the representation against its Bellman target."""
        observation, action, reward, discount, following = batch
        with torch.no_grad():
            after = self.outputs(self.target_network, following.reshape(-1, *self.shape)).unflatten(0, reward.shape)
        target = self.backup(after, reward, discount)
        y = self.outputs(self.network, observation)
        loss = td_loss(self.representation, y, action, target)
        with torch.no_grad():
            size = len(reward)  # of transitions of 1 to n steps, the longest
            w = self.representation.read(after.reshape(size, -1, *after.shape[-2:])[:, -1])
            w = self.representation.mixture(self.policy(self.representation, w), w)
            longest = reward.reshape(size, -1)[:, -1], discount.reshape(size, -1)[:, -1]
            outside = self.representation.outside(w, *longest).mean()
            value = self.representation.mean(self.representation.read(y)).amax(1).mean()
        return {"loss": loss.mean(), "outside": outside, "value": value}, {}


class LambdaReturnLearner(ReturnLearner):
    """Learns from λ-returns: the target is the mixture of those of 1 to n steps, in field space their weighted sum.

    Transitions come from `datamodules.LambdaEnvironment`: rewards and discounts (B, n), next observations
    (B, n, *shape). As with n steps, the steps within a target are those of the policy that collected the experience.

    Args:
        shape: as for `ReturnLearner`.
        actions: as for `ReturnLearner`.
        representation: as for `ReturnLearner`.
        lam: λ; 0 is one step, 1 is n steps.
        options: arguments of `ReturnLearner`.

    References:
        | Sutton, Learning to Predict by the Methods of Temporal Differences, 1988 (λ-returns)
        | Nam et al., GMAC: A Distributional Perspective on Actor-Critic Framework, arXiv 2105.11366 (as mixtures)
    """

    def __init__(
        self, shape: Sequence[int], actions: int, representation: Representation, lam: float = 0.8, **options: Any
    ) -> None:
        super().__init__(shape, actions, representation, **options)
        in_range(0, 1, lam=lam)
        self.lam = lam

    def backup(self, y: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Targets (B, outputs) for outputs (B, n, A, outputs) and rewards and discounts (B, n).

        Raises:
            UserError: for transitions of one length.
        """
        if reward.ndim != 2:
            raise UserError(
                "λ-returns need transitions of 1 to n steps: choose data=frozen_lake_lambda, or another config of "
                "datamodules.LambdaEnvironment"
            )
        each = super().backup(y.flatten(0, 1), reward.flatten(), discount.flatten()).unflatten(0, reward.shape)
        shares = lambda_shares(self.lam, reward.shape[1]).to(each)
        return self.representation.mixture(shares.expand(reward.shape), each)


class FreeReturnLearner(DistributionalLearner):
    """The paper's parametrisation: networks s(x; z, a) and g(x; z, a), trained at free query points.

    At points x uniform over the range, the targets are s'((x + n − r)/γ)/γ and g'((x + n − r)/γ)/γ² of the target
    network, with noise n of variance h²(1 − γ²) in place of the exact re-smoothing; N(x; r, h²) and its slope where the
    episode ended. Values, samples and figures read s at the representation's nodes.

    Args:
        shape: shape of an observation, from the data module.
        actions: number of actions, from the data module.
        representation: `GaussianFields` with learn="density"; `positive` rescales s to mass one in values and targets.
        hidden: as for `ReturnLearner`.
        queries: points x for each transition.
        gradient_weight: weight of the error of g, whose unit is h.
        options: arguments of `DistributionalLearner`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        actions: int,
        representation: GaussianFields,
        hidden: Sequence[int] = (64, 64),
        queries: int = 32,
        gradient_weight: float = 0.1,
        **options: Any,
    ) -> None:
        if representation.learn != "density":
            raise ValueError("networks in x give densities: set representation.learn=density")
        super().__init__(shape, actions, representation, **options)
        positive(queries=queries)
        in_range(0, float("inf"), gradient_weight=gradient_weight)
        self.queries, self.gradient_weight = queries, gradient_weight
        ends = float(representation.x[0]), float(representation.x[-1])
        self.learn_with(FieldNetworks(math.prod(self.shape), actions, hidden, *ends))

    def outputs(self, network: nn.Module, observation: Tensor) -> Tensor:
        """What the representation reads (B, A, outputs): s at the nodes."""
        rep = self.representation
        return network(observation.flatten(1), rep.x)[0].mT * rep.spacing - rep.start

    def compute(self, batch: Batch, generator: torch.Generator | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Squared errors of both fields on a batch of transitions.

        Raises:
            UserError: for transitions of several lengths.
        """
        observation, action, reward, discount, following = batch
        refuse_lengths(reward)
        rep, size = self.representation, (len(action), self.queries)
        rand = torch.rand(size, generator=generator, device=self.device)
        noise = torch.randn(size, generator=generator, device=self.device)
        x = self.network.low + (self.network.high - self.network.low) * rand
        r, gamma, ended = reward[:, None], discount[:, None].clamp_min(1e-6), (discount == 0)[:, None]
        with torch.no_grad():
            y = self.outputs(self.target_network, following)
            policy = self.policy(rep, rep.read(y))
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
