"""Quantiles, preferences, λ-returns and finite environments against closed forms."""

import math

import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.modules import ReturnLearner
from bd_lightning.returns import (
    Categorical,
    CVaR,
    GaussianFields,
    MeanReturn,
    Policy,
    Quantiles,
    Spread,
    UpperQuantile,
    bellman_target,
    lambda_shares,
    normal_cdf,
    wasserstein1,
)
from bd_lightning.returns.finite import backup, mixed, remembered, tabulated


def gaussian(rep: GaussianFields, mean: float, sd: float) -> torch.Tensor:
    return rep.read(normal_cdf((rep.points - mean) / sd) - rep.start)


# ---- QR-DQN


def test_transitions_of_several_lengths_are_for_lambda_returns():
    y = torch.zeros(3, 2, 5)
    with pytest.raises(UserError, match="choose model=returns_lambda"):
        ReturnLearner.backup(None, y, torch.zeros(3, 5), torch.zeros(3, 5))


class Short(Categorical):
    """A representation whose matrix lacks a row."""

    def matrix(self, reward, discount):
        return super().matrix(reward, discount)[:, 1:]


def test_a_matrix_of_another_shape_is_refused():
    """Fields of one's own: too few rows would fail in the loss, without a word why."""
    rep, same = Short(0, 1, 5), torch.zeros(2)
    with pytest.raises(UserError, match=r"Short.matrix gives the shape \[1, 4, 5\] .* not \[1, 5, 5\]: a row for each"):
        rep.target(torch.full((2, 5), 0.2), same, same + 0.9)


def test_quantiles_minimise_their_loss():
    """Against many draws of N(1, 0.5²), and where the Huber loss is all but linear."""
    rep = Quantiles(-2, 4, quantiles=11, kappa=0.01)
    draws = 1 + 0.5 * math.sqrt(2) * torch.erfinv(2 * (torch.arange(1100) + 0.5) / 1100 - 1)
    y = torch.zeros(1, 11, requires_grad=True)
    optimizer = torch.optim.Adam([y], 0.02)
    for k in range(400):
        loss = rep.loss(y.expand(100, -1), draws.reshape(11, 100).T).mean()  # every row has draws of all levels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - k / 400)
    expected = 1 + 0.5 * math.sqrt(2) * torch.erfinv(2 * rep.levels - 1)
    assert torch.allclose(rep.read(y.detach())[0], expected, atol=0.03)


def test_the_loss_of_quantiles_by_hand():
    """arXiv 1710.10044, Eq. 10, for two quantiles, levels ¼ and ¾, and both parts of the Huber loss."""
    rep = Quantiles(0, 2, quantiles=2, kappa=1.0)  # at 0.5 and 1.5, one apart
    target = torch.tensor([[0.0, 3.5]])
    huber = {0.5: 0.125, 3.0: 2.5, 1.5: 1.0, 2.0: 1.5}
    hand = (0.75 * huber[0.5] + 0.25 * huber[3.0]) / 2 + (0.25 * huber[1.5] + 0.75 * huber[2.0]) / 2
    assert float(rep.loss(torch.zeros(1, 2), target)) == pytest.approx(hand)


def test_quantiles_move_and_mix():
    rep = Quantiles(0, 10, quantiles=50)
    w = rep.read(torch.zeros(1, 50))  # uniform over [0, 10]
    moved = rep.target(w, torch.tensor([1.0]), torch.tensor([0.5]))
    assert torch.allclose(moved[0], 1 + 0.5 * rep.x)
    assert float(rep.mean(moved)) == pytest.approx(3.5) and float(rep.outside(w, *torch.tensor([[6.0], [1.0]]))) > 0.5
    both = torch.stack([torch.full((50,), 2.0), torch.linspace(5, 7, 50)])
    half = rep.mixture(torch.tensor([0.4, 0.6]), both)
    assert (half == 2.0).sum() == 20 and float(half[20:].mean()) == pytest.approx(6.0, abs=0.05)
    assert torch.equal(rep.mixture(torch.tensor([0.0, 1.0]), both), both[1])  # a greedy policy
    x = torch.linspace(-5, 15, 4001)
    s, _ = rep.fields(w[0], x)
    narrow, slope = rep.fields(torch.tensor([3.0]), torch.tensor([2.9, 3.1]))
    assert narrow.tolist() == pytest.approx([2.5, 2.5]) and slope.tolist() == pytest.approx([25.0, -25.0])
    assert float(rep.cdf(w[0], x)[-1]) == 1.0 and float(s.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-3)
    assert float((x * s).sum() * (x[1] - x[0])) == pytest.approx(5.0, abs=1e-2)


