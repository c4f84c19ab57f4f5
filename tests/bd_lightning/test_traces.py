"""Ways of taking the trace, antithetic pairs and strata: the same mean gradient, less noise."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from bd_lightning import kernels
from bd_lightning.checks import UserError
from bd_lightning.divergences import stein_weight
from bd_lightning.dynamics import MultistepDynamics
from bd_lightning.fields import AnalyticFields
from bd_lightning.fields.preconditioning import HIGHEST, Direct, Factored
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP
from bd_lightning.objectives import FieldDivergence, NoiseLevels, Pool, Queries, queries
from bd_lightning.targets import GaussianMixture

DIM, DRAWS, BATCH = 4, 100, 64
MODES = GaussianMixture([[1] * DIM, [-1] * DIM], sd=0.3)
DATA = MODES.sample(4000, torch.Generator().manual_seed(0)).float()
CONSTANT, SLICES = kernels.Constant(), kernels.ClosedFormSlices(0.01)


def gradients(trace="stein", sigma=0.5, form="factored", kernel=CONSTANT, **noise):
    """Gradients of the network's parameters in independent batches near one noise level, (draws, parameters)."""
    torch.manual_seed(0)
    objective = FieldDivergence(trace=trace, probed=1.0 if trace == "combined" else None)
    module = BellmanDiffusion(
        MLP((DIM,), width=8, depth=1), kernel, (DIM,), 0, 1.0, {"sde": MultistepDynamics()}, "sde",
        objective, NoiseLevels(math.log(sigma), 1e-3, **noise), parametrisation=form,
    )  # fmt: skip
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    found = []
    for seed in range(DRAWS):
        g = torch.Generator().manual_seed(1000 * len(trace) + seed)
        x = DATA[torch.randint(0, len(DATA), (BATCH,), generator=g)]
        module.zero_grad()
        module.losses(x, generator=g).gradient.mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double())
    return torch.stack(found)


def disagreement(a, b):
    """Mean over parameters of the squared difference of two means, in units of its variance: 1 if they agree."""
    variance = (a.var(0) + b.var(0)) / DRAWS
    seen = variance > 1e-12 * variance.max()
    return float(((a.mean(0) - b.mean(0)).square()[seen] / variance[seen]).mean())


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize(("form", "kernel"), [("factored", CONSTANT), ("velocity", CONSTANT), ("direct", SLICES)])
def test_every_trace_has_the_same_mean_gradient(form, kernel, sigma):
    """With m̂ = 1 the weights m̂² and m_ref² are the same; direct fields have m_ref² alone."""
    exact = gradients("exact", sigma, form, kernel)
    for trace in ("stein", "combined", "hutchinson", "gaussian"):
        assert disagreement(gradients(trace, sigma, form, kernel), exact) < 4, trace


@pytest.mark.parametrize("sigma", [0.3])
def test_factored_fields_combine_in_the_weights_of_the_denoising_form(sigma):
    stein = gradients("stein", sigma, kernel=SLICES)
    assert disagreement(gradients("combined", sigma, kernel=SLICES), stein) < 4


def test_a_wrong_sign_is_seen(monkeypatch):
    """What the two tests above would say of a mistake."""
    right, control = gradients(), Factored.control
    wrong = lambda self, h, trace, noise, *rest: control(self, h, trace, -noise, *rest)  # noqa: E731
    monkeypatch.setattr(Factored, "control", wrong)
    assert disagreement(gradients("combined"), right) > 10


