"""Networks and denoisers of other people."""

import math
import sys

import pytest
import torch
from torch import nn

from bd_lightning.divergences import bcast
from bd_lightning.dynamics import MultistepDynamics, ProbabilityFlow, SampleNoise
from bd_lightning.fields import LearnedFields, Mixture
from bd_lightning.kernels import Constant
from bd_lightning.likelihood import FlowSource, flow_log_density
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import Adapted, AzulaDenoiser, DiffusersDenoiser, DiffusersModel, PretrainedDenoiser
from bd_lightning.networks.denoisers import refuse_other_noise
from bd_lightning.targets import GaussianMixture
from oracles import square

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4}
UNET |= {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 2, "num_layers": 1}
DIT |= {"sample_size": 8, "num_embeds_ada_norm": 4, "norm_num_groups": 4}


class Exact(nn.Module):
    """The denoiser of a density in closed form."""

    def __init__(self, density):
        super().__init__()
        self.density = density

    def forward(self, x, sigma):
        return x + bcast(sigma.square(), x) * self.density.score(x, sigma)


def fields_of(denoiser, sigma_data=1.0, dim=2):
    return LearnedFields(PretrainedDenoiser(denoiser, (dim,), sigma_data), Constant(), sigma_data, dim)


def samplers():
    return {"sde": MultistepDynamics(levels=20), "ode": ProbabilityFlow(steps=10)}


@pytest.mark.parametrize("name, options", [("UNet2DModel", UNET), ("DiTTransformer2DModel", DIT)])
def test_a_trunk_of_diffusers_is_trained(name, options):
    conditional = options is DIT
    pytest.importorskip("diffusers")
    network = Adapted((1, 8, 8), DiffusersModel(name, options), 3 if conditional else 0, conditional, noise_scale=100.0)
    model = BellmanDiffusion(network, Constant(), (1, 8, 8), 3, 0.5, samplers())
    x, label = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    losses = model.losses(x, label)
    losses.total.backward()
    assert all(p.grad is not None for p in (network.gradient_head.weight, network.scalar_head.weight))
    assert any(p.grad is not None and p.grad.any() for p in network.module.parameters())
    assert model.sample([0, 1], label=label[:2] if conditional else None).shape == (2, 1, 8, 8)


def test_any_module_is_a_trunk_or_says_why_not():
    class Twice(nn.Module):
        def forward(self, x, noise):
            return torch.cat([x, x], 1)

    class Mine(nn.Module):
        def forward(self, x, noise):
            return x * noise[:, None]

    F, a = Adapted((3,), Mine(), noise_scale=2.0)(torch.ones(4, 3), torch.full((4,), 0.5))
    torch.testing.assert_close(F, torch.ones(4, 3))
    assert a.shape == (4,) and not a.any()
    with pytest.raises(ValueError, match=r"Twice must give x of shape \(2, 3\) back, and gives \(2, 6\)"):
        Adapted((3,), Twice())
    with pytest.raises(ValueError, match="Linear cannot be called with x"):
        Adapted((3,), nn.Linear(3, 3))


def test_a_model_that_diffusers_lacks_is_a_sentence():
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="diffusers has no model 'Sequential'"):
        DiffusersModel("Sequential")


def test_without_diffusers_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="diffusers is not installed: uv sync --group diffusers"):
        DiffusersModel("UNet2DModel")


def test_a_denoiser_is_fields_that_samplers_and_the_flow_take():
    density = square()
    fields = fields_of(Exact(density)).double()
    x = density.sample(40)
    sigma = torch.full((40,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(fields.score(x, sigma), density.score(x, sigma))
    single = fields_of(Exact(density))
    for sampler in samplers().values():
        found = sampler(single, SampleNoise(range(300), (2,)))
        shares = torch.bincount(density.mode_of(found.double()), minlength=4) / 300
        assert float((shares - density.mode_weights).abs().max()) < 0.1
    model = BellmanDiffusion(single.network, Constant(), (2,), 0, 1.0, samplers())
    assert model.sample(range(3)).shape == (3, 2)
    truth = density.log_density(x, 0.1)
    torch.testing.assert_close(flow_log_density(fields, x, 1.0, sigma_min=0.1), truth, atol=0.05, rtol=0)


def test_mixtures_of_denoisers():
    """Two densities, mixed without fields of a ratio: the score of the mixture is exact."""
    parts = [GaussianMixture([[-1.0, 0.0]], sd=0.3), GaussianMixture([[1.0, 0.5]], sd=0.5)]
    whole = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.8, 0.2], [0.3, 0.5])
    source = FlowSource([fields_of(Exact(one)).double() for one in parts], [0.5, 0.5])
    mixture = Mixture([(source, torch.tensor([1.6, 0.4]))])
    x = whole.sample(20)
    for level in (0.2, 1.0):
        sigma = torch.full((20,), level, dtype=torch.float64)
        torch.testing.assert_close(mixture.score(x, sigma), whole.score(x, sigma), atol=0.06, rtol=0.02)
    source = FlowSource([fields_of(Exact(one)) for one in parts], [0.5, 0.5])
    found = MultistepDynamics(levels=30, sigma_min=0.1)(
        Mixture([(source, torch.tensor([1.6, 0.4]))]), SampleNoise(range(400), (2,))
    )
    assert float((found[:, 0] < 0).float().mean()) == pytest.approx(0.78, abs=0.1)
    with pytest.raises(ValueError, match="give one for each"):
        FlowSource([], [1.0])


