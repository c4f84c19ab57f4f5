"""Guidance that begins late, at a noise level or at a minimum of its own size."""

import math
from types import SimpleNamespace

import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.dynamics import FeynmanKac, MultistepDynamics, ProbabilityFlow, SampleNoise, resampling
from bd_lightning.dynamics.resampling import systematic
from bd_lightning.fields import (
    AnalyticFields,
    DynamicGuidedFields,
    FieldPair,
    Guidance,
    GuidedFields,
    LateGuidedFields,
)
from bd_lightning.fields.base import log_gradient
from bd_lightning.inverse import PosteriorFields
from bd_lightning.kernels import ClosedFormSlices, Constant
from bd_lightning.modules import BellmanDiffusion, RelativeDensities
from bd_lightning.networks import MLP
from bd_lightning.targets import GaussianMixture
from callbacks.drawing import classes_of, manner

CLASS = AnalyticFields(GaussianMixture([[1.0, 1.0]], sd=0.3), Constant())
ALL = AnalyticFields(GaussianMixture([[1.0, 1.0], [-1.0, -1.0]], sd=0.3), Constant())


def slope(fields, x, level):
    return log_gradient(*fields(x, torch.full((len(x),), level)))


def test_before_a_noise_level_another_scale_acts():
    fields, x = LateGuidedFields(CLASS, ALL, 3.0, -2.0, transition=0.5), torch.randn(5, 2)
    for level, w in ((0.8, -2), (0.5, 3), (0.1, 3)):
        own, base = slope(CLASS, x, level), slope(ALL, x, level)
        torch.testing.assert_close(slope(fields, x, level), base + w * (own - base), rtol=1e-4, atol=1e-4)
    outside = LateGuidedFields(CLASS, ALL, 3.0, 0.0, 0.5, interval=(0.2, 0.6))
    torch.testing.assert_close(slope(outside, x, 0.8), slope(CLASS, x, 0.8))