@pytest.mark.parametrize(
    ("form", "sigma", "size"), [(Factored(), 0.3, 1), (Factored(), 0.3, 1000), (Direct(), 0.3, 1), (Direct(), 1.0, 1)]
)
def test_what_is_added_to_the_denoising_form_has_mean_zero(form, sigma, size):
    """For the field sin x and m̂ = exp(−‖x̃‖²/2), of which ∇m̂ is no small part; of 1,000 times that weights end."""
    g, n = torch.Generator().manual_seed(0), 400_000
    x = MODES.sample(n, g)
    noise = torch.randn(n, DIM, generator=g, dtype=torch.float64)
    point, level, one = x + sigma * noise, torch.full((n,), sigma, dtype=torch.float64), torch.ones(n).double()
    m = size * (-point.square().sum(1) / 2).exp()
    if size > 1:
        assert 0.1 < (m > HIGHEST).double().mean() < 0.9
    control = form.control(point.sin(), point.cos().sum(1), noise, level, m, -m[:, None] * point, one)
    assert control.mean().abs() < 4 * control.std() / n**0.5
    wrong = form.control(point.sin(), point.cos().sum(1), noise, level, m, m[:, None] * point, one)
    assert wrong.mean().abs() > 20 * wrong.std() / n**0.5


def test_combined_with_a_probe_alone_is_the_weighted_divergence():
    """The denoising form and all that is added to it: m̂(¼‖S‖² + ½ tr ∇S)/m_ref and terms without S (theory §4)."""
    g = torch.Generator().manual_seed(0)
    h, noise, grad_m = torch.randn(3, 20, DIM, generator=g).double()
    m, m_ref, level, trace = torch.rand(4, 20, generator=g).double() + 0.1

    def whole(S, trace):
        form, given = Factored(), (noise, level, m, grad_m, m_ref)
        return form.stein_loss(S, *given) + form.control(S, trace, *given)

    expected = m / m_ref * (h.square().sum(1) / 4 + trace / 2)
    torch.testing.assert_close(whole(h, trace) - whole(torch.zeros_like(h), torch.zeros_like(trace)), expected)


def test_no_point_weighs_without_an_end():
    """The exact kernel's estimate in 32 dimensions lies between nothing and 10⁹ times m_ref."""
    x, sigma, g = torch.randn(64, 32), torch.full((64,), 0.3), torch.Generator().manual_seed(0)
    noise, kernel, form = torch.randn(64, 32, generator=g), kernels.Exact(), Factored()
    m, grad_m = Pool(0.3 * x, torch.full((64, 64), 1 / 64)).mobility(kernel, 0.3 * x + sigma[:, None] * noise, sigma)
    m_ref = kernel.reference(sigma, 1.0, 32)
    assert (m / m_ref).max() > 1e6
    loss = form.stein_loss(torch.zeros(64, 32), noise, sigma, m, grad_m, m_ref)
    whole = form.stein_loss(torch.zeros(64, 32), noise, sigma, torch.ones(64), grad_m / m[:, None], torch.ones(64))
    torch.testing.assert_close(loss, whole * (m / m_ref).clamp_max(HIGHEST))
    h, far = torch.zeros(64, 32, requires_grad=True), 10 * sigma  # m̂² and m̂ m_ref are below single precision there
    point = 0.3 * x + far[:, None] * noise
    m, grad_m = Pool(0.3 * x, torch.full((64, 64), 1 / 64)).mobility(kernel, point, far)
    (slope,) = torch.autograd.grad(form.stein_loss(h, noise, far, m, grad_m, kernel.reference(far, 1.0, 32)).sum(), h)
    assert slope.isfinite().all() and slope.abs().sum() > 0 and not (m * m).any()


def test_a_noisy_kernel_moves_no_minimiser_of_factored_fields():
    """The mean derivative of the denoising form at the closed-form fields, with one drawn slice; divided by m̂ once more
    it is far from zero, as ∇log m̂ has another mean than ∇log m."""
    kernel, level, form = kernels.Sliced(0.01), torch.full((256,), 0.3).double(), Factored()
    plane, g = GaussianMixture([[1.0, 0.0], [-1.0, 0.0]], weights=[0.7, 0.3], sd=0.3), torch.Generator().manual_seed(0)
    found, other = [], []
    for _ in range(100):
        x, noise = plane.sample(256, g), torch.randn(256, 2, generator=g).double()
        point = x + 0.3 * noise
        pool = Pool(plane.sample(64, g), torch.full((256, 64), 1 / 64))
        m, grad_m = pool.mobility(kernel, point, level, g)
        s, gradient = AnalyticFields(plane, kernel, 1.0)(point, level)
        h = (2 * gradient / s[:, None]).requires_grad_()
        loss = form.stein_loss(h, noise, level, m, grad_m, torch.ones_like(m))
        (slope,) = torch.autograd.grad(loss.sum(), h)
        along = (slope * point).sum(1)
        found.append(along.mean())
        other.append((along / m).mean())
    off = [abs(means.mean() / means.std()) * len(means) ** 0.5 for means in map(torch.stack, (found, other))]
    assert off[0] < 4 and off[1] > 10


