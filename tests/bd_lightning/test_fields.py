import pytest
import torch

from bd_lightning import kernels
from bd_lightning.divergences import probe_jacobian
from bd_lightning.fields import AnalyticFields, FieldPair, GuidedFields, LearnedFields, log_gradient
from bd_lightning.networks import MLP, UNet
from bd_lightning.targets import GaussianMixture

NETWORKS = [
    lambda **o: MLP((1, 8, 8), width=32, depth=2, **o),
    lambda **o: UNet((1, 8, 8), channels=(8, 16), attention=(1,), **o),
]


def excite(network):
    """Move the parameters that start at zero, so that outputs depend on inputs."""
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(0, 0.1)
    return network


def test_fields_start_from_the_gaussian_of_the_data():
    """Zero outputs mean p_σ = N(0, (σ² + σ_d²) I) and s = m_ref: the EDM preconditioning."""
    kernel = kernels.ClosedFormSlices(0.01)
    fields = LearnedFields(NETWORKS[0](), kernel, sigma_data=0.7, dim=64)
    x, sigma = torch.randn(5, 1, 8, 8), torch.tensor([0.01, 0.1, 1.0, 5.0, 20.0])
    s, g = fields(x, sigma)
    torch.testing.assert_close(s, kernel.reference(sigma, 0.7, 64))
    expected = -x / (sigma.square() + 0.7**2).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(log_gradient(s, g), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", NETWORKS, ids=["mlp", "unet"])
@pytest.mark.parametrize("parametrisation", ["factored", "velocity", "direct"])
def test_shapes_signs_and_the_factored_identity(build, parametrisation):
    fields = LearnedFields(excite(build()), kernels.ClosedFormSlices(0.01), 0.7, 64, parametrisation)
    x, sigma = 3 * torch.randn(6, 1, 8, 8), torch.logspace(-2, 1, 6)
    s, g = fields(x, sigma)
    assert s.shape == (6,) and g.shape == x.shape and (s > 0).all()
    head, again = fields.outputs(x, sigma)
    torch.testing.assert_close(again, s)
    torch.testing.assert_close(head if parametrisation == "direct" else 0.5 * s[:, None, None, None] * head, g)
    assert (fields(x, 2 * sigma)[1] - g).abs().max() > 0  # conditioned on the noise level


def test_denoiser_form_without_cancellation():
    """S = (D − x)/σ² with EDM's D, also where σ is tiny."""
    network = excite(NETWORKS[0]()).double()
    fields = LearnedFields(network, kernels.ClosedFormSlices(0.01), 0.7, 64)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for level in (0.01, 1.0):
        sigma = torch.full((4,), level, dtype=torch.float64)
        total = level**2 + 0.49
        out, _ = network(x / total**0.5, sigma.log() / 4, None)
        denoised = 0.49 / total * x + level * 0.7 / total**0.5 * out
        S, _ = fields.outputs(x, sigma)
        torch.testing.assert_close(S, (denoised - x) / level**2, rtol=1e-5, atol=1e-5)


def test_velocity_is_flow_matching():
    """With the constant kernel its loss is flow matching's squared error, and S the score of that velocity."""
    network = excite(NETWORKS[0]()).double()
    fields = LearnedFields(network, kernels.Constant(), 0.7, 64, "velocity")
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    sigma, noise = torch.tensor([0.01, 0.3, 2.0, 40.0], dtype=torch.float64), torch.randn_like(x)
    t = (0.7 / (sigma + 0.7)).reshape(-1, 1, 1, 1)
    point = t * x / 0.7 + (1 - t) * noise
    velocity, _ = network(point, sigma.log() / 4, None)
    S, s = fields.outputs(point * 0.7 / t, sigma)
    clean = 0.7 * (point + (1 - t) * velocity)
    torch.testing.assert_close(S, (clean - 0.7 * point / t) / sigma.square().reshape(-1, 1, 1, 1))
    one, zero, form = torch.ones(4, dtype=torch.float64), torch.zeros_like(x), fields.parametrisation

    def loss(output):
        h = form.output(output, 0.7 * point / t, sigma, 0.7, fields.kernel, one)
        return form.weight(sigma, 0.7, 64) * form.stein_loss(h, noise, sigma, one, zero, one)

    def error(output):
        return (output - (x / 0.7 - noise)).square().flatten(1).mean(1) / 2

    other = torch.randn_like(x)  # the losses differ by what does not depend on the network
    torch.testing.assert_close(loss(velocity) - loss(other), error(velocity) - error(other))


def test_two_networks():
    scalar = excite(NETWORKS[0]())
    fields = LearnedFields(excite(NETWORKS[0]()), kernels.ClosedFormSlices(0.01), 0.7, 64, "direct", scalar)
    x, sigma = torch.randn(3, 1, 8, 8), torch.zeros(3)
    s, g = fields(x, sigma)
    torch.autograd.grad(s.sum(), list(scalar.scalar_head.parameters()), retain_graph=True)
    (unused,) = torch.autograd.grad(s.sum(), fields.network.enter.weight, allow_unused=True)
    assert unused is None and g.isfinite().all()
    (s.sum() + g.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in fields.parameters())  # what DDP asks for


@pytest.mark.parametrize("build", NETWORKS, ids=["mlp", "unet"])
def test_forward_mode_agrees_with_differences(build):
    """A probed trace differentiates networks in forward mode, attention included."""
    fields = LearnedFields(excite(build()), kernels.ClosedFormSlices(0.01), 0.7, 64).double()
    x, v = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.3, 1.0], dtype=torch.float64)
    function = lambda p: fields.network(p, sigma, None)[0]  # noqa: E731
    _, _, form = probe_jacobian(lambda p: (function(p), p), x, v[None])
    difference = (function(x + 1e-5 * v) - function(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(form, (v * difference).flatten(1).sum(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("build", NETWORKS, ids=["mlp", "unet"])
def test_gradients_of_the_probed_jacobian(build):
    """Parameters are trained through vᵀJv: forward over reverse has to agree with reverse over reverse."""
    network = excite(build()).double()
    x, c = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    v = torch.randn(1, 2, 1, 8, 8, dtype=torch.float64)
    parameters = [p for name, p in network.named_parameters() if not name.startswith("scalar_head")]

    _, _, forward = probe_jacobian(lambda p: network(p, c), x, v)
    point = x.clone().requires_grad_(True)
    out = network(point, c)[0]
    (pulled,) = torch.autograd.grad((out * v[0]).sum(), point, create_graph=True)
    reverse = (pulled * v[0]).flatten(1).sum(1)
    torch.testing.assert_close(forward, reverse)
    for a, b in zip(*(torch.autograd.grad(t.sum(), parameters, allow_unused=True) for t in (forward, reverse))):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", NETWORKS, ids=["mlp", "unet"])
def test_the_probed_jacobian_in_half_precision(build):
    network, x, c, v = excite(build()), torch.randn(8, 1, 8, 8), torch.zeros(8), torch.randn(1, 8, 1, 8, 8)
    weights = [p for name, p in network.gradient_head.named_parameters() if name.endswith("weight")]
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            _, _, form = probe_jacobian(lambda p: network(p, c), x, v)
        found.append((form.detach().float(), *torch.autograd.grad(form.sum(), weights)))
    for full, half in zip(*found):
        assert 0 < (full - half).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("build", NETWORKS, ids=["mlp", "unet"])
def test_class_conditioning(build):
    network = excite(build(num_classes=3, conditional=True))
    x, c = torch.randn(2, 1, 8, 8), torch.zeros(2)
    a, b = (network(x, c, torch.full((2,), k))[0] for k in (0, 1))
    assert (a - b).abs().max() > 0
    with pytest.raises(ValueError, match="class-conditional and needs labels"):
        network(x, c)
    with pytest.raises(ValueError, match="unconditional"):
        build(num_classes=3)(x, c, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="needs a data set with classes"):
        build(conditional=True)


def test_guidance_extrapolates_the_score_within_its_interval():
    one, both = GaussianMixture([[1.0, 0.0]], sd=0.4), GaussianMixture([[1.0, 0.0], [-1.0, 0.0]], sd=0.4)
    kernel, asked = kernels.ClosedFormSlices(0.01), []

    class Base(FieldPair):
        def __call__(self, x, sigma):
            asked.append(len(x))
            return AnalyticFields(both, kernel)(x, sigma)

    base = Base()

    fields = AnalyticFields(one, kernel)
    guided = GuidedFields(fields, base, scale=3.0, interval=(0.2, 2.0))
    x = torch.randn(3, 2, dtype=torch.float64)
    for level in (0.1, 5.0):
        sigma = torch.full((3,), level, dtype=torch.float64)
        for found, expected in zip(guided(x, sigma), fields(x, sigma)):
            torch.testing.assert_close(found, expected)
    assert not asked
    sigma = torch.full((3,), 0.5, dtype=torch.float64)
    s, g = guided(x, sigma)
    torch.testing.assert_close(s, fields(x, sigma)[0])
    with_class, without = log_gradient(*fields(x, sigma)), log_gradient(*base(x, sigma))
    torch.testing.assert_close(log_gradient(s, g), 3 * with_class - 2 * without)
    mixed = torch.tensor([0.1, 0.5, 5.0], dtype=torch.float64)
    torch.testing.assert_close(guided(x, mixed)[1][1], g[1])
    torch.testing.assert_close(guided(x, mixed)[1][::2], fields(x, mixed)[1][::2])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 9, 13)])
def test_unet_takes_any_size(shape):
    out, a = UNet(shape, channels=(8, 8, 16), blocks=2, attention=(2,))(torch.randn(2, *shape), torch.zeros(2))
    assert out.shape == (2, *shape) and a.shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UNet((64,)), "images of shape"),
        (lambda: UNet((1, 8, 8), attention=(2,)), "attention level 2 does not exist"),
        (lambda: UNet((1, 8, 8), channels=()), "at least one entry"),
        (lambda: UNet((1, 28, 28), patch=3), "patch 3 does not divide"),
        (lambda: MLP((2,), width=0), "width must be positive"),
        (lambda: MLP((2,), dropout=1.5), "dropout must lie between 0 and 1"),
        (lambda: LearnedFields(MLP((2,)), kernels.Exact(), 1.0, 2, "fancy"), "parametrisation must be one of"),
        (lambda: LearnedFields(MLP((2,)), kernels.Exact(), 0.0, 2), "sigma_data must be positive"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_sample_of_few_channels():
    """torch's own layer refuses groups of a single value."""
    network = UNet((1, 8, 8), channels=[8])
    x, level = torch.randn(4, 1, 8, 8), torch.zeros(4)
    with torch.no_grad():
        torch.testing.assert_close(network(x[:1], level[:1])[1], network(x, level)[1][:1])


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_the_scalar_of_few_channels_sees_the_image(channels):
    """A pooled channel that is standardised by itself is a constant, two of them are signs."""
    torch.manual_seed(0)
    network = UNet((1, 8, 8), channels=[channels])
    torch.nn.init.normal_(network.scalar_head[-1].weight)
    with torch.no_grad():
        scalars = network(torch.randn(16, 1, 8, 8), torch.zeros(16))[1]
    assert len(scalars.mul(100).round().unique()) > 12