def test_a_quantile_is_spread_over_the_distance_between_quantiles():
    rep = Quantiles(0, 10, quantiles=50)
    f = rep.cdf(torch.tensor([3.0]), torch.tensor([2.9, 2.95, 3.0, 3.1]))
    assert f.tolist() == pytest.approx([0, 0.25, 0.5, 1], abs=1e-5)


def test_quantiles_are_outside_beyond_half_of_their_distance():
    rep = Quantiles(0, 10, quantiles=10)
    w = torch.tensor([[-0.6, -0.4, 0.4, 2.0, 4.0, 6.0, 8.0, 9.6, 10.4, 10.6]])
    assert float(rep.outside(w, torch.zeros(1), torch.ones(1))) == pytest.approx(0.2)


@pytest.mark.parametrize("actions", [2, 4])
def test_mixtures_of_alike_shares_keep_the_mean(actions):
    """The uniform policy where actions differ by what they pay at once: V = E[r]/(1 − γ), with ties at every level."""
    rep, reward = Quantiles(0, 10), torch.linspace(0, 1, actions)
    shares, w = torch.full((actions,), 1 / actions), rep.read(torch.zeros(51))
    for _ in range(200):
        w = rep.mixture(shares, rep.target(w.expand(actions, -1), reward, torch.full((actions,), 0.9)))
    assert float(rep.mean(w)) == pytest.approx(5.0, abs=0.03)  # the lower of two neighbours has 4.60 for two actions
    assert (
        float(rep.mixture(torch.ones(2) / 2, torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(1, 26)[:, :51]).mean())
        == 0.5
    )


def test_our_quantile_loss_is_that_of_another_implementation():
    utils = pytest.importorskip("sb3_contrib.common.utils", reason="sb3-contrib: uv sync --group benchmarks")
    rep = Quantiles(0, 1, quantiles=7, kappa=7.0)  # one unit of reward
    generator = torch.Generator().manual_seed(0)
    y, target = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    y.requires_grad_()
    theirs = utils.quantile_huber_loss(rep.read(y), target, sum_over_quantiles=True)
    (a,) = torch.autograd.grad(theirs, y)
    (b,) = torch.autograd.grad(rep.loss(y, target).mean() * rep.spacing, y)  # theirs is not divided by κ
    assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 1e-2


# ---- preferences


def test_preferences_of_gaussians():
    """Actions N(1, 0.3²), N(1.2, 1²): the second has the better mean, the first the better tail."""
    rep = GaussianFields(-4, 6, nodes=80)
    w = torch.stack([gaussian(rep, 1.0, 0.3), gaussian(rep, 1.2, 1.0)])[None]
    assert MeanReturn()(rep, w)[0].tolist() == pytest.approx([1.0, 1.2], abs=1e-3)
    assert UpperQuantile(0.9)(rep, w)[0].tolist() == pytest.approx([1 + 1.2816 * 0.3, 1.2 + 1.2816], abs=0.02)
    assert Spread(-0.5)(rep, w)[0].tolist() == pytest.approx([0.85, 0.7], abs=0.02)
    for far in (0.0, 1e3, 1e4):
        away = GaussianFields(far, far + 1)
        one = away.read(normal_cdf((away.points - far - 0.5) / 0.1) - away.start)
        assert float(Spread()(away, one) - away.mean(one)) == pytest.approx(0.1, abs=0.01)
    shortfall = math.exp(-(1.2816**2) / 2) / math.sqrt(2 * math.pi) / 0.1
    assert CVaR(0.1)(rep, w)[0].tolist() == pytest.approx([1 - 0.3 * shortfall, 1.2 - shortfall], abs=0.02)
    assert Policy(MeanReturn(), 0.2)(rep, w)[0].tolist() == pytest.approx([0.1, 0.9])
    assert Policy(CVaR(0.1))(rep, w)[0].tolist() == [1.0, 0.0]
    for wrong in (lambda: CVaR(0.0), lambda: UpperQuantile(1.2), lambda: Policy(uniform=-1.0)):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_a_cautious_target_is_that_of_the_safe_action():
    rep = GaussianFields(-4, 6, nodes=80)
    y = torch.stack([normal_cdf((rep.points - m) / sd) - rep.start for m, sd in ((1.0, 0.3), (1.2, 1.0))])[None]
    r, gamma = torch.tensor([0.1]), torch.tensor([0.9])
    for preference, action in ((MeanReturn(), 1), (CVaR(0.1), 0)):
        target = bellman_target(rep, y, r, gamma, Policy(preference))
        assert torch.allclose(target, rep.target(rep.read(y[:, action]), r, gamma), atol=1e-6)


