"""Consistency models: their function, their losses, tuning and distillation from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from bd_lightning import checkpoints, kernels
from bd_lightning.dynamics import ConsistencySteps, MultistepDynamics, SampleNoise
from bd_lightning.fields import AnalyticFields
from bd_lightning.modules import ConsistencyModel, DistilledModel, Gaps
from bd_lightning.networks import MLP
from bd_lightning.objectives import NoiseLevels
from bd_lightning.targets import GaussianMixture
from conftest import ROOT
from wandb_records import read_records

TAU = 0.7


def small(**options):
    torch.manual_seed(0)
    network = MLP((2,), width=64, depth=1, **options.pop("network", {}))
    samplers = {"one": ConsistencySteps(sigma_max=10.0), "two": ConsistencySteps(sigma_max=10.0, between=(1.0,))}
    return ConsistencyModel(network, (2,), 0, TAU, samplers, **options)


def excited(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_boundary_holds_exactly():
    model, x = excited(small()), torch.randn(20, 2)
    assert torch.equal(model.function(x, torch.zeros(20)), x)
    near = model.function(x, torch.full((20,), 1e-3))
    assert 0 < (near - x).abs().max() < 0.01


def test_gaps_narrow_by_stages_and_begin_at_the_data():
    gaps, t = Gaps(q=2.0, stages=3), torch.tensor([0.01, 0.5, 50.0])
    assert gaps(t, 0.0).tolist() == pytest.approx([0.0, 0.0, 0.5])
    last = gaps(t, 1.0)
    assert torch.equal(last, gaps(t, 0.7)) and last.tolist() == pytest.approx(
        [1 - (1 + 8 / (1 + torch.tensor(v).exp().item())) / 8 for v in (0.01, 0.5, 50.0)]
    )
    assert (gaps(t, 0.4) <= last).all()


@pytest.mark.parametrize("teacher", [False, True])
def test_the_function_of_gaussian_data_is_learned(teacher):
    """f(x, t) = x τ/√(τ² + t²), where the denoiser, with which it begins, has the square of that factor."""
    model = small(noise=NoiseLevels(-0.5, 1.2), gaps=Gaps(q=2.0, stages=5), lr=3e-3)
    if teacher:
        model.frozen = (AnalyticTeacher(),)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
    generator, steps = torch.Generator().manual_seed(1), 500
    for k in range(steps):
        model.progress = k / steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / steps)
        loss = model.losses(TAU * torch.randn(200, 2, generator=generator), None, generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(2000, 2, generator=generator)
    for t in (0.3, 1.0, 5.0):
        point = (TAU**2 + t**2) ** 0.5 * x
        with torch.no_grad():
            ratio = float((model.function(point, torch.full((2000,), t)) * x).sum() / x.square().sum())
        assert ratio == pytest.approx(TAU, rel=0.2)
        assert t < 1 or abs(ratio - TAU) < 0.5 * (TAU - TAU**2 / (TAU**2 + t**2) ** 0.5)  # the denoiser
    for name in ("one", "two"):
        assert float(model.eval().sample(range(2000), name).std()) == pytest.approx(TAU, rel=0.15)


class AnalyticTeacher:
    """The flow of the Gaussian in closed form."""

    labels, exact = (), True

    def fields(self, label):
        return AnalyticFields(GaussianMixture([[0.0, 0.0]], sd=TAU), kernels.Constant())

    def step(self, x, t, r, label):
        return x * ((TAU**2 + r.square()) / (TAU**2 + t.square())).sqrt()[:, None]


def test_both_sides_share_noise_and_dropout():
    model = excited(small(network={"dropout": 0.5})).train()
    seen = []
    function = model.function
    model.function = lambda x, sigma, label: seen.append((x, sigma, function(x, sigma, label))) or seen[-1][2]
    torch.manual_seed(3)
    x = torch.randn(64, 2)
    model.losses(x)
    (x_r, r, target), (x_t, t, out) = seen
    noise = (x_t - x) / t[:, None]
    torch.testing.assert_close(x_r, x + r[:, None] * noise, rtol=1e-3, atol=1e-3)
    assert torch.equal(target[r == 0], x[r == 0]) and not target.requires_grad and out.requires_grad
    torch.manual_seed(3)
    seen.clear()
    model.gaps = lambda t, progress: torch.ones_like(t)  # r = t: the two sides are one if their masks are
    model.losses(x)
    assert torch.equal(seen[0][2], seen[1][2].detach())


def test_coupling_costs_its_divergence_and_learns():
    model = small(coupling=MLP((2,), width=16, depth=1))
    losses = model.losses(torch.randn(32, 2))
    assert torch.equal(losses.scalar, torch.zeros(32))  # N(0, I) to begin with
    excited(model.coupling)
    n, kl = model.noised(torch.ones(50_000, 2), torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(n.mean(0), n.std(0))
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert float(kl[0]) == pytest.approx(float(exact), rel=0.05)
    model.losses(torch.randn(32, 2)).total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_energy_widens_what_a_regression_draws_to_its_mean():
    """Of a function that halves its samples, the energy distance asks for more, and at the data's width for nothing."""
    model = distilled(energy=2.0)
    x = TAU * torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    for scale, sign in ((0.5, -1), (2.0, 1)):
        factor = torch.tensor(scale, requires_grad=True)
        model.function = lambda x, sigma, label, factor=factor: factor * TAU * x / 10.0
        (slope,) = torch.autograd.grad(model.matching(x, None, torch.Generator().manual_seed(1)), factor)
        assert sign * slope > 0.1
    model.function = lambda x, sigma, label: TAU * x / 10.0
    assert abs(model.matching(x, None, torch.Generator().manual_seed(1))) < 0.02
    assert distilled(energy=0.0).matching(x, None, None) == 0
    joined = distilled(energy=1.0, network=MLP((2,), 2, conditional=True, width=8, depth=1))
    joined.num_classes, joined.function = 2, lambda x, sigma, label: TAU * x / 10.0 + 2.0 * label[:, None]
    label = torch.arange(4000) % 2
    assert abs(joined.matching(x + 2.0 * label[:, None], label, None)) < 0.05
    assert joined.matching(x + 2.0 * (1 - label)[:, None], label, None) > 0.2  # the same samples, of other classes


