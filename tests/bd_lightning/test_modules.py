"""The LightningModule learns fields that are known in closed form."""

from types import SimpleNamespace

import pytest
import torch

from bd_lightning import kernels
from bd_lightning.checks import UserError
from bd_lightning.distances import relative_error
from bd_lightning.dynamics import BellmanDynamics, MultistepDynamics, ProbabilityFlow
from bd_lightning.fields import Guidance, log_gradient
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP, Network, UNet
from bd_lightning.objectives import FieldDivergence, KernelRegression, NoiseLevels, Partners, Proposal, Queries
from bd_lightning.optimizers import AdamW, Muon, ScheduleFree
from bd_lightning.targets import GaussianMixture
from oracles import square


class Fused(Network):
    """A network with a layer whose second derivatives PyTorch gets wrong."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(2)


def build(**options):
    torch.manual_seed(0)
    single = options.get("noise", NoiseLevels()) is None
    sampler = BellmanDynamics() if single else ProbabilityFlow()
    options = {"kernel": kernels.ClosedFormSlices(0.01), "samplers": {"ode": sampler}, **options}
    options = {"network": MLP((2,), width=96, depth=2), "shape": (2,), **options}
    return BellmanDiffusion(num_classes=0, sigma_data=1.04, **options)


def train(module, steps=600, batch=256, target=None):
    target = target or square()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        module.losses(target.sample(batch).float()).total.backward()
        optimizer.step()
    return module


def errors(module, level):
    """Relative errors of s and g against the analytic fields, on noised data."""
    target = square()
    x = (target.sample(2000) + level * torch.randn(2000, 2)).float()
    sigma = torch.full((2000,), level)
    with torch.no_grad():
        s, g = module.fields(x, sigma)
    true_s, true_g = module.analytic(target)(x, sigma)
    return float((s - true_s).norm() / true_s.norm()), float((g - true_g).norm() / true_g.norm())


# one probe for both terms of the loss: its noise needs more steps than a test has, unless the noise levels are few
NOISY = {"objective": FieldDivergence(trace="sliced"), "parametrisation": "direct", "noise": NoiseLevels(-0.7, 0.2)}


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.2),
        ({"objective": FieldDivergence(trace="exact")}, 0.3),
        ({"parametrisation": "direct"}, 0.3),
        (NOISY, 0.5),
        ({"kernel": kernels.Constant()}, 0.2),
        ({"partners": Partners(pairs="single")}, 0.35),
    ],
    ids=["default", "divergence", "direct", "sliced", "constant", "single"],
)
def test_multi_scale_fields_are_learned(options, limit):
    module = build(**options)
    before = errors(module, 0.5)[1]
    after_s, after_g = errors(train(module), 0.5)
    assert after_g < limit < before and after_s < 0.12


def test_single_scale_divergence_learns_the_papers_fields():
    kernel = kernels.Exact(0.1)
    module = build(
        kernel=kernel, noise=None, parametrisation="direct",
        objective=FieldDivergence(trace="exact", scalar_weight=1.0),
    )  # fmt: skip
    _, before = errors(module, 0.0)
    s, g = errors(train(module, steps=800), 0.0)
    assert s < 0.2 and g < 0.45 < before


def test_regression_learns_the_fields_on_and_off_the_data():
    module = build(
        kernel=kernels.Exact(0.03), noise=None, objective=KernelRegression(scalar_weight=1.0),
        parametrisation="direct", partners=Partners(queries=128),
    )  # fmt: skip
    train(module, steps=500, batch=512)
    axis = torch.linspace(-3, 3, 41)
    for x, limit in ((square().sample(1000).float(), 0.15), (torch.cartesian_prod(axis, axis), 0.25)):
        with torch.no_grad():
            found = module.fields(x, torch.zeros(len(x)))
        truth = module.analytic(square())(x.double(), torch.zeros(len(x)).double())
        for field, true in zip(found, truth):
            assert relative_error(field, true) < limit


def test_multi_scale_regression_is_learned():
    module = build(
        kernel=kernels.Exact(0.03), objective=KernelRegression(scalar_weight=1.0), parametrisation="direct",
        noise=NoiseLevels(-0.7, 0.2),
    )  # fmt: skip
    after_s, after_g = errors(train(module, steps=400), 0.5)
    assert after_s < 0.1 and after_g < 0.15


def test_regression_knows_no_classes():
    with pytest.raises(ValueError, match="has the density of all the data at its query points, whatever the class"):
        build(
            kernel=kernels.Exact(0.03), objective=KernelRegression(), parametrisation="direct", noise=None,
            network=MLP((2,), width=8, depth=1, conditional=True, num_classes=3),
        )  # fmt: skip


@pytest.mark.parametrize("channels", [[32, 224], [32, 144], [8, 18], [16, 50], [8, 33]])
def test_widths_that_heads_and_groups_do_not_divide(channels):
    network = UNet((3, 16, 16), channels=channels, blocks=1, attention=[1])
    out, _ = network(torch.zeros(2, 3, 16, 16), torch.zeros(2), None)
    assert out.shape == (2, 3, 16, 16)


def test_fields_of_a_mixture_are_mixtures_of_fields():
    """Fields fitted to reweighted data against the same weights of fields fitted to the parts."""

    def fit(target):
        module = build(
            kernel=kernels.Exact(0.05), noise=None, parametrisation="direct", shape=(1,),
            objective=KernelRegression(scalar_weight=1.0, proposal=Proposal(margin=1.0)),
            network=MLP((1,), width=64, depth=2),
        )  # fmt: skip
        module = train(module, steps=500, batch=512, target=target)
        x = torch.linspace(-2, 2, 201)[:, None]
        with torch.no_grad():
            return module.fields(x, torch.zeros(201))

    parts = [fit(GaussianMixture([[mean]], sd=0.4)) for mean in (-1.0, 1.0)]
    whole = fit(GaussianMixture([[-1.0], [1.0]], [0.8, 0.2], 0.4))
    for field, left, right in zip(whole, *parts):
        assert relative_error(0.8 * left + 0.2 * right, field) < 0.06
        assert relative_error(0.6 * left + 0.4 * right, field) > 0.2


def test_losses_are_finite_where_the_mobility_vanishes():
    """A drawn slice, or the exact kernel, far from all partners: m̂ underflows."""
    for kernel in (kernels.Sliced(1e-4), kernels.Exact(1e-4)):
        module = build(kernel=kernel, noise=NoiseLevels(-6.0, 0.1))
        x = torch.linspace(-100, 100, 16)[:, None].expand(16, 2).contiguous()
        assert not module.partners(x)[1].mobility(kernel, x, torch.zeros(16))[0].any()
        module.losses(x).total.backward()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_queries_train_at_the_first_points_with_all_as_partners():
    module = build(partners=Partners(queries=8))
    x = square().sample(64).float()
    losses = module.losses(x, generator=torch.Generator().manual_seed(1))
    assert all(value.shape == (8,) for value in vars(losses).values())
    queries, pool = module.partners(x)
    m, _ = pool.mobility(module.kernel, queries, torch.full((8,), 0.5))
    expected, _ = module.kernel(x[:1], x[1:], torch.full((1,), 0.5), torch.full((1, 63), 1 / 63))
    torch.testing.assert_close(m[:1], expected)


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_default_samplers_lose_no_chain(start):
    module = train(
        build(network=MLP((2,), width=48, depth=1), samplers={
            "sde": MultistepDynamics(levels=30, sigma_max=10.0, sigma_min=0.01, exact_score=True, start=start),
            "ode": ProbabilityFlow(sigma_max=10.0, sigma_min=0.01, exact_score=True, start=start),
        }),
        steps=400,
    )  # fmt: skip
    for sampler in ("sde", "ode"):
        x = module.sample(range(10_000), sampler, seed=3)
        assert x.shape == (10_000, 2) and float(x.abs().max()) < 4


def test_losses_are_the_weighted_denoising_error():
    """For the constant kernel: (2σ)²(1 + σ²/σ_d²)/d · ¼‖S + n/σ‖², EDM's weighting."""
    module = build(kernel=kernels.Constant())
    x = square().sample(32).float()
    losses = module.losses(x, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    sigma = (-0.8 + 1.2 * torch.randn(32, generator=g)).exp()
    noise = torch.randn(32, 2, generator=g)
    s, field = module.fields(x + sigma[:, None] * noise, sigma)
    residual = log_gradient(s, field) + noise / sigma[:, None]
    expected = sigma.square() * (1 + sigma.square() / 1.04**2) / 2 * residual.square().sum(1)
    torch.testing.assert_close(losses.sigma, sigma)
    torch.testing.assert_close(losses.gradient, expected, rtol=1e-4, atol=1e-5)


def test_sampling_depends_on_index_and_seed_only():
    module = build()
    together = module.sample(range(6), seed=2)
    torch.testing.assert_close(torch.cat([module.sample([i], seed=2) for i in range(6)]), together)
    assert (module.sample(range(6), seed=3) - together).abs().max() > 0.01


def test_guidance_of_a_conditional_model():
    torch.manual_seed(0)
    network = MLP((2,), num_classes=3, conditional=True, width=16, depth=1)
    module = BellmanDiffusion(
        network, kernels.Constant(), (2,), 3, 1.0, {"ode": ProbabilityFlow(4)}, label_dropout=0.3, guidance=2.0
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, label = torch.randn(200, 2), torch.randint(0, 2, (200,))
    module.train().losses(x, label).gradient.mean().backward()
    reached = network.embed.classes.weight.grad.abs().sum(1) > 0
    assert reached.tolist() == [True, True, False, True]  # the last row stands for no class
    network.zero_grad()
    module.eval().losses(x, label).gradient.mean().backward()
    assert not network.embed.classes.weight.grad[-1].any()
    asked = torch.tensor([0, 2])
    guided = module.sample(range(2), label=asked)
    everything = module.sample(range(2))
    module.guidance = Guidance()
    plain = module.sample(range(2), label=asked)
    assert (guided - plain).abs().min() > 1e-4
    module.guidance = Guidance(0.0)
    torch.testing.assert_close(module.sample(range(2), label=asked), everything)
    module.guidance = Guidance(2.0, (30.0, 40.0))  # above every noise level
    torch.testing.assert_close(module.sample(range(2), label=asked), plain)


def test_compiled_networks_compute_the_same(monkeypatch):
    compile_ = torch.nn.Module.compile
    whole = {"backend": "eager", "fullgraph": True}  # traced as one graph, and not translated to C
    monkeypatch.setattr(MLP, "compile", lambda self: compile_(self, **whole))
    plain, compiled = build(), build(compile=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    x = square().sample(32).float()
    a, b = (module.losses(x, generator=torch.Generator().manual_seed(0)) for module in (plain, compiled))
    assert compiled.fields.network._compiled_call_impl is not None
    torch.testing.assert_close(a.gradient, b.gradient)


def test_evaluation_repeats_and_leaves_the_training_randomness_alone():
    module = build()
    module.log_dict = lambda *args, **options: None
    module._trainer = SimpleNamespace(world_size=1, global_rank=0)
    batch = (square().sample(16).float(), torch.zeros(16))
    state = torch.get_rng_state()
    first, second = (module.validation_step(batch, 3)["loss"] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    module._trainer = SimpleNamespace(world_size=2, global_rank=1)  # each process has noise of its own
    assert module.validation_step(batch, 3)["loss"] != first
    module._trainer.global_rank = 0
    assert module.validation_step(batch, 3)["loss"] != module.validation_step(batch, 4)["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samplers": {"ode": None}}, "samplers are all null: at least one is needed"),
        ({"sampler": "sde"}, "sampler must be one of ode; got 'sde'"),
        (
            {
                "noise": None,
                "parametrisation": "direct",
                "objective": FieldDivergence(trace="exact"),
                "samplers": {"ode": ProbabilityFlow()},
            },
            "samplers.ode goes down noise levels, and with noise=null the fields have none",
        ),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"lr_decay": "cosine", "optimizer": ScheduleFree()}, "set lr_decay=none"),
        (
            {"objective": FieldDivergence(trace="combined"), "noise": None, "parametrisation": "direct"},
            "nothing to den",
        ),
        ({"compile": True, "objective": FieldDivergence(trace="combined")}, "forward mode cannot be compiled"),
        ({"noise": None, "parametrisation": "direct"}, "nothing to denoise"),
        ({"noise": None, "objective": FieldDivergence(trace="exact")}, "noise=null needs parametrisation=direct"),
        (
            {"scalar_network": MLP((2,), num_classes=3, per_class=True, width=8, depth=1)},
            "per_class=true is for model=relative",
        ),
        ({"label_dropout": 0.1}, "label_dropout needs network.conditional=true"),
        ({"guidance": 2.0}, "guidance needs a class-conditional model"),
        ({"guidance_interval": (3.0, 1.0)}, "guidance_interval must be .low, high."),
        ({"compile": True, "objective": FieldDivergence(trace="exact")}, "forward mode cannot be compiled"),
        ({"network": Fused(), "objective": FieldDivergence(trace="gaussian")}, "second derivatives of it are wrong"),
        ({"objective": KernelRegression()}, "needs kernel=Exact and parametrisation=direct"),
        (
            {"objective": KernelRegression(), "noise": NoiseLevels(antithetic=0.5), "kernel": kernels.Exact(0.1)}
            | {"parametrisation": "direct"},
            "noise.antithetic=0",
        ),
        ({"objective": FieldDivergence(trace="sliced")}, "parametrisation=direct"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Partners(queries=0), "queries must be at least 1"),
        (lambda: Partners(pairs="some"), "pairs must be one of all, single"),
        (lambda: NoiseLevels(std=0.0), "std must be positive"),
        (lambda: NoiseLevels(antithetic=-1.0), "antithetic must lie between 0 and inf"),
        (lambda: NoiseLevels(std=50.0), "mean ± 5 std must lie between -40 and 10, got mean=-0.8 and std=50"),
        (lambda: NoiseLevels(mean=15.0, std=0.1), "mean ± 5 std must lie between -40 and 10"),
        (lambda: AdamW(weight_decay=float("inf")), "weight_decay must lie between 0 and"),
        (lambda: AdamW((0.9, 1.5)), r"betas\[1\] must lie between 0 and 1"),
        (lambda: Muon(momentum=2.0), "momentum must lie between 0 and 1"),
        (lambda: FieldDivergence(trace="steïn"), "trace must be one of stein, combined, hutchinson, gaussian, sliced"),
        (lambda: FieldDivergence(trace="combined", crossover=0.0), "crossover must be positive"),
        (lambda: FieldDivergence(trace="combined", probed=1.5), "probed must lie between 0 and 1"),
        (lambda: FieldDivergence(crossover=0.5), "crossover and probed are of trace=combined"),
        (lambda: FieldDivergence(scalar_weight=-1.0), "scalar_weight must lie between"),
        (lambda: FieldDivergence(scalar_weight=float("inf")), "scalar_weight must lie between"),
    ],
)
def test_refusals_of_parts(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_single_scale_is_refused_where_it_has_no_meaning():
    module = build()
    x, pool = module.partners(square().sample(16).float())
    with pytest.raises(ValueError, match="noise=null needs parametrisation=direct"):
        FieldDivergence()(module.fields, Queries(x), pool)


def test_outputs_of_a_network_have_the_shapes_of_fields():
    class Column(MLP):
        def forward(self, x, c_noise, label=None):
            out, a = super().forward(x, c_noise, label)
            return out, a[:, None]

    module = build(network=Column((2,), width=8, depth=1))
    with pytest.raises(UserError, match=r"a of shape \(16, 1\) for x of shape \(16, 2\); they must be"):
        module.losses(square().sample(16).float())


@pytest.mark.parametrize(("give", "what"), [(lambda out, a: out, "Tensor"), (lambda out, a: (out, 0.0), "tuple")])
def test_a_network_gives_two_tensors(give, what):
    class Other(MLP):
        def forward(self, x, c_noise, label=None):
            return give(*super().forward(x, c_noise, label))

    with pytest.raises(UserError, match=f"the network gives a {what}; it must give two tensors"):
        build(network=Other((2,), width=8, depth=1)).losses(square().sample(2).float())


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.nn.functional.layer_norm(h, h.shape[1:]), lambda h: h.softmax(1), torch.nn.LogSoftmax(1),
        lambda h: h - h.logsumexp(1, keepdim=True), lambda h: torch.nn.functional.instance_norm(h[:, None])[:, 0],
        lambda h: torch.special.softmax(h, 1), lambda h: torch.nn.functional.glu(torch.cat([h, h], 1), 1),
        lambda h: torch.nn.functional.softmin(h, 1), lambda h: h.logcumsumexp(1),
        lambda h: torch.nn.MultiheadAttention(2, 1)(h, h, h)[0],
    ],
)  # fmt: skip
def test_functions_without_second_derivatives_are_refused_in_forward_mode(function):
    class Functional(MLP):
        def forward(self, x, c_noise, label=None):
            return super().forward(function(x), c_noise, label)

    x = square().sample(16).float()
    network = Functional((2,), width=8, depth=1)
    module = build(network=network, objective=FieldDivergence(trace="hutchinson"))
    with pytest.raises(UserError, match="a trace by forward mode cannot train through .* Take LayerNorm, GroupNorm or"):
        module.losses(x)
    build(network=network).losses(x).total.backward()


def test_functions_with_second_derivatives_are_trained_in_forward_mode():
    class Grouped(MLP):
        def forward(self, x, c_noise, label=None):
            return super().forward(torch.nn.functional.group_norm(x, 1) + x, c_noise, label)

    module = build(network=Grouped((2,), width=8, depth=1), objective=FieldDivergence(trace="hutchinson"))
    module.losses(square().sample(16).float()).total.backward()
