"""Return distributions against closed forms."""

import math

import pytest
import torch

from bd_lightning.dynamics import BellmanDynamics, SampleNoise
from bd_lightning.returns import (
    Categorical,
    GaussianFields,
    Policy,
    PositiveFields,
    Quantiles,
    ReturnFields,
    Spread,
    UpperQuantile,
    bellman_target,
    conditional_value_at_risk,
    mixed_policy,
    monotone,
    normal,
    normal_cdf,
    quantile,
    ruin,
    sample_by_inverse_cdf,
    sample_by_sde,
    wasserstein1,
)

LEARN = ["cumulative", "density"]


def fitted(rep: GaussianFields, mean: float, sd: float) -> torch.Tensor:
    """Weights of N(mean, sd²), sd above h, by what the representation itself is asked for at its points."""
    u = rep.points - mean
    y = normal_cdf(u / sd) if rep.learn == "cumulative" else normal(u, sd**2) * rep.spacing
    return rep.read(y - rep.start)


def distance(rep, w, mean, sd):
    """Largest errors of s, g and F against N(mean, sd²), relative to its largest values."""
    x = rep.grid().clamp(rep.v_min, rep.v_max)
    s, g = rep.fields(w, x)
    p = normal(x - mean, sd**2)
    slope = -(x - mean) / sd**2 * p
    cdf = normal_cdf((x - mean) / sd)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in ((s, p), (g, slope), (rep.cdf(w, x), cdf))]


@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize(("bandwidth", "tolerance"), [(0.7, 0.01), (1.0, 0.002)])  # of interpolation
def test_target_is_exact_for_gaussian_returns(learn, bandwidth, tolerance):
    """N(1, 1) before, reward 0.7, γ = 0.9: N(0.7 + γ, γ²(1 − h²) + h²), since noise of variance h²(1 − γ²) is added."""
    rep = GaussianFields(-6, 8, nodes=60, learn=learn, bandwidth=bandwidth)
    w = fitted(rep, 1.0, 1.0)
    assert max(distance(rep, w, 1.0, 1.0)) < tolerance
    after = rep.read(rep.target(w[None], torch.tensor([0.7]), torch.tensor([0.9])))[0]
    sd = math.sqrt(0.81 * (1 - rep.h**2) + rep.h**2)
    assert max(distance(rep, after, 1.6, sd)) < tolerance
    assert float(rep.mean(after)) == pytest.approx(1.6, abs=1e-3)


@pytest.mark.parametrize("learn", LEARN)
def test_several_steps_are_one_with_their_discount(learn):
    """Three backups of one step, and one with r + γr + γ²r and γ³, are N(…) alike."""
    rep = GaussianFields(-6, 8, nodes=60, learn=learn, bandwidth=1.0)
    w, r, gamma = fitted(rep, 1.0, 1.0)[None], torch.tensor([0.3]), torch.tensor([0.8])
    once = rep.read(rep.target(w, r * (1 + 0.8 + 0.64), gamma**3))
    thrice = w
    for _ in range(3):
        thrice = rep.read(rep.target(thrice, r, gamma))
    sd = math.sqrt(0.8**6 * (1 - rep.h**2) + rep.h**2)
    assert max(distance(rep, once[0], 0.3 * 2.44 + 0.512, sd)) < 5e-3
    assert max(distance(rep, thrice[0], 0.3 * 2.44 + 0.512, sd)) < 1e-2


@pytest.mark.parametrize("learn", LEARN)
def test_terminal_target_is_the_kernel_at_the_reward(learn):
    rep = GaussianFields(-1, 2, learn=learn)
    w = fitted(rep, 0.5, 0.4)
    target = rep.target(w[None], torch.tensor([0.31]), torch.tensor([0.0]))[0] + rep.start
    u = rep.points - 0.31
    kernel = normal_cdf(u / rep.h) if learn == "cumulative" else normal(u, rep.h**2) * rep.spacing
    assert torch.allclose(target, kernel, atol=1e-5)


