"""Sums of fields, the shares of named classes in them, and many experts."""

import math
import warnings

import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.fields import (
    AnalyticSource,
    Mixture,
    RelativeFields,
    batched,
    calibrated,
    combine,
)  # fmt: skip
from bd_lightning.fields.experts import Experts
from bd_lightning.fields.shares import PILOTS
from bd_lightning.networks import MLP
from bd_lightning.targets import GaussianMixture
from four_modes import MEANS, PARTS, SOURCE, WEIGHTS, learned, mixture, noised_points, same, truth


@pytest.fixture
def points():
    return noised_points()


def test_laws_of_the_algebra(points):
    a, b, c = mixture(1, 2, 0, 0), mixture(0, 1, 0, 1), mixture(0, 0, 0.5, 0)
    assert same(a + b, b + a, points) and same((a + b) + c, a + (b + c), points)
    assert same(2 * (a + b), 2 * a + 2 * b, points) and same(a + a, 2 * a, points)
    assert same((a + b) - b, a, points) and same(a + 0 * b, a, points)
    assert (a - a).terms == [] and (a + b).mass() == pytest.approx(a.mass() + b.mass())
    assert torch.allclose((3 * a).score(*points), a.score(*points))  # a scale is no matter to the density


def test_weights_per_sample(points):
    x, sigma = points[0][:4], points[1][:4]
    each = Mixture([(SOURCE, torch.eye(4, dtype=torch.float64))]).score(x, sigma)
    for i in range(4):
        assert torch.allclose(each[i], PARTS[i].score(x[i : i + 1], sigma[i : i + 1])[0])


def test_more_taken_than_there_is():
    fields = mixture(1, 1, -1.5, 1)
    x = MultistepDynamics(levels=20, sigma_max=10.0, sigma_min=0.01)(fields, SampleNoise(range(500), (2,)))
    centre, level = torch.tensor(MEANS[2:3], dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)
    near = fields.log_ratio(centre, level)[0]
    assert x.isfinite().all() and (truth(1, 1, 1, 1).mode_of(x.double()) != 2).all()
    positive = mixture(1, 1, 0, 1).log_ratio(centre, level)[0]
    assert torch.allclose(near - positive, torch.tensor(0.01, dtype=torch.float64).log())  # held at the floor
    names = ["a", "b", "c", "d"]
    with pytest.warns(UserWarning, match="class 'c' has the negative share -0.2: that is not a density"):
        combine([(SOURCE, names, 1.0)], {"a": 0.6, "b": 0.6, "c": -0.2})
    with pytest.raises(ValueError, match="needs a positive weight"):
        mixture(-1, 0, 0, 0)(torch.zeros(2, 2), torch.ones(2))
    each = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])  # a point without a positive weight
    with pytest.raises(ValueError, match="needs a positive weight"):
        Mixture([(SOURCE, each)])(torch.zeros(2, 2), torch.ones(2))
    assert (
        Mixture([(SOURCE, each), (AnalyticSource(PARTS, WEIGHTS, 1.1), torch.ones(4))])
        .log_ratio(torch.zeros(2, 2), torch.ones(2))[0]
        .isfinite()
        .all()
    )
    other = AnalyticSource(PARTS, WEIGHTS, sigma_data=2.0)
    with pytest.raises(ValueError, match=r"the base Gaussians differ: sigma_data is 1\.1 and 2\.0"):
        mixture(1, 1, 1, 1) + Mixture([(other, torch.ones(4))])


