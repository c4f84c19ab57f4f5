"""Each loss is stationary at the analytic fields, and the test would notice a wrong sign or a factor of two."""

import pytest
import torch
from torch.autograd import forward_ad

from bd_lightning import divergences, kernels
from bd_lightning.fields import AnalyticFields
from bd_lightning.networks import dual
from bd_lightning.objectives import Proposal
from bd_lightning.targets import GaussianMixture

N = 400_000
EPSILON, SIGMA, TAU = 0.2, 0.6, 0.8


def gaussian():
    """A Gaussian target in the plane with the exact kernel: every field in closed form."""
    g = torch.Generator().manual_seed(5)
    x = TAU * torch.randn(N, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(N, 2, generator=g, dtype=torch.float64)
    return x, noise, x + SIGMA * noise


def mobility(x):
    """m and ∇m of the exact kernel: the Gaussian of variance τ² + σ² + ε."""
    variance = TAU**2 + SIGMA**2 + EPSILON
    m = (-x.square().sum(1) / (2 * variance)).exp() / (2 * torch.pi * variance)
    return m, -x * m[:, None] / variance


def test_formulas_agree_with_the_analytic_fields():
    fields = AnalyticFields(GaussianMixture([[0, 0]], sd=TAU), kernels.Exact(EPSILON))
    x = gaussian()[2][:50]
    s, g = fields(x, torch.full((50,), SIGMA, dtype=torch.float64))
    torch.testing.assert_close(s, mobility(x)[0])
    torch.testing.assert_close(g, optimum(x, factored=False)[0])


def directions(x):
    """Fields to move in, with their Jacobians: linear, with a curl, and nonlinear."""
    eye = torch.eye(2, dtype=x.dtype).expand(len(x), 2, 2)
    curl = torch.tensor([[0.0, 1.0], [-1.0, 0.5]], dtype=x.dtype).expand(len(x), 2, 2)
    wave = torch.diag_embed(x.cos())
    return [(x, eye), (torch.einsum("bij,bj->bi", curl, x), curl), (x.sin(), wave)]


def optimum(point, factored):
    """S* = ∇log p_σ + ∇log m or g* = ½(m∇log p_σ + ∇m), with the Jacobian."""
    m, grad_m = mobility(point)
    a, b = 1 / (TAU**2 + SIGMA**2), 1 / (TAU**2 + SIGMA**2 + EPSILON)
    eye = torch.eye(2, dtype=point.dtype)
    S, jacobian = -(a + b) * point, -(a + b) * eye.expand(len(point), 2, 2)
    if factored:
        return S, jacobian
    return 0.5 * m[:, None] * S, 0.5 * (m[:, None, None] * jacobian + S[:, :, None] * grad_m[:, None, :])


def loss_of(name, field, jacobian, noise, point):
    m, grad_m = mobility(point)
    sigma = torch.full((len(point),), SIGMA, dtype=point.dtype)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    v = torch.where(torch.randn(point.shape, generator=torch.Generator().manual_seed(8)) < 0, -1.0, 1.0).double()
    vjv = torch.einsum("bi,bij,bj->b", v, jacobian, v)
    return {
        "divergence": lambda: divergences.divergence_loss(field, trace, m),
        "sliced": lambda: divergences.sliced_divergence_loss(field, v, vjv, m),
        "stein": lambda: divergences.stein_loss(field, noise, sigma, m, grad_m),
        "factored_divergence": lambda: divergences.factored_divergence_loss(field, trace, m, grad_m),
        "factored_stein": lambda: divergences.factored_stein_loss(field, noise, sigma, m, grad_m),
    }[name]()


LOSSES = ["divergence", "sliced", "stein", "factored_divergence", "factored_stein"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", range(3))
def test_gradient_field_losses_are_stationary_at_the_analytic_field(name, which):
    _, noise, point = gaussian()
    h, jacobian_h = directions(point)[which]
    best, jacobian = optimum(point, name.startswith("factored"))

    def slope(scale):
        """Per-sample derivative of the loss along h at scale · g*, exact since losses are quadratic."""
        up = loss_of(name, scale * best + h, scale * jacobian + jacobian_h, noise, point)
        down = loss_of(name, scale * best - h, scale * jacobian - jacobian_h, noise, point)
        return (up - down) / 2

    def deviations(values):
        return float(values.mean() / (values.std() / N**0.5))

    assert abs(deviations(slope(1.0))) < 4
    if which != 1:  # along the curl field the slope is small for every field
        for wrong in (-1.0, 0.5, 2.0):
            assert abs(deviations(slope(wrong))) > 15


def test_scalar_loss_is_minimised_by_the_mobility():
    _, _, point = gaussian()
    s, _ = mobility(point)
    partner = TAU * torch.randn(N, 2, dtype=torch.float64)
    v = EPSILON + SIGMA**2
    k = (-(point - partner).square().sum(1) / (2 * v)).exp() / (2 * torch.pi * v)  # one noisy pair per sample
    h = point.cos().prod(1)

    def deviations(scale):
        slope = (divergences.scalar_loss(scale * s + h, k) - divergences.scalar_loss(scale * s - h, k)) / 2
        return float(slope.mean() / (slope.std() / N**0.5))

    assert abs(deviations(1.0)) < 4
    for wrong in (-1.0, 0.5, 2.0):
        assert abs(deviations(wrong)) > 15


@pytest.mark.parametrize("where", ["data", "proposal"])
def test_regression_is_stationary_at_the_gradient_of_the_mobility(where):
    """At any density of query points, off the data too, with one noisy partner per query."""
    _, _, point = gaussian()
    if where == "proposal":
        pool = point[:2000]
        point = Proposal(box=1.0)(point, pool, torch.full((N,), 0.4, dtype=torch.float64))
    partner = TAU * torch.randn(N, 2, dtype=torch.float64)
    v = EPSILON + SIGMA**2
    pairs = torch.eye(1, dtype=torch.float64)
    k = (-(point - partner).square().sum(1) / (2 * v)).exp() / (2 * torch.pi * v)
    grad_k = -(point - partner) / v * k[:, None]
    m_hat, grad_hat = kernels.Exact(EPSILON)(point[:1], partner[:1], torch.tensor([SIGMA]).double(), pairs)
    torch.testing.assert_close(m_hat, k[:1])
    torch.testing.assert_close(grad_hat, grad_k[:1])
    _, best = mobility(point)
    h = point.sin()

    def deviations(scale):
        up, down = (divergences.regression_loss(scale * best + sign * h, grad_k) for sign in (1, -1))
        slope = (up - down) / 2
        return float(slope.mean() / (slope.std() / N**0.5))

    assert abs(deviations(1.0)) < 4
    for wrong in (-1.0, 0.5, 2.0):
        assert abs(deviations(wrong)) > 15


def test_proposal():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20_000, 2, generator=g)
    width = torch.full((20_000,), 0.1)
    far = Proposal(box=1.0, margin=0.5)(x, x, width, g)
    assert far.min() == pytest.approx(-0.5, abs=0.01) and far.max() == pytest.approx(1.5, abs=0.01)
    near = Proposal(box=0.0, spread=2.0)(x, x, width, g) - x
    assert float(near.std()) == pytest.approx(0.2, rel=0.03)
    moved = Proposal(box=0.25, margin=9.0)(x, x, width, g) - x
    assert float((moved.abs().amax(1) > 1).float().mean()) == pytest.approx(0.25, abs=0.03)
    for refuse in ({"box": 1.5}, {"spread": 0.0}, {"margin": -1.0}):
        with pytest.raises(ValueError, match=next(iter(refuse))):
            Proposal(**refuse)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "gaussian"])
