"""Callbacks inside short real trainings."""

import csv
import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import Precision
from PIL import Image

from bd_lightning.checks import UserError
from bd_lightning.dynamics import AnnealedDynamics, BellmanDynamics, ProbabilityFlow
from bd_lightning.kernels import ClosedFormSlices
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP
from callbacks import (
    AveragedWeights,
    ClassifierFeatures,
    FieldDiagnostics,
    ImageMetrics,
    LastCheckpoint,
    NonFiniteLoss,
    SampleGrid,
    Trajectory,
)
from callbacks.drawing import draw, draw_together
from callbacks.evaluation import Evaluation, Findings, Metric, shown
from callbacks.records import append_record
from counted import Counted
from datamodules import Digits


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def build(**options):
    torch.manual_seed(0)
    samplers = {"sde": AnnealedDynamics(levels=6), "ode": ProbabilityFlow(steps=4)}
    return BellmanDiffusion(
        MLP((1, 8, 8), num_classes=10, width=32, depth=1, **options), ClosedFormSlices(), (1, 8, 8), 10, 0.75, samplers
    )


class Losses(L.Callback):
    """Keeps what a test wants to compare."""

    def __init__(self):
        self.losses, self.evaluated, self.trained = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.evaluated.append(pl_module.fields.network.enter.weight.clone())

    def on_validation_end(self, trainer, pl_module):
        self.trained.append(pl_module.fields.network.enter.weight.clone())


def fit(tmp_path, cache, callbacks, steps=12, module=None, **options):
    torch.manual_seed(3)
    module = module or build()
    record = Losses()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=steps // 2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=4,
        default_root_dir=str(tmp_path), callbacks=[record, *callbacks],
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(root=cache, batch_size=64))
    return trainer, record


def metrics(**options):
    return ImageMetrics(ClassifierFeatures(steps=60), **{"n": 80, "kid_subset": 40, **options})


def test_callbacks_leave_the_training_randomness_alone(tmp_path, cache):
    _, plain = fit(tmp_path / "a", cache, [])
    _, watched = fit(tmp_path / "b", cache, [metrics(), SampleGrid(n=4), Trajectory(n=4, frames=3), FieldDiagnostics()])
    assert plain.losses == watched.losses and len(plain.losses) == 12


def test_evaluation_sees_averaged_weights(tmp_path, cache):
    frozen = AveragedWeights(decay=1.0)  # the average stays at the weights of the first step
    _, record = fit(tmp_path, cache, [frozen])
    assert torch.equal(record.evaluated[0], record.evaluated[1])
    assert not torch.equal(record.trained[0], record.trained[1])
    assert not torch.equal(record.evaluated[1], record.trained[1])


def test_exception_during_validation_saves_weights_in_their_places(tmp_path, cache):
    class Fails(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise KeyError("evaluation failed")

    callbacks = [Fails(), AveragedWeights(decay=1.0), LastCheckpoint(str(tmp_path))]
    with pytest.raises(KeyError, match="evaluation failed"):
        fit(tmp_path, cache, callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    name = "fields.network.enter.weight"
    start = build().fields.network.enter.weight
    average, current = saved["state_dict"][name], saved["current_model_state"][name]
    assert (average - start).norm() < (current - start).norm()  # decay 1: the average is the first step's


def test_until_averaging_begins_the_weights_are_judged_as_they_are(tmp_path, cache):
    _, record = fit(tmp_path, cache, [AveragedWeights(update_starting_at_step=100)])
    assert torch.equal(record.evaluated[1], record.trained[1])
    for options in ({"update_every_n_steps": 0}, {"update_starting_at_step": -1}, {"decay": 1.5}):
        with pytest.raises(ValueError, match="must lie between"):
            AveragedWeights(**options)


def test_averages_live_where_the_model_trains_and_take_one_call(tmp_path):
    """Lightning moves the model after `setup`, in which the averages are made."""
    module, average = build(), AveragedWeights(decay=0.9)
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    trainer = SimpleNamespace(strategy=strategy, global_step=0, optimizers=[None])
    average.setup(trainer, module, "fit")
    module.to("meta")
    made = average._average_model
    assert {p.device.type for p in made.module.parameters()} == {"meta"} and made.n_averaged.device.type == "cpu"
    for step in (1, 2, 3):
        trainer.global_step = step
        with Counted() as calls:  # reading a number of the device back would fail: meta has none
            average.on_train_batch_end(trainer, module, None, None, step)
    updates = [name for name in calls.names if "lerp" in name or "copy" in name]
    assert updates == ["aten._foreach_lerp_.Scalar", "aten._foreach_copy_.default"] and int(made.n_averaged) == 3


def test_averages_are_what_they_were(tmp_path, cache):
    average = AveragedWeights(decay=0.7)
    kept = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(pl_module.fields.network.enter.weight.detach().clone())

    trainer, _ = fit(tmp_path, cache, [Watch(), average], steps=6)
    expected = kept[0]
    for weight in kept[1:]:
        expected = 0.7 * expected + 0.3 * weight
    torch.testing.assert_close(trainer.lightning_module.fields.network.enter.weight.detach(), expected)


def test_samples_are_judged_in_the_precision_that_they_are_written_in(tmp_path):
    module = build().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    trainer = L.Trainer(accelerator="cpu", devices=1, precision="bf16-mixed", logger=False, default_root_dir=tmp_path)
    trainer.datamodule = Digits(root=str(tmp_path))
    with trainer.precision_plugin.predict_step_context():  # as in `predict`
        written = module.sample(range(6), "ode", 0)
    judged = draw_together(trainer, module, 6, 6, 0, "ode")
    assert torch.equal(judged, written)
    assert (module.sample(range(6), "ode", 0) - written).abs().max() > 1e-4


def test_last_is_saved_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("callbacks.checkpoints.time.monotonic", lambda: now[0])
    last = LastCheckpoint(str(tmp_path), minutes=2.0)

    def after(step, accumulating=False):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: accumulating))
        return SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda x: x), global_step=step, fit_loop=loop)

    due = []
    for step in range(1, 701):
        now[0] += 1.0
        assert not last._due(after(step, accumulating=True))  # gradients would be lost
        if last._due(after(step)):
            due.append(step)
            last.saved = now[0]
    assert due == [150, 300, 450, 600]  # at looks, every 50 steps, two minutes and more apart
    steps = LastCheckpoint(str(tmp_path), every=4)
    assert [s for s in range(1, 10) if steps._due(after(s))] == [4, 8]
    assert not LastCheckpoint(str(tmp_path), every=0)._due(after(250))


