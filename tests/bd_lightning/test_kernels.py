import math

import pytest
import torch

from bd_lightning import kernels, targets
from oracles import square

KERNELS = [kernels.Exact(0.05), kernels.ClosedFormSlices(0.05), kernels.Sliced(0.05, slices=3), kernels.Constant()]


def points(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(kernel, u: torch.Tensor, variance: float) -> float:
    """k(x, y) for u = x − y, written out."""
    d, r2 = len(u), float(u.square().sum())
    if isinstance(kernel, kernels.Exact):
        return math.exp(-r2 / (2 * variance)) / (2 * math.pi * variance) ** (d / 2)
    return 1 / math.sqrt(2 * math.pi * (variance + r2 / d))


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=lambda k: type(k).__name__)
def test_mobility_is_the_mean_over_pairs(kernel):
    x, sigma = points(5, 3), torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0], dtype=torch.float64)
    m, _ = kernel(x, x, sigma, kernels.leave_one_out(5).double())
    for i in range(5):
        v = kernel.epsilon + float(sigma[i]) ** 2
        expected = sum(pair(kernel, x[i] - x[j], v) for j in range(5) if j != i) / 4
        assert float(m[i]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_gradient_of_the_mobility(kernel):
    x, y = points(4, 3).requires_grad_(True), points(6, 3, seed=1)
    sigma, weights = torch.full((4,), 0.3, dtype=torch.float64), torch.full((4, 6), 1 / 6, dtype=torch.float64)
    m, grad_m = kernel(x, y, sigma, weights, torch.Generator().manual_seed(3))
    assert grad_m.shape == x.shape
    if m.requires_grad:
        (expected,) = torch.autograd.grad(m.sum(), x)
        torch.testing.assert_close(grad_m, expected)
    else:
        assert torch.equal(m, torch.ones_like(m)) and not grad_m.any()


def test_drawn_slices_average_to_the_closed_form():
    x, y = points(3, 5), points(7, 5, seed=1)
    sigma, weights = torch.full((3,), 0.4, dtype=torch.float64), torch.full((3, 7), 1 / 7, dtype=torch.float64)
    exact_m, exact_grad = kernels.ClosedFormSlices(0.05)(x, y, sigma, weights)
    draws = [kernels.Sliced(0.05, slices=20000)(x, y, sigma, weights) for _ in range(5)]
    m, grad = (torch.stack(values).mean(0) for values in zip(*draws))
    torch.testing.assert_close(m, exact_m, rtol=0.01, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=0.05, atol=0.003)


@pytest.mark.parametrize("kernel", [*KERNELS[:2], kernels.Constant()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize(
    "target", [square(), targets.UniformBox([-1, 0, 0], [1, 1, 2])], ids=lambda t: type(t).__name__
)
def test_estimates_have_the_mobility_in_closed_form_as_their_mean(kernel, target):
    g = torch.Generator().manual_seed(2)
    sigma = torch.linspace(0.05, 1, 40, dtype=torch.float64)
    x = target.sample(40, g) + sigma[:, None] * torch.randn(40, target.dim, generator=g, dtype=torch.float64)
    y = target.sample(40_000, g)
    m, grad_m = kernel.mobility(target, x, sigma)
    each = torch.full((40, 40_000), 1 / 40_000, dtype=torch.float64)
    m_hat, grad_hat = kernel(x, y, sigma, each)
    torch.testing.assert_close(m_hat, m, rtol=0.06, atol=1e-3)
    assert float((grad_hat - grad_m).norm()) <= 0.04 * float(grad_m.norm())


def test_closed_form_slices_of_a_point_are_the_kernel():
    """The integral over Gaussian widths, against the formula it stands for."""
    point = targets.GaussianMixture([[0.0, 0.0]], sd=1e-7)
    x = torch.tensor([[0, 0], [0.1, 0], [3, 4], [60, 0]], dtype=torch.float64)
    m, grad_m = kernels.ClosedFormSlices(1e-3).mobility(point, x, torch.zeros(4, dtype=torch.float64))
    expected = (2 * math.pi * (1e-3 + x.square().sum(1) / 2)).rsqrt()
    torch.testing.assert_close(m, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_m, -x * (math.pi * expected**3)[:, None], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dim", "dtype"), [(2, torch.float32), (12, torch.float32), (64, torch.float64)])
def test_closed_form_slices_in_many_dimensions(dim, dtype):
    """Of a narrow Gaussian the mobility is nearly the kernel at its mean."""
    target = targets.GaussianMixture([[0.5] * dim], sd=0.01)
    x = points(5, dim).to(dtype)
    m, grad_m = kernels.ClosedFormSlices(1e-3).mobility(target, x, torch.zeros(5, dtype=dtype))
    u = x - 0.5
    expected = (2 * math.pi * (1e-3 + u.square().sum(1) / dim)).rsqrt()
    torch.testing.assert_close(m, expected, rtol=5e-3, atol=0)
    slope = -2 * math.pi / dim * u * expected[:, None] ** 3
    torch.testing.assert_close(grad_m, slope, rtol=2e-2, atol=1e-4)


def test_mobility_is_linear_in_the_data_weights():
    x, y = points(4, 2), points(10, 2, seed=1)
    sigma = torch.full((4,), 0.3, dtype=torch.float64)
    a, b = torch.zeros(4, 10, dtype=torch.float64), torch.zeros(4, 10, dtype=torch.float64)
    a[:, :5], b[:, 5:] = 0.2, 0.2
    for kernel in KERNELS[:2]:
        mixed = kernel(x, y, sigma, 0.7 * a + 0.3 * b)
        parts = kernel(x, y, sigma, a), kernel(x, y, sigma, b)
        for got, left, right in zip(mixed, *parts):
            torch.testing.assert_close(got, 0.7 * left + 0.3 * right)


def test_reference_is_the_mean_of_the_kernel_for_gaussian_data():
    for kernel in (kernels.Exact(0.1), kernels.ClosedFormSlices(0.1)):
        d, sigma = (2, 0.7) if isinstance(kernel, kernels.Exact) else (400, 0.7)
        y = 0.5 * points(1500, d)
        x = 0.5 * points(300, d, seed=1) + sigma * points(300, d, seed=2)
        weights = torch.full((300, 1500), 1 / 1500, dtype=torch.float64)
        m, _ = kernel(x, y, torch.full((300,), sigma, dtype=torch.float64), weights)
        assert float(kernel.reference(torch.tensor(sigma), 0.5, d)) == pytest.approx(float(m.mean()), rel=0.05)


def test_weights():
    w = kernels.leave_one_out(3, pool=6)
    assert w.shape == (3, 6) and torch.allclose(w.sum(1), torch.ones(3))
    assert [int(row.argmin()) for row in w] == [0, 1, 2] and (w == 0).sum() == 3
    single = kernels.single_partner(4)
    assert single.argmax(1).tolist() == [1, 2, 3, 0] and single.sum() == 4
    assert kernels.single_partner(2, pool=4).argmax(1).tolist() == [1, 2]
    for refuse in (kernels.leave_one_out, kernels.single_partner):
        with pytest.raises(ValueError, match="at least 2 points"):
            refuse(1)


def test_refusals():
    with pytest.raises(ValueError, match="epsilon must be positive, got 0"):
        kernels.Exact(0)
    with pytest.raises(ValueError, match="slices must be positive, got 0"):
        kernels.Sliced(0.1, slices=0)