@pytest.mark.parametrize("learn", LEARN)
def test_targets_and_values_are_linear_in_mixtures(learn):
    """Mixtures of returns, and of transition models: with negative weights too."""
    rep = GaussianFields(-3, 3, learn=learn)
    w = torch.stack([fitted(rep, m, 0.5) for m in (-1.0, 0.2, 1.1)])
    a = torch.tensor([0.7, 0.9, -0.6])
    r, gamma = torch.full((1,), 0.25), torch.full((1,), 0.9)
    whole = rep.target((a @ w)[None], r, gamma)[0]
    parts = rep.target(w, r.expand(3), gamma.expand(3))
    assert torch.allclose(whole, a @ parts, atol=1e-5)
    assert torch.allclose(rep.mean(a @ w), a @ rep.mean(w), atol=1e-5)
    assert torch.allclose(rep.read(whole), a @ rep.read(parts), atol=1e-4)


def test_positive_part_is_not_linear_and_has_mass_one():
    rep = GaussianFields(-3, 3, positive=True)
    y = 0.1 * torch.randn(20, rep.outputs, generator=torch.Generator().manual_seed(0))
    w = rep.read(y)
    assert torch.allclose(w.sum(1), torch.ones(20), atol=1e-4)
    assert float((w @ rep.gram).min()) > -1e-4
    assert not torch.allclose(rep.read(y.mean(0)), w.mean(0), atol=1e-3)


@pytest.mark.parametrize("kind", [GaussianFields, PositiveFields, Categorical])
def test_values_are_not_rounded_where_networks_have_half_precision(kind):
    rep = kind(0.0, 1.0)
    y, step = 0.01 * torch.randn(5, rep.outputs, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 5)

    def found():
        w = rep.read(y)
        return w, rep.mean(w), rep.target(w, step, 0.9 * step), *rep.fields(w, step), rep.cdf(w, step)

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(plain, found()):
            assert torch.equal(one, other)


def test_mass_is_one_whatever_the_network_says():
    for options in ({"learn": "cumulative"}, {"learn": "density"}):
        rep = GaussianFields(-3, 3, **options)
        w = rep.read(torch.randn(50, rep.outputs, generator=torch.Generator().manual_seed(0)))
        assert torch.allclose(w.sum(1), torch.ones(50), atol=1e-3)
    free = GaussianFields(-3, 3, learn="density", mass=False)
    assert (free.read(torch.ones(1, free.outputs)).sum(1) - 1).abs() > 0.5


@pytest.mark.parametrize("learn", LEARN)
def test_learning_starts_with_the_uniform_distribution_over_the_range(learn):
    rep = GaussianFields(0, 1, nodes=150, padding=50, learn=learn)  # and no share for the padding
    x = torch.tensor([0.0, 0.25, 1.0])
    assert torch.allclose(rep.cdf(rep.read(torch.zeros(rep.outputs)), x), x, atol=rep.spacing)


@pytest.mark.parametrize(
    "rep",
    [GaussianFields(0, 1, padding=0), PositiveFields(0, 1, padding=0), Categorical(0, 1), Quantiles(0, 1)],
    ids=lambda rep: type(rep).__name__,
)
def test_grids_reach_beyond_all_mass(rep):
    f = rep.cdf(rep.read(torch.zeros(rep.outputs)), rep.grid())
    assert f[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-5)


def test_positive_fields_are_backed_up_exactly():
    """The target is the density of r + γ(G + hn), its width restored; what leaves the range stays at its ends."""
    rep = PositiveFields(-4, 6, nodes=60)
    w = rep.read(torch.randn(3, rep.outputs, generator=torch.Generator().manual_seed(1)))
    reward, discount = torch.tensor([0.5, -0.3, 30.0]), torch.tensor([0.9, 0.0, 0.5])
    target = rep.target(w, reward, discount) / rep.spacing
    assert torch.allclose(target.sum(1) * rep.spacing, torch.ones(3))
    moved = (reward[:, None] + discount[:, None] * rep.x).clamp(-4, 6)
    density = torch.distributions.Normal(moved[:, None], rep.h).log_prob(rep.x[:, None]).exp()
    torch.testing.assert_close(target, (density * w[:, None]).sum(-1), atol=1e-4, rtol=1e-3)
    assert float((target[2] * rep.x).sum() * rep.spacing) == pytest.approx(6, abs=1e-3)
    for padding in (0, 3):  # at the ends exactly, whatever the padding
        short = PositiveFields(-4, 6, nodes=60, bandwidth=1.0, padding=padding)
        w = short.read(torch.zeros(1, short.outputs))
        for far, node in ((-9.0, padding), (30.0, -1 - padding)):
            end = short.target(w, torch.tensor([far]), torch.tensor([0.5]))[0]
            torch.testing.assert_close(end, short.shares[node], atol=1e-6, rtol=1e-3)
    for shares in (rep.shares, rep.matrix(reward, discount)):  # no denormal numbers, which take ten times as long
        assert float(shares[shares > 0].min()) > 1e-13
    w = rep.read(torch.randn(3, rep.outputs))
    mixed = rep.mixture(torch.tensor([0.2, 0.5, 0.3]), w)
    torch.testing.assert_close(rep.fields(mixed, rep.x)[1], torch.tensor([0.2, 0.5, 0.3]) @ rep.fields(w, rep.x)[1])