def test_pictures_are_written(tmp_path, cache):
    fit(tmp_path, cache, [SampleGrid(n=9), Trajectory(n=4, frames=5, seconds=1.0)])
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    grids = [f"{sampler}-{step:07d}.png" for sampler in ("ode", "sde") for step in (6, 12)]
    assert names == [*grids, "trajectory-sde.gif"]
    with Image.open(tmp_path / "samples" / grids[0]) as grid:
        assert grid.size == (8 * 66 + 2, 2 * 66 + 2)  # eight 8×8 images a row, enlarged eightfold
    with Image.open(tmp_path / "samples" / names[-1]) as animation:
        assert 2 <= animation.n_frames <= 5  # equal frames are merged


def test_fid_is_recorded_with_its_protocol_and_does_not_depend_on_the_batch(tmp_path, cache):
    values = []
    for name, batch_size in (("a", 80), ("b", 23)):
        trainer, _ = fit(tmp_path / name, cache, [metrics(batch_size=batch_size)])
        rows = json.loads((tmp_path / name / "fid.json").read_text())
        assert [row["step"] for row in rows] == [6, 12]
        assert rows[-1]["val/fid"] == pytest.approx(float(trainer.callback_metrics["val/fid"]))
        values.append((rows[-1]["val/fid"], rows[-1]["val/kid"]))
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    row = rows[-1]
    assert 0 < row["floor"] < row["noise"] / 5 and row["floor"] < row["val/fid"]
    for word in ("80 samples (ode, 7 network calls, seed 1)", "1500 train images of Digits", "accuracy", "149 test"):
        assert word in row["protocol"]


def test_reference_statistics_are_cached(tmp_path, cache, monkeypatch):
    fit(tmp_path / "a", cache, [metrics()], steps=2)
    monkeypatch.setattr("callbacks.references.embed", lambda *args, **options: pytest.fail("computed again"))
    fit(tmp_path / "b", cache, [metrics()], steps=2)


