"""Optimisers as choices of the config: what they train, and that they go on exactly."""

import copy
import shutil

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from torch._subclasses import FakeTensorMode

import train
from bd_lightning.modules.base import Schedule
from bd_lightning.networks import MLP, UNet
from bd_lightning.optimizers import AdamW, Muon, ScheduleFree
from small_run import launch

CHOICES = [AdamW(weight_decay=0.01), Muon(weight_decay=0.01), ScheduleFree(weight_decay=0.01)]


def unet():
    torch.manual_seed(0)
    return UNet((1, 8, 8), channels=[8, 16], attention=[1])


def run(network, optimizer, rates, steps, first=0):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x, c = torch.randn(4, 1, 8, 8, generator=g), torch.randn(4, generator=g)
        optimizer.zero_grad()
        out, a = network(x, c)
        ((out - x).square().mean() + (a - 1).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_training_goes_on_exactly_from_a_state(choice):
    if isinstance(choice, ScheduleFree):
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    whole = unet()
    optimizer = choice(whole, 1e-2)
    rates = Schedule(optimizer, 3, 20)
    run(whole, optimizer, rates, 5)
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), rates.state_dict()))
    run(whole, optimizer, rates, 5, first=5)
    again = unet()
    other = choice(again, 1e-2)
    following = Schedule(other, 3, 20)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    following.load_state_dict(kept[2])
    run(again, other, following, 5, first=5)
    for (name, a), b in zip(whole.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in other.param_groups] and 0 < min(rates) < 1e-2


def test_muon_is_torchs_on_flattened_matrices_and_adam_on_the_rest():
    network, copied = unet(), unet()
    chosen = {id(p) for p in network.matrices()}
    names = [name for name, p in network.named_parameters() if id(p) in chosen]
    assert "middle.conv1.weight" in names and "middle.attention.qkv.weight" in names
    assert not [n for n in names if n.startswith(("enter", "embed")) or "head" in n or "condition" in n or "bias" in n]
    optimizer = Muon()(network, 1e-2)
    run(network, optimizer, Schedule(optimizer, 0, None), 1)
    theirs = dict(copied.named_parameters())
    flat = {name: torch.nn.Parameter(theirs[name].detach().flatten(1)) for name in names}
    muon = torch.optim.Muon(list(flat.values()), 1e-2, 0.0, 0.95, adjust_lr_fn="match_rms_adamw")
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(4, 1, 8, 8, generator=g), torch.randn(4, generator=g)
    out, a = copied(x, c)
    ((out - x).square().mean() + (a - 1).square().mean()).backward()
    torch.nn.utils.clip_grad_norm_(copied.parameters(), 1.0)
    for name, p in flat.items():
        p.grad = theirs[name].grad.flatten(1)
    muon.step()
    adam = torch.optim.AdamW([p for n, p in theirs.items() if n not in flat], 1e-2, (0.9, 0.99), weight_decay=0.0)
    adam.step()
    for name, p in network.named_parameters():
        expected = flat[name].view(p.shape) if name in flat else theirs[name]
        torch.testing.assert_close(p, expected, rtol=0, atol=0)


@pytest.mark.parametrize("choice", CHOICES[:2], ids=lambda choice: type(choice).__name__)
def test_gradients_can_be_clipped_in_mixed_precision_on_a_gpu(choice):
    """Lightning refuses to for optimisers that unscale gradients themselves, as fused ones on a GPU do."""
    with FakeTensorMode(), torch.device("cuda"):
        network = MLP((2,), width=8, depth=1)
        optimizer = choice(network, 1e-3)
    assert {p.device.type for p in network.parameters()} == {"cuda"}
    parts = [optimizer, *getattr(optimizer, "parts", [])]
    assert not any(_optimizer_handles_unscaling(part) for part in parts)


def test_whole_numbers_are_rates_too():
    optimizer = AdamW([0, 0.99])(MLP((2,), width=8, depth=1), 1e-3)
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.99)


def test_an_average_of_its_own_needs_the_callback_that_puts_it_in(tmp_path, capsys):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    words = ["model.optimizer._target_=bd_lightning.optimizers.ScheduleFree", "model.lr_decay=none"]
    assert launch(tmp_path / "runs", *words, "callbacks.ema=null") == 2
    assert "ScheduleFree is judged by its own average, which callbacks.ema puts in" in capsys.readouterr().err


