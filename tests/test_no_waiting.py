"""Nothing is read back from a device between logging steps, on a CPU that is taken for one to be waited for.

There AdamW is the fused one, as on CUDA, and `at_hand` says no.
"""

import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bd_lightning import optimizers
from bd_lightning.divergences import bcast
from bd_lightning.dynamics import AnnealedDynamics, MultistepDynamics, ProbabilityFlow, SampleNoise
from bd_lightning.dynamics.sampler import SamplingDiverged
from bd_lightning.fields import GuidedFields
from bd_lightning.fields.base import FieldPair
from bd_lightning.kernels import ClosedFormSlices
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP, UNet
from callbacks import FieldDiagnostics, LastCheckpoint, NonFiniteLoss
from callbacks.progress import StepProgress
from datamodules import Digits
from faults import Poison

EVERY = 4


@pytest.fixture
def far(monkeypatch):
    """The CPU is far away."""
    monkeypatch.setattr(optimizers, "FUSED", ("cpu",))
    for module in ("callbacks.diagnostics", "callbacks.progress", "bd_lightning.dynamics.sampler"):
        monkeypatch.setattr(f"{module}.at_hand", lambda x: False)


class Reads(TorchDispatchMode):
    """Counts numbers that are read back."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class Steps(L.Callback):
    """What each step read, and the weights after it."""

    def __init__(self, reads=None):
        self.reads, self.counts, self.weights = reads or Reads(), [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.reads.count

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        self.counts.append(self.reads.count - self.before)


def build(network=None):
    torch.manual_seed(0)
    samplers = {"ode": ProbabilityFlow(steps=3)}
    network = network or MLP((1, 8, 8), width=16, depth=1)
    return BellmanDiffusion(network, ClosedFormSlices(), (1, 8, 8), 10, 0.75, samplers, warmup_steps=0)


def fit(tmp_path, callbacks, steps=3 * EVERY, module=None, **options):
    torch.manual_seed(3)
    module = module or build()
    trainer = L.Trainer(**{
        "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "accelerator": "cpu", "devices": 1,
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": EVERY,
        "default_root_dir": str(tmp_path), "callbacks": callbacks, "enable_checkpointing": False,
        "gradient_clip_val": 1.0, **options,
    })  # fmt: skip
    trainer.fit(module, datamodule=Digits(root=str(tmp_path / "data"), batch_size=64))
    return trainer


CHOICES = pytest.mark.parametrize("choice", [optimizers.AdamW(), optimizers.Muon()], ids=lambda one: type(one).__name__)


@CHOICES
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_reads_nothing_back_between_logging_steps(far, tmp_path, precision, choice):
    reads, module = Reads(), build()
    module.optimizer = choice
    steps = Steps(reads)
    callbacks = [FieldDiagnostics(), steps, StepProgress(refresh_rate=1)]  # averages count their steps on the host
    with reads:
        trainer = fit(tmp_path, callbacks, module=module, precision=precision, enable_progress_bar=True)
    between = [count for step, count in enumerate(steps.counts, 1) if step % EVERY and step > 1]
    assert len(between) == 8 and set(between) == {0}, steps.counts
    assert all(steps.counts[step - 1] > 0 for step in (4, 8, 12))  # so that reads are seen
    assert "train/gradient_norm" in trainer.callback_metrics


@CHOICES
@pytest.mark.parametrize("at", [[0, 5], [4, 5, 7]])
def test_steps_at_fault_are_left_out_on_the_device(far, tmp_path, at, choice):
    diagnostics, steps, module = FieldDiagnostics(nonfinite="skip"), Steps(), build(UNet((1, 8, 8), channels=[8]))
    module.optimizer = choice
    begin = torch.cat([p.detach().flatten() for p in module.parameters()])
    trainer = fit(tmp_path, [Poison(at), diagnostics, steps], module=module)
    assert torch.equal(steps.weights[0], begin) == (0 in at)
    for step, (before, after) in enumerate(zip(steps.weights, steps.weights[1:]), 1):
        assert after.isfinite().all() and torch.equal(before, after) == (step in at)
    assert diagnostics.skipped == len(at) == trainer.callback_metrics["train/skipped_steps"]
    kept = torch.load(tmp_path / "nonfinite-batch-rank0.pt", weights_only=True)
    assert kept["step"] == at[-1] and kept["batch"][0].isinf().all() and not kept["loss"].isfinite()
    optimizer = trainer.optimizers[0]
    states = [state for part in getattr(optimizer, "parts", [optimizer]) for state in part.state.values()]
    assert {float(state["step"]) for state in states if "step" in state} == {float(3 * EVERY - len(at))}
    assert all(value.isfinite().all() for state in states for value in state.values())


@CHOICES
def test_a_run_that_stops_changes_nothing_after_the_step_at_fault(far, tmp_path, choice):
    module, steps = build(UNet((1, 8, 8), channels=[8])), Steps()
    module.optimizer = choice
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step 5; the batch is kept in .*rank0.pt"):
        fit(tmp_path, [Poison([5, 6]), FieldDiagnostics(), steps], module=module)
    assert len(steps.weights) == 7  # the eighth is that of the look
    assert torch.equal(steps.weights[4], steps.weights[6]) and not torch.equal(steps.weights[3], steps.weights[4])
    kept = torch.load(tmp_path / "nonfinite-batch-rank0.pt", weights_only=True)
    assert kept["step"] == 5 and kept["batch"][0].isinf().all()


@pytest.mark.parametrize("place", ["at hand", "far"])
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_float16_looks_after_its_gradients_and_not_after_the_loss(request, tmp_path, place, nonfinite):
    if place == "far":
        request.getfixturevalue("far")
    steps, diagnostics = Steps(), FieldDiagnostics(nonfinite=nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)  # the first gradients are infinite
    options = {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    run = partial(fit, tmp_path, [Poison([5]), diagnostics, steps], **options)
    if nonfinite == "stop":
        with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step 5"):
            run()
        return
    run()
    assert diagnostics.skipped == 1 and scaler.get_scale() < 2.0**26
    moved = [not torch.equal(before, after) for before, after in zip(steps.weights, steps.weights[1:])]
    assert not moved[4] and moved[-1], moved


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_checkpoint_knows_of_steps_at_fault_that_were_not_looked_at(far, tmp_path, nonfinite):
    diagnostics = FieldDiagnostics(nonfinite=nonfinite)
    callbacks = [Poison([5]), diagnostics, LastCheckpoint(str(tmp_path), every=6)]
    run = {"steps": 6, "enable_checkpointing": True}
    if nonfinite == "stop":
        with pytest.raises(NonFiniteLoss, match="at step 5"):
            fit(tmp_path, callbacks, **run)
        assert not (tmp_path / "last.ckpt").exists()
        return
    fit(tmp_path, callbacks, **run)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert next(state["skipped"] for state in states.values() if "skipped" in state) == 1


def test_a_batch_of_another_size_is_kept_too(far, tmp_path):
    diagnostics, bad = FieldDiagnostics(nonfinite="skip"), torch.tensor(True)
    diagnostics.faults = torch.zeros((), dtype=torch.long)
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), global_rank=0)
    for step, size in enumerate((4, 4, 3)):
        batch = [torch.full((size, 2), float(step)), None]
        found = {"batch": batch, "step": torch.tensor(step), "loss": bad / 0, "norm": bad / 0}
        diagnostics._note(trainer, bad & (step != 1), found)
        diagnostics.faults += step != 1
    diagnostics._look(trainer)
    kept = torch.load(tmp_path / "nonfinite-batch-rank0.pt", weights_only=True)
    assert kept["step"] == 2 and kept["batch"][0].shape == (3, 2) and diagnostics.skipped == 2


class Breaks(BellmanDiffusion):
    """Its loss is not a number in the batches whose place among all is in `at`; `met` has all batches."""

    def losses(self, x, *args):
        self.met.append(x)
        found = super().losses(x, *args)
        return replace(found, scalar=found.scalar * float("nan")) if len(self.met) - 1 in self.at else found


@pytest.mark.parametrize("where", ["at hand", "far"])
@pytest.mark.parametrize(("at", "kept"), [([6], 6), ([7, 8], 7), ([8], 8)])
def test_of_accumulated_batches_the_first_at_fault_is_kept(request, tmp_path, where, at, kept):
    if where == "far":
        request.getfixturevalue("far")
    module = build()
    module.__class__, module.at, module.met = Breaks, at, []
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 2"):
        fit(tmp_path, [FieldDiagnostics()], module=module, accumulate_grad_batches=3)
    batch = torch.load(tmp_path / "nonfinite-batch-rank0.pt", weights_only=True)["batch"]
    assert torch.equal(batch[0], module.met[kept])


def test_the_fused_optimizer_is_clipped_under_autocast(far, tmp_path):
    for limit in (1e-9, 1e9):
        steps = Steps()
        module = build()
        module.optimizer = optimizers.AdamW(betas=(0.0, 0.0))
        trainer = fit(tmp_path, [steps], 2, module, precision="bf16-mixed", gradient_clip_val=limit)
        moved = (steps.weights[1] - steps.weights[0]).abs().max()
        assert trainer.optimizers[0].param_groups[0]["fused"] and (moved < 1e-4) == (limit == 1e-9)


def test_a_state_keeps_its_weights_and_takes_the_kernel_of_the_device(monkeypatch):
    networks = [nn.Linear(3, 3) for _ in range(3)]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    monkeypatch.setattr(optimizers, "FUSED", ("cpu",))
    fused = optimizers.AdamW()(networks[0], 0.1)
    monkeypatch.setattr(optimizers, "FUSED", ("cuda",))
    plain = optimizers.AdamW()(networks[1], 0.1)
    for _ in range(2):
        for network, optimizer in zip(networks, (fused, plain)):
            optimizer.zero_grad()
            network(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight)
    for there, here in ((fused, plain), (plain, fused)):
        kernel = here.param_groups[0]["fused"]
        here.load_state_dict(there.state_dict())
        assert here.param_groups[0]["fused"] == kernel
        optimizers.AdamW().unless(here, torch.tensor(True))
        before = [p.clone() for group in here.param_groups for p in group["params"]]
        here.step()
        assert all(torch.equal(a, b) for a, b in zip(before, (p for g in here.param_groups for p in g["params"])))


class Steep(FieldPair):
    """Fields that lose some chains at a level."""

    def __init__(self, below=0.0, rows=3, value=float("nan")):
        self.below, self.rows, self.value = below, rows, value

    def __call__(self, x, sigma):
        g = -x / bcast(2 * (sigma.square() + 1), x)
        lost = (sigma < self.below) & (torch.arange(len(x)) < self.rows)
        return torch.ones(len(x)), torch.where(lost[:, None], torch.full_like(g, self.value), g)


@pytest.mark.parametrize("sampler", [MultistepDynamics(levels=120), ProbabilityFlow(steps=7)])
@pytest.mark.parametrize("fields", [Steep(0.5), Steep(99.0), Steep(0.5, value=1e9), Steep(0.5, rows=8)])
def test_lost_chains_are_the_same_wherever_they_are_looked_for(sampler, fields, monkeypatch):
    found = []
    for near in (True, False):
        monkeypatch.setattr("bd_lightning.dynamics.sampler.at_hand", lambda x, near=near: near)
        for finite in (False, True):
            try:
                with warnings.catch_warnings(record=True) as said:
                    x = sampler(fields, SampleNoise(range(8), (2,)), finite_part=finite)
                assert len(x) == 5 and "3 of 8" in str(said[0].message)
                found.append((x, str(said[0].message), 0))
            except SamplingDiverged as stop:
                found.append((stop.x.nan_to_num(), str(stop), stop.step))
    for here, there in zip(found[:2], found[2:]):
        torch.testing.assert_close(here[0], there[0], rtol=0, atol=0)
        assert here[1:] == there[1:]


@pytest.mark.parametrize(
    "sampler",
    [MultistepDynamics(levels=9, order=3, corrector=True), ProbabilityFlow(steps=5), AnnealedDynamics(levels=4)],
)
def test_guided_samples_are_drawn_without_reading(far, sampler):
    noise = lambda: SampleNoise(range(8), (2,))  # noqa: E731
    guided = GuidedFields(Steep(), Steep(99.0, rows=0), 2.0, (0.3, 5.0))
    plain = GuidedFields(Steep(), Steep(99.0, rows=0), 2.0, (0.3, 5.0))
    plain.at = lambda level: plain  # looks at the levels of the points
    reads = Reads()
    with reads:
        for _ in sampler.path(guided, noise()):
            pass
    assert reads.count <= sampler.calls  # of levels, which lie on the host
    torch.testing.assert_close(sampler(guided, noise()), sampler(plain, noise()), rtol=0, atol=0)


def test_evaluation_batches_of_any_size_are_one_compilation(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, whole = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: whole(self, backend=counter))
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = MLP((1, 8, 8), width=16, depth=1)
    samplers = {"ode": ProbabilityFlow(steps=2)}
    module = BellmanDiffusion(network, ClosedFormSlices(), (1, 8, 8), 10, 0.75, samplers, compile=True)
    seen = Counter()

    def ran(name):
        seen[name], ran.before = counter.frame_count - ran.before, counter.frame_count

    ran.before = 0
    for _ in range(2):
        module.train().losses(torch.randn(16, 1, 8, 8)).total.backward()
    ran("training")
    module.eval()
    with torch.no_grad():
        for size in (12, 12, 7):
            module.losses(torch.randn(size, 1, 8, 8))
    ran("validation")
    for mode in (torch.no_grad, torch.inference_mode):
        for size in (12, 5, 3):
            with mode():
                module.sample(range(size))
    ran("samples")
    module.train().losses(torch.randn(16, 1, 8, 8)).total.backward()
    ran("training again")
    assert seen == {"training": 1, "validation": 1, "samples": 0, "training again": 0}