def test_the_likelihood_is_greatest_at_the_target():
    """Where the target is one of the fields: elsewhere it is the nearest in Kullback and Leibler's sense."""
    rep = PositiveFields(-4, 6, nodes=60)
    y = torch.zeros(rep.outputs)
    y[20:30] = 9.0
    target = rep.target(rep.read(y[None]), torch.tensor([2 * rep.spacing]), torch.tensor([1.0]))[0]
    shifted = y.roll(2).requires_grad_()
    loss = rep.loss(shifted, target)
    loss.backward()
    assert shifted.grad.abs().max() < 1e-3 < rep.loss(y, target) - loss
    entropy = -(target * (target.clamp_min(1e-30)).log()).sum()
    assert float(loss - entropy) == pytest.approx(0, abs=2e-3)


def test_positive_fields_learn_the_returns_of_a_chain():
    """0 → 0 or 1 with equal chances, reward 0.4; 1 → end, reward −0.5; γ = 0.8: means 1/3 and −0.5."""
    rep = PositiveFields(-3, 4, nodes=60)
    y = torch.zeros(2, rep.outputs, requires_grad=True)
    optimizer = torch.optim.Adam([y], 0.1)
    for _ in range(600):
        with torch.no_grad():
            w = rep.read(y)
            after = torch.stack([w.mean(0), w[1]])
            target = rep.target(after, torch.tensor([0.4, -0.5]), torch.tensor([0.8, 0.0]))
        optimizer.zero_grad()
        rep.loss(y, target).sum().backward()
        optimizer.step()
    with torch.no_grad():
        means = rep.mean(rep.read(y))
        torch.testing.assert_close(means, torch.tensor([1 / 3, -0.5]), atol=0.02, rtol=0)
        s = rep.fields(rep.read(y)[1], rep.x)[0]
    assert float((s - torch.distributions.Normal(-0.5, rep.h).log_prob(rep.x).exp()).abs().max()) < 0.1 * float(s.max())


def test_means_of_positive_fields_are_off_by_an_eighth_of_a_node_at_most():
    """States of constant rewards, γ = 0.97: the positive field nearest to a target, by EM, again and again."""
    rep = PositiveFields(0, 2)
    reward = 0.03 + 0.03 * rep.spacing * torch.arange(8) / 8  # all fractions of a node
    w = rep.read(torch.zeros(8, rep.outputs)).double()
    gram, discount = rep.shares.double(), torch.full((8,), 0.97)
    for _ in range(250):
        target = rep.target(w.float(), reward, discount).double()
        for _ in range(60):
            w = w * ((target / (w @ gram).clamp_min(1e-300)) @ gram.T)
    off = (rep.mean(w.float()) - reward / 0.03).abs().max()
    assert 0.05 * rep.spacing < float(off) < 0.125 * rep.spacing


def two_states(rep, w, backups):
    """Backups of a chain 0 → 0 or 1 with equal chances, reward 0.4; 1 → end, reward −0.5; γ = 0.8."""
    for _ in range(backups):
        following = torch.stack([w.mean(0), w[1]])
        w = rep.read(rep.target(following, torch.tensor([0.4, -0.5]), torch.tensor([0.8, 0.0])))
    return w