def test_classes_by_name(points):
    names = ["a", "b", "c", "d"]
    asked = combine([(SOURCE, names, 1.0)], {"a": 0.5, "d": 0.5})
    assert torch.allclose(asked.score(*points), GaussianMixture([MEANS[0], MEANS[3]], sd=0.3).score(*points), atol=1e-9)
    less = combine([(SOURCE, names, 1.0)], remove=["c"])
    assert torch.allclose(less.score(*points), truth(1, 1, 0, 1).score(*points), atol=1e-9)
    low, high = AnalyticSource(PARTS[:2], [0.6, 0.4], 1.1), AnalyticSource(PARTS[1:], [0.5, 0.3, 0.2], 1.1)
    both = combine([(low, names[:2], 1.0), (high, names[1:], 3.0)])
    sum_ = GaussianMixture([*MEANS[:2], *MEANS[1:]], [0.6, 0.4, 1.5, 0.9, 0.6], sd=0.3)
    assert torch.allclose(both.score(*points), sum_.score(*points), atol=1e-9)
    shared = combine([(low, names[:2], 1.0), (high, names[1:], 1.0)], {"b": 1.0})  # the average of the two
    assert torch.allclose(shared.score(*points), PARTS[1].score(*points), atol=1e-9)
    some = combine([(low, names[:2], 1.0), (high, names[1:], 1.0)], {"a": 0.5, "b": 0.5})  # a in one, b in both
    alike = GaussianMixture(MEANS[:2], [0.5, 0.5], sd=0.3)
    assert torch.allclose(some.score(*points), alike.score(*points), atol=1e-9) and some.mass() == pytest.approx(1)
    less = combine([(SOURCE, names, 1.0), (high, names[1:], -0.5)])  # shares 0.4, 0.3 - 0.25, 0.2 - 0.15, 0.1 - 0.1
    assert len(less.terms) == 1 and abs(less.mass() - 0.5) < 1e-6
    rest = GaussianMixture(MEANS[:3], [0.4, 0.05, 0.05], sd=0.3)
    assert torch.allclose(less.score(*points), rest.score(*points), atol=1e-6)
    one = AnalyticSource(PARTS[:1], [1.0], 1.1)  # of one density, from data of four names
    assert combine([(one, names, 1.0), (AnalyticSource(PARTS[:1], [1.0], 1.1), names, 1.0)]).mass() == 2
    with pytest.warns(UserWarning, match="class 'd' has the negative share"):
        taken = combine([(SOURCE, names, 1.0), (high, names[1:], -0.6)])
    assert [(w < 0).any().item() for _, w in taken.terms] == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine([(AnalyticSource(PARTS[:1], [1.0], 1.1), names, 2.0), (SOURCE, names, -1.0)])  # what b has is not known
    for bad, sentence in (
        ({"mix": {"e": 1.0}}, "no class 'e': the classes are a, b, c, d"),
        ({"mix": {"a": -1.0}}, "the weights of the mixture sum to -1; they must sum to a positive number"),
        ({"remove": names}, "sum to 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            combine([(SOURCE, names, 1.0)], **bad)


@pytest.mark.parametrize("weights", [(0.3, -0.1, -0.2), (1.1, 2.2, -3.3), (1.0, -0.04, -0.96), (0.1, 0.2, -0.3)])
def test_what_rounding_leaves_of_a_sum_is_nothing(weights):
    sevens = [AnalyticSource(PARTS[:1], [1.0], 1.1) for _ in weights]
    sources = [(one, ["7"], w) for one, w in zip(sevens, weights)]
    with pytest.raises(UserError, match="the weights of the mixture sum to 0; they must"):
        combine(sources)
    eight = AnalyticSource(PARTS[1:2], [1.0], 1.1)
    left = combine([(eight, ["8"], 0.5), *sources])
    assert [source for source, _ in left.terms] == [eight] and left.mass() == 0.5
    parts = [w * Mixture([(SOURCE, torch.ones(4))]) for w in weights]
    assert not (parts[0] + parts[1] + parts[2]).terms and not sum(parts).terms


def test_what_rounding_leaves_of_densities_without_names_is_nothing():
    wholes = [AnalyticSource(PARTS[:1], [1.0], 1.1) for _ in range(3)]
    with pytest.raises(UserError, match="the weights of the mixture sum to 0; they must"):
        combine([(one, [], w) for one, w in zip(wholes, (1.1, 2.2, -3.3))])  # 4e-16 in double precision


def test_a_source_of_one_density_knows_no_classes():
    names = ["a", "b", "c", "d"]
    whole = AnalyticSource(PARTS[:1], [1.0], 1.1)
    less = combine([(SOURCE, names, 1.0), (whole, names, -0.05)])
    assert [w.tolist() for _, w in less.terms] == [[1.0] * 4, [-0.05]] and less.mass() == pytest.approx(0.95)
    assert combine([(whole, [], 1.0), (SOURCE, names, 1.0)]).mass() == pytest.approx(2.0)
    for asked in ({"mix": {"b": 1.0}}, {"remove": ["b"]}):
        with pytest.raises(UserError, match="as one density knows no class that mix or remove could ask for"):
            combine([(SOURCE, names, 1.0), (whole, names, 1.0)], **asked)
    with pytest.raises(ValueError, match="3 names for the 4 classes"):
        combine([(SOURCE, names[:3], 1.0)])


def test_classes_that_were_not_seen_have_no_share():
    names, low = ["a", "b", "c", "d"], AnalyticSource(PARTS, [0.6, 0.4, 0.0, 0.0], 1.1)
    with pytest.raises(UserError, match="class 'c' was not seen in training"):
        combine([(low, names, 1.0)], {"a": 1.0, "c": 1.0})
    untrained = RelativeFields(MLP((3,), 2, per_class=True, width=8, depth=1), 1.1, classes=2)
    with pytest.raises(UserError, match="the weights of the mixture sum to 0; they must"):
        combine([(untrained, names[:2], 1.0)])


def test_weights_of_sources_beside_those_of_classes_are_refused():
    names = ["a", "b", "c", "d"]
    for weight in (0.0, -1.0, 2.0):
        with pytest.raises(UserError, match="mix says the weights of all classes: give every source the weight 1"):
            combine([(SOURCE, names, 1.0), (SOURCE, names, weight)], {"a": 1.0})


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e300, None, "1"])
def test_weights_are_numbers(weight):
    names = ["a", "b", "c", "d"]
    for source, mix in ((weight, None), (1.0, {"a": weight, "b": 1.0})):
        with pytest.raises(UserError, match="weights of a mixture are numbers between"):
            combine([(SOURCE, names, source)], mix)