def test_a_resumed_run_says_what_is_not_as_it_was(tmp_path, capsys):
    assert launch(tmp_path / "runs", "run_id=a", "trainer.accumulate_grad_batches=2") == 0
    last = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert train.main([f"ckpt_path={last}", "steps=6"]) == 0
    assert "not as in the checkpoint" not in capsys.readouterr().out
    other = [f"ckpt_path={last}", "steps=8", "trainer=cpu", "model.lr=2e-3", "trainer.enable_progress_bar=false"]
    assert train.main(other) == 2
    assert "set trainer.accumulate_grad_batches=2 (data.batch_size may change)" in capsys.readouterr().err
    assert train.main([*other, "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=7"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not as in the checkpoint: ")]
    assert len(said) == 1 and "model.lr=0.002 (was " in said[0] and "trainer.log_every_n_steps=7 (was " in said[0]
    assert "scores from here on" not in said[0]
    words = {"model.samplers.ode.steps=4": "do not", "data.flip=true": "may not"}
    for steps, (word, verb) in enumerate(words.items(), start=10):
        assert train.main([f"ckpt_path={last}", f"steps={2 * steps}", word]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not as in the checkpoint: ")]
        assert word in said[0].lower() and f"scores from here on {verb} compare with those before" in said[0]


def test_muon_asks_for_a_network_with_matrices():
    with pytest.raises(ValueError, match="this model has none: take bd_lightning.optimizers.AdamW"):
        Muon()(torch.nn.Linear(2, 2), 1e-3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: AdamW((1.0, 0.9)), r"betas\[0\] must lie between 0 and 1, and below 1"),
        (lambda: Muon(momentum=1.0), "momentum must lie between 0 and 1, and below 1"),
        (lambda: ScheduleFree((0.0, 0.9)), r"betas\[0\] must be positive"),
    ],
)
def test_rates_that_would_stand_still(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_muon_leaves_reparametrised_weights_to_adam():
    network = MLP((2,), width=8, depth=1)
    torch.nn.utils.parametrizations.weight_norm(network.blocks[0].inner)
    assert len(network.matrices()) == 1


def test_another_optimizer_cannot_go_on_and_leaves_the_run_alone(tmp_path, capsys):
    assert launch(tmp_path / "runs", "run_id=a") == 0
    folder = tmp_path / "runs" / "bellman-diffusion" / "a"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [f"ckpt_path={folder}/checkpoints/last.ckpt", "steps=6"]
    assert train.main([*words, "model.optimizer._target_=bd_lightning.optimizers.Muon"]) == 2
    assert "optimizers.AdamW, whose state cannot go on with bd_lightning.optimizers.Muon" in capsys.readouterr().err
    for setting, name in (("betas=[0.5,0.9]", "betas"), ("weight_decay=0.1", "weight_decay")):
        assert train.main([*words, f"model.optimizer.{setting}"]) == 2
        assert f"trained with model.optimizer.{name}=" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_optimizer_of_another_module_is_another_one(tmp_path, capsys, monkeypatch):
    text = "import bd_lightning.optimizers as o\n\n\nclass AdamW(o.AdamW):\n    pass\n\n\nRenamed = AdamW\n"
    (tmp_path / "own_optimizers.py").write_text(
        text + "class Empty(o.AdamW):\n    def __call__(self, module, lr):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert launch(tmp_path / "runs", "run_id=a") == 0
    last = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints" / "last.ckpt"
    assert train.main([f"ckpt_path={last}", "steps=6", "model.optimizer._target_=own_optimizers.AdamW"]) == 2
    assert "whose state cannot go on with own_optimizers.AdamW" in capsys.readouterr().err
    assert launch(tmp_path / "runs", "run_id=b", "model.optimizer._target_=own_optimizers.AdamW") == 0
    last = tmp_path / "runs" / "bellman-diffusion" / "b" / "checkpoints" / "last.ckpt"
    words = [f"ckpt_path={last}", "steps=6", "trust=true"]
    assert train.main([*words, "model.optimizer._target_=own_optimizers.Renamed"]) == 2
    assert "whose state cannot go on with own_optimizers.Renamed" in capsys.readouterr().err
    (tmp_path / "moved_optimizers.py").write_text("from own_optimizers import AdamW\n")
    assert train.main([*words, "model.optimizer._target_=moved_optimizers.AdamW"]) == 0
    assert launch(tmp_path / "runs", "run_id=c", "model.optimizer._target_=own_optimizers.Empty") == 2
    assert "model.optimizer: Empty makes a NoneType, no torch.optim.Optimizer" in capsys.readouterr().err


def test_a_resumed_run_takes_the_rate_that_it_is_given(tmp_path):
    words = ["run_id=a", "model.lr_decay=none", "model.warmup_steps=1"]
    assert launch(tmp_path / "runs", *words) == 0
    last = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    assert train.main([f"ckpt_path={last}", "steps=6", "model.lr=1e-30", "model.optimizer.betas=[0.9,0.99]"]) == 0
    after = torch.load(last, weights_only=True)
    assert [group["lr"] for group in after["optimizer_states"][0]["param_groups"]] == [1e-30]
    assert after["hyper_parameters"]["model"]["lr"] == 1e-30
    for key, value in before["current_model_state"].items():
        torch.testing.assert_close(after["current_model_state"][key], value, rtol=0, atol=1e-25)


def test_a_state_that_cannot_be_restored_leaves_the_checkpoint_alone(tmp_path, capsys):
    assert launch(tmp_path / "runs", "run_id=a") == 0
    last = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    stored["optimizer_states"][0]["state"] = {k: {"z": torch.zeros(1)} for k in stored["optimizer_states"][0]["state"]}
    torch.save(stored, last)
    before = last.read_bytes()
    train.main([f"ckpt_path={last}", "steps=6"])
    assert last.read_bytes() == before and "error:" in capsys.readouterr().err


def test_an_optimizer_that_cannot_train_the_model_is_one_sentence(tmp_path, capsys):
    words = ["model=autoencoder", "model.latent=[4]", "model.channels=[4]", "callbacks=autoencoder"]
    words += ["callbacks.metrics=null", "callbacks.best=null", "callbacks.grid=null", "callbacks.progress=null"]
    words += ["steps=2", "eval_every=2", "logger=none", "trainer=cpu", f"root={tmp_path / 'runs'}"]
    assert train.main([*words, "model.optimizer={_target_: bd_lightning.optimizers.Muon}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "this model has none: take bd_lightning.optimizers.AdamW" in said[0]


def test_an_optimizer_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="Muon needs torch 2.9 or later"):
        Muon()(MLP((2,)), 1e-3)
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(ValueError, match="needs the package schedulefree: uv sync --group optimizers"):
        ScheduleFree()(MLP((2,)), 1e-3)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
def test_steps_that_are_left_out_leave_nothing(choice):
    """Weights, moments and what an average counts by are those of the other steps alone."""

    def trained(left_out, steps):
        torch.manual_seed(0)
        module = MLP((2,), width=8, depth=1)
        optimizer = choice(module, 1e-2)
        for k in range(left_out + steps):
            optimizer.zero_grad()
            x = torch.randn(16, 2, generator=torch.Generator().manual_seed(k - left_out if k >= left_out else 99))
            sum(part.square().mean() for part in module(x, x[:, 0], None)).backward()
            choice.unless(optimizer, torch.tensor(k < left_out))
            optimizer.step()
        return [p.detach() for p in module.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(3, 2), trained(0, 2)))
    assert not all(torch.equal(a, b) for a, b in zip(trained(0, 2), trained(0, 3)))


def test_schedule_free_is_judged_by_its_own_average():
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    network = unet()
    choice = ScheduleFree()
    optimizer = choice(network, 1e-2)
    run(network, optimizer, Schedule(optimizer, 0, None), 5)
    average = choice.averaged(optimizer)
    optimizer.eval()
    for p in network.parameters():
        torch.testing.assert_close(average.get(p, p), p)
    assert any((average[p] != 0).any() for p in average) and AdamW().averaged(optimizer) is None


@pytest.mark.parametrize("choice", [AdamW(), ScheduleFree()], ids=lambda choice: type(choice).__name__)
def test_weights_without_a_gradient_have_no_moments_and_are_no_damage(choice):
    """A frozen layer and a head that nothing reads; moments that some weights lack are damage."""
    if isinstance(choice, ScheduleFree):
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    layers[1].requires_grad_(False)
    optimizer = choice(layers, 1e-2)
    layers[1](layers[0](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    choice(layers, 1e-2).load_state_dict(state)
    name = next(name for name in state["state"][0] if name != "step")
    del state["state"][0][name]
    with pytest.raises(ValueError, match="some weights have .* and some"):
        choice(layers, 1e-2).load_state_dict(state)


def same(a, b):
    """Whether two nested states are equal, bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


EVERY = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, save_top_k: -1, filename: 'at-{step}', auto_insert_metric_name: false}"  # noqa: E501


@pytest.mark.parametrize("name", ["Muon", "ScheduleFree"])
def test_a_run_goes_on_exactly(name, tmp_path):
    """With averages, warm-up, clipping, a combined trace and antithetic pairs."""
    if name == "ScheduleFree":
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    words = [
        f"model.optimizer={{_target_: bd_lightning.optimizers.{name}}}", "model.objective.trace=combined",
        "model.noise.antithetic=0.5", "model.noise.stratified=true", "run_id=a", f"callbacks.every={EVERY}",
        *(["model.lr_decay=none"] if name == "ScheduleFree" else []),
    ]  # fmt: skip
    assert launch(tmp_path / "runs", *words) == 0
    folder = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints"
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    shutil.copy(folder / "at-3.ckpt", folder / "last.ckpt")
    assert train.main([f"ckpt_path={folder}/last.ckpt", "callbacks.every=null"]) == 0
    again = torch.load(folder / "last.ckpt", weights_only=True)
    assert whole["global_step"] == again["global_step"] == 4
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
        assert same(again[part], whole[part]), part
    if name == "ScheduleFree":
        states = whole["optimizer_states"][0]["state"]
        for (key, p), state in zip(whole["current_model_state"].items(), states.values(), strict=True):
            torch.testing.assert_close(whole["state_dict"][key], p.lerp(state["z"], 1 - 1 / 0.9))