@pytest.mark.parametrize("learn", LEARN)
def test_backups_contract_to_the_returns_of_a_chain(learn):
    """Successive differences in Cramér's distance shrink by √γ at least, and the fixed point has the exact returns."""
    rep = GaussianFields(-2, 4, nodes=120, learn=learn)
    x = rep.grid()
    w, differences = torch.stack([fitted(rep, m, 0.5) for m in (0.0, 1.0)]), []
    for _ in range(12):
        new = two_states(rep, w, 1)
        differences.append(float((rep.cdf(new - w, x)).square().sum().sqrt()))
        w = new
    assert all(b < math.sqrt(0.8) * a + 1e-3 for a, b in zip(differences[1:], differences[2:]))
    w = two_states(rep, w, 200)
    # T visits of state 0, T geometric: G = 0.4 (1 − 0.8^T)/0.2 − 0.5·0.8^T
    generator = torch.Generator().manual_seed(0)
    visits = torch.empty(200_000).geometric_(0.5, generator=generator)
    returns = 2 * (1 - 0.8**visits) - 0.5 * 0.8**visits
    smoothed = returns + rep.h * torch.randn(len(returns), generator=generator)
    assert float(rep.mean(w[0])) == pytest.approx(float(returns.mean()), abs=0.01)
    assert float(wasserstein1(x, rep.cdf(w[0], x), smoothed)) < 0.01


def test_categorical_projection_against_the_algorithm_of_the_paper():
    """Algorithm 1 of arXiv 1707.06887, atom by atom."""
    rep = Categorical(-2, 3, atoms=11)
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(6, 11, generator=generator).softmax(1)
    reward = torch.tensor([0.3, -1.7, 2.5, 0.0, 0.5, 9.0])
    discount = torch.tensor([0.9, 0.9, 0.9, 0.0, 1.0, 0.9])
    expected = torch.zeros_like(p)
    for i in range(6):
        for j in range(11):
            moved = min(3.0, max(-2.0, float(reward[i] + discount[i] * rep.x[j])))
            b = (moved + 2) / 0.5
            low, high = math.floor(b + 1e-6), math.ceil(b - 1e-6)
            if low == high:
                expected[i, low] += p[i, j]
            else:
                expected[i, low] += p[i, j] * (high - b)
                expected[i, high] += p[i, j] * (b - low)
    for size in (1, 20):  # both ways of multiplying
        found = rep.target(p.repeat(size, 1), reward.repeat(size), discount.repeat(size))
        assert torch.allclose(found, expected.repeat(size, 1), atol=1e-5)


def test_policies_mix_and_targets_follow():
    values = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.0, 0.1]])
    assert mixed_policy(values, 0.3).tolist() == [
        pytest.approx([0.1, 0.8, 0.1]),
        pytest.approx([0.8, 0.1, 0.1]),
    ]
    rep = GaussianFields(-1, 2)
    y = 0.05 * torch.randn(4, 3, rep.outputs, generator=torch.Generator().manual_seed(0))
    r, gamma = torch.full((4,), 0.1), torch.full((4,), 0.9)
    greedy, uniform, mixed = (bellman_target(rep, y, r, gamma, Policy(uniform=share)) for share in (0.0, 1.0, 0.25))
    assert torch.allclose(mixed, 0.75 * greedy + 0.25 * uniform, atol=1e-5)
    best = rep.mean(rep.read(y)).argmax(1)
    assert torch.allclose(greedy, rep.target(rep.read(y)[range(4), best], r, gamma), atol=1e-6)


def test_quantiles_of_levels_below_a_distribution_function_are_the_first_point():
    x = torch.tensor([1.0, 2.0, 4.0])
    found = quantile(x, torch.tensor([0.2, 0.6, 1.0]), torch.tensor([0.0, 0.1, 0.4, 0.6, 1.0]))
    assert found.tolist() == pytest.approx([1, 1, 1.5, 2, 4])


def test_ruin_between_the_points_of_a_grid_and_beyond_them():
    x, cdf = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 0.2, 1.0])
    assert [float(ruin(x, cdf, at)) for at in (-1.0, 0.5, 1.25, 9.0)] == pytest.approx([0, 0.1, 0.4, 1])