def test_ranks_share_the_samples_of_one_process():
    class Rank:
        world_size, received_sigterm = 3, False
        precision_plugin = Precision()

        def __init__(self, rank):
            self.global_rank, self.datamodule = rank, Digits()

    module = build().eval()
    shares = [torch.cat(list(draw(Rank(rank), module, 8, 2, 0, "ode"))) for rank in range(3)]
    Rank.world_size = 1
    together = torch.cat(list(draw(Rank(0), module, 8, 8, 0, "ode")))
    assert [len(s) for s in shares] == [3, 3, 2]
    assert all(torch.equal(shares[i % 3][i // 3], together[i]) for i in range(8))


def test_conditional_modules_are_asked_for_every_class(tmp_path, cache):
    module, seen = build(conditional=True), []
    sample = module.sample
    module.sample = lambda indices, label=None, **options: (
        seen.append(label.tolist()) or sample(indices, label=label, **options)
    )
    fit(tmp_path, cache, [metrics(n=20, kid_subset=10, batch_size=20)], steps=2, module=module)
    assert seen[0] == [i % 10 for i in range(20)]


def logged(folder, cache, diagnostics, steps, every) -> list[dict[str, str]]:
    """Rows of metrics.csv of a run that diagnostics watch, logged at every so many steps."""
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, limit_val_batches=0, accelerator="cpu", log_every_n_steps=every,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder), callbacks=[diagnostics], logger=CSVLogger(str(folder), name="", version=""),
    )  # fmt: skip
    trainer.fit(build(), datamodule=Digits(root=cache, batch_size=64))
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_diagnostics(tmp_path, cache):
    class Watching(FieldDiagnostics):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    torch.manual_seed(3)
    seen: list[dict] = []
    rows = logged(tmp_path, cache, Watching(edges=(0.1, 1.0)), 8, 4)
    rows = [row for row in rows if row["field/s_near_zero"]]
    assert len(rows) == 2
    sigma = torch.cat([outputs["sigma"] for outputs in seen[:4]])
    for term in ("gradient", "scalar"):
        losses = torch.cat([outputs[term] for outputs in seen[:4]])
        for name, low, high in (("below-0.1", 0, 0.1), ("0.1-1", 0.1, 1), ("above-1", 1, torch.inf)):
            mean = losses[(sigma >= low) & (sigma < high)].mean()
            assert float(rows[0][f"field/{term}_loss_sigma_{name}"]) == pytest.approx(float(mean), rel=1e-4)
    assert float(rows[0]["field/s_near_zero"]) == 0 and float(rows[0]["train/samples_per_second"]) > 0
    assert float(rows[0]["train/gradient_norm"]) > 0


def test_samples_a_second_and_the_share_near_zero(tmp_path, monkeypatch):
    """By a clock that tells 2 s a step and 50 s for a validation between them, with batches of 10 on 3 devices."""
    now = iter([-9.0, 0.0, 2.0, 52.0, 54.0, 54.0])  # the first is that of the constructor, the last begins anew
    monkeypatch.setattr("callbacks.diagnostics.time", SimpleNamespace(perf_counter=lambda: next(now)))
    logged: list[dict[str, float]] = []
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values, **options: logged.append(values))
    trainer = SimpleNamespace(world_size=3, global_step=0, log_every_n_steps=2)
    diagnostics = FieldDiagnostics(near_zero=1e-2)
    diagnostics.on_train_start(trainer, module)
    ones = torch.ones(4)
    for step, relative in enumerate(([0.009, 0.011, 1.0, -0.5], [0.5, 0.6, 0.011, 1.0]), 1):
        trainer.global_step = step
        outputs = {"sigma": ones, "gradient": ones, "scalar": ones, "relative_s": torch.tensor(relative)}
        diagnostics.on_train_batch_end(trainer, module, outputs, [torch.zeros(10, 1)], 0)
        if step == 1:
            diagnostics.on_validation_end(trainer, module)
    (values,) = logged
    assert values["train/samples_per_second"] == pytest.approx(2 * 10 * 3 / 4)
    assert values["field/s_near_zero"] == pytest.approx(2 / 8)  # negative values are below, too


def test_a_bin_without_points_has_no_value_of_before(tmp_path, cache):
    class Sparse(FieldDiagnostics):
        def values(self):
            known = super().values()
            return {name: value for name, value in known.items() if "above" not in name or self.logged_step == 2}

    rows = logged(tmp_path, cache, Sparse(edges=(0.1, 1.0)), 4, 1)
    assert [bool(row["field/gradient_loss_sigma_above-1"]) for row in rows] == [False, True, False, False]
    assert all(row["field/gradient_loss_sigma_0.1-1"] for row in rows)


def test_non_finite_loss_stops_before_the_weights_change(tmp_path, cache):
    module = build()
    before = module.fields.network.enter.weight.detach().clone()
    losses = module.losses

    def broken(x, *args):
        return losses(x * float("nan"), *args)

    module.losses = broken
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 0; the batch is kept in .*rank0.pt"):
        fit(tmp_path, cache, [FieldDiagnostics()], module=module)
    assert torch.equal(before, module.fields.network.enter.weight)
    kept = torch.load(tmp_path / "nonfinite-batch-rank0.pt", weights_only=True)
    assert kept["batch"][0].shape == (64, 1, 8, 8) and kept["step"] == 0


