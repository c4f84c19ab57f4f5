import pytest
import torch

from bd_lightning import dynamics, kernels
from bd_lightning.distances import mmd
from bd_lightning.dynamics import (
    AnnealedDynamics,
    BellmanDynamics,
    MultistepDynamics,
    ProbabilityFlow,
    SampleNoise,
    SamplingDiverged,
    bellman_step,
)
from bd_lightning.fields import AnalyticFields, FieldPair
from bd_lightning.targets import GaussianMixture
from oracles import square

TAU = 0.7
KERNELS = [kernels.Exact(0.01), kernels.ClosedFormSlices(0.01), kernels.Constant()]


def gaussian_fields(kernel):
    return AnalyticFields(GaussianMixture([[0.3, 0.3]], sd=TAU), kernel, sigma_data=TAU)


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_chains_begin_as_they_are_asked_to(start):
    """With the spread of the first noise level; a uniform start has no point beyond √3 of it."""
    sampler = MultistepDynamics(levels=2, sigma_max=5.0, start=start)
    x = next(iter(sampler.path(gaussian_fields(kernels.Constant()), SampleNoise(range(4000), (2,)))))
    assert float(x.std()) == pytest.approx(5.0, rel=0.03)
    assert (float(x.abs().max()) > 5.0 * 3**0.5) == (start == "gaussian")


def test_annealed_dynamics_end_with_a_denoising_step_by_the_score_that_is_asked_for():
    fields, samples = gaussian_fields(kernels.ClosedFormSlices(0.01)), {}
    for exact in (False, True):
        sampler = AnnealedDynamics(levels=2, steps_per_level=2, sigma_max=2.0, sigma_min=1.0, exact_score=exact)
        *_, before, samples[exact] = sampler.path(fields, SampleNoise(range(6), (2,)))
        sigma = torch.ones(6)
        torch.testing.assert_close(samples[exact], before + fields.score(before, sigma, exact))
    assert (samples[True] - samples[False]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kernel", "unit"),
    [(kernels.Exact(0.05), 0.001), (kernels.ClosedFormSlices(0.05), 0.004), (kernels.Constant(), 0.004)],
    ids=["exact", "slices", "constant"],
)
def test_plain_dynamics_started_at_p_stay_at_p(kernel, unit):
    """The mobility varies by an order of magnitude over the target, so that a wrong Itô correction would show."""
    target = square()
    fields = AnalyticFields(target, kernel)

    def run(drift):
        """Mean squared distance to the nearest mode over the second half of the run, as a ratio to the start's."""
        g = torch.Generator().manual_seed(1)
        x = start = target.sample(1500, g).float()
        sigma, spreads = torch.zeros(len(x)), []
        for _ in range(120):
            s, field = fields(x, sigma)
            x = bellman_step(x, s, drift * field, unit / fields.reference(sigma), torch.randn(x.shape, generator=g))
            spreads.append(torch.cdist(x, target.means.float()).min(1)[0].square().mean())
        before = torch.cdist(start, target.means.float()).min(1)[0].square().mean()
        return float(torch.stack(spreads[60:]).mean() / before)

    assert run(1.0) == pytest.approx(1.0, abs=0.08)
    assert run(2.0) < 0.85  # and the test sees a factor of two
    assert run(0.5) > 1.15


@pytest.mark.parametrize("kernel", [*KERNELS, kernels.Sliced(0.01, slices=4)], ids=lambda k: type(k).__name__)
def test_generator_vanishes_in_expectation_under_p(kernel):
    """E_p[g·∇f + ½ m ∆f] = 0 for every f: no net flux, with m̂ and ∇m̂ of the kernel's own estimates."""
    target, g = square(), torch.Generator().manual_seed(0)
    sigma = torch.full((4000,), 0.2, dtype=torch.float64)
    x = target.sample(4000, g) + 0.2 * torch.randn(4000, 2, generator=g, dtype=torch.float64)
    y = target.sample(3000, g)
    weights = torch.full((4000, 3000), 1 / 3000, dtype=torch.float64)
    m, grad_m = kernel(x, y, sigma, weights, g)
    slope = -torch.pi * (torch.pi * x + 0.3).sin()  # f = cos(πx₁ + 0.3) + cos(πx₂ + 0.3), low at the modes
    laplacian = -(torch.pi**2) * (torch.pi * x + 0.3).cos().sum(1)

    def deviations(drift, ito=1.0):
        field = 0.5 * (m[:, None] * target.score(x, 0.2) + ito * grad_m)
        values = drift * (field * slope).sum(1) + 0.5 * m * laplacian
        return abs(float(values.mean() / (values.std() / len(x) ** 0.5)))

    assert deviations(1.0) < 3.5
    for wrong in (-1.0, 0.5, 2.0):
        assert deviations(wrong) > 8
    if grad_m.any():
        assert deviations(1.0, ito=-1.0) > 8


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_flux_vanishes_at_the_analytic_fields(kernel):
    """g p − ½∇(m p) = 0 at every point and noise level."""
    target = square()
    x = (1.5 * torch.randn(40, 2, dtype=torch.float64)).requires_grad_(True)
    sigma = torch.full((40,), 0.3, dtype=torch.float64)
    m, g = AnalyticFields(target, kernel)(x, sigma)
    p, _ = target.smoothed(x, sigma)
    (slope,) = torch.autograd.grad((m * p).sum(), x)
    torch.testing.assert_close(g * p[:, None], slope / 2, rtol=1e-4, atol=1e-7)
    regressed = AnalyticFields(target, kernels.Exact(0.01), smoothed=True)
    s, g = regressed(x, sigma)
    torch.testing.assert_close(s[:, None] * g, torch.autograd.grad(s.square().sum(), x)[0] / 2)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_two_sample_test_does_not_tell_the_chain_from_p(kernel):
    """MMD of chains that started at p, against its distribution between independent samples of p."""
    target, n = square(), 400
    fields = AnalyticFields(target, kernel)
    unit = 0.002 if isinstance(kernel, kernels.Exact) else 0.006

    def chain(drift):
        g = torch.Generator().manual_seed(4)
        x, sigma = target.sample(n, g), torch.zeros(n, dtype=torch.float64)
        for _ in range(150):
            s, field = fields(x, sigma)
            noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
            x = bellman_step(x, s, drift * field, unit / fields.reference(sigma), noise)
        return x

    g = torch.Generator().manual_seed(7)
    between = sorted(mmd(target.sample(n, g), target.sample(n, g), 0.3) for _ in range(60))
    other = target.sample(n, g)
    assert mmd(chain(1.0), other, 0.3) < between[-2]  # the level of the test is 1 in 30
    assert mmd(chain(3.0), other, 0.3) > 1.2 * between[-1]


