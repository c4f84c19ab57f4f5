"""Consistency models and distilled ones: their function, their losses, what they learn of a Gaussian."""

import math
from types import SimpleNamespace

import pytest
import torch

from bd_lightning import kernels
from bd_lightning.checks import UserError
from bd_lightning.dynamics import ConsistencySteps, MultistepDynamics, SampleNoise
from bd_lightning.fields import AnalyticFields
from bd_lightning.modules import ConsistencyModel, DistilledModel, Gaps
from bd_lightning.networks import MLP
from bd_lightning.objectives import NoiseLevels
from bd_lightning.targets import GaussianMixture

TAU = 0.7


def small(**options):
    torch.manual_seed(0)
    network = MLP((2,), width=64, depth=1, **options.pop("network", {}))
    samplers = {"one": ConsistencySteps(sigma_max=10.0), "two": ConsistencySteps(sigma_max=10.0, between=(1.0,))}
    facts = {"shape": (2,), "num_classes": 0, "sigma_data": TAU}
    return ConsistencyModel(network=network, samplers=samplers, **facts, **options)


def excited(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_boundary_holds_exactly():
    model, x = excited(small()), torch.randn(20, 2)
    assert torch.equal(model.function(x, torch.zeros(20)), x)
    near = model.function(x, torch.full((20,), 1e-3))
    assert 0 < (near - x).abs().max() < 0.01


def test_gaps_narrow_by_stages_and_begin_at_the_data():
    gaps, t = Gaps(q=2.0, stages=3), torch.tensor([0.01, 0.5, 50.0])
    assert gaps(t, 0.0).tolist() == pytest.approx([0.0, 0.0, 0.5])
    last = gaps(t, 1.0)
    assert torch.equal(last, gaps(t, 0.7)) and last.tolist() == pytest.approx(
        [1 - (1 + 8 / (1 + torch.tensor(v).exp().item())) / 8 for v in (0.01, 0.5, 50.0)]
    )
    assert (gaps(t, 0.4) <= last).all()


@pytest.mark.parametrize("teacher", [False, True])
def test_the_function_of_gaussian_data_is_learned(teacher):
    """f(x, t) = x τ/√(τ² + t²), where the denoiser, with which it begins, has the square of that factor."""
    model = small(noise=NoiseLevels(-0.5, 1.2), gaps=Gaps(q=2.0, stages=5), lr=3e-3)
    if teacher:
        model.frozen = (AnalyticTeacher(),)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
    generator, steps = torch.Generator().manual_seed(1), 500
    for k in range(steps):
        model.progress = k / steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / steps)
        loss = model.losses(TAU * torch.randn(200, 2, generator=generator), None, generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(2000, 2, generator=generator)
    for t in (0.3, 1.0, 5.0):
        point = (TAU**2 + t**2) ** 0.5 * x
        with torch.no_grad():
            ratio = float((model.function(point, torch.full((2000,), t)) * x).sum() / x.square().sum())
        assert ratio == pytest.approx(TAU, rel=0.2)
        assert t < 1 or abs(ratio - TAU) < 0.5 * (TAU - TAU**2 / (TAU**2 + t**2) ** 0.5)  # the denoiser
    for name in ("one", "two"):
        assert float(model.eval().sample(range(2000), name).std()) == pytest.approx(TAU, rel=0.15)


class AnalyticTeacher:
    """The flow of the Gaussian in closed form."""

    labels, exact = (), True

    def fields(self, label):
        return AnalyticFields(GaussianMixture([[0.0, 0.0]], sd=TAU), kernels.Constant())

    def step(self, x, t, r, label):
        return x * ((TAU**2 + r.square()) / (TAU**2 + t.square())).sqrt()[:, None]


def test_both_sides_share_noise_and_dropout():
    model = excited(small(network={"dropout": 0.5})).train()
    seen = []
    function = model.function
    model.function = lambda x, sigma, label: seen.append((x, sigma, function(x, sigma, label))) or seen[-1][2]
    torch.manual_seed(3)
    x = torch.randn(64, 2)
    model.losses(x)
    (x_r, r, target), (x_t, t, out) = seen
    noise = (x_t - x) / t[:, None]
    torch.testing.assert_close(x_r, x + r[:, None] * noise, rtol=1e-3, atol=1e-3)
    assert torch.equal(target[r == 0], x[r == 0]) and not target.requires_grad and out.requires_grad
    torch.manual_seed(3)
    seen.clear()
    model.gaps = lambda t, progress: torch.ones_like(t)  # r = t: the two sides are one if their masks are
    model.losses(x)
    assert torch.equal(seen[0][2], seen[1][2].detach())


def test_the_consistency_loss_is_its_formula():
    """(√(‖f(x_t, t) − f(x_r, r)‖² + c²) − c) / (t − r), with c = huber · √d · σ_d."""
    model, seen = excited(small(huber=0.3)), []
    function = model.function
    model.function = lambda x, sigma, label: seen.append((sigma, function(x, sigma, label))) or seen[-1][1]
    losses = model.losses(torch.randn(16, 2))
    (r, target), (t, out) = seen
    c = 0.3 * math.sqrt(2) * TAU
    torch.testing.assert_close(losses.gradient, (((out - target).square().sum(1) + c**2).sqrt() - c) / (t - r))
    assert torch.equal(losses.sigma, t)


def at_step(model, step, steps):
    """A model at a step of a training."""
    model.seed, model._trainer = 0, SimpleNamespace(global_step=step, max_steps=steps, current_epoch=0)
    model.on_train_batch_start(None, 0)
    return model


def test_stages_and_chains_follow_the_steps(monkeypatch):
    monkeypatch.setattr("bd_lightning.modules.base.batch_seed", lambda *_: 0)
    assert [at_step(small(), step, 40).progress for step in (0, 10, 40)] == [0, 0.25, 1]
    assert [at_step(distilled(every=7), step, 40).place for step in (0, 6, 7, 21)] == [0, 0, 1, 3]


def test_classes_are_those_that_the_teacher_was_asked_for():
    model = small(network={"num_classes": 6, "conditional": True})
    own = torch.tensor([0, 1, 3, 4, 0])
    assert torch.equal(model.classes(own, 5, own.device), own)
    model.frozen = (SimpleNamespace(labels=[2, 5]),)
    assert model.classes(own, 5, own.device).tolist() == [2, 5, 2, 5, 2]


def test_coupling_costs_its_divergence_and_learns():
    model = small(coupling=MLP((2,), width=16, depth=1))
    losses = model.losses(torch.randn(32, 2))
    assert torch.equal(losses.scalar, torch.zeros(32))  # N(0, I) to begin with
    excited(model.coupling)
    n, kl = model.noised(torch.ones(50_000, 2), torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(n.mean(0), n.std(0))
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert float(kl[0]) == pytest.approx(float(exact), rel=0.05)
    model.losses(torch.randn(32, 2)).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_divergence_of_a_coupling_is_taken_in_single_precision():
    model = small(coupling=MLP((2,), width=16, depth=1))
    model.coupling.forward = lambda x, c_noise, label: (torch.zeros_like(x).bfloat16(), c_noise.bfloat16() + 0.01)
    _, kl = model.noised(torch.ones(4, 2), torch.Generator().manual_seed(0))
    s = float(torch.tensor(0.01).bfloat16())
    assert kl.tolist() == pytest.approx([(math.exp(2 * s) - 1 - 2 * s) / 2] * 4, rel=0.01)


def test_energy_widens_what_a_regression_draws_to_its_mean():
    """Of a function that halves its samples, the energy distance asks for more, and at the data's width for nothing."""
    model = distilled(energy=2.0)
    x = TAU * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    for scale, sign in ((0.5, -1), (2.0, 1)):
        factor = torch.tensor(scale, requires_grad=True)
        model.function = lambda x, sigma, label, factor=factor: factor * TAU * x / 10.0
        (slope,) = torch.autograd.grad(model.matching(x, None, torch.Generator().manual_seed(1)), factor)
        assert sign * slope > 0.1
    model.function = lambda x, sigma, label: TAU * x / 10.0
    assert abs(model.matching(x, None, torch.Generator().manual_seed(1))) < 0.02
    assert distilled(energy=0.0).matching(x, None, None) == 0
    joined = distilled(energy=1.0, network=MLP((2,), 2, conditional=True, width=8, depth=1))
    joined.num_classes, joined.function = 2, lambda x, sigma, label: TAU * x / 10.0 + 2.0 * label[:, None]
    label = torch.arange(4000) % 2
    assert abs(joined.matching(x + 2.0 * label[:, None], label, None)) < 0.05
    assert joined.matching(x + 2.0 * (1 - label)[:, None], label, None) > 0.2  # the same samples, of other classes


def distilled(**options):
    torch.manual_seed(0)
    samplers = {"one": ConsistencySteps(sigma_max=10.0), "two": ConsistencySteps(sigma_max=10.0, between=(1.0,))}
    flow = MultistepDynamics(levels=12, order=3, corrector=True, relaxation=0.0, sigma_min=0.05)
    options = {
        "network": MLP((2,), width=64, depth=1),
        "teacher": "a checkpoint",
        "flow": flow,
        "chains": 500,
    } | options
    return DistilledModel(**{"shape": (2,), "num_classes": 0, "sigma_data": TAU, "samplers": samplers} | options)


def test_the_ends_of_a_teachers_chains_are_learned():
    model = distilled(first=0.4, energy=0.5)
    model.frozen = (AnalyticTeacher(),)
    optimizer, steps = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3), 300
    for k in range(steps):
        model.place = k // 50
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / steps)
        loss = model.losses(torch.zeros(200, 2)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    for t in (0.5, 10.0):
        point = (TAU**2 + t**2) ** 0.5 * x
        with torch.no_grad():
            ratio = float((model.function(point, torch.full((2000,), t)) * x).sum() / x.square().sum())
        assert ratio == pytest.approx(TAU, rel=0.08)
    for name in ("one", "two"):
        assert float(model.eval().sample(range(2000), name).std()) == pytest.approx(TAU, rel=0.08)


def test_chains_are_the_same_again_and_others_later():
    model = distilled()
    model.frozen = (AnalyticTeacher(),)
    first, again, later = (model.chains(place, 20) for place in (0, 0, 1))
    assert torch.equal(first.states, again.states) and not torch.equal(first.states, later.states)
    assert first.states.shape == (12, 20, 2) and first.levels[0] == 10.0
    moved = AnalyticTeacher().step(first.states[0], torch.full((20,), 10.0), torch.zeros(20), None)
    torch.testing.assert_close(first.ends, moved, atol=0.02, rtol=0.02)
    for wrong, sentence in [
        ({"teacher": None}, "learns from another one alone: give teacher"),
        ({"chains": 1}, "chains must lie between 2"),
        (
            {"samplers": {"two": ConsistencySteps(sigma_max=10.0), "one": ConsistencySteps(sigma_max=5.0)}},
            r"begin at noise levels \[5.0, 10.0\]",
        ),
        ({"noise": NoiseLevels()}, "noise is that of data"),
        ({"flow": MultistepDynamics(relaxation=0.5)}, "flow.relaxation must be 0"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            distilled(**wrong)


def test_chains_are_each_processs_and_each_runs_own(monkeypatch):
    model = distilled()
    model.frozen = (AnalyticTeacher(),)
    starts = [model.chains(0, 20).states[0]]
    model.seed = 5
    starts.append(model.chains(0, 20).states[0])
    monkeypatch.setattr(DistilledModel, "global_rank", 1)
    starts.append(model.chains(0, 20).states[0])
    assert not any(torch.equal(a, b) for a, b in zip(starts, [*starts[1:], starts[0]]))


def test_errors_count_in_units_of_their_noise_level():
    """Down to the data's: the loss of a pair is its distance over min(σ, σ_d)."""
    model = distilled(energy=0.0)
    model.frozen = (AnalyticTeacher(),)
    model.distance = lambda error: torch.ones(len(error))
    losses = model.losses(torch.zeros(400, 2))
    assert losses.sigma.min() < TAU < losses.sigma.max()
    torch.testing.assert_close(losses.gradient, 1 / losses.sigma.clamp_max(TAU))


def test_samplers_do_not_begin_above_what_was_learned():
    """Which is the class's own first level where a config names none."""
    model = small()
    for first in (20.0, 80.0):
        model.sigma_max = first
        was = {"samplers": {"two": {"sigma_max": 5.0}, "three": {"between": [1.0]}, "none": None}}
        if first == 20:
            model.refuse_changes(was, was)
            continue
        with pytest.raises(UserError, match="begins at noise level 80, and 20 is the highest learned"):
            model.refuse_changes(was, was)


def test_one_teacher_step_follows_the_flow():
    from bd_lightning.teachers import Teacher

    target = GaussianMixture([[0.0, 0.0]], sd=TAU)

    class Model:
        takes_labels, samplers = False, {"ode": MultistepDynamics(exact_score=True)}

        def asked(self, label):
            return AnalyticFields(target, kernels.ClosedFormSlices(0.01))

    x, t = torch.randn(30, 2), torch.full((30,), 0.5)
    moved = Teacher(Model()).step(x, t, 0.98 * t)
    exact = AnalyticTeacher().step(x, t, 0.98 * t, None)
    assert (moved - exact).abs().max() < 0.05 * (x - exact).abs().max()
    at_once = Teacher(Model()).step(x, t, 0 * t)
    torch.testing.assert_close(at_once, x * TAU**2 / (TAU**2 + 0.25), rtol=1e-3, atol=1e-3)


def test_sampler_levels_and_calls():
    sampler = ConsistencySteps(sigma_max=10.0, between=(2.0, 0.5))
    seen = []
    x = sampler(
        AnalyticFields(GaussianMixture([[0.3, 0.3]], sd=TAU), kernels.Constant()),
        SampleNoise(range(7), (2,)),
        watch=lambda step, x: seen.append(step),
    )
    assert sampler.calls == 3 and seen == [0, 1, 2, 3] and x.shape == (7, 2)
    for wrong in ((11.0,), (1.0, 2.0)):
        with pytest.raises(ValueError, match="between must fall, from below sigma_max 10"):
            ConsistencySteps(sigma_max=10.0, between=wrong)
