"""Linear algebra on fields, exact on Gaussian mixtures."""

import math

import pytest
import torch

from bd_lightning import divergences
from bd_lightning.checks import UserError
from bd_lightning.dynamics import AnnealedDynamics, MultistepDynamics, ProbabilityFlow, SampleNoise, TrackedPosterior
from bd_lightning.fields import (
    AnalyticFields,
    AnalyticRelative,
    AnalyticSource,
    Mixture,
    RelativeFields,
    combine,
    log_ratio,
)  # fmt: skip
from bd_lightning.kernels import ClosedFormSlices, Constant
from bd_lightning.modules import BellmanDiffusion, RelativeDensities
from bd_lightning.networks import MLP, UNet
from bd_lightning.objectives import DensityRatio, NoiseLevels
from bd_lightning.targets import GaussianMixture
from four_modes import MEANS, PARTS, SOURCE, WEIGHTS, learned, mixture, noised_points, truth


@pytest.fixture
def points():
    return noised_points()


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 0, 0, 2.5), (0, 0, 3, 0)])
def test_fields_of_a_sum_are_the_sum_of_fields(weights, points):
    target = truth(*weights)
    assert torch.allclose(mixture(*weights).score(*points), target.score(*points), atol=1e-9)
    log, slope = mixture(*weights).log_ratio(*points)
    total = sum(w * share for w, share in zip(weights, WEIGHTS))
    expected, expected_slope = log_ratio(target, *points, sigma_data=1.1)
    assert torch.allclose(log, expected + math.log(total), atol=1e-9)
    assert torch.allclose(slope, expected_slope, atol=1e-9)


def test_what_is_removed_is_gone(points):
    whole = AnalyticSource([truth(1, 1, 1, 1)], [1.0], 1.1)  # another source that knows no classes
    rest = Mixture([(whole, torch.ones(1, dtype=torch.float64))]) - mixture(0, 0, 1, 0)
    left = mixture(0, 0, 1, 0).log_ratio(*points)[0] < mixture(1, 1, 1, 1).log_ratio(*points)[0] - 0.1
    found, expected = rest.score(*points), truth(1, 1, 0, 1).score(*points)
    assert 200 < left.sum() < 300 and torch.allclose(found[left], expected[left], atol=1e-6)
    assert rest.mass() == pytest.approx(0.8)
    x = MultistepDynamics(levels=40, sigma_max=10.0, sigma_min=0.01)(rest, SampleNoise(range(4000), (2,)))
    shares = torch.bincount(truth(1, 1, 1, 1).mode_of(x.double()), minlength=4) / 4000
    assert shares[2] <= 0.005 and (shares - truth(1, 1, 0, 1).mode_weights).abs().max() < 0.03


@pytest.mark.parametrize("mobility", ["constant", "density"])
def test_fields_leave_the_mixture_unchanged(mobility):
    """Zero flux: g p − ½ ∇(s p) = 0, in the fields that a sampler is given."""
    weights = (1, 0, 2, 1)
    fields, target = mixture(*weights, mobility=mobility), truth(*weights)
    x = target.sample(50, torch.Generator().manual_seed(0)).requires_grad_(True)
    sigma = x.new_full((50,), 0.4).detach()
    s, g = fields(x, sigma)
    p = target.log_density(x, sigma).exp()
    (slope,) = torch.autograd.grad((s * p).sum(), x)
    flux = g * p[:, None] - slope / 2
    assert flux.abs().max() < 1e-9 * slope.abs().max()
    ratio, S, log_slope = fields.log_gradients(x, sigma)
    assert torch.allclose(S - log_slope, target.score(x, sigma)) and torch.allclose(ratio, s)


def test_the_density_as_its_own_mobility_is_the_minimiser_of_the_objective():
    fields = mixture(1, 1, 1, 1, mobility="density")
    analytic = AnalyticRelative(truth(1, 1, 1, 1), sigma_data=1.1)
    x, sigma = torch.randn(20, 2, dtype=torch.float64), torch.full((20,), 0.5, dtype=torch.float64)
    assert all(torch.allclose(a, b) for a, b in zip(fields(x, sigma), analytic(x, sigma)))