def test_risk_measures_of_a_gaussian():
    rep = GaussianFields(-6, 8, nodes=60)
    w, x = fitted(rep, 1.0, 1.2), rep.grid()
    cdf = rep.cdf(w, x)
    assert quantile(x, cdf, torch.tensor([0.05, 0.5])).tolist() == pytest.approx([1 - 1.6449 * 1.2, 1.0], abs=0.01)
    shortfall = 1 - 1.2 * math.exp(-(1.6449**2) / 2) / math.sqrt(2 * math.pi) / 0.05
    assert float(conditional_value_at_risk(x, cdf, 0.05)) == pytest.approx(shortfall, abs=0.01)
    assert float(conditional_value_at_risk(x, cdf, 1.0)) == pytest.approx(1.0, abs=0.01)
    assert float(ruin(x, cdf, -0.2)) == pytest.approx(float(normal_cdf(torch.tensor(-1.0))), abs=0.003)


def test_errors_of_a_distribution_function_count_against_it():
    """N(−6.5, 0.7²) on a wide range, with errors of F of either sign, as fields of any sign have: caution, by 0.9."""
    x = torch.linspace(-25, 0, 201)
    cdf = normal_cdf((x + 6.5) / 0.7) + 0.005 * torch.randn(400, 201, generator=torch.Generator().manual_seed(0))
    exact = -6.5 - 0.7 * 1.755  # φ(Φ⁻¹(0.1))/0.1
    assert -1.1 < float(conditional_value_at_risk(x, cdf, 0.1).mean()) - exact < -0.6


def test_wasserstein_of_shifted_samples():
    x = torch.linspace(-6, 6, 4001)
    samples = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [0.3], [-1.0]])
    assert wasserstein1(x, normal_cdf(x), samples).tolist() == pytest.approx([0.0, 0.3, 1.0], abs=0.015)


def test_categorical_densities_have_mass_one_and_their_slopes():
    rep = Categorical(-2, 3, atoms=11)
    w = torch.rand(11, generator=torch.Generator().manual_seed(0)).softmax(0)
    x = torch.linspace(-3, 4, 70_001)
    s, g = rep.fields(w, x)
    assert float(s.sum() * (x[1] - x[0])) == pytest.approx(1, abs=2e-3)
    assert float((x * s).sum() * (x[1] - x[0])) == pytest.approx(float(rep.mean(w)), abs=2e-3)
    slope = (s[2:] - s[:-2]) / (x[2] - x[0])
    assert float((slope - g[1:-1]).abs().median()) < 1e-2
    assert float((rep.cdf(w, x)[1:] - rep.cdf(w, x)[:-1]).sum()) == pytest.approx(1, abs=1e-5)


def test_categorical_steps_are_reached_at_their_atoms():
    rep = Categorical(0, 2, atoms=3, interpolate=False)
    w, x = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-0.1, 0.0, 0.9, 1.0, 2.0])
    assert rep.cdf(w, x).tolist() == pytest.approx([0, 0.2, 0.2, 0.7, 1])


def test_fields_of_one_distribution_are_none_where_its_density_is_negative():
    fields = ReturnFields(torch.tensor([0.0, 2.0]), 0.5, torch.tensor([1.5, -0.5]))
    x, sigma = torch.tensor([[0.0], [2.0]]), torch.zeros(2)
    s, g = fields(x, sigma)
    assert s[0] > 0 and s[1] == 0 and g[1] == 0
    _, S, slope = fields.log_gradients(x, sigma)
    assert S[1] == 0 and slope[1] == 0


def test_the_typical_density_of_one_return_is_the_mean_of_its_density():
    fields, x = ReturnFields(torch.tensor([3.0]), 0.5, torch.ones(1)), torch.linspace(-10, 16, 4001)
    for level in (0.0, 1.2):
        s, _ = fields(x[:, None], x.new_full((len(x),), level))
        mean = float(s.square().sum() * (x[1] - x[0]))
        assert float(fields.reference(torch.tensor(level))) == pytest.approx(mean, rel=1e-3)


def test_the_sde_ends_with_the_width_of_the_kernel():
    rep = GaussianFields(0, 10)
    draws = sample_by_sde(rep, torch.eye(len(rep.x))[[25]], range(1000))
    assert float(draws.mean()) == pytest.approx(float(rep.x[25]), abs=0.1 * rep.h)
    assert float(draws.std()) == pytest.approx(rep.h, rel=0.1)


