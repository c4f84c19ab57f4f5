"""Bellman targets of return distributions, and the loss against them."""

import torch
from torch import Tensor

from bd_lightning.returns.policies import Policy
from bd_lightning.returns.representation import Representation


def bellman_target(
    representation: Representation, y: Tensor, reward: Tensor, discount: Tensor, policy: Policy
) -> Tensor:
    """The distributional Bellman target for a policy.

    The return under a policy is the mixture of the returns of its actions; it is taken over all actions exactly, as
    expected SARSA does for means.

    Args:
        representation: how distributions are represented.
        y: outputs of the target network at the next state, shape (B, A, outputs).
        reward: shape (B,).
        discount: shape (B,), 0 where the episode ended.
        policy: whose returns are learned.

    Returns:
        Targets, shape (B, outputs), without gradient.

    References:
        | van Seijen et al., A Theoretical and Empirical Analysis of Expected Sarsa, 2009
    """
    with torch.no_grad():
        w = representation.read(y)
        return representation.target(representation.mixture(policy(representation, w), w), reward, discount)


def lambda_shares(lam: float, steps: int) -> Tensor:
    """Shares (steps,) of the targets of 1 … n steps in a λ-return cut after n: (1 − λ)λᵏ, the rest for the last."""
    shares = (1 - lam) * lam ** torch.arange(steps, dtype=torch.float64)
    shares[-1] = lam ** (steps - 1)
    return shares.float()


def td_loss(representation: Representation, y: Tensor, action: Tensor, target: Tensor) -> Tensor:
    """Losses (B,) of outputs y (B, A, outputs) at the actions taken (B,) against targets (B, outputs)."""
    return representation.loss(
        y.gather(-2, action[..., None, None].expand(*action.shape, 1, y.shape[-1]))[..., 0, :], target
    )