@pytest.mark.parametrize("name", ["VPSchedule", "VESchedule", "CosineSchedule"])
def test_denoisers_of_azula_at_our_noise_levels(name):
    azula = pytest.importorskip("azula")
    from azula import denoise, noise
    from azula.linalg import covariance as linalg

    assert azula
    schedule = getattr(noise, name)()
    theirs = denoise.GaussianDenoiser(torch.zeros(2), linalg.IsotropicCovariance(torch.tensor(0.25)), schedule)
    wrapped, x = AzulaDenoiser(theirs), torch.randn(5, 2)
    for level in (0.05, 0.5, 5.0):
        alpha, beta = schedule(wrapped.time(torch.tensor([level])))
        assert float(beta / alpha) == pytest.approx(level, rel=1e-3)
        found = wrapped(x, torch.full((5,), level))
        torch.testing.assert_close(found, x * 0.25 / (0.25 + level**2), rtol=2e-3, atol=1e-4)
    score = fields_of(wrapped, 0.5).score(x, torch.full((5,), 0.5))
    torch.testing.assert_close(score, -x / 0.5, rtol=5e-3, atol=1e-3)


class Ideal(nn.Module):
    """What a perfect network of diffusers gives for Gaussian data of standard deviation ½, at whole time steps."""

    def __init__(self, alphas, kind):
        super().__init__()
        self.alphas, self.kind = alphas, kind

    def forward(self, x, t):
        alpha = torch.lerp(self.alphas[t.floor().long()], self.alphas[t.ceil().long()], t.frac())[:, None, None, None]
        mean = alpha.sqrt() * 0.25 / (alpha * 0.25 + 1 - alpha) * x
        eps = (x - alpha.sqrt() * mean) / (1 - alpha).sqrt()
        out = {"epsilon": eps, "sample": mean, "v_prediction": alpha.sqrt() * eps - (1 - alpha).sqrt() * mean}
        return type("Output", (), {"sample": out[self.kind]})()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictions_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    wrapped = DiffusersDenoiser.of(Ideal(scheduler.alphas_cumprod, kind), scheduler)
    x = torch.randn(3, 1, 4, 4)
    for level in (0.05, 0.5, 5.0):
        found = wrapped(x, torch.full((3,), level))
        torch.testing.assert_close(found, x * 0.25 / (0.25 + level**2), rtol=5e-3, atol=1e-3)
    PretrainedDenoiser(wrapped, (1, 4, 4), 0.5)


def test_a_saved_model_of_diffusers_is_read_with_its_schedule(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.UNet2DModel(**UNET).save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    found = DiffusersDenoiser(str(tmp_path), subfolder="unet")
    assert found.prediction == "v_prediction"
    assert found(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="no UNet2DModel with its scheduler could be loaded from"):
        DiffusersDenoiser(str(tmp_path / "nothing"))


class Foreign(nn.Module):
    """Ways to get the convention wrong, for Gaussian data of standard deviation 1."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x, sigma):
        level = bcast(sigma, x)
        if self.way == "epsilon":  # predicts the noise
            return level * x / (1 + level**2)
        if self.way == "log noise":  # takes its noise as ln σ
            return x / (1 + (2 * level).exp())
        if self.way == "steps":  # takes its noise as a time step of a thousand
            return x / (1 + (20 * level / 1000) ** 2)
        if self.way == "scaled":  # takes αx + βn
            return x * (1 + level**2).sqrt() / (1 + level**2)
        return {"nan": x * math.nan, "shape": x[:, :1]}[self.way]


@pytest.mark.parametrize("way", ["epsilon", "log noise", "steps", "scaled", "nan", "shape"])
def test_another_noise_convention_is_refused(way):
    with pytest.raises(ValueError, match="this is no denoiser of data of standard deviation 1|the denoiser gives"):
        PretrainedDenoiser(Foreign(way), (4,), 1.0)
    network = PretrainedDenoiser(Foreign(way), (4,), 1.0, check=False)
    with pytest.raises(ValueError, match="PretrainedDenoiser is read by parametrisation=factored, not velocity"):
        LearnedFields(network, Constant(), 1.0, 4, "velocity")
    assert network.denoiser.way == way


def test_data_make_the_probe_strict():
    """A denoiser that is right at both ends and wrong between."""

    def wrong(x, sigma):
        share = 1 / (1 + sigma**2) if float(sigma[0]) < 0.1 or float(sigma[0]) > 10 else 0 * sigma
        return bcast(share, x) * x

    x = torch.randn(500, 4)
    refuse_other_noise(wrong, (4,), 1.0)
    with pytest.raises(ValueError, match="at noise level 0.5 what it gives is off the data by"):
        refuse_other_noise(wrong, (4,), 1.0, x)
    refuse_other_noise(lambda x, sigma: x / (1 + bcast(sigma, x) ** 2), (4,), 1.0, x)