# ---- λ-returns


def test_shares_of_lambda_returns():
    assert lambda_shares(0.5, 4).tolist() == [0.5, 0.25, 0.125, 0.125]
    assert lambda_shares(0.0, 3).tolist() == [1, 0, 0] and lambda_shares(1.0, 3).tolist() == [0, 0, 1]


# ---- finite environments

GAMMA = 0.8


def chain(ahead: float) -> dict:
    """Three states and an end: on with this probability (reward 1), else stay (−1); the other action ends."""
    table = {}
    for s in range(3):
        on = [(ahead, s + 1, 1.0, s == 2), (1 - ahead, s, -1.0, False)]
        table[s] = {0: on, 1: [(1.0, 3, 0.5, True)]}
    return table | {3: {a: [(1.0, 0, 5.0, False)] for a in (0, 1)}}  # where an episode has ended nothing follows


def values(ahead: float) -> list[float]:
    """Values of going on, by hand: v = a (1 + γv') + (1 − a)(−1 + γv)."""
    v = 0.0
    found = []
    for last in (True, False, False):
        v = (ahead * (1 + (0.0 if last else GAMMA * v)) - (1 - ahead)) / (1 - GAMMA * (1 - ahead))
        found.append(v)
    return found[::-1]


class GoOn:
    """Scores that prefer the first action."""

    def __call__(self, representation, w):
        return torch.tensor([1.0, 0.0]).expand(w.shape[:-1])


def fixed_point(rep, outcomes, w=None, backups=150):
    w = rep.read(torch.zeros(4, 2, rep.outputs)) if w is None else w
    for _ in range(backups):
        w = backup(rep, outcomes, w, Policy(GoOn()))
    with pytest.raises(UserError, match="exact backups need GaussianFields .*, not Categorical"):
        backup(Categorical(-3, 3), outcomes, w, Policy(GoOn()))
    return w


def test_backups_of_a_chain_solve_it_and_dynamics_mix_at_every_step():
    """The mixed operator has the fixed point of the mixed dynamics; the mixture of fixed points is another one."""
    rep = GaussianFields(-7, 5, nodes=120)
    surely, hardly = tabulated(chain(1.0), GAMMA), tabulated(chain(0.4), GAMMA)
    w = [fixed_point(rep, outcomes) for outcomes in (surely, hardly)]
    for own, ahead in zip(w, (1.0, 0.4)):
        assert rep.mean(own)[:3, 0].tolist() == pytest.approx(values(ahead), abs=0.01)
        assert rep.mean(own)[:3, 1].tolist() == pytest.approx([0.5] * 3, abs=0.01)
    both = mixed([(0.5, surely), (0.5, hardly)])
    once = 0.5 * backup(rep, surely, w[0], Policy(GoOn())) + 0.5 * backup(rep, hardly, w[0], Policy(GoOn()))
    assert torch.allclose(backup(rep, both, w[0], Policy(GoOn())), once, atol=1e-5)  # linear in the dynamics
    mixture = 0.5 * (w[0] + w[1])
    errors = [float((rep.mean(fixed_point(rep, both, mixture, k))[0, 0] - values(0.7)[0]).abs()) for k in (0, 3, 40)]
    assert errors[0] > 0.3 and errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01
    # and the whole distribution, against simulation
    generator = torch.Generator().manual_seed(0)
    total, weight, at = torch.zeros(20_000), torch.ones(20_000), torch.zeros(20_000)
    for _ in range(60):
        alive, on = at < 3, torch.rand(20_000, generator=generator) < 0.7
        total += alive * weight * torch.where(on, 1.0, -1.0)
        at, weight = at + alive * on, weight * GAMMA
    total += rep.h * torch.randn(20_000, generator=generator)
    x = rep.grid()
    assert float(wasserstein1(x, rep.cdf(fixed_point(rep, both)[0, 0], x), total)) < 0.03