class Planned(FieldPair):
    """S of a given length over σ for each chain and level, along the first axis."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, x, sigma):
        d = torch.tensor([chain[float(sigma[0])] for chain in self.lengths])
        S = torch.zeros_like(x)
        S[:, 0] = d / sigma
        return torch.ones_like(sigma), 0.5 * S


class Nothing(FieldPair):
    def __call__(self, x, sigma):
        return torch.ones_like(sigma), torch.zeros_like(x)


def run(fields, levels, count):
    """The scales that act on each chain at each level."""
    rows = []
    for level in levels:
        x, sigma = torch.zeros(count, 2), torch.full((count,), level)
        guided, own = fields(x, sigma)[1], fields.fields(x, sigma)[1]
        rows.append((guided[:, 0] / own[:, 0]).tolist())
    return rows


def test_each_chain_passes_the_first_minimum_of_its_own():
    """That of the first chain at 8 is none: it has not risen before."""
    levels = [16.0, 8.0, 4.0, 2.0, 1.0]
    lengths = [
        dict(zip(levels, one)) for one in ([5, 4, 6, 2, 3], [1, 2, 3, 2, 1], [1, 2, 1, 2, 1], [3.0, 3.0, 3.0, 3.0, 3.0])
    ]
    fields = DynamicGuidedFields(Planned(lengths), Nothing(), 4.0, 0.0)
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, 0], [4, 0, 4, 0]]
    assert run(fields, levels, 4) == expected
    assert "50% of 4 chains never met their transition and kept the scale 0: take more noise levels" in fields.remark()
    assert PosteriorFields(fields, torch.zeros(4, 1), lambda x: x[:, :1]).remark() == fields.remark()
    assert run(fields, levels, 4) == expected  # the next batch begins anew
    twice = [level for level in levels for _ in range(2)]  # Heun's method asks twice
    assert run(fields, twice, 4) == [row for row in expected for _ in range(2)]
    assert run(fields, levels[:2], 4) == expected[:2]


def test_a_chain_does_not_depend_on_its_batch():
    samplers = (MultistepDynamics(levels=15, sigma_max=5.0), ProbabilityFlow(steps=8, sigma_max=5.0))
    for sampler in samplers:

        def draw(indices, sampler=sampler):
            return sampler(DynamicGuidedFields(CLASS, ALL, 2.0, 0.0), SampleNoise(indices, (2,)))

        torch.testing.assert_close(draw(range(6))[4:], draw(range(4, 6)))


def test_guidance_is_a_scale_or_a_mapping():
    assert Guidance.read(2.0, (0.0, 1.0)) == Guidance(2.0, (0.0, 1.0))
    assert type(Guidance(2.0).guided(CLASS, ALL)) is GuidedFields and not CLASS.remark()
    with pytest.raises(ValueError, match="guidance has an interval, and guidance_interval is another"):
        Guidance.read({"scale": 2.0, "interval": (0.1, 1.0)}, (0.2, 2.0))
    assert type(Guidance(2.0, before=0.0, transition=1.6).guided(CLASS, ALL)) is LateGuidedFields
    assert type(Guidance(2.0, before=-2.0, transition="dynamic").guided(CLASS, ALL)) is DynamicGuidedFields
    assert Guidance().guided(CLASS, ALL) is CLASS
    given = {"scale": 3.0, "interval": [0.1, 2.0], "before": 0, "transition": "dynamic"}
    assert Guidance.read(given, (0.0, math.inf)).interval == [0.1, 2.0]


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"scale": 2.0, "before": 0.0}, "guidance.before is the scale until a transition"),
        ({"scale": 2.0, "transition": "late"}, "guidance.transition must be a noise level, or dynamic; got 'late'"),
        ({"scale": 2.0, "transition": -1.0}, "guidance.transition must be positive"),
        ({"strength": 2.0}, "guidance has no 'strength': it takes scale, interval, before, transition"),
        ({}, "guidance needs its scale"),
        ({"scale": True}, "guidance.scale must be a number, got True"),
        ({"scale": 2.0, "transition": True}, "guidance.transition must be a number"),
        ({"scale": -1.0}, "guidance must lie between 0 and 1000"),
        ({"scale": "two"}, "guidance takes numbers"),
        ({"scale": 2.0, "interval": [2.0, 1.0]}, "guidance_interval must be"),
        ({"scale": 2.0, "before": math.nan, "transition": 1.0}, "guidance.before must lie between"),
    ],
)
def test_mistakes_are_one_sentence(given, sentence):
    network = MLP((2,), 3, conditional=True, width=8, depth=1)
    with pytest.raises(ValueError, match=sentence):
        BellmanDiffusion(
            network, Constant(), (2,), 3, 1.0, {"ode": ProbabilityFlow(steps=3)}, label_dropout=0.1, guidance=given
        )


def test_conditional_and_relative_models_take_it():
    given = {"scale": 2.0, "before": 0.0, "transition": "dynamic"}
    samplers, label = {"ode": ProbabilityFlow(steps=4, sigma_max=3.0)}, torch.tensor([0, 1])
    told = MLP((2,), 2, conditional=True, width=8, depth=1)
    every = MLP((2,), 2, per_class=True, width=8, depth=1)
    models = [
        BellmanDiffusion(told, Constant(), (2,), 2, 1.0, samplers, label_dropout=0.1, guidance=given),
        RelativeDensities(every, (2,), 2, 1.0, samplers, "ode", guidance=given),
    ]
    models[1].fields.count(torch.tensor([0, 1]))
    for model in models:
        assert isinstance(model.asked(label), DynamicGuidedFields) and model.describe() == ", guided with scale 2"
        assert manner(model, "ode", 40) == "ode, 7 network calls, guided with scale 2"
        with pytest.warns(UserWarning, match="100% of 2 chains never met their transition"):  # the fields are zero
            assert model.sample([0, 1], label=label).shape == (2, 2)
        assert not isinstance(model.asked(None), GuidedFields)
        assert classes_of(model, range(3)).tolist() == [0, 1, 0]
    assert classes_of(RelativeDensities(every, (2,), 2, 1.0, samplers, "ode"), range(3)) is None


def test_zero_before_draws_from_all_the_data_first():
    """Guided from nothing on: with before 0 chains leave for the other mode, and come back only if there is time."""
    fields = {before: LateGuidedFields(CLASS, ALL, 1.0, before, transition=0.2) for before in (0.0, 1.0)}
    sampler = MultistepDynamics(levels=40, sigma_max=8.0)
    share = {
        before: float((sampler(one, SampleNoise(range(200), (2,))).sum(1) > 0).float().mean())
        for before, one in fields.items()
    }
    assert share[1.0] == 1 and 0.35 < share[0.0] < 0.65


def gaussian_power(w):
    """Mean and variance of p₀^{1−w} p_c^w for p_c = N(1, ¼), p₀ = N(0, 1)."""
    precision = w / 0.25 + (1 - w)
    return w / 0.25 / precision, 1 / precision


NARROW = AnalyticFields(GaussianMixture([[1.0, 1.0]], sd=0.5), Constant())
WIDE = AnalyticFields(GaussianMixture([[0.0, 0.0]], sd=1.0), Constant())


@pytest.mark.parametrize("w, relaxation", [(0.5, 0.0), (2.0, 1.0)])
def test_weighted_chains_have_the_density_that_guidance_means(w, relaxation):
    """Of Gaussians it is a Gaussian, which chains without weights miss."""
    mean, variance = gaussian_power(w)
    guided, levels = GuidedFields(NARROW, WIDE, w), {"levels": 100, "sigma_max": 10.0, "sigma_min": 0.01}
    errors = []
    for kind in (FeynmanKac, MultistepDynamics):
        x = kind(relaxation=relaxation, **levels)(guided, SampleNoise(range(5000), (2,))).double()
        errors.append([(x.mean(0) - mean).abs().max(), (x.var(0) / variance - 1).abs().max()])
    (mean_error, variance_error), (unweighted, _) = errors
    assert mean_error < 0.05 and variance_error < 0.1 and unweighted > 0.1


def test_weighted_chains_of_a_mixture():
    """p₀ of three modes, p_c another mixture of them: masses of q ∝ p₀^{1−w} p_c^w by quadrature."""
    means = [[-2.0], [0.0], [2.0]]
    base, own = GaussianMixture(means, sd=0.5), GaussianMixture(means, weights=[0.2, 0.3, 0.5], sd=0.5)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    q = (2 * own.log_density(grid) - base.log_density(grid)).exp()
    edges = grid[:, 0] / 2 - 0.5
    true = torch.stack([q[(edges > k - 2) & (edges <= k - 1)].sum() for k in range(3)]) / q.sum()
    guided = GuidedFields(*(AnalyticFields(one, Constant()) for one in (own, base)), 2.0)
    x = FeynmanKac(levels=100, sigma_max=10.0)(guided, SampleNoise(range(8000), (1,)))
    found = torch.stack(
        [((x[:, 0] / 2 - 0.5 > k - 2) & (x[:, 0] / 2 - 0.5 <= k - 1)).double().mean() for k in range(3)]
    )
    assert (found - true).abs().max() < 0.03


def test_chains_are_taken_by_their_weights():
    weights = torch.tensor([0.5, 0.0, 0.25, 0.25])
    assert systematic(weights, torch.tensor(0.5)).tolist() == [0, 0, 2, 3]
    many = systematic(torch.tensor([0.7, 0.1, 0.2]).repeat_interleave(100) / 100, torch.tensor(0.3))
    assert (torch.bincount(many // 100, minlength=3) / 300 - torch.tensor([0.7, 0.1, 0.2])).abs().max() < 0.01


class Rated(FieldPair):
    """The score of a standard normal, with weights that grow at rates of their own."""

    def __call__(self, x, sigma):
        raise NotImplementedError

    def weighted_score(self, x, sigma, exact):
        return -x / (1 + sigma[:, None] ** 2), torch.arange(len(x)) * sigma

    def at(self, level):
        return self


@pytest.mark.parametrize("threshold, times", [(0.0, 1), (1.0, 4)])
def test_weights_grow_by_the_trapezium_rule_and_below_the_threshold_chains_are_resampled(monkeypatch, threshold, times):
    seen = []
    monkeypatch.setattr(
        resampling, "systematic", lambda weights, place: seen.append(weights) or torch.arange(len(weights))
    )
    sampler = FeynmanKac(levels=5, sigma_max=16.0, sigma_min=1.0, relaxation=0.0, threshold=threshold)
    sampler(Rated(), SampleNoise(range(4), (2,)))
    assert len(seen) == times
    if times == 1:  # at levels 16, 8, 4, 2, 1, with h = ln 2
        grown = math.log(2) * (16 / 2 + 8 + 4 + 2 + 1 / 2) * torch.arange(4.0)
        torch.testing.assert_close(seen[0], grown.double().softmax(0), rtol=1e-4, atol=1e-6)


def test_a_chain_that_is_lost_is_taken_by_none():
    class Lost(GuidedFields):
        """The first chain has no number."""

        def weighted_score(self, x, sigma, exact):
            score, rate = super().weighted_score(x, sigma, exact)
            return score, torch.cat([rate[:1] * float("nan"), rate[1:]])

    found = FeynmanKac(levels=30, sigma_max=5.0)(Lost(CLASS, ALL, 2.0), SampleNoise(range(200), (2,)))
    assert found.isfinite().all() and len(found.unique(dim=0)) > 20


def test_without_guidance_weights_are_equal():
    """And chains are the reversed diffusion of the constant kernel, as by multistep dynamics of second order."""
    noise = [SampleNoise(range(50), (2,)) for _ in range(2)]
    x = FeynmanKac(levels=20, sigma_max=5.0)(ALL, noise[0])
    plain = MultistepDynamics(levels=20, sigma_max=5.0, order=2, relaxation=1.0)(ALL, noise[1])
    torch.testing.assert_close(x.sort(0).values, plain.sort(0).values)


def test_protocols_say_how_many_chains_were_resampled_together():
    samplers = {"fk": FeynmanKac(levels=5), "ode": ProbabilityFlow(steps=2)}
    module = SimpleNamespace(samplers=samplers, describe=lambda: ", guided")
    assert manner(module, "fk", 40) == "fk, 5 network calls, guided, 40 chains resampled together"
    assert manner(module, "ode", 40) == "ode, 3 network calls, guided"


def test_samples_of_few_ancestors_are_said_to_be():
    fields = GuidedFields(CLASS, ALL, 40.0)
    with pytest.warns(UserWarning, match=r"these 200 samples descend from \d+ of the chains"):
        FeynmanKac(levels=30, sigma_max=5.0)(fields, SampleNoise(range(200), (2,)))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (GuidedFields(CLASS, ALL, 2.0, (0.1, 1.0)), "leave guidance.interval out"),
        (DynamicGuidedFields(CLASS, ALL, 2.0, 0.0), "leave guidance.transition out"),
        (LateGuidedFields(CLASS, ALL, 2.0, 0.0, 1.0), "leave guidance.transition out"),
    ],
)
def test_weights_are_those_of_one_scale(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        FeynmanKac(levels=5)(fields, SampleNoise(range(4), (2,)))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_exact_scores_of_one_class_are_drawn_with(guidance):
    """Samples are drawn without autograd, and the gradient of the mobility is taken in the midst of it."""
    network = MLP((2,), 2, conditional=True, width=8, depth=1)
    samplers = {"sde": MultistepDynamics(levels=3, exact_score=True)}
    options = {"sampler": "sde", "guidance": guidance, "label_dropout": 0.1}
    model = BellmanDiffusion(network, ClosedFormSlices(0.001), (2,), 2, 1.0, samplers, **options).eval()
    x = model.sample(range(4), seed=0, label=torch.tensor([0, 1, 1, 0]))
    with torch.inference_mode():
        label = torch.tensor([0, 1, 1, 0])
        torch.testing.assert_close(model.sample(range(4), seed=0, label=label), x)