def reached(sampler, kernel, n=1500):
    x = sampler(gaussian_fields(kernel), SampleNoise(range(n), (2,), seed=4))
    assert x.mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.08)
    return float(x.std()) / TAU


@pytest.mark.parametrize("kernel", [kernels.ClosedFormSlices(0.01), kernels.Constant()], ids=lambda k: type(k).__name__)
def test_flow_reaches_a_gaussian(kernel):
    flow = ProbabilityFlow(steps=18, sigma_max=10.0, sigma_min=0.05, exact_score=True)
    assert reached(flow, kernel) == pytest.approx(1, abs=0.06)


def test_churn_forgets_the_start_and_keeps_the_density():
    def run(churn, **options):
        sampler = ProbabilityFlow(steps=40, sigma_max=10.0, churn=churn, **options)
        return sampler(gaussian_fields(kernels.Constant()), SampleNoise(range(4000), (2,)))

    still, churned = run(0.0), run(20.0)
    assert churned.std() == pytest.approx(TAU, rel=0.03) and churned.mean() == pytest.approx(0.3, abs=0.03)
    correlation = torch.corrcoef(torch.stack([still.flatten(), churned.flatten()]))[0, 1]
    assert correlation < 0.7
    assert torch.equal(run(20.0, churn_interval=(20.0, 30.0)), still)  # above the first noise level


