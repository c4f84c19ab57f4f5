"""Dynamics of third order with a corrector: exact for polynomials, of their order, and with any number of calls."""

import pytest
import torch

from bd_lightning import kernels
from bd_lightning.dynamics import MultistepDynamics, ProbabilityFlow, SampleNoise
from bd_lightning.dynamics.descent import step_target
from bd_lightning.fields import AnalyticFields, FieldPair
from bd_lightning.targets import GaussianMixture
from oracles import square

TAU = 0.7


def gaussian_fields(kernel):
    return AnalyticFields(GaussianMixture([[0.3, 0.3]], sd=TAU), kernel, sigma_data=TAU)


def reached(sampler, kernel, n=1500):
    x = sampler(gaussian_fields(kernel), SampleNoise(range(n), (2,), seed=4))
    assert x.mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.08)
    return float(x.std()) / TAU


class InDouble(SampleNoise):
    """Noise in double precision, so that rounding does not hide the order of a rule."""

    def __call__(self):
        return super().__call__().double()


class Following(FieldPair):
    """The score of a point that the denoiser goes to at each noise level: D(x, σ) = T(−ln σ), the same for every x."""

    def __init__(self, target):
        self.target = target

    def __call__(self, x, sigma):
        return torch.ones_like(sigma), (self.target(-sigma.log())[:, None] - x) / (2 * sigma.square()[:, None])


def states(fields, **options):
    sampler = MultistepDynamics(**{"relaxation": 0.0, "sigma_max": 4.0, "sigma_min": 0.1} | options)
    return list(sampler.path(fields, InDouble(range(20), (2,), seed=2)))


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("relaxation", [0.0, 0.7])
@pytest.mark.parametrize("rho", [None, 7.0])
def test_steps_are_exact_for_polynomials(corrector, relaxation, rho):
    """dx = −κ(x − T)dt has a solution in closed form for T of a degree below the number of levels it is taken from."""

    def ends(degree, order, levels):
        """The mean of the chains at the end; the noise of the steps is left out by the difference of two T."""
        options = {"order": order, "levels": levels, "corrector": corrector, "relaxation": relaxation, "rho": rho}
        moved = states(Following(lambda t: (t + 1.4) ** degree), **options)[-2]
        return (moved - states(Following(torch.zeros_like), **options)[-2])[0, 0]

    kappa, start = 1 + relaxation, -torch.tensor(4.0).log() + 1.4
    stop = -torch.tensor(0.1).log() + 1.4
    exact = {0: 1 - (-kappa * (stop - start)).exp()}
    for degree in (1, 2, 3):  # ∫ κ e^{−κ(stop − t)} tᵏ dt by parts
        by_parts = stop**degree - start**degree * (-kappa * (stop - start)).exp()
        exact[degree] = by_parts - degree / kappa * exact[degree - 1]
    for order in (1, 2, 3):
        assert ends(0, order, 7) == pytest.approx(float(exact[0]), rel=1e-5)
    degree = 2 + corrector  # which a step of third order is exact for
    gaps = {order: abs(float(ends(degree, order, 40) - exact[degree])) for order in (1, 2, 3)}
    assert gaps[3] < gaps[2] < gaps[1]


def test_a_step_of_full_order_meets_a_polynomial_exactly():
    kappa = torch.tensor([[1.0], [1.7], [4.0]], dtype=torch.float64)
    h, places = 0.8, [0.0, -0.3, -1.1, 0.8]
    u = torch.linspace(0, h, 200_001, dtype=torch.float64)
    decay = (-kappa * (h - u)).exp()
    for count in (1, 2, 3, 4):
        for degree in range(count):
            past = [(2.0 - u0, torch.full((3, 1), u0**degree, dtype=torch.float64)) for u0 in places[:count]]
            expected = torch.trapezoid(decay * u**degree, u) / torch.trapezoid(decay, u)
            torch.testing.assert_close(step_target(past, 2.0, h, kappa)[:, 0], expected, rtol=1e-8, atol=1e-9)