def test_returns_by_inverse_cdf_have_noise_of_their_own():
    rep = GaussianFields(0, 10)
    w = fitted(rep, 5.0, 1.0)
    one, other = sample_by_inverse_cdf(rep, torch.stack([w, w]), range(2000)).T
    for draws in (one, other):
        assert float(draws.mean()) == pytest.approx(5, abs=0.1) and float(draws.std()) == pytest.approx(1, abs=0.06)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


def test_sde_with_an_annealed_width_draws_the_returns():
    """Two modes far apart, weights .3 and .7: the dynamics at the kernel's own width freeze from a uniform start."""
    rep = GaussianFields(0, 10, nodes=57)
    w = 0.3 * fitted(rep, 2.0, 0.4) + 0.7 * fitted(rep, 7.0, 0.6)
    grid, n = rep.grid(), 2000
    cdf = rep.cdf(w, grid)
    annealed, other = sample_by_sde(rep, torch.stack([w, w]), range(n)).T
    assert abs(float(torch.corrcoef(torch.stack([annealed, other]))[0, 1])) < 0.1  # noise of its own for each
    assert float((annealed < 4.5).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(wasserstein1(grid, cdf, annealed)) < 0.15
    inverse = quantile(grid, cdf, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    assert float(wasserstein1(grid, cdf, inverse)) < 0.15
    plain = BellmanDynamics(steps=500, step_size=0.01, scale=3.0, start="uniform")
    frozen = 5 + plain(rep.field_pair(w, 5.0), SampleNoise(range(n), (1,), seed=0))[:, 0]
    assert float(wasserstein1(grid, cdf, frozen)) > 0.5


def test_mass_outside_the_range_is_counted():
    rep = GaussianFields(0, 10)
    w = fitted(rep, 9.0, 0.5)[None]
    inside, outside, at_the_edge = (
        float(rep.outside(w, torch.tensor([r]), torch.tensor([0.9]))) for r in (0.0, 5.0, 10.0 - 0.9 * 9.0)
    )
    assert inside < 0.01 and outside > 0.99 and 0.2 < at_the_edge < 0.8
    rep, moved = Categorical(0, 10, atoms=11), torch.tensor([[0.4], [0.6], [-0.4], [-0.6]])
    ends = torch.eye(11)[[10, 10, 0, 0]]
    assert rep.outside(ends, moved[:, 0], torch.ones(4)).tolist() == [0, 1, 0, 1]  # nearer to an end than a neighbour


def test_negative_weights_outside_the_range_do_not_cancel_positive_ones():
    rep = GaussianFields(0, 10)
    w = torch.zeros(1, len(rep.x))
    w[0, [0, 1, 25]] = torch.tensor([1.0, -1.0, 1.0])
    assert float(rep.outside(w, torch.zeros(1), torch.ones(1))) == pytest.approx(0.5)


def test_a_distribution_function_that_falls_is_made_to_rise_between_both_ends():
    assert monotone(torch.tensor([0.0, 0.6, 0.4, 1.2])).tolist() == pytest.approx([0, 0.5, 0.5, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianFields(1, 1), "v_min must be below v_max"),
        (lambda: GaussianFields(1e8, 1e8 + 1), "too close to be told apart in single precision"),
        (lambda: Categorical(0, 1e-40), "too close to be told apart in single precision"),
        (lambda: Categorical(2, -1), "v_min must be below v_max, both finite; got 2 and -1"),
        (lambda: Categorical(0, math.inf), "both finite"),
        (lambda: GaussianFields(0, 1, learn="score"), "learn must be one of cumulative, density; got 'score'"),
        (lambda: GaussianFields(0, 1, nodes=6), "nodes must lie between 8"),
        (lambda: GaussianFields(0, 1, bandwidth=4.0), "bandwidth must lie between 0.3 and 1.1"),
        (lambda: GaussianFields(0, 1, bandwidth=1.2), "bandwidth must lie between 0.3 and 1.1"),
        (lambda: GaussianFields(0, 1, learn="density", bandwidth=0.4), "bandwidth must lie between 0.5 and 1.5"),
        (lambda: PositiveFields(0, 1, bandwidth=0.5), "bandwidth must lie between 0.6 and 1.5"),
        (lambda: UpperQuantile(1.0), "level must lie between 0 and 1, got 1"),
        (lambda: Spread(float("nan")), "weight must lie between"),
        (lambda: Categorical(0, 1, atoms=1), "atoms must lie between 2"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()