@pytest.mark.parametrize(
    "sampler",
    [
        MultistepDynamics(levels=40, sigma_max=10.0, sigma_min=0.01),
        ProbabilityFlow(sigma_max=10.0, sigma_min=0.01),
        AnnealedDynamics(levels=20, steps_per_level=10, sigma_max=10.0, sigma_min=0.01),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_sampler_accepts_a_mixture(sampler):
    x = sampler(mixture(1, 0, 3, 1), SampleNoise(range(2000), (2,))).double()
    shares = torch.bincount(truth(1, 1, 1, 1).mode_of(x), minlength=4) / 2000
    assert (shares - truth(1, 0, 3, 1).mode_weights).abs().max() < 0.04


class Drifting(AnalyticSource):
    """Whose scalar fields say nothing: every class is as likely everywhere."""

    def components(self, x, sigma):
        log, slope = super().components(x, sigma)
        return torch.zeros_like(log), slope


def drawn_shares(sampler, fields, n=2000):
    x = sampler(fields, SampleNoise(range(n), (2,))).double()
    nearest = torch.cdist(x, torch.tensor(MEANS, dtype=x.dtype)).argmin(1)
    return torch.bincount(nearest, minlength=4) / n, float((x - torch.tensor(MEANS, dtype=x.dtype)[nearest]).std())


def test_weights_that_are_carried_along_need_no_scalar_field():
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    wrong = Mixture([(Drifting(PARTS, WEIGHTS, sigma_data=1.1), weights)])
    asked = weights * torch.tensor(WEIGHTS, dtype=torch.float64)
    asked = asked / asked.sum()
    tracked = TrackedPosterior(levels=60, relaxation=1.0)
    _, spread = drawn_shares(MultistepDynamics(levels=60, relaxation=1.0), wrong)
    assert spread > 0.5  # between the modes
    experts = Mixture([(AnalyticSource([part], [1.0], 1.1), w[None]) for part, w in zip(PARTS, asked)])
    for fields in (wrong, experts):
        shares, spread = drawn_shares(tracked, fields)
        assert (shares - asked).abs().sum() < 0.08 and 0.27 < spread < 0.33


@pytest.mark.parametrize("relaxation", [0.5, 1e-6])
def test_weights_that_are_carried_along_are_kept_at_any_number_of_levels(relaxation):
    """Steps by the mean of the classes, as of a score, give 0.96 for the 0.9 that is asked for."""
    modes = [GaussianMixture([[x, 0.0]], sd=0.3) for x in (-2.0, 2.0)]
    fields = Mixture([(AnalyticSource(modes, [0.5, 0.5], 2.0), torch.tensor([0.9, 0.1]))])
    for levels in (8, 30):
        x = TrackedPosterior(levels=levels, relaxation=relaxation)(fields, SampleNoise(range(20_000), (2,)))
        assert float((x[:, 0] < 0).float().mean()) == pytest.approx(0.9, abs=0.0065)  # three standard errors
        assert float((x[:, 0].abs() - 2).std()) == pytest.approx(0.3, abs=0.01)


def test_tracked_chains_keep_their_precision_where_networks_have_half_of_it():
    def drawn():
        return TrackedPosterior(levels=8)(mixture(1, 1, 2, 0), SampleNoise(range(5), (2,)))

    plain = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        half = drawn()  # the densities' own products are rounded
    assert half.dtype == torch.float32 and len(half.unique()) == 10
    torch.testing.assert_close(half, plain, atol=0.02, rtol=0)


def test_counts_of_classes_do_not_stop_at_the_largest_integer_of_single_precision():
    fields = RelativeFields(MLP((2,), width=8, depth=1, num_classes=2, per_class=True), 1.0, classes=2)
    fields.counts.fill_(2.0**24)
    for _ in range(4):
        fields.count(torch.zeros(2**21, dtype=torch.long))
    assert 0.55 < fields.shares[0] < 0.8 and fields.counts.max() < 2**23


def test_learned_fields_are_those_of_all_classes_and_of_the_one_that_is_asked_for():
    fields, x, sigma = learned(1, classes=3)[0], torch.randn(6, 3), torch.rand(6) + 0.1
    a, _ = fields.components(x, sigma)
    assert torch.allclose(fields(x, sigma)[0], a.exp().sum(1))  # their ratios to the base Gaussian add up
    label = torch.tensor([0, 2, 1, 1, 0, 2])
    each = fields.conditioned(label).score(x, sigma)
    for c in range(3):
        one = Mixture([(fields, torch.eye(3)[c])]).score(x, sigma)
        assert torch.allclose(each[label == c], one[label == c], atol=1e-5)


def test_of_one_density_tracked_chains_are_those_of_the_dynamics():
    noise = [SampleNoise(range(5), (2,)) for _ in range(2)]
    settings = {"levels": 12, "sigma_max": 10.0, "sigma_min": 0.1}
    one = mixture(1, 0, 0, 0)
    torch.testing.assert_close(
        TrackedPosterior(**settings)(one, noise[0]), MultistepDynamics(**settings)(one, noise[1])
    )
    with pytest.raises(UserError, match="here is a negative weight: take another model.sampler than tracked"):
        TrackedPosterior()(mixture(1, 1, -0.5, 0), noise[0])


def test_tracked_chains_follow_the_score_that_is_asked_for():
    one, chains = truth(1, 0, 0, 0), {}  # one density; with another mobility its score is S less its slope
    settings = {"levels": 4, "sigma_max": 2.0, "sigma_min": 1.0}
    for exact in (False, True):
        sampler = TrackedPosterior(**settings, exact_score=exact)
        chains[exact] = sampler(AnalyticFields(one, ClosedFormSlices(0.01)), SampleNoise(range(5), (2,)))
    constant = TrackedPosterior(**settings)(AnalyticFields(one, Constant()), SampleNoise(range(5), (2,)))
    torch.testing.assert_close(chains[True], constant)
    assert (chains[False] - constant).abs().max() > 1e-3


def test_a_density_as_the_mobility_is_not_cut_where_it_is_small():
    fields = mixture(1, 1, 1, 1, mobility="density")
    x, sigma = torch.tensor([[1.0, 1.0], [3.0, 1.0], [3.5, 1.0]], dtype=torch.float64), torch.full((3,), 0.1)
    log, _ = fields.log_ratio(x, sigma)
    assert log[0] > 0 and log[1] < -10 and log[2] < -20
    assert torch.allclose(fields(x, sigma)[0].log(), log)


def test_ratio_loss_is_minimised_by_the_log_ratios():
    """Its gradient vanishes at log(π_c p_c/r), within four standard errors, and not at another scale or sign."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    label = torch.multinomial(torch.tensor(WEIGHTS), n, replacement=True, generator=generator)
    sigma = torch.full((n,), 0.7, dtype=torch.float64)
    clean = torch.stack([part.sample(n, generator) for part in PARTS])[label, torch.arange(n)]
    x = clean + 0.7 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    elsewhere = (0.7**2 + 1.1**2) ** 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    data, base = (SOURCE.components(point, sigma)[0] for point in (x, elsewhere))

    def slopes(scale, shift):
        change = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.ones((), requires_grad=True)
        logits = [change[1] * scale * log + shift + change[0] for log in (data, base)]
        losses = divergences.ratio_loss(*logits, label)
        return [float(grad.abs().max()) for grad in torch.autograd.grad(losses.mean(), change)]

    assert max(slopes(1.0, 0.0)) < 4 * n**-0.5
    assert min(max(slopes(scale, shift)) for scale, shift in ((0.9, 0.0), (-1.0, 0.0), (1.0, 0.2))) > 0.01


@pytest.mark.parametrize("source", [SOURCE, learned(1)[0]], ids=["analytic", "learned"])
def test_one_noise_level_for_all_points(source):
    fields = Mixture([(source, torch.ones(len(source.shares)))])
    x = torch.randn(20, 2 if source is SOURCE else 3)
    here, there = fields.at(0.7), fields
    for a, b in zip(here.log_gradients(x, None), there.log_gradients(x, torch.full((20,), 0.7))):
        assert a.shape == b.shape and torch.allclose(a, b.to(a), atol=1e-5)


def small(per_class=True, classes=4, **options):
    network = MLP((2,), classes, per_class=per_class, width=64, depth=2)
    samplers = {"sde": MultistepDynamics(levels=30, sigma_max=10.0, sigma_min=0.02)}
    arguments = {"objective": DensityRatio(scalar_weight=1.0), "noise": NoiseLevels(-0.5, 1.3)}
    return RelativeDensities(network, shape=(2,), num_classes=classes, sigma_data=1.1, samplers=samplers,
                             **(arguments | options))  # fmt: skip


def test_a_trained_model_is_mixed_without_training():
    torch.manual_seed(0)
    module = small()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        label = torch.multinomial(torch.tensor(WEIGHTS), 256, replacement=True)
        x = torch.tensor(MEANS)[label] + 0.3 * torch.randn(256, 2)
        optimizer.zero_grad()
        module.losses(x, label).total.backward()
        optimizer.step()
        schedule.step()
    module.eval()
    assert (module.fields.shares - torch.tensor(WEIGHTS)).abs().max() < 0.01

    def shares(fields):
        x = module.sample(range(4000), fields=fields).double()
        return torch.bincount(truth(1, 1, 1, 1).mode_of(x), minlength=4) / 4000

    names = [str(c) for c in range(4)]
    assert (shares(None) - torch.tensor(WEIGHTS)).abs().max() < 0.05
    even = shares(combine([(module.fields, names, 1.0)], dict.fromkeys(names, 1.0)))
    assert (even - 0.25).abs().max() < 0.05
    without = shares(combine([(module.fields, names, 1.0)], remove=["1"]))
    assert without[1] < 0.01 and (without - truth(1, 0, 1, 1).mode_weights).abs().max() < 0.05
    x = module.sample(range(200), label=torch.tensor([3]).expand(200)).double()
    assert (truth(1, 1, 1, 1).mode_of(x) == 3).float().mean() > 0.98


def test_networks_have_heads_for_every_class():
    mlp = MLP((5,), 3, per_class=True, width=16, depth=1)
    assert [tuple(out.shape) for out in mlp(torch.randn(2, 5), torch.zeros(2))] == [(2, 3, 5), (2, 3)]
    unet = UNet((2, 8, 8), 3, per_class=True, channels=[8, 8], patch=2)
    torch.nn.init.normal_(unet.gradient_head[2].weight)
    out, a = unet(torch.randn(4, 2, 8, 8), torch.zeros(4))
    assert out.shape == (4, 3, 2, 8, 8) and a.shape == (4, 3) and not torch.equal(out[:, 0], out[:, 1])
    fields = RelativeFields(MLP((5,), width=16, depth=1), 1.0)
    assert [tuple(o.shape) for o in fields.components(torch.randn(2, 5), torch.ones(2))] == [(2, 1), (2, 1, 5)]


def test_mistakes_in_a_model():
    told = MLP((2,), 4, conditional=True, width=16, depth=1)
    for mistake, sentence in (
        (lambda: small(noise=None), "noise levels"),
        (lambda: small(per_class=False, guidance=2.0), "guidance needs fields of the classes"),
        (lambda: small(classes=0), "per_class needs a data set with classes"),
        (lambda: RelativeDensities(told, (2,), 4, 1.0, {"sde": MultistepDynamics()}), "per_class=true instead of"),
        (
            lambda: BellmanDiffusion(
                MLP((2,), 4, per_class=True), Constant(), (2,), 4, 1.0, {"ode": ProbabilityFlow()}
            ),
            "per_class=true is for model=relative",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            mistake()