def test_the_algebra_of_mixtures(points):
    a, b = mixture(1, 0, 0, 0), mixture(0, 1, 0, 0)
    for one, other in ((sum([a, b]), a + b), (a - b / 2, a + -0.5 * b), (-a, -1 * a)):
        assert [w.tolist() for _, w in one.terms] == [w.tolist() for _, w in other.terms]
    for wrong in (lambda: a * b, lambda: a + 1, lambda: a - 1, lambda: 1 + a, lambda: a / b):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    for use in (batched, lambda none: none.posterior(*points), lambda none: none.densities(*points)):
        with pytest.raises(ValueError, match="a mixture needs a positive weight"):
            use(a - a)
    wide = Mixture([(learned(1)[0], torch.ones(2)), (learned(1, width=8)[0], torch.ones(2))])
    with pytest.raises(ValueError, match="the networks differ in more than their weights"):
        batched(wide)


def test_sums_have_the_mobility_and_the_floor_of_the_first():
    first, other = (
        Mixture([(one, torch.ones(2))], mobility, floor)
        for one, mobility, floor in zip(learned(2), ("density", "constant"), (0.2, 0.01))
    )
    sums = [first + other, first - other, sum([first, other]), 2 * first, first / 2, -first]
    sums += [batched(first + other), calibrated(first, lambda _: torch.zeros(5, 3))]
    assert [(one.mobility, one.floor) for one in sums] == [("density", 0.2)] * len(sums)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 3.0, 0.5), (1.0, 2.0, -0.1)])
def test_experts_are_asked_in_one_call(weights):
    members = learned(3)
    apart = sum((w * Mixture([(one, torch.ones(2))]) for w, one in zip(weights[1:], members[1:])),
                weights[0] * Mixture([(members[0], torch.ones(2))]))  # fmt: skip
    together, calls = batched(apart), []
    for one in members:
        one.network.register_forward_hook(lambda *_: calls.append(1))
    x, sigma = 3 * torch.randn(40, 3), torch.rand(40) + 0.1
    found = together.log_ratio(x, sigma)
    assert len(calls) == 1
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(apart.log_ratio(x, sigma), found))
    assert together.mass() == pytest.approx(apart.mass())
    assert torch.allclose(
        torch.cat(together.posterior(x, sigma), 1), torch.cat(apart.posterior(x, sigma), 1), atol=1e-4
    )


