"""Log densities against closed forms."""

import math

import pytest
import torch

from bd_lightning.fields import AnalyticFields, AnalyticRelative, AnalyticSource
from bd_lightning.kernels import Constant
from bd_lightning.likelihood import (
    auroc,
    bits_per_dimension,
    class_log_densities,
    flow_log_density,
    ranks,
    slope_and_trace,
    spearman,
    spearman_error,
)
from bd_lightning.targets import GaussianMixture
from oracles import square


def gaussian(dim=8):
    """A rotated Gaussian whose spread differs between directions."""
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    covariance = axes @ torch.diag(torch.logspace(0, -1.5, dim, dtype=torch.float64)) @ axes.mT
    covariance = (covariance + covariance.mT) / 2
    return GaussianMixture([[0.1] * dim], covariances=[covariance.tolist()])


def test_the_flow_gives_bits_per_dimension_of_a_gaussian():
    density = gaussian()
    x = density.sample(100)
    width, fields = 2 / 255, AnalyticFields(density, Constant(), 0.5)
    found = flow_log_density(fields, x, 0.5, sigma_min=0.002)
    ours = bits_per_dimension(found, 8, width).mean()
    truth = bits_per_dimension(density.log_density(x), 8, width).mean()
    assert abs(ours / truth - 1) < 0.005
    torch.testing.assert_close(found, density.log_density(x, 0.002), atol=0.1, rtol=0)


def test_the_flow_in_single_precision_on_images():
    """A Gaussian of 3 × 8 × 8 dimensions, whose trace is estimated by one probe each."""
    d = 192
    density = GaussianMixture([[0.0] * d], sd=0.3)
    x = density.sample(64).float()
    probe = torch.randn(64, d).sign()
    found = flow_log_density(AnalyticFields(density, Constant(), 0.5), x, 0.5, probes=[probe], exact=False)
    truth = density.log_density(x, 0.02)
    assert abs(float(found.mean() / truth.mean()) - 1) < 0.005


def test_of_several_probes_the_mean_counts():
    """The path depends on none of them, so that the log density is the mean of those by each."""
    density, x = gaussian(), torch.randn(5, 8, dtype=torch.float64)
    probes = [torch.randn(5, 8, dtype=torch.float64).sign() for _ in range(3)]
    options = {"steps": 3, "exact": False}
    found = [
        flow_log_density(AnalyticFields(density, Constant(), 0.5), x, 0.5, probes=part, **options)
        for part in (probes, *([probe] for probe in probes))
    ]
    torch.testing.assert_close(found[0], torch.stack(found[1:]).mean(0))
    assert (found[1] - found[2]).abs().max() > 1e-3


def test_one_probe_estimates_the_trace():
    density, x = gaussian(), torch.randn(1, 8, dtype=torch.float64).expand(4000, 8)
    fields, sigma = AnalyticFields(density, Constant()), torch.full((4000,), 0.3, dtype=torch.float64)
    U, exact = slope_and_trace(fields, x[:2], sigma[:2], 1.0, None, True)
    _, probed = slope_and_trace(fields, x, sigma, 1.0, [torch.randn(4000, 8, dtype=torch.float64).sign()], True)
    torch.testing.assert_close(U, density.score(x[:2], 0.3) + x[:2] / 1.09)
    assert abs(float(probed.mean() - exact[0])) < 5 * float(probed.std()) / math.sqrt(4000)


def test_flow_and_one_call_agree_with_the_truth_on_a_mixture():
    density = square()
    x = density.sample(200)
    sigma = torch.full((200,), 0.05, dtype=torch.float64)
    truth = density.log_density(x, 0.05)
    parts = [GaussianMixture([m.tolist()], sd=0.3) for m in density.means]
    source = AnalyticSource(parts, density.weights.tolist())
    logs = class_log_densities(source, x, sigma)
    torch.testing.assert_close(logs.logsumexp(1), truth)
    assert float((logs.argmax(1) == density.mode_of(x)).double().mean()) > 0.99
    flow = flow_log_density(AnalyticRelative(density), x, 1.0, sigma_min=0.05)
    assert float((flow - truth).abs().max()) < 0.05


def test_the_step_is_of_fourth_order():
    density = square()
    x, fields = density.sample(20), AnalyticFields(density, Constant())
    coarse, fine, finest = (flow_log_density(fields, x, 1.0, sigma_min=0.05, steps=n) for n in (12, 24, 64))
    assert float((fine - finest).abs().mean()) < float((coarse - finest).abs().mean()) / 8


def test_ranks_and_what_is_made_of_them():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.875
    assert auroc(torch.randn(9) + 99, torch.randn(5)) == 1
    x = torch.randn(50)
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)


def test_the_error_of_a_rank_correlation():
    """Against the spread of the correlations of 400 samples of 100 pairs."""
    a = torch.randn(400, 100)
    b = 0.8 * a + 0.6 * torch.randn(400, 100)
    found = torch.tensor([spearman(*pair) for pair in zip(a, b)])
    assert spearman_error(float(found.mean()), 100) == pytest.approx(float(found.std()), rel=0.15)


def test_levels_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="sigma_min must lie"):
        flow_log_density(AnalyticFields(square(), Constant()), torch.zeros(1, 2), 1.0, sigma_min=2.0, sigma_max=1.0)
