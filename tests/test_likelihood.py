"""train.py test … likelihood=ode|fields."""

import csv
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import train
from bd_lightning.fields import AnalyticFields
from bd_lightning.kernels import Constant
from bd_lightning.modules import ConsistencyModel
from callbacks import FieldLikelihood, FlowLikelihood
from callbacks.likelihood import together
from datamodules import Digits, Synthetic
from oracles import square
from small_run import WORDS, launch, refused
from tiny_data import write_autoencoder

QUICK = ["callbacks.diagnostics=null", "callbacks.report=null"]
SINGLE = ["model.noise=null", "model.parametrisation=direct", "model.objective.trace=hutchinson", "model.sampler=one"]
SINGLE += ["model.samplers={'ode': null, 'one': {_target_: bd_lightning.dynamics.BellmanDynamics}}"]
FLOW = ["callbacks.likelihood._target_=callbacks.FlowLikelihood", "callbacks.likelihood.steps=4"]


def command(name, run, *words):
    return train.main([name, f"ckpt_path={run}/checkpoints/last.ckpt", *words])


def record(run, name):
    (path,) = run.glob(f"test-*/{name}.json")
    return json.loads(path.read_text())[-1]


def test_bits_per_dimension_of_images(run, capsys):
    assert command("test", run, "callbacks.likelihood.n=20", *FLOW) == 0
    row = record(run, "likelihood")
    d = 64
    assert row["test/bits_per_dim"] == pytest.approx(
        (row["test/nats"] / d - math.log(1 / 127.5)) / math.log(2), abs=1e-4
    )
    assert 2 < row["test/bits_per_dim"] < 12 and 0 < row["test/bits_per_dim_se"] < 1
    said = capsys.readouterr().out
    assert row["summary"] in said and "bits per dimension: 20 samples of the test split" in said
    for word in ("dequantised", "Hutchinson's trace of 1 probe,", "seed 1"):
        assert word in row["protocol"]
    chosen = re.search(
        r"to ([\d.]+) \(of 4 levels up to 20 the best for 148 samples of the val split\), (\d) steps \((\d+) network",
        row["protocol"],
    )
    level, steps, calls = (float(number) for number in chosen.groups())
    assert level == pytest.approx(0.02 * 1000 ** (steps / 4), rel=0.01) and calls == 4 * steps
    (logged,) = run.glob("test-*/metrics.csv")
    (row,) = [row for row in csv.DictReader(logged.open()) if row["test/bits_per_dim_se"]]
    assert row["step"] == "4"  # the checkpoint's


class Unreliable(AnalyticFields):
    """Those of a density, with slopes above noise level 3 that a network never learned."""

    def __call__(self, x, sigma):
        s, g = super().__call__(x, sigma)
        far = (sigma[:, None] > 3) * s[:, None] / sigma[:, None]
        return s, g + 0.1 * far * torch.sin(3 * x / sigma[:, None])


def test_the_flow_ends_where_fields_are_still_right():
    """With errors at high noise the likelihood is that of the level before; with none they may all be taken."""
    data = Synthetic(square(), size=500, held_out=300)
    trainer = SimpleNamespace(datamodule=data, world_size=1, global_rank=0, received_sigterm=False)
    truth = float(data.density.log_density(data.split("test").x.double(), 0.02).mean())
    off = {}
    for kind in (AnalyticFields, Unreliable):
        module = SimpleNamespace(
            device=torch.device("cpu"), fields=kind(data.density, Constant(), 1.0), conditional=False
        )
        for choosing in (0, 100):
            logs, steps = FlowLikelihood(n=300, choosing=choosing).draw(trainer, module, "test", "ode")
            off[kind, choosing] = abs(float(logs.mean()) - truth)
            assert choosing or steps == 20
    assert off[Unreliable, 0] > 0.3 and off[Unreliable, 100] < 0.05
    assert max(off[AnalyticFields, choosing] for choosing in (0, 100)) < 0.05


def test_a_likelihood_judges_no_samples(run, capsys):
    words = ["callbacks.metrics=null", "callbacks.memorisation=null", "callbacks.best=null", "calls=[4]"]
    assert command("test", run, "callbacks.likelihood.n=5", *FLOW, *words) == 2
    assert "calls needs callbacks.metrics, which judges samples" in capsys.readouterr().err