def test_experts_of_some_of_which_points_have_weights_of_their_own():
    members, x, sigma = learned(2), torch.randn(5, 3), torch.rand(5) + 0.1
    apart = Mixture([(members[0], torch.ones(2)), (members[1], torch.rand(5, 2))])
    found = batched(apart).log_ratio(x, sigma)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(apart.log_ratio(x, sigma), found))


def test_many_points_on_a_cpu_are_given_to_one_expert_after_the_other():
    members, calls = learned(3), []
    together = batched(Mixture([(one, torch.tensor(w)) for one, w in zip(members, ([1.0, 2], [0.1, 5], [3, 0.4]))]))
    for one in members:
        one.network.register_forward_hook(lambda *_: calls.append(1))
    x, sigma = torch.randn(120, 3), torch.rand(120) + 0.1
    many = together.log_ratio(x, sigma)
    assert len(calls) == 3
    for part, rows in zip(torch.arange(120).split(40), x.split(40)):
        few = together.log_ratio(rows, sigma[part])
        assert all(torch.allclose(a[part], b, atol=1e-4) for a, b in zip(many, few))
    assert len(calls) == 6


def test_experts_that_were_asked_before_they_were_moved_are_stacked_again():
    """As those of a teacher, whose weights are calibrated before it goes to the student's device."""
    members = learned(3)
    ((together, _),) = batched(Mixture([(one, torch.ones(2)) for one in members])).terms
    together.components(torch.randn(10, 3), torch.ones(10))
    for one in members:
        one.to("meta")
    log, slope = together.components(torch.empty(10, 3, device="meta"), torch.empty(10, device="meta"))
    assert log.shape == (10, 6) and slope.device.type == "meta"


def test_an_expert_that_comes_later():
    *first, late = learned(3)
    both = batched(sum((Mixture([(one, torch.ones(2))]) for one in first[1:]), Mixture([(first[0], torch.ones(2))])))
    more = both + 0.5 * Mixture([(late, torch.tensor([1.0, 0.0]))])
    x, sigma = torch.randn(10, 3), torch.ones(10)
    terms = [*((one, torch.ones(2)) for one in first), (late, torch.tensor([0.5, 0.0]))]
    assert torch.allclose(more.score(x, sigma), Mixture(terms).score(x, sigma), atol=1e-4)
    with pytest.raises(ValueError, match=r"the base Gaussians differ: sigma_data is 1\.1 and 2\.0"):
        late.sigma_data = 2.0
        batched(Mixture([(first[0], torch.ones(2))]) + Mixture([(late, torch.ones(2))]))
    with pytest.raises(ValueError, match=r"the base Gaussians differ: sigma_data is 1\.1 and 2\.0"):
        Experts([first[0], late])


def test_calibration_corrects_a_drift():
    """Fields of one class that are too weak lose it; the corrected weights bring its share back."""

    class Weak(AnalyticSource):
        def components(self, x, sigma):
            log, slope = super().components(x, sigma)
            high = (sigma > 1)[:, None]
            return log + torch.where(high, torch.tensor([-1.0, 0.0, 0.0, 0.0]), 0.0).to(log), slope

    source = Weak(PARTS, WEIGHTS, 1.1)
    asked = Mixture([(source, torch.tensor([1.0, 1.0, 0.0, 3.0], dtype=torch.float64))])
    sampler, target = MultistepDynamics(levels=30, sigma_max=10.0, sigma_min=0.01), truth(1, 1, 0, 3)

    def error(mixture):
        x = sampler(mixture, SampleNoise(range(4000), (2,), seed=5)).double()
        shares = torch.bincount(truth(1, 1, 1, 1).mode_of(x), minlength=4) / 4000
        return float((shares - target.mode_weights).abs().sum())

    def pilot(mixture):
        return sampler(mixture, SampleNoise(range(2000), (2,), seed=6)).double()

    assert error(asked) > 0.15 and error(calibrated(asked, pilot)) < 0.06
    assert torch.equal(calibrated(asked, pilot, floor=0.9).terms[0][1], asked.terms[0][1])  # no share is above it
    with pytest.raises(UserError, match="here one is taken away: leave calibrate out"):
        calibrated(Mixture([(source, torch.tensor([1.0, 1.0, 0.0, -0.3], dtype=torch.float64))]), pilot)
    exact = mixture(1, 1, 0, 3)
    weights = calibrated(exact, pilot).terms[0][1]
    assert torch.allclose(weights, exact.terms[0][1], rtol=0.1)  # nothing to correct


