"""Our fields in azula, and posteriors that are known."""

import pytest
import torch

from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.fields import AnalyticFields
from bd_lightning.inverse import Outside, PosteriorFields, Shrunk, nearest_filled
from bd_lightning.kernels import Constant
from bd_lightning.targets import GaussianMixture
from oracles import square

DIM, SEEN, NOISE = 6, 3, 0.1


@pytest.fixture
def problem():
    """A Gaussian of 6 dimensions of which 3 are seen with noise: fields, operator, y, and the posterior's moments."""
    torch.manual_seed(0)
    factor = torch.randn(DIM, DIM, dtype=torch.float64) / DIM**0.5
    covariance = factor @ factor.mT + 0.05 * torch.eye(DIM)
    covariance = (covariance + covariance.mT) / 2
    density = GaussianMixture([[0.0] * DIM], covariances=[covariance.tolist()])
    A = torch.eye(DIM, dtype=torch.float64)[:SEEN]
    y = A @ density.sample(1)[0] + NOISE * torch.randn(SEEN, dtype=torch.float64)
    gain = covariance @ A.mT @ torch.linalg.inv(A @ covariance @ A.mT + NOISE**2 * torch.eye(SEEN))
    return AnalyticFields(density, Constant()), y.float(), gain @ y, covariance - gain @ A @ covariance


def first(x):
    return x[:, :SEEN]


def off(samples, mean, covariance):
    """Errors of the mean, in standard deviations, and of the covariance, relative."""
    samples = samples.double()
    error = ((samples.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()
    return float(error), float(torch.linalg.norm(samples.T.cov() - covariance) / torch.linalg.norm(covariance))


def test_the_schedules_match():
    pytest.importorskip("azula")
    from bd_lightning.azula import FieldsDenoiser

    density, x = square(), torch.randn(5, 2)
    denoiser = FieldsDenoiser(AnalyticFields(density, Constant()), 0.02, 20.0)
    for t in (0.0, 0.3, 1.0):
        alpha, level = denoiser.schedule(torch.tensor(t))
        assert float(alpha) == 1 and float(level) == pytest.approx(0.02 ** (1 - t) * 20.0**t)
        truth = x + level**2 * density.score(x, float(level))
        torch.testing.assert_close(denoiser(x, torch.tensor(t)).mean, truth, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="sigma_min must lie"):
        FieldsDenoiser(AnalyticFields(density, Constant()), 2.0, 1.0)


def test_azula_samples_our_fields():
    pytest.importorskip("azula")
    from azula.sample import DDIMSampler

    from bd_lightning.azula import FieldsDenoiser

    density = square()
    sampler = DDIMSampler(FieldsDenoiser(AnalyticFields(density, Constant())), steps=40, silent=True)
    torch.manual_seed(0)
    found = sampler(sampler.init((1000, 2)))
    shares = torch.bincount(density.mode_of(found.double()), minlength=4) / 1000
    assert float((shares - density.mode_weights).abs().max()) < 0.06


def test_the_posterior_of_a_gaussian_is_exact(problem):
    """Our sampler, and azula's with its own moment matching, on one problem whose posterior is known."""
    pytest.importorskip("azula")
    from azula.guidance import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    from bd_lightning.azula import FieldsDenoiser

    fields, y, mean, covariance = problem
    posterior = PosteriorFields(fields, y.expand(600, -1), first, NOISE, iterations=SEEN)
    ours = MultistepDynamics(levels=40, relaxation=0.5)(posterior, SampleNoise(range(600), (DIM,)))
    noise = IsotropicCovariance(torch.tensor(NOISE**2))
    peer = MMPSDenoiser(FieldsDenoiser(fields, 0.01), y.expand(600, -1), first, noise, iterations=SEEN)
    torch.manual_seed(0)
    sampler = DDPMSampler(peer, steps=80, silent=True)
    theirs = sampler(sampler.init((600, DIM)))
    for found in (ours, theirs):
        error, spread = off(found, mean, covariance)
        assert error < 0.25 and spread < 0.25
    x, t = torch.randn(600, DIM), torch.tensor(0.5)
    level = peer.schedule(t)[1].expand(600)
    torch.testing.assert_close(posterior.mean(x, level), peer(x, t).mean, rtol=1e-3, atol=1e-3)


def test_a_curved_operator_is_linearised():
    """A through layers with forward-mode rules of their own, whose derivative is taken by two backward passes."""
    from bd_lightning.networks.dual import Linear

    torch.manual_seed(0)
    layer = torch.nn.Sequential(Linear(2, 5), torch.nn.Tanh(), Linear(5, 3)).double()
    fields = AnalyticFields(GaussianMixture([[0.0, 0.0]]), Constant())
    x, sigma = torch.randn(4, 2, dtype=torch.float64), torch.full((4,), 0.7, dtype=torch.float64)
    y = layer(torch.randn(4, 2, dtype=torch.float64)).detach()
    found = PosteriorFields(fields, y, layer, 0.3, iterations=3).mean(x, sigma)
    D, variance = x / 1.49, 0.49 / 1.49
    for i in range(4):
        A = torch.autograd.functional.jacobian(layer, D[i])
        gain = variance * A.mT @ torch.linalg.inv(variance * A @ A.mT + 0.09 * torch.eye(3))
        torch.testing.assert_close(found[i], (D[i] + gain @ (y[i] - layer(D[i]))).detach())


def test_operators():
    images = torch.arange(32.0).reshape(2, 1, 4, 4)
    hole = torch.zeros(4, 4, dtype=torch.bool)
    hole[1:3, 1:3] = True
    assert Outside(hole)(images).shape == (2, 12) and Shrunk(2)(images)[0].tolist() == [2.5, 4.5, 10.5, 12.5]
    filled = nearest_filled(images, hole)
    torch.testing.assert_close(filled[..., ~hole], images[..., ~hole])
    assert filled[0, 0, 1, 1] == 2.5  # of 1 and 4
    for wrong in (hole & False, hole | True):
        with pytest.raises(ValueError, match="a mask needs pixels that are to be filled"):
            Outside(wrong)
