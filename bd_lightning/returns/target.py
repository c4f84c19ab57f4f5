"""Bellman targets of return distributions, and the loss against them."""

import torch
from torch import Tensor, nn

from bd_lightning.returns.representation import Representation


def mixed_policy(values: Tensor, uniform_policy: float = 0.0) -> Tensor:
    """Probabilities (B, A) of actions of these values (B, A): a share of the uniform policy, the rest the best one."""
    actions = values.shape[-1]
    best = nn.functional.one_hot(values.argmax(-1), actions).to(values.dtype)
    return (1 - uniform_policy) * best + uniform_policy / actions


def bellman_target(
    representation: Representation, y: Tensor, reward: Tensor, discount: Tensor, uniform_policy: float = 0.0
) -> Tensor:
    """The distributional Bellman target for a policy that is greedy, uniform, or a mixture of the two.

    The return under a policy is the mixture of the returns of its actions; it is taken over all actions exactly.

    Args:
        representation: how distributions are represented.
        y: outputs of the target network at the next state, shape (B, A, outputs).
        reward: shape (B,).
        discount: shape (B,), 0 where the episode ended.
        uniform_policy: share of the uniform policy: 0 is control, 1 evaluates the uniform policy.

    Returns:
        Targets, shape (B, outputs), without gradient.
    """
    with torch.no_grad():
        w = representation.read(y)
        policy = mixed_policy(representation.mean(w), uniform_policy)
        return representation.target((policy[..., None] * w).sum(-2), reward, discount)


def td_loss(representation: Representation, y: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Losses (B,) of outputs y (B, A, outputs) at the actions taken (B,) against targets (B, outputs)."""
    return representation.loss(
        y.gather(-2, action[..., None, None].expand(*action.shape, 1, y.shape[-1]))[..., 0, :], target
    )