def distilled(**options):
    torch.manual_seed(0)
    samplers = {"one": ConsistencySteps(sigma_max=10.0), "two": ConsistencySteps(sigma_max=10.0, between=(1.0,))}
    flow = MultistepDynamics(levels=12, order=3, corrector=True, relaxation=0.0, sigma_min=0.05)
    options = {
        "network": MLP((2,), width=64, depth=1),
        "teacher": "a checkpoint",
        "flow": flow,
        "chains": 500,
    } | options
    return DistilledModel(shape=(2,), num_classes=0, sigma_data=TAU, samplers=samplers, **options)


def test_the_ends_of_a_teachers_chains_are_learned():
    model = distilled(first=0.4, energy=0.5)
    model.frozen = (AnalyticTeacher(),)
    optimizer, steps = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3), 300
    for k in range(steps):
        model.place = k // 50
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - k / steps)
        loss = model.losses(torch.zeros(200, 2)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    for t in (0.5, 10.0):
        point = (TAU**2 + t**2) ** 0.5 * x
        with torch.no_grad():
            ratio = float((model.function(point, torch.full((2000,), t)) * x).sum() / x.square().sum())
        assert ratio == pytest.approx(TAU, rel=0.08)
    for name in ("one", "two"):
        assert float(model.eval().sample(range(2000), name).std()) == pytest.approx(TAU, rel=0.08)


def test_chains_are_the_same_again_and_others_later():
    model = distilled()
    model.frozen = (AnalyticTeacher(),)
    first, again, later = (model.chains(place, 20) for place in (0, 0, 1))
    assert torch.equal(first.states, again.states) and not torch.equal(first.states, later.states)
    assert first.states.shape == (12, 20, 2) and first.levels[0] == 10.0
    moved = AnalyticTeacher().step(first.states[0], torch.full((20,), 10.0), torch.zeros(20), None)
    torch.testing.assert_close(first.ends, moved, atol=0.02, rtol=0.02)
    for wrong, sentence in [
        ({"teacher": None}, "learns from another one alone: give teacher"),
        ({"flow": MultistepDynamics(relaxation=0.5)}, "flow.relaxation must be 0"),
        ({"coupling": MLP((2,), width=8, depth=1)}, "coupling learns the noise of data"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            distilled(**wrong)


def test_one_teacher_step_follows_the_flow():
    from bd_lightning.teachers import Teacher

    target = GaussianMixture([[0.0, 0.0]], sd=TAU)

    class Model:
        takes_labels, samplers = False, {"ode": MultistepDynamics(exact_score=True)}

        def asked(self, label):
            return AnalyticFields(target, kernels.ClosedFormSlices(0.01))

    x, t = torch.randn(30, 2), torch.full((30,), 0.5)
    moved = Teacher(Model()).step(x, t, 0.98 * t)
    exact = AnalyticTeacher().step(x, t, 0.98 * t, None)
    assert (moved - exact).abs().max() < 0.05 * (x - exact).abs().max()
    at_once = Teacher(Model()).step(x, t, 0 * t)
    torch.testing.assert_close(at_once, x * TAU**2 / (TAU**2 + 0.25), rtol=1e-3, atol=1e-3)


def test_sampler_levels_and_calls():
    sampler = ConsistencySteps(sigma_max=10.0, between=(2.0, 0.5))
    seen = []
    x = sampler(
        AnalyticFields(GaussianMixture([[0.3, 0.3]], sd=TAU), kernels.Constant()),
        SampleNoise(range(7), (2,)),
        watch=lambda step, x: seen.append(step),
    )
    assert sampler.calls == 3 and seen == [0, 1, 2, 3] and x.shape == (7, 2)
    for wrong in ((11.0,), (1.0, 2.0)):
        with pytest.raises(ValueError, match="between must fall, from below sigma_max 10"):
            ConsistencySteps(sigma_max=10.0, between=wrong)


# ---- from the command line

SHORT = ["trainer=cpu", "logger=none", "callbacks.metrics.n=60", "callbacks.metrics.n_test=60", "data.batch_size=64"]
SHORT += ["callbacks.metrics.features.steps=20", "callbacks.trajectory=null", "callbacks.memorisation=null"]
SHORT += ["callbacks.progress=null", "callbacks.grid.n=4", "model.network.width=32", "model.network.depth=1"]


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("consistency")


def fit(root, name, *words, code=0):
    command = [*words, *SHORT, f"run_id={name}", f"root={root / 'runs'}", f"data.root={root / 'data'}"]
    assert train.main(command) == code
    return root / "runs" / "bellman-diffusion" / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def teacher(root) -> Path:
    return fit(root, "teacher", "model=mlp", "steps=20", "eval_every=20")


@pytest.fixture(scope="session")
def relative(root) -> Path:
    return fit(root, "relative", "model=relative", "steps=4", "eval_every=4")


@pytest.fixture(scope="session")
def tuned(root, teacher) -> Path:
    return fit(root, "tuned", "model=consistency", f"model.init={teacher}", "steps=4", "eval_every=2")


def test_tuning_begins_with_the_weights_of_its_checkpoint(root, teacher, tuned):
    still = fit(
        root, "still", "model=consistency", f"model.init={teacher}", "steps=1", "eval_every=1", "model.lr=1e-12"
    )
    old, _ = checkpoints.load(teacher)
    new, _ = checkpoints.load(still)
    for (name, a), b in zip(old.fields.network.named_parameters(), new.fields.network.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=name)
    moved, _ = checkpoints.load(tuned)
    assert not torch.equal(next(moved.parameters()), next(new.parameters()))
    rows = json.loads((tuned.parents[1] / "fid.json").read_text())
    assert [row["step"] for row in rows] == [2, 4] and "(two, 2 network calls, seed 1)" in rows[-1]["protocol"]


def test_a_tuned_model_resumes_and_draws_without_what_it_came_from(root, teacher, tuned, tmp_path):
    copy = tmp_path / "init.ckpt"
    copy.write_bytes(teacher.read_bytes())
    whole = fit(root, "whole", "model=consistency", f"model.init={copy}", "steps=4", "eval_every=2")
    copy.unlink()
    words = ["model=consistency", f"model.init={teacher}", "eval_every=2", "model.lr_decay=none", "model.gaps.stages=1"]
    half = fit(root, "half", *words, "steps=2")
    assert train.main([f"ckpt_path={half}", "steps=4"]) == 0
    straight = fit(root, "straight", *words, "steps=4")
    states = [torch.load(one, weights_only=True)["state_dict"] for one in (half, straight)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert not any("teacher" in name for name in states[0])
    for sampler in ("one", "two"):
        assert train.main(["predict", f"ckpt_path={whole}", f"model.sampler={sampler}", "n=5"]) == 0


def test_mixtures_that_were_never_trained_on_are_distilled(root, relative):
    words = ["model=consistency", f"model.teacher={relative}", "steps=2", "eval_every=2"]
    student = fit(root, "mixture", *words, "model.mix={3: 0.7, 8: 0.3}", "model.calibrate=20")
    fit(root, "removed", *words, "model.remove=[7]", f"model.merge={{{relative}: 1.0}}")
    assert train.main(["predict", f"ckpt_path={student}", "n=5"]) == 0
    classes = ["model.network.conditional=true", "model.labels=[3, 8]", "model.guidance=2"]
    fit(root, "guided", *words, *classes)


def test_a_distilled_model_resumes_and_draws_without_its_teacher(root, relative, tmp_path):
    copy = tmp_path / "teacher.ckpt"
    copy.write_bytes(relative.read_bytes())
    words = ["model=distilled", f"model.teacher={copy}", "model.mix={3: 0.7, 8: 0.3}", "model.energy=1", "eval_every=2"]
    words += ["model.chains=30", "model.every=3", "model.flow.levels=3", "model.lr_decay=none"]
    half = fit(root, "distilled-half", *words, "steps=2")
    assert train.main([f"ckpt_path={half}", "steps=4"]) == 0
    straight = fit(root, "distilled", *words, "steps=4")
    states = [torch.load(one, weights_only=True)["state_dict"] for one in (half, straight)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    copy.unlink()
    assert train.main(["predict", f"ckpt_path={straight}", "n=5"]) == 0
    assert train.main(["test", f"ckpt_path={straight}"]) == 0


def test_the_weights_of_a_mixture_are_corrected_before_it_is_learned(relative, monkeypatch):
    from bd_lightning import combinations, teachers

    student = small()
    model, stored = checkpoints.load(relative)
    student.shape, student.fields.sigma_data = model.shape, model.fields.sigma_data
    student.sigma_max = 1.0
    asked = {"mix": {3: 0.7, 8: 0.3}}
    as_it_is = teachers.load(student, str(relative), **asked).mixture.terms[0][1]
    corrected = teachers.load(student, str(relative), **asked, calibrate=50).mixture.terms[0][1]
    assert (corrected[[3, 8]] / as_it_is[[3, 8]] - 1).abs().max() > 0.01 and corrected.count_nonzero() == 2
    drawn = []
    monkeypatch.setattr(combinations.fields, "calibrated", lambda mixture, draw: drawn.append(draw(mixture)) or mixture)
    teachers.load(student, str(relative), **asked, calibrate=7)
    assert [len(x) for x in drawn] == [7]


def test_tuning_on_two_processes(root, teacher):
    """The frozen scalar head and the teacher, which is no part of the module, keep nobody waiting."""
    command = [
        sys.executable,
        "train.py",
        "model=consistency",
        f"model.init={teacher}",
        f"model.teacher={teacher}",
        *SHORT,
    ]
    command += ["trainer=ddp_cpu", "steps=2", "eval_every=2", "run_id=two", f"root={root / 'runs'}"]
    command += [f"data.root={root / 'data'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((root / "runs" / "bellman-diffusion" / "two" / "fid.json").read_text())
    assert row["step"] == 2 and row["val/fid"] > 0


def test_mistakes(root, teacher, relative, tuned, capsys):
    def refused(*words):
        fit(root, "refused", "model=consistency", "steps=2", "eval_every=2", *words, code=2)
        assert not (root / "runs" / "bellman-diffusion" / "refused").exists()
        return capsys.readouterr().err

    message = refused(f"model.init={teacher}", "model.network.fourier=[1.0]")
    assert "is another one: set model.network as it is there (" in message
    assert " has the shape [" in message and "size mismatch" not in message and "state_dict" not in message
    assert "checkpoint not found: nowhere.ckpt" in refused("model.init=nowhere.ckpt")
    assert "is sampled from noise level 20 down, the samplers here begin at 80" in refused(
        f"model.init={teacher}", "model.samplers.one.sigma_max=80.0"
    )
    words = ["model=consistency", f"model.init={teacher}", "data=wine", "callbacks=points", "steps=2", "eval_every=2"]
    assert train.main([*words, "logger=none", f"root={root / 'runs'}"]) == 2
    assert "its shape of a sample is [1, 8, 8], here it is [13]" in capsys.readouterr().err
    assert "labels need a class-conditional model" in refused(
        f"model.teacher={teacher}", "model.network.conditional=true", "model.labels=[3]"
    )
    assert "train with model=relative" in refused(f"model.teacher={teacher}", "model.mix={3: 1.0}")
    assert "is a consistency model, no score to learn from" in refused(f"model.teacher={tuned}")
    assert "guidance needs a teacher with classes" in refused(f"model.teacher={teacher}", "model.guidance=2")
    assert "mix says what a teacher's flow is made of" in refused("model.mix={3: 1.0}")
    assert "calibrate corrects the weights of a mixture" in refused(f"model.teacher={relative}", "model.calibrate=9")
    told = ["model.network.conditional=true", "model.mix={3: 1.0}"]
    assert "a mixture has no classes to be told" in refused(f"model.teacher={relative}", *told)
    assert "knows no classes" in refused(f"model.teacher={teacher}", "model.network.conditional=true")
    assert "no class 'cat'" in refused(f"model.teacher={relative}", "model.mix={cat: 1.0}")
    for word in ("model.sampler=ode", "model.samplers.sde={_target_: bd_lightning.dynamics.MultistepDynamics}"):
        message = refused(word)
        assert "is no score that" in message and "take one or two" in message
    assert train.main(["predict", f"ckpt_path={tuned}", "model.sampler=sde"]) == 2
    assert "is no score that 'sde' could follow" in capsys.readouterr().err


def test_metrics_against_calls(root, teacher, tuned, capsys):
    folder = teacher.parents[1]
    words = ["calls=[8, 3]", "model.samplers.sde.order=3", "model.samplers.sde.corrector=true"]
    assert train.main(["test", f"ckpt_path={teacher}", *words]) == 0
    (folder,) = folder.glob("test-*")
    rows = json.loads((folder / "calls.json").read_text())
    assert [(row["sampler"], row["calls"]) for row in rows] == [("sde", 3), ("sde", 8), ("ode", 3), ("ode", 7)]
    assert all(row["fid"] > 0 and 0 <= row["recall"] <= 1 for row in rows)
    assert "(ode@7, 7 network calls, seed 1)" in rows[-1]["protocol"]
    assert "| sampler | calls | fid | kid | precision | recall |" in (folder / "calls.md").read_text()
    assert (folder / "figures" / "calls-0000020.png").is_file()
    assert train.main(["test", f"ckpt_path={tuned}", "calls=5", "logger=wandb"]) == 0
    (folder,) = tuned.parents[1].glob("test-*")
    rows = json.loads((folder / "calls.json").read_text())
    assert [(row["sampler"], row["calls"]) for row in rows] == [("one", 1), ("two", 2)]
    (path,) = tuned.parents[1].glob("wandb/offline-run-*/run-*.wandb")
    assert any("calls/fid" in key for row in read_records(path).history for key in row)
    capsys.readouterr()
    for words, sentence in [
        (
            ["test", f"ckpt_path={teacher}", "calls=[0]"],
            "'calls' are numbers of network calls, from 1 to 10,000, got [0]",
        ),
        (["test", f"ckpt_path={teacher}", "calls=[5]", "callbacks.metrics=null"], "calls needs callbacks.metrics"),
        (["validate", f"ckpt_path={teacher}", "calls=[5]"], "'calls' is for train.py test"),
        (["predict", f"ckpt_path={teacher}", "calls=[5]"], "'calls' is for train.py test"),
        (["test", f"ckpt_path={teacher}", "calls=[100000000000]"], "from 1 to 10,000"),
    ]:
        assert train.main(words) == 2
        assert sentence in capsys.readouterr().err


def test_benchmark_of_calls(root, teacher, tuned, monkeypatch, capsys):
    from benchmarks import few_steps

    words = [str(teacher), str(tuned), "--n", "40", "--calls", "4", "2", "--rules", "Heun", "order 3+"]
    words += ["--out", str(root / "few"), "--asked", "{3: 0.7, 8: 0.3}", "--time"]
    monkeypatch.setattr("sys.argv", ["few_steps.py", *words])
    few_steps.main()
    printed = capsys.readouterr().out
    assert "| rule | 1 | 2 | 3 | 4 |" in printed or "| rule | 1 | 2 |" in printed
    assert printed.count("| L1 |") == 2 and "| time of a step |" in printed
    kept = (root / "few" / "rows.jsonl").read_text()
    few_steps.main()
    assert (root / "few" / "rows.jsonl").read_text() == kept