def test_a_likelihood_chooses_no_checkpoint(tmp_path, capsys):
    """It is measured at tests alone."""
    best = "callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/nats}"
    said = refused(tmp_path / "root", capsys, "run_id=x", best, *FLOW)
    assert "nothing measures val/nats, to choose the best checkpoint by: there is" in said


def test_a_conditional_model_is_told_the_class(tmp_path, capsys):
    words = ["model.network.conditional=true", "model.label_dropout=0.1", "run_id=told", *QUICK]
    assert launch(tmp_path, *words) == 0
    folder = tmp_path / "bellman-diffusion" / "told"
    assert command("test", folder, "callbacks.likelihood.n=5", *FLOW) == 0
    assert "given the class" in record(folder, "likelihood")["protocol"]
    capsys.readouterr()
    assert command("test", folder, "model.guidance=3", *FLOW) == 2
    assert "likelihood is that of the model's own density, which guidance changes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A short run on four Gaussians, with their classes as one."""
    root = tmp_path_factory.mktemp("mixture")
    words = [
        "data=gaussians_2d",
        "data.size=2000",
        "data.held_out=200",
        "model=relative",
        "callbacks=points",
        "model.sampler=ode",
    ]
    words += ["model.network.per_class=false", "callbacks.figures=null", "run_id=one", *QUICK]
    assert launch(root, *words) == 0
    return root / "bellman-diffusion" / "one"


@pytest.mark.parametrize("key", ["ode", "fields"])
def test_both_are_asked_for_by_one_word(mixture, key, monkeypatch):
    monkeypatch.setattr("bd_lightning.cli.fit.FlowLikelihood", lambda: FlowLikelihood(20, 4))
    monkeypatch.setattr("bd_lightning.cli.fit.FieldLikelihood", lambda: FieldLikelihood(40, compared=20, steps=4))
    assert command("test", mixture, f"likelihood={key}") == 0
    if key == "ode":
        row = record(mixture, "likelihood")
        assert set(row) == {"step", "drawn", "test/nats", "test/nats_se", "protocol", "summary"}
        assert row["drawn"] is None and "exact trace" in row["protocol"]
    else:
        row = record(mixture, "densities")
        assert row["test/speed_ratio"] > 1 and -1 <= row["test/spearman"] <= 1
        assert "test/class_accuracy" not in row and not any("auroc" in name for name in row)
        assert row["test/nats_flow"] == pytest.approx(row["test/nats_compared"], abs=1.5)
        assert abs(row["test/nats_flow"] - row["test/nats"]) < 2 * row["test/nats_off"] + 1.5
        assert "noised at 0.1" in row["protocol"] and 0 <= row["test/spearman_se"] < 1


def test_classes_and_strangers_are_told_by_one_call(tmp_path, capsys):
    """In codes: the posterior of the classes, inverted images and other data."""
    ae = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), Digits(root=str(tmp_path / "data")).name)
    data = [
        "data=digits_latent",
        f"data.autoencoder.ckpt_path={ae}",
        "model=relative",
        "model.sampler=ode",
        "run_id=one",
        *QUICK,
    ]
    assert launch(tmp_path / "root", *data) == 0
    run = tmp_path / "root" / "bellman-diffusion" / "one"
    words = ["callbacks.likelihood._target_=callbacks.FieldLikelihood"]
    words += ["callbacks.likelihood.n=60", "callbacks.likelihood.compared=10", "callbacks.likelihood.steps=2"]
    words += ["callbacks.likelihood.others.again={_target_: datamodules.Digits}"]
    assert command("test", run, *words) == 0
    row = record(run, "densities")
    assert row["test/auroc_again"] == 0.5 and 0 <= row["test/auroc_inverted_flow"] <= 1
    assert 0 <= row["test/class_accuracy"] <= 1
    assert "60 of inverted, 60 of again" in row["protocol"]
    other = "callbacks.likelihood.others.again={_target_: datamodules.Synthetic, density: {_target_: "
    other += "bd_lightning.targets.GaussianMixture, means: [[0.0]]}}"
    assert command("test", run, *words[:-1], other) == 2
    assert "others.again has samples of shape (1,), " in capsys.readouterr().err
    assert command("test", run, *words[:-1], words[-1].replace(".again=", ".test=")) == 2
    assert "others.test: 'test' and 'inverted' are the data's own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["likelihood=both"], "'likelihood' is ode, by the probability flow, or fields, in one call; got 'both'"),
        (["likelihood=fields"], "likelihood=fields reads densities off fields relative to a base Gaussian"),
    ],
)
def test_what_has_no_density_is_refused(run, capsys, words, sentence):
    assert command("test", run, *words) == 2
    assert sentence in capsys.readouterr().err