def test_lost_chains_do_not_end_training(tmp_path, cache):
    module = build()
    module.samplers["ode"] = BellmanDynamics(steps=50, step_size=500.0)
    trainer, record = fit(tmp_path, cache, [metrics(), SampleGrid(n=4)], module=module)
    assert len(record.losses) == 12 and float(trainer.callback_metrics["val/fid"]) == float("inf")
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["sde-0000006.png", "sde-0000012.png"]


def test_the_progress_bar_shows_what_evaluations_declare(tmp_path, cache):
    class Mean(Evaluation):
        metrics = (Metric("mean", 2), Metric("not_shown"))
        record = "mean.json"

        def draw(self, trainer, pl_module, stage, sampler):
            torch.rand(7)  # training must not notice
            return draw_together(trainer, pl_module, 8, 8, 0, sampler)

        def judge(self, trainer, pl_module, stage, sampler, drawn):
            values = {f"{stage}/mean": float(drawn.mean()), f"{stage}/not_shown": 1.0}
            return Findings(values, {**values, "summary": "a mean"})

    _, plain = fit(tmp_path / "a", cache, [])
    trainer, watched = fit(tmp_path / "b", cache, [Mean()])
    assert plain.losses == watched.losses
    assert shown(trainer) == {"mean": f"{float(trainer.callback_metrics['val/mean']):.2f}"}
    rows = json.loads((tmp_path / "b" / "mean.json").read_text())
    assert [row["step"] for row in rows] == [6, 12] and rows[-1]["val/not_shown"] == 1


def test_lost_chains_are_one_line(tmp_path, cache, caplog):
    module = build()
    module.samplers["ode"] = BellmanDynamics(steps=50, step_size=500.0)
    with caplog.at_level("INFO"):
        fit(tmp_path, cache, [SampleGrid(n=4, samplers=["ode"])], module=module)
    said = [line for line in caplog.messages if line.startswith("no ")]
    assert [line.split(": ")[0] for line in said] == [f"no grid of sampler 'ode' at step {step}" for step in (6, 12)]


def test_unknown_sampler_is_named(tmp_path, cache):
    with pytest.raises(UserError, match="SampleGrid: no sampler named 'sd'; the model has sde, ode"):
        fit(tmp_path, cache, [SampleGrid(samplers=["sd"])])


def test_records_are_json_whatever_the_numbers(tmp_path):
    trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    for step, value in enumerate((float("nan"), float("inf"), 1.5)):
        append_record(trainer, "a.json", {"step": step, "val/w2": value, "summary": "x"})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    rows = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert [row["val/w2"] for row in rows] == [None, None, 1.5]


def test_a_row_takes_the_place_of_its_own_alone(tmp_path):
    """Of the same step and sampler: a row of another sampler stays, whether there is a protocol or not."""
    trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    for drawn, value in (("sde", 1.0), ("ode", 2.0), ("sde", 3.0)):
        append_record(trainer, "a.json", {"step": 4, "drawn": drawn, "val/own": value})
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [(row["drawn"], row["val/own"]) for row in rows] == [("ode", 2.0), ("sde", 3.0)]


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_ranks_decide_alike_about_a_loss_of_one(tmp_path, nonfinite):
    """An infinite loss may have gradients that are finite: this rank's own loss is sound, the other's is not."""
    module, left_out = build(), []
    diagnostics = FieldDiagnostics(nonfinite=nonfinite)
    strategy = SimpleNamespace(reduce=lambda bad, reduce_op: {"max": torch.ones_like(bad)}[reduce_op])
    trainer = SimpleNamespace(
        global_step=3, log_every_n_steps=50, precision_plugin=None, world_size=2, strategy=strategy, global_rank=0,
        default_root_dir=str(tmp_path), loggers=[], accumulate_grad_batches=1,
    )  # fmt: skip
    module.optimizer = SimpleNamespace(unless=lambda optimizer, bad: left_out.append(bool(bad)))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    diagnostics.on_train_start(trainer, module)
    diagnostics.on_train_batch_start(trainer, module, [torch.zeros(2)], 0)
    diagnostics.on_before_backward(trainer, module, torch.tensor(1.0))
    if nonfinite == "stop":
        with pytest.raises(NonFiniteLoss, match="the loss on another device is not finite at step 3"):
            diagnostics.on_before_optimizer_step(trainer, module, None)
    else:
        diagnostics.on_before_optimizer_step(trainer, module, None)
        assert diagnostics.skipped == 1
    assert left_out == [True]


def test_validation_noise_is_each_ranks_own():
    module, seeds = build(), []
    module._step = lambda stage, batch, generator: seeds.append(generator.initial_seed())
    batch = (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    for rank in range(2):
        module._trainer = SimpleNamespace(world_size=2, global_rank=rank)
        for index in range(2):
            module.validation_step(batch, index)
    assert len(set(seeds)) == 4