def test_coefficients_of_a_step_are_not_rounded_in_half_precision():
    past = [(0.0, torch.tensor([[1.0]])), (0.31, torch.tensor([[3.0]])), (0.7, torch.tensor([[-2.0]]))]
    exact = step_target(past, 0.0, 0.37, torch.tensor([[1.3]]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(step_target(past, 0.0, 0.37, torch.tensor([[1.3]])), exact, rtol=0, atol=0)


def test_a_step_that_forgets_all_before_its_end_takes_what_is_there():
    past = [(0.0, torch.tensor([[1.0]])), (0.5, torch.tensor([[3.0]]))]
    found = step_target(past, 0.0, 0.5, torch.tensor([[1e6]]))  # e^{-kappa h} is 0 at every point of the rule but one
    assert float(found) == pytest.approx(-1.0, abs=0.1)  # the line through both, at the end of the step


@pytest.mark.parametrize("rho", [None, 7.0])
def test_orders_of_the_rules_on_a_mixture(rho):
    """Halving the steps of the flow divides its error by 2^order, the corrector adding one; analytic fields."""
    fields = AnalyticFields(square(), kernels.Constant())
    finest = states(fields, order=3, corrector=True, levels=900, rho=rho, sigma_max=15.0)[-2]

    def observed(order, corrector):
        errors = [
            (states(fields, order=order, corrector=corrector, levels=n + 1, rho=rho, sigma_max=15.0)[-2] - finest)
            .norm(dim=1)
            .mean()
            for n in (100, 200)
        ]
        return float((errors[0] / errors[1]).log2()), float(errors[1])

    found = {pair: observed(*pair) for pair in [(1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]}
    for (order, corrector), (slope, _) in found.items():
        assert slope > order + corrector - 0.4, list(found.values())
    assert found[3, True][1] < found[3, False][1] < found[2, False][1] < found[1, False][1]


def test_heun_is_of_second_order_on_a_mixture():
    fields = AnalyticFields(square(), kernels.Constant())

    def end(steps):
        sampler = ProbabilityFlow(steps=steps, sigma_max=15.0, sigma_min=0.1)
        return list(sampler.path(fields, InDouble(range(20), (2,), seed=2)))[-2]

    coarse, fine, finest = map(end, (20, 40, 160))
    slope = float(((coarse - finest).norm(dim=1).mean() / (fine - finest).norm(dim=1).mean()).log2())
    assert 1.7 < slope < 2.4
    third = states(fields, order=3, corrector=True, levels=150, sigma_max=15.0)[-2]
    torch.testing.assert_close(finest, third, atol=5e-3, rtol=0)  # both solve the same equation


@pytest.mark.parametrize("relaxation", [0.0, 1.0])
@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_fewer_calls_than_the_order(calls, relaxation):
    sampler = MultistepDynamics(levels=calls, order=3, corrector=True, relaxation=relaxation, rho=7.0)
    count = Counted(gaussian_fields(kernels.Constant()))
    x = sampler(count, SampleNoise(range(50), (2,)))
    assert x.isfinite().all() and x.shape == (50, 2) and count.calls == calls == sampler.calls


class Counted(FieldPair):
    def __init__(self, fields):
        self.fields, self.calls = fields, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.fields(x, sigma)


@pytest.mark.parametrize("kernel", [kernels.ClosedFormSlices(0.01), kernels.Constant()], ids=lambda k: type(k).__name__)
def test_corrected_dynamics_of_third_order_reach_a_gaussian(kernel):
    options = {"order": 3, "corrector": True, "sigma_max": 10.0, "sigma_min": 0.05, "exact_score": True}
    for relaxation in (0.0, 0.5, 2.0):
        sampler = MultistepDynamics(levels=40, relaxation=relaxation, **options)
        assert reached(sampler, kernel) == pytest.approx(1, abs=0.05)


def test_states_on_the_way_are_corrected_ones():
    """A distilled model learns from them all: each is as near to the flow, known for a Gaussian, as the rule allows."""
    levels = torch.tensor(MultistepDynamics(levels=12, sigma_max=4.0, sigma_min=0.1).ladder()[:-1]).double()
    fields = gaussian_fields(kernels.Constant())

    def error(corrector):
        found = torch.stack(states(fields, levels=12, order=1, corrector=corrector)[:-1])
        exact = 0.3 + (found[0] - 0.3) * ((TAU**2 + levels**2) / (TAU**2 + levels[0] ** 2)).sqrt()[:, None, None]
        return (found - exact).abs().mean((1, 2))[1:]

    assert (error(True) < 0.4 * error(False)).all(), (error(True), error(False))
