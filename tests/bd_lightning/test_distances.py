import pytest
import torch

from bd_lightning.distances import mmd, relative_error, wasserstein2


def normal(n, d, mean=0.0, sd=1.0, seed=0):
    return mean + sd * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 3])
def test_wasserstein_of_a_shift_is_its_length(d):
    x = normal(300, d)
    shift = torch.full((d,), 2.0, dtype=torch.float64)
    assert wasserstein2(x, x + shift) == pytest.approx(2 * d**0.5)
    assert wasserstein2(x, x[torch.randperm(300)]) == pytest.approx(0, abs=1e-6)
    assert wasserstein2(x, 3 * x) == pytest.approx(float((2 * x).square().sum(1).mean().sqrt()))  # a gradient map


def test_wasserstein_of_unequal_numbers():
    x = torch.tensor([[0.0, 0.0]])
    y = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert wasserstein2(x, y) == pytest.approx((0.5 * 9 + 0.5 * 16) ** 0.5)
    assert wasserstein2(x[:, :1], y[:, :1]) == pytest.approx((0.5 * 9) ** 0.5)


def test_mmd_between_gaussians_is_the_formula():
    """For N(a, I) and N(b, I) and bandwidth h: MMD² = 2 (h²/(h² + 2))^{d/2} (1 − e^{−‖a−b‖²/2(h²+2)})."""
    x, y = normal(4000, 2), normal(4000, 2, mean=0.7, seed=1)
    expected = (2 * (1 / 3) * (1 - torch.tensor(-2 * 0.49 / 6).exp())).sqrt()
    assert mmd(x, y, bandwidth=1.0) == pytest.approx(float(expected), abs=0.025)
    assert mmd(x, x) == pytest.approx(0, abs=1e-6)
    assert mmd(x, y) == mmd(x, y, float(torch.pdist(y[:2000]).median()))


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)


def test_shapes_are_checked():
    for distance in (wasserstein2, mmd):
        with pytest.raises(ValueError, match=r"expected two samples .* got \(3, 2\) and \(3, 1\)"):
            distance(torch.zeros(3, 2), torch.zeros(3, 1))
