"""Densities in closed form, against numerical integration, differentiation and their own samples."""

import pytest
import torch

from bd_lightning.targets import GaussianMixture, Moons, Rings, UniformBox
from oracles import square

SKEW = GaussianMixture([[0.5, 0.0], [-1.0, 0.3]], [3, 1], covariances=[[[0.3, 0.2], [0.2, 0.4]], [[0.1, 0], [0, 0.5]]])
TARGETS = {
    "square": square(),
    "skew": SKEW,
    "sds": GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [1, 2], [0.2, 0.5]),
    "box": UniformBox([-1.0, -0.5], [1.0, 1.5]),
    "moons": Moons(0.1),
    "rings": Rings(noise=0.08),
}
every = pytest.mark.parametrize("name", TARGETS)


def draws(target, n, sigma=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return target.sample(n, g) + sigma * torch.randn(n, target.dim, generator=g, dtype=torch.float64)


@every
def test_density_integrates_to_one_and_its_score_is_its_gradient(name):
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert float(TARGETS[name].smoothed(grid, 0.3)[0].sum() * 0.05**2) == pytest.approx(1, abs=1e-6)
    x = draws(TARGETS[name], 50, 0.5).requires_grad_(True)
    sigma = torch.linspace(0.05, 2, 50, dtype=torch.float64)
    log, score = TARGETS[name].log_and_score(x, sigma)
    torch.testing.assert_close(score, torch.autograd.grad(log.sum(), x)[0])
    p, grad_p = TARGETS[name].smoothed(x, sigma)
    torch.testing.assert_close(grad_p, torch.autograd.grad(p.sum(), x)[0])


@every
@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_samples_have_the_density(name, sigma):
    """Counts in boxes, against the density summed over them."""
    n, x = 200_000, draws(TARGETS[name], 200_000, sigma)
    cells = 24  # boxes of side 0.25; their borders fall on those of the uniform box
    axis = (torch.arange(cells * 10, dtype=torch.float64) + 0.5) / 40 - 3
    fine = TARGETS[name].log_density(torch.cartesian_prod(axis, axis), sigma).exp().reshape(cells, 10, cells, 10)
    expected = n * fine.sum((1, 3)) / 40**2
    counts = torch.histogramdd(x, bins=[cells, cells], range=[-3, 3, -3, 3]).hist
    deviation = (counts - expected) / (expected + 9).sqrt()
    assert float(deviation.abs().max()) < 5 and float(deviation.square().mean()) < 1.2


@pytest.mark.parametrize("name", ["square", "skew", "sds", "box"])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_marginal_along_a_direction(name, sigma):
    for direction in ([0.8, -0.6], [0.0, 2.0]):
        w = torch.tensor(direction, dtype=torch.float64)
        t = torch.linspace(-6, 6, 2401, dtype=torch.float64)
        marginal = TARGETS[name].marginal(w, t, sigma)
        assert float(marginal.sum() * 0.005) == pytest.approx(1, abs=0.003)
        counts = torch.histc(draws(TARGETS[name], 400_000, sigma) @ w, 48, -6, 6) / 400_000 / 0.25
        mean = marginal[:-1].reshape(48, 50).mean(1)
        assert float((counts - mean).abs().max()) < 0.02


def test_marginal_of_a_cube_is_a_spline():
    """A sum of three uniform variables, from the textbook: t²/2, (−2t² + 6t − 3)/2, (3 − t)²/2."""
    cube = UniformBox([0, 0, 0], [1, 1, 1])
    t = torch.tensor([-0.1, 0.5, 1.5, 2.5, 3.1], dtype=torch.float64)
    got = cube.marginal(torch.ones(3, dtype=torch.float64), t)
    assert got.tolist() == pytest.approx([0, 0.125, 0.75, 0.125, 0], abs=1e-12)
    with pytest.raises(ValueError, match="1 to 12 components"):
        cube.marginal(torch.zeros(3, dtype=torch.float64), t)


def test_box_far_outside_is_finite():
    log, score = UniformBox([-1.0], [1.0]).log_and_score(torch.tensor([[9.0], [-30.0]], dtype=torch.float64), 0.5)
    # the tail of a Gaussian around the nearer face
    assert log.isfinite().all() and score[:, 0].tolist() == pytest.approx([-8 / 0.25, 29 / 0.25], rel=0.02)


def test_modes():
    target = square()
    x = draws(target, 20_000)
    shares = torch.bincount(target.mode_of(x)) / len(x)
    torch.testing.assert_close(shares, target.mode_weights.float(), atol=0.015, rtol=0)
    rings = Rings(weights=[1, 2, 1], noise=0.08)
    assert rings.mode_weights.tolist() == [0.25, 0.5, 0.25]
    assert rings.mode_of(torch.tensor([[0.0, 0.5], [1.0, 0.1], [-1.5, 0.0]])).tolist() == [0, 1, 2]
    moons = draws(Moons(0.05), 4000)
    assert Moons(0.05).mode_of(moons).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0]), "weights must be 2 numbers"),
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0, -1.0]), "not negative"),
        (lambda: GaussianMixture([[0.0]], sd=0.0), "sd must be one positive number"),
        (lambda: GaussianMixture([[0.0], [1.0, 2.0]]), "means must be a list of points"),
        (lambda: GaussianMixture([[0.0, 0.0]], covariances=[[[1, 2], [2, 1]]]), "positive definite"),
        (lambda: GaussianMixture([[0.0, 0.0]], covariances=[[[1, 2], [0, 1]]]), "symmetric"),
        (lambda: UniformBox([0.0], [0.0]), "low < high"),
        (lambda: Moons(0.0), "at least 0.03"),
        (lambda: Rings([1.0, -1.0]), r"radii\[1\] must be positive"),
        (lambda: Rings([1.0], [1.0, 2.0]), "weights must be 1 numbers"),
        (lambda: Rings([1.0], noise=0.001), "at least a fiftieth of the largest radius, 0.02"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
