"""Environments with finitely many states: their backups in field space, exact, with nothing sampled or trained.

For a fixed policy the one-step backup T of return distributions is linear in the transition probabilities,

    P = Σ_k c_k P_k    gives    T w = Σ_k c_k T_k w,    for every w,

so that outcomes of several dynamics are mixed by their shares. Its fixed point is not linear in them: Σ_k c_k w_k of
the fixed points w_k = T_k w_k is what follows if the dynamics are drawn once for a whole episode, not at every step. It
is where backups of the mixed operator start from; each brings it nearer to the fixed point of T, by √γ at least in
Cramér's distance, the mean by γ. Nor is a greedy policy fixed: `backup` takes the greedy one of its present argument.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.returns.policies import Policy
from bd_lightning.returns.representation import GaussianFields


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of state-action pairs with their probabilities, E of them in all.

    Args:
        states: number of states S.
        actions: number of actions A.
        pair: s · A + a of the state and action that each belongs to, shape (E,).
        share: its probability given these, (E,); those of a pair sum to one, or there is none.
        reward: (E,).
        discount: γ, or 0 where the episode ends, (E,).
        following: next state, (E,).
    """

    states: int
    actions: int
    pair: Tensor
    share: Tensor
    reward: Tensor
    discount: Tensor
    following: Tensor

    @property
    def known(self) -> Tensor:
        """Whether a pair has outcomes, shape (S, A)."""
        return torch.bincount(self.pair, minlength=self.states * self.actions).reshape(self.states, -1) > 0


def tabulated(table: Mapping[int, Mapping[int, Sequence[Any]]], gamma: float) -> Outcomes:
    """Outcomes of gymnasium's table `env.unwrapped.P`: state → action → [(probability, next state, reward, ended)]."""
    actions = len(table[0])
    rows = [
        (s * actions + a, share, reward, 0.0 if ended else gamma, int(following))
        for s, choices in table.items()
        for a, outcomes in choices.items()
        for share, following, reward, ended in outcomes
    ]
    pair, *numbers, following = zip(*rows)
    share, reward, discount = (torch.tensor(values, dtype=torch.float32) for values in numbers)
    return Outcomes(len(table), actions, torch.tensor(pair), share, reward, discount, torch.tensor(following))


def remembered(batch: Sequence[Tensor], actions: int) -> Outcomes:
    """Outcomes as often as they were seen in transitions of one step, states one-hot (n, S); equal ones are one.

    That a transition spans one step (data.n_step=1) cannot be seen in it.

    Raises:
        UserError: for observations that are no states, other actions than these, and for transitions of 1 to n steps,
            for λ-returns.
    """
    observation, action, reward, discount, following = batch
    if reward.ndim != 1:
        raise UserError("a table of outcomes needs transitions of one step: collect with data.n_step=1")
    if not ((action >= 0) & (action < actions)).all():
        raise UserError(
            f"of {actions} actions there are those from 0 to {actions - 1}; got {sorted(set(action.tolist()))}"
        )
    for states in (observation, following):
        if states.ndim != 2 or not ((states == 0) | (states == 1)).all() or not (states.sum(1) == 1).all():
            raise UserError("a table of outcomes needs states, one-hot (n, S), as environments with Discrete ones give")
    pair = observation.argmax(1) * actions + action
    rows = torch.stack([column.double() for column in (pair, reward, discount, following.argmax(1))], 1)
    rows, count = rows.unique(dim=0, return_counts=True)
    pair, reward, discount, after = rows.unbind(1)
    pair = pair.long()
    share = count / torch.bincount(pair, weights=count.double())[pair]
    return Outcomes(observation.shape[1], actions, pair, share.float(), reward.float(), discount.float(), after.long())


def mixed(parts: Sequence[tuple[float, Outcomes]]) -> Outcomes:
    """The dynamics that follow the k-th of these with probability share_k at every step; shares sum to one.

    Pairs that one of them has no outcomes of are left to the others.

    Raises:
        UserError: for shares that are none, and for dynamics of other states or actions.
    """
    if not (all(share >= 0 for share, _ in parts) and abs(sum(share for share, _ in parts) - 1) <= 1e-6):
        raise UserError(f"shares of dynamics must sum to one, none below zero; got {[share for share, _ in parts]}")
    parts = [(share, outcomes) for share, outcomes in parts if share]
    first = parts[0][1]
    if any((one.states, one.actions) != (first.states, first.actions) for _, one in parts):
        sizes = ", ".join(f"{one.states} and {one.actions}" for _, one in parts)
        raise UserError(f"dynamics that are mixed must have the same states and actions; these have {sizes}")
    known = sum(share * outcomes.known.float() for share, outcomes in parts).flatten()  # type: ignore[union-attr]
    shares = [share * outcomes.share / known[outcomes.pair] for share, outcomes in parts]
    names = ("pair", "reward", "discount", "following")
    rest = {name: torch.cat([getattr(outcomes, name) for _, outcomes in parts]) for name in names}
    return Outcomes(first.states, first.actions, share=torch.cat(shares), **rest)


def backup(representation: GaussianFields, outcomes: Outcomes, w: Tensor, policy: Policy) -> Tensor:
    """The Bellman operator T in field space: weights (S, A, N) of weights (S, A, N); pairs without outcomes stay.

    The policy is that of the argument w.

    Raises:
        UserError: for another representation, whose outputs are no linear function of weights, and for weights of
            other states, actions or nodes.
    """
    if not isinstance(representation, GaussianFields):
        raise UserError(f"exact backups need GaussianFields (model=returns), not {type(representation).__name__}")
    if w.shape != (shape := (outcomes.states, outcomes.actions, len(representation.x))):
        raise UserError(
            f"outcomes of {outcomes.states} states and {outcomes.actions} actions need weights of as many, of shape "
            f"{shape} with these nodes; got weights of shape {tuple(w.shape)}"
        )
    w = w.to(representation.x)
    following = representation.mixture(policy(representation, w), w)[outcomes.following]
    targets = outcomes.share[:, None] * representation.target(following, outcomes.reward, outcomes.discount)
    pairs = outcomes.states * outcomes.actions
    y = targets.new_zeros(pairs, targets.shape[1]).index_add(0, outcomes.pair, targets)
    new = representation.read(y).unflatten(0, (outcomes.states, outcomes.actions))
    return torch.where(outcomes.known[..., None], new, w)