def test_calibration_leaves_samples_that_have_the_shares_asked_for_alone():
    asked, generator = mixture(1, 0, 0.2, 0), torch.Generator().manual_seed(0)  # shares 10/11 and 1/11
    pilots = torch.cat([PARTS[c].sample(count, generator) for c, count in ((0, 1000), (2, 100))])
    weights = calibrated(asked, lambda _: pilots).terms[0][1]  # the noise level of the posterior is below the modes' sd
    assert torch.allclose(weights, asked.terms[0][1], rtol=0.02)


def test_each_round_of_a_calibration_draws_of_what_the_last_one_made():
    drawn, asked = [], mixture(1, 1, 1, 1)

    def draw(one):
        drawn.append(one.terms[0][1])
        return truth(1, 1, 1, 2).sample(500, torch.Generator().manual_seed(0))

    found = [calibrated(asked, draw, rounds=rounds).terms[0][1] for rounds in (1, 2)]
    assert len(drawn) == 3 and torch.equal(drawn[1], asked.terms[0][1]) and torch.equal(drawn[2], found[0])
    assert not torch.equal(*found)


def test_pilot_samples_count_alike_whatever_they_are_asked_with():
    asked, generator = mixture(3, 4, 0, 0), torch.Generator().manual_seed(0)  # of equal shares
    pilots = torch.cat([PARTS[0].sample(PILOTS, generator), PARTS[1].sample(PILOTS // 5, generator)])
    found = calibrated(asked, lambda _: pilots, rounds=1)
    assert found.terms[0][1].tolist() == pytest.approx([3 * 0.6, 4 * 3, 0, 0], rel=1e-2)


def test_a_class_of_which_no_pilot_sample_was_drawn_keeps_its_weight():
    asked = mixture(1, 1, 0, 0)
    found = calibrated(asked, lambda _: PARTS[0].sample(50, torch.Generator().manual_seed(0)), rounds=1)
    assert found.terms[0][1].tolist() == pytest.approx([4 / 7, 1, 0, 0], rel=1e-3)


def test_a_class_that_one_source_never_saw_is_that_of_another():
    """A model that knows its name alone, and one that was trained on it: a class that is added later."""
    early = AnalyticSource(PARTS[:3], [0.5, 0.5, 0.0], 1.1)
    late = AnalyticSource(PARTS[2:3], [1.0], 1.1)
    names = ["a", "b", "c"]
    both = combine([(early, names, 1.0), (late, ["c"], 1.0)], {"a": 0.4, "c": 0.6})
    assert both.mass() == pytest.approx(1.0)
    assert [weights.tolist() for _, weights in both.terms] == [[0.8, 0.0, 0.0], [0.6]]
    with pytest.raises(UserError, match="class 'c' was not seen in training"):
        combine([(early, names, 1.0)], {"a": 0.4, "c": 0.6})


def test_what_is_asked_for_and_left_out_and_other_contradictions_are_refused():
    names = ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="class 'b' is asked for in mix and left out in remove"):
        combine([(SOURCE, names, 1.0)], {"a": 1, "b": 1}, ["b"])
    with pytest.raises(ValueError, match="a source names a class twice: a, a, c, d"):
        combine([(SOURCE, ["a", "a", "c", "d"], 1.0)])
    for floor in (0.0, -3.0, 1.0, 5.0, math.nan):
        with pytest.raises(ValueError, match="floor must lie between"):
            Mixture([(SOURCE, torch.tensor(WEIGHTS))], floor=floor)
    for wrong in (Mixture([(SOURCE, torch.tensor(WEIGHTS))]), batched(Mixture([(learned(1, 2)[0], torch.ones(2))]))):
        with pytest.raises(ValueError, match="batched takes learned fields"):
            batched(wrong)