def test_annealed_dynamics_reach_a_gaussian():
    sampler = AnnealedDynamics(levels=40, steps_per_level=40, step_size=0.1, sigma_max=10.0, sigma_min=0.1)
    assert reached(sampler, kernels.Constant()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("relaxation", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_multistep_dynamics_reach_a_gaussian(kernel, relaxation):
    sampler = MultistepDynamics(levels=60, relaxation=relaxation, sigma_max=10.0, sigma_min=0.05, exact_score=True)
    assert reached(sampler, kernel) == pytest.approx(1, abs=0.06)


def test_multistep_dynamics_are_of_second_order():
    """With λ = 0 and a Gaussian of width τ the flow is known: x shrinks by √((τ² + σ'²)/(τ² + σ²))."""
    fields = AnalyticFields(GaussianMixture([[0.0, 0.0]], sd=TAU), kernels.ClosedFormSlices(0.01))
    errors = []
    for levels in (40, 80):
        sampler = MultistepDynamics(levels=levels, relaxation=0.0, sigma_max=5.0, sigma_min=0.05, exact_score=True)
        states = [x.double() for x in sampler.path(fields, SampleNoise(range(50), (2,)))]
        expected = ((TAU**2 + 0.05**2) / (TAU**2 + 25)) ** 0.5
        errors.append(abs(float((states[-2] / states[0]).mean()) / expected - 1))
    assert errors[0] < 0.01 and errors[1] < errors[0] / 3


def mode_weights(sampler, kernel, n=4000):
    target = square()
    x = sampler(AnalyticFields(target, kernel), SampleNoise(range(n), (2,), seed=1))
    return (torch.bincount(target.mode_of(x), minlength=4) / n - target.mode_weights).abs().max()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_mode_weights_are_recovered_in_few_calls(kernel):
    sampler = MultistepDynamics(levels=30, relaxation=0.25, sigma_max=10.0, exact_score=True)
    assert mode_weights(sampler, kernel) < 0.02  # four standard errors of 4,000 draws are 0.03: the seed is fixed
    flow = ProbabilityFlow(steps=15, sigma_max=10.0, exact_score=True)
    assert mode_weights(flow, kernel) < 0.02


def test_plain_dynamics_keep_the_weights_of_their_start():
    sampler = BellmanDynamics(steps=200, step_size=0.01, start="uniform")
    assert mode_weights(sampler, kernels.Constant(), n=2000) > 0.1


def test_score_is_the_same_for_every_kernel():
    """(2g − ∇s)/s cancels the kernel."""
    target = square()
    x, sigma = target.sample(40).float() + 0.3 * torch.randn(40, 2), torch.full((40,), 0.5)
    for kernel in (kernels.Exact(0.01), kernels.ClosedFormSlices(0.01)):
        fields = AnalyticFields(target, kernel)
        torch.testing.assert_close(fields.score(x, sigma, exact=True), target.score(x, 0.5), rtol=1e-3, atol=1e-3)
        assert (fields.score(x, sigma) - target.score(x, 0.5)).abs().max() > 0.05
    with torch.inference_mode():  # as inside Lightning's evaluation loops
        inside = x.clone()
        again = fields.score(inside, sigma, exact=True)
    torch.testing.assert_close(again, target.score(x, 0.5), rtol=1e-3, atol=1e-3)


def test_samples_do_not_depend_on_the_batch():
    fields = gaussian_fields(kernels.Constant())
    sampler = MultistepDynamics(levels=10)
    together = sampler(fields, SampleNoise(range(12), (2,), seed=3))
    apart = [sampler(fields, SampleNoise(part, (2,), seed=3)) for part in (range(0, 5), range(5, 12))]
    torch.testing.assert_close(together, torch.cat(apart))
    other = sampler(fields, SampleNoise(range(12), (2,), seed=4))
    assert (together - other).abs().min() > 0


def test_noise_streams_are_standard_normal_and_independent():
    noise = SampleNoise(range(4000), (3,), seed=0)
    first, second = noise(), noise()
    assert float(first.std()) == pytest.approx(1, abs=0.03) and float(first.mean()) == pytest.approx(0, abs=0.03)
    for a, b in ((first, second), (first[:-1], first[1:]), (first, SampleNoise(range(4000), (3,), seed=1)())):
        assert abs(float((a * b).mean())) < 0.04


def test_lost_chains_stop_the_run():
    class Broken(FieldPair):
        def __call__(self, x, sigma):
            g = -x
            g[:3] = float("nan")
            return torch.ones(len(x)), g

    with pytest.raises(
        SamplingDiverged, match=r"3 of 10 samples \(30 %\) were lost at step 1 .*not a number from the first call on"
    ) as caught:
        BellmanDynamics(steps=5)(Broken(), SampleNoise(range(10), (2,)))
    assert caught.value.lost.tolist() == [True] * 3 + [False] * 7
    assert caught.value.x[3:].isfinite().all() and caught.value.step == 1
    whole = BellmanDynamics(steps=5)
    with pytest.warns(UserWarning, match="3 of 10 .* at step 1 .*the finite part is returned"):
        kept = whole(Broken(), SampleNoise(range(10), (2,)), finite_part=True)
    assert kept.shape == (7, 2) and kept.isfinite().all()

    with pytest.raises(SamplingDiverged, match="were lost at step .*step size.*off the data"):
        BellmanDynamics(steps=2000, step_size=50.0)(lambda_fields(), SampleNoise(range(10), (2,)))


def lambda_fields():
    class Repelling(FieldPair):
        def __call__(self, x, sigma):
            return torch.ones(len(x)), x

    return Repelling()


def test_watch_sees_every_step():
    seen = []
    sampler = AnnealedDynamics(levels=4, steps_per_level=2)
    out = sampler(
        gaussian_fields(kernels.Constant()), SampleNoise([0], (2,)), watch=lambda step, x: seen.append((step, x))
    )
    assert [step for step, _ in seen] == list(range(10)) and torch.equal(seen[-1][1], out)
    assert sampler.calls == 9 and ProbabilityFlow(steps=18).calls == 35


def test_grids():
    grid = dynamics.edm_grid(80.0, 0.002, 18)
    assert grid[0] == pytest.approx(80) and grid[-2] == pytest.approx(0.002) and grid[-1] == 0
    ladder = dynamics.geometric_ladder(8.0, 0.5, 5)
    assert ladder.tolist() == pytest.approx([8, 4, 2, 1, 0.5])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda: AnnealedDynamics(levels=0), "levels must be positive, got 0"),
        (lambda: AnnealedDynamics(sigma_min=-1.0), "sigma_min must be positive"),
        (lambda: AnnealedDynamics(sigma_min=30.0), "sigma_min must lie below sigma_max 20"),
        (lambda: ProbabilityFlow(rho=float("nan")), "rho must be positive, got nan"),
        (lambda: BellmanDynamics(step_size=0.0), "step_size must be positive"),
        (lambda: ProbabilityFlow(churn_interval=(2.0, 1.0)), "churn_interval must be .low, high. with 0 ≤ low < high"),
    ],
)
def test_refusals(sampler, message):
    with pytest.raises(ValueError, match=message):
        sampler()