def test_outcomes_are_remembered_and_unknown_pairs_stay():
    """As often as they were seen; a pair that only one of two dynamics knows is left to that one."""
    eye = torch.eye(4)
    action, reward = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5])
    discount = torch.tensor([GAMMA, GAMMA, GAMMA, GAMMA, 0.0])
    batch = (eye[[0, 0, 0, 1, 0]], action, reward, discount, eye[[1, 0, 1, 2, 3]])
    seen = remembered(batch, 2)
    assert seen.known.tolist() == [[True, True], [True, False], [False, False], [False, False]]
    assert seen.share[seen.pair == 0].tolist() == pytest.approx([1 / 3, 2 / 3]) and len(seen.share) == 4
    rep = GaussianFields(-7, 5, nodes=60)
    w = rep.read(0.05 * torch.randn(4, 2, rep.outputs, generator=torch.Generator().manual_seed(1)))
    new = backup(rep, seen, w, Policy())
    assert torch.equal(new[2:], w[2:]) and torch.equal(new[1, 1], w[1, 1])
    best = rep.mean(w).amax(1)
    hand = (2 * (1 + GAMMA * best[1]) + (-1 + GAMMA * best[0])) / 3
    assert float(rep.mean(new)[0, 0]) == pytest.approx(float(hand), abs=0.01)
    assert float(rep.mean(new)[0, 1]) == pytest.approx(0.5, abs=0.01)  # where the episode ended
    both = mixed([(0.3, seen), (0.7, tabulated(chain(0.5), GAMMA))])
    totals = torch.zeros(8).index_add(0, both.pair, both.share)
    assert torch.allclose(totals, torch.ones(8))
    alone = mixed([(1.0, seen), (0.0, tabulated(chain(0.5), GAMMA))])  # nothing is known of the other pairs then
    assert torch.equal(alone.known, seen.known) and alone.share.isfinite().all()
    alone = both.share[both.pair == 3]
    assert alone.tolist() == [1.0]  # state 1, action 1: the table's


def test_tables_that_do_not_fit_are_refused():
    rep, eye, one = GaussianFields(-7, 5, nodes=20), torch.eye(3), torch.ones(2)
    small = remembered((eye[:2], one.long(), one, one, eye[:2]), 2)
    large = tabulated(chain(0.5), GAMMA)
    for wrong, sentence in (
        (lambda: mixed([(0.7, small), (0.7, small)]), "must sum to one"),
        (lambda: mixed([]), "must sum to one"),
        (lambda: mixed([(math.nan, small), (0.5, small)]), "must sum to one"),
        (lambda: mixed([(1.5, small), (-0.5, small)]), "none below zero"),
        (lambda: mixed([(0.5, small), (0.5, large)]), "the same states and actions; these have 3 and 2, 4 and 2"),
        (lambda: backup(rep, small, torch.zeros(4, 2, rep.outputs), Policy()), "3 states and 2 actions need weights"),
        (lambda: remembered((eye[:2] + 0.1, one.long(), one, one, eye[:2]), 2), "needs states, one-hot"),
        (lambda: remembered((eye[:2], one.long(), torch.ones(2, 4), one, eye[:2]), 2), "transitions of one step"),
        (lambda: remembered((eye[:2], one.long(), one, one, eye[:2]), 1), r"from 0 to 0; got \[1\]"),
        (lambda: backup(rep, small, torch.zeros(3, 2, 5), Policy()), r"got weights of shape \(3, 2, 5\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            wrong()
    w = torch.zeros(3, 2, len(rep.x))
    assert torch.equal(backup(rep, small, w.double(), Policy()), backup(rep, small, w, Policy()))


def test_mixtures_of_targets_are_linear_in_fields_and_not_in_quantiles():
    shares = torch.tensor([0.3, 0.7])
    for rep in (GaussianFields(-3, 3), Categorical(-3, 3)):
        w = rep.read(0.1 * torch.randn(2, rep.outputs, generator=torch.Generator().manual_seed(0)))
        assert torch.allclose(rep.mixture(shares, w), shares @ w)
    rep = Quantiles(-3, 3)
    w = rep.read(torch.stack([torch.zeros(51), torch.full((51,), 0.3)]))
    assert not torch.allclose(rep.mixture(shares, w), shares @ w, atol=0.1)
    assert float(rep.mean(rep.mixture(shares, w))) == pytest.approx(float(shares @ rep.mean(w)), abs=0.05)