@pytest.mark.parametrize(("form", "kernel"), [("factored", CONSTANT), ("velocity", CONSTANT), ("direct", SLICES)])
def test_a_combined_trace_is_less_noisy_than_either(form, kernel):
    """Of a network that was trained a little, on ten modes in 16 dimensions."""
    g = torch.Generator().manual_seed(16)
    means = torch.randn(10, 16, generator=g)
    modes = GaussianMixture((4 * means / means.norm(dim=1, keepdim=True)).tolist(), sd=0.3)
    torch.manual_seed(0)
    module = BellmanDiffusion(
        MLP((16,), width=32, depth=1), kernel, (16,), 0, 1.0, {"sde": MultistepDynamics()}, "sde",
        parametrisation=form,
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        module.losses(modes.sample(128).float()).total.backward()
        optimizer.step()
    parameters = list(module.fields.network.parameters())
    for sigma in (0.1, 0.5, 2.0):
        spread = {}
        for trace in ("stein", "combined", "hutchinson"):
            module.objective = FieldDivergence(0.0, trace, probed=1.0 if trace == "combined" else None)
            module.noise, found = NoiseLevels(math.log(sigma), 1e-3), []
            for seed in range(60):
                torch.manual_seed(seed)
                loss = module.losses(modes.sample(64).float()).gradient.mean()
                parts = torch.autograd.grad(loss, parameters, allow_unused=True)
                found.append(torch.cat([part.flatten() for part in parts if part is not None]))
            spread[trace] = float(torch.stack(found).var(0).sum())
        assert spread["combined"] < min(spread["stein"], spread["hutchinson"])


def test_antithetic_pairs_leave_the_mean_and_take_noise():
    plain, pairs = gradients(sigma=0.1), gradients(sigma=0.1, antithetic=math.inf)
    assert disagreement(pairs, plain) < 4
    assert pairs.var(0).sum() < 0.7 * plain.var(0).sum()
    both = gradients("combined", sigma=0.1, antithetic=math.inf)
    assert disagreement(both, plain) < 4


def test_pairs_are_one_point_with_opposite_noise_and_without_itself_in_the_pool():
    x, y = torch.randn(11, 3), torch.randn(22, 3)  # an odd batch, and the partners of two devices
    pool = Pool(torch.cat([x, y[11:]]), kernels.leave_one_out(11, 22))
    noise = NoiseLevels(antithetic=0.5, stratified=True)
    points, own = queries(x, torch.arange(11), noise, 2.0, torch.Generator().manual_seed(0), pool)
    share = torch.distributions.Normal(noise.mean, noise.std).cdf(torch.tensor(0.5 * 2.0).log())
    assert points.pairs == int(11 * share / 2) > 1
    rows = points.label  # of the clean points
    assert rows.tolist() == [*(i for i in range(points.pairs) for _ in "+-"), *range(points.pairs, 11 - points.pairs)]
    assert torch.equal(points.x, x[rows])
    assert not own.weights[torch.arange(11), rows].any() and torch.allclose(own.weights.sum(1), torch.ones(11))
    assert own.y is pool.y and (own.weights > 0).sum(1).tolist() == [21] * 11
    point, n, sigma = points.perturbed(torch.Generator().manual_seed(1))
    paired = slice(0, 2 * points.pairs)
    assert torch.equal(sigma[paired][::2], sigma[paired][1::2]) and torch.equal(n[paired][::2], -n[paired][1::2])
    assert sigma[paired].max() < sigma[2 * points.pairs :].min()
    torch.testing.assert_close(point[paired][::2] + point[paired][1::2], 2 * points.x[paired][::2])


@pytest.mark.parametrize(
    "options", [{"stratified": True}, {"antithetic": 0.3}, {"antithetic": 0.3, "stratified": True}]
)
def test_noise_levels_keep_their_distribution(options):
    noise, g = NoiseLevels(-0.5, 0.8, **options), torch.Generator().manual_seed(0)
    pairs = noise.pairs(40, 1.0)
    drawn = torch.cat([noise(40, generator=g, pairs=pairs) for _ in range(500)]).log()
    levels = torch.linspace(0.05, 0.95, 19)
    expected = -0.5 + 0.8 * torch.special.ndtri(levels)
    assert (torch.quantile(drawn, levels) - expected).abs().max() < 0.05
    if noise.stratified and not pairs:
        batch = noise(40, generator=g).log()
        cells = (40 * torch.special.ndtr((batch + 0.5) / 0.8)).long()
        assert sorted(cells.tolist()) == list(range(40))


@pytest.mark.parametrize(("antithetic", "sigma_data"), [(5e-324, 0.1), (0.5, 0.0)])
def test_no_level_lies_below_nothing(antithetic, sigma_data):
    assert NoiseLevels(antithetic=antithetic).pairs(10, sigma_data) == 0


@pytest.mark.parametrize(("crossover", "a"), [(1e200, 0.0), (1e-200, 1.0), (0.3, 0.25 / 0.34)])
def test_the_weight_of_steins_identity_is_a_number_at_any_crossover(crossover, a):
    assert stein_weight(torch.tensor([0.5]), crossover).item() == pytest.approx(a)


def test_the_lowest_noise_levels_are_probed():
    torch.manual_seed(0)
    module = BellmanDiffusion(
        MLP((DIM,), width=8, depth=1), CONSTANT, (DIM,), 0, 1.0, {"sde": MultistepDynamics()}, "sde",
        FieldDivergence(trace="combined", crossover=0.2, probed=0.25),
    )  # fmt: skip
    level = torch.tensor([0.3, 2.0, 0.1, 0.5, 0.05, 0.7, 1.0, 4.0])
    h, s, trace, weight = module.objective._probed(module.fields, DATA[:8], level, Queries(DATA[:8]), None)
    assert trace.nonzero().flatten().tolist() == [2, 4]
    torch.testing.assert_close(weight[[2, 4]], 0.04 / (0.04 + level[[2, 4]].square()))
    assert not weight[[0, 1, 3, 5, 6, 7]].any()
    for found, plain in zip((h, s), module.fields.outputs(DATA[:8], level)):
        torch.testing.assert_close(found, plain)


class Fused(MLP):
    """With distances in a kernel that has no derivative in forward mode."""

    def forward(self, x, c_noise, label=None):
        out, a = super().forward(x, c_noise, label)
        return torch.cdist(out, DATA[:DIM]), a


class Cut(MLP):
    """Whose output is cut from its input."""

    def forward(self, x, c_noise, label=None):
        out, a = super().forward(torch.zeros_like(forward_ad.unpack_dual(x).primal), c_noise, label)
        return out, a


@pytest.mark.parametrize("trace", ["combined", "hutchinson"])
@pytest.mark.parametrize("network", [Fused, Cut])
def test_a_network_without_forward_mode_is_one_sentence(network, trace):
    module = BellmanDiffusion(
        network((DIM,), width=8, depth=1), CONSTANT, (DIM,), 0, 1.0, {"sde": MultistepDynamics()}, "sde",
        FieldDivergence(trace=trace), parametrisation="direct",
    )  # fmt: skip
    with pytest.raises(UserError, match="cannot be differentiated in forward mode.*take objective.trace=stein"):
        module.losses(DATA[:6])