def test_sigterm_ends_it():
    asked, done = SimpleNamespace(world_size=1, global_rank=0, received_sigterm=False), []

    def one(rows):
        asked.received_sigterm = done.append(rows) is None
        return rows

    with pytest.raises(SIGTERMException):
        together(asked, None, 6, 2, "rows", one)
    assert len(done) == 1


def test_a_single_scale_has_no_flow(tmp_path, capsys):
    assert launch(tmp_path / "root", "run_id=single", *SINGLE) == 0
    capsys.readouterr()
    assert command("test", tmp_path / "root" / "bellman-diffusion" / "single", "likelihood=ode") == 2
    assert "this model was trained with noise=null" in capsys.readouterr().err


def test_two_of_them_would_log_under_one_name(mixture, capsys):
    words = ["likelihood=fields", "callbacks.likelihood._target_=callbacks.FlowLikelihood"]
    assert command("test", mixture, *words) == 2
    assert "leave likelihood= or that callback out" in capsys.readouterr().err


def test_other_commands_and_models_are_refused(run, tmp_path, capsys):
    for name in ("predict", "validate"):
        assert command(name, run, "likelihood=ode") == 2
        assert "'likelihood' is for train.py test" in capsys.readouterr().err
    ae = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), Digits(root=str(tmp_path)).name)
    from bd_lightning.checkpoints import load
    from bd_lightning.modules import Autoencoder

    with pytest.raises(Exception, match="Autoencoder is none"):
        load(str(ae), Autoencoder)[0].check_likelihood()
    assert not ConsistencyModel.has_score
    with pytest.raises(Exception, match="ConsistencyModel has none"):
        ConsistencyModel.check_likelihood(ConsistencyModel.__new__(ConsistencyModel))


def test_numbers_do_not_depend_on_the_batch():
    from bd_lightning.kernels import Constant

    class Still(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            from bd_lightning.fields import LearnedFields
            from bd_lightning.networks import MLP

            network = MLP((1, 5, 5), width=8, depth=1)
            torch.nn.init.normal_(network.gradient_head.weight)
            self.fields = LearnedFields(network, Constant(), 1.0, 25)

    module, x, index = Still(), torch.randn(6, 1, 5, 5), torch.arange(6)
    flow = FlowLikelihood(steps=2)
    whole = flow.densities(module, x, index, 0.1)
    parts = [flow.densities(module, x[rows], index[rows], 0.1) for rows in index.split(4)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_a_network_of_diffusers_from_the_command_line(tmp_path):
    pytest.importorskip("diffusers")
    unet = "{sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [8, 16], norm_num_groups: 4, "
    unet += "down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}"
    module = f"{{_target_: bd_lightning.networks.DiffusersModel, name: UNet2DModel, options: {unet}}}"
    network = f"model.network={{_target_: bd_lightning.networks.Adapted, noise_scale: 100, module: {module}}}"
    words = [word for word in WORDS if not word.startswith(("model.network", "model="))]
    assert train.main([*words, network, "data.batch_size=16", f"root={tmp_path}", "run_id=one", *QUICK]) == 0
    assert command("predict", tmp_path / "bellman-diffusion" / "one", "n=2") == 0


def test_bytes_are_spread_over_their_cells(monkeypatch):
    """Evenly; what is no bytes stays where it is."""
    seen = []
    monkeypatch.setattr(
        "callbacks.likelihood.flow_log_densities", lambda fields, x, *rest: seen.append(x) or x.flatten(1)
    )
    fields = SimpleNamespace(conditioned=lambda told: SimpleNamespace(), sigma_data=1.0)
    module = SimpleNamespace(device=torch.device("cpu"), fields=fields)
    x = torch.randn(50, 1, 8, 8)
    for cell in (0.5, None):
        FlowLikelihood().densities(module, x, torch.arange(50), cell)
    moved = (seen[0] - x) / 0.5
    assert moved.abs().max() <= 0.5 and moved.std() == pytest.approx(12**-0.5, rel=0.05)
    assert abs(float(moved.mean())) < 0.02 and torch.equal(seen[1], x)
