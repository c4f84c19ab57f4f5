"""Guidance that begins late, at a noise level or at a minimum of its own size."""

import math

import pytest
import torch

from bd_lightning.dynamics import MultistepDynamics, ProbabilityFlow, SampleNoise
from bd_lightning.fields import (
    AnalyticFields,
    DynamicGuidedFields,
    FieldPair,
    Guidance,
    GuidedFields,
    LateGuidedFields,
)
from bd_lightning.fields.base import log_gradient
from bd_lightning.kernels import Constant
from bd_lightning.modules import BellmanDiffusion, RelativeDensities
from bd_lightning.networks import MLP
from bd_lightning.targets import GaussianMixture

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
    levels = [16.0, 8.0, 4.0, 2.0, 1.0]
    lengths = [
        dict(zip(levels, one)) for one in ([5, 4, 6, 2, 3], [1, 2, 3, 2, 1], [1, 2, 1, 2, 1], [3.0, 3.0, 3.0, 3.0, 3.0])
    ]
    fields = DynamicGuidedFields(Planned(lengths), Nothing(), 4.0, 0.0)
    expected = [[0, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0], [4, 0, 4, 0], [4, 0, 4, 0]]
    assert run(fields, levels, 4) == expected
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
    assert type(Guidance(2.0).guided(CLASS, ALL)) is GuidedFields
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
        ({"scale": -1.0}, "guidance must lie between 0 and inf"),
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
        assert isinstance(model.asked(label), DynamicGuidedFields)
        assert model.sample([0, 1], label=label).shape == (2, 2)
        assert not isinstance(model.asked(None), GuidedFields)


def test_zero_before_draws_from_all_the_data_first():
    """Guided from nothing on: with before 0 chains leave for the other mode, and come back only if there is time."""
    fields = {before: LateGuidedFields(CLASS, ALL, 1.0, before, transition=0.2) for before in (0.0, 1.0)}
    sampler = MultistepDynamics(levels=40, sigma_max=8.0)
    share = {
        before: float((sampler(one, SampleNoise(range(200), (2,))).sum(1) > 0).float().mean())
        for before, one in fields.items()
    }
    assert share[1.0] == 1 and 0.35 < share[0.0] < 0.65