def test_trace_estimators(method):
    matrix = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 3.0, 1.0], [0.5, 0.0, -1.5]])
    x = torch.randn(50_000, 3)

    def field(p):
        return p @ matrix.T, p.sum(1)

    value, aux, trace = divergences.probe_jacobian(field, x, divergences.probes(x, method))
    torch.testing.assert_close(value, x @ matrix.T)
    torch.testing.assert_close(aux, x.sum(1))
    if method == "exact":
        torch.testing.assert_close(trace, torch.full_like(trace, 2.5))
    else:
        error = float(trace.std()) / len(x) ** 0.5
        assert float(trace.mean()) == pytest.approx(2.5, abs=4 * error) and error < 0.05


def test_probed_jacobian_trains_parameters():
    weight = torch.tensor(2.0, requires_grad=True)
    x = torch.randn(7, 3)
    _, aux, trace = divergences.probe_jacobian(
        lambda p: (weight * p.pow(2), weight * p.sum(1)), x, divergences.probes(x, "exact")
    )
    (trace.sum() + aux.sum()).backward()
    assert float(weight.grad) == pytest.approx(float(2 * x.sum() + x.sum()), rel=1e-5)


def test_unknown_trace_method():
    with pytest.raises(ValueError, match="trace must be one of .*exact; got 'hutch'"):
        divergences.probes(torch.zeros(2, 2), "hutch")


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 6), (4, 3, 6)])
def test_layer_norms_of_duals_are_those_of_torch(shape, options):
    """Values, and tangents by differences, of rows and of tokens."""
    norm, plain = (cls(shape[-1], dtype=torch.float64, **options) for cls in (dual.LayerNorm, torch.nn.LayerNorm))
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(norm.state_dict())
    _assert_same_derivative(norm, plain, shape)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norms_of_duals_are_those_of_torch(affine):
    norm, plain = (cls(2, 6, affine=affine, dtype=torch.float64) for cls in (dual.GroupNorm, torch.nn.GroupNorm))
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(norm.state_dict())
    _assert_same_derivative(norm, plain, (4, 6, 3, 3))


def _assert_same_derivative(norm, plain, shape):
    x, v = torch.randn(2, *shape, dtype=torch.float64)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(value, plain(x))
    torch.testing.assert_close(tangent, (plain(x + 1e-5 * v) - plain(x - 1e-5 * v)) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_layer_norm_over_several_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"LayerNorm is over the last dimension alone, got \(3, 6\)"):
        dual.LayerNorm((3, 6))
