"""Numbers that compare with published ones: references, exported samples, training without a validation split."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import train
from bd_lightning.checks import UserError
from bd_lightning.dynamics import AnnealedDynamics, ProbabilityFlow
from callbacks import CallsCurve, ClassifierFeatures, ImageMetrics, ImageWriter
from callbacks.evaluation import Findings, Metric
from callbacks.export import Export
from callbacks.moments import Gaussian, Moments, load_statistics, moments_of, save_statistics
from datamodules import MNIST, Digits, to_uint8
from datamodules.images import to_unit
from fake_images import Drawn, Halves, Shades, evaluated, fake_trainer
from tiny_data import write_mnist


def published(path, rows):
    """Statistics as EDM and guided-diffusion publish them."""
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    return path


def halves(images):
    """The features of `Halves`, by numpy: of bytes (N, H, W)."""
    flat = images.astype(np.float64).reshape(len(images), 2, -1)
    return flat.mean(2)


def by_scipy(a, b):
    """FID by its formula."""
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)
    return np.square(a.mean(0) - b.mean(0)).sum() + traces


def test_fid_is_that_of_the_saved_images_by_numpy_and_scipy(tmp_path, monkeypatch):
    data = Shades(True, root=str(tmp_path))
    x = 0.6 * torch.randn(400, 1, 8, 8).clamp(-1, 1) + 0.1
    ImageWriter(tmp_path / "samples").setup(None, None, "predict")
    ImageWriter(tmp_path / "samples").write(list(range(400)), x)
    row = evaluated(data, tmp_path, monkeypatch, x, "test", reference="train", batch_size=60)
    saved = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples").glob("*.png"))])
    expected = by_scipy(halves(saved), halves(data.load_split("train").x[:, 0].numpy()))
    assert expected > 1 and row["test/fid"] == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert "400 samples" in row["protocol"] and "against 6000 train images of Shades-True" in row["protocol"]


def test_sums_need_no_features_and_keep_double_precision():
    rows = (1000 + torch.randn(4000, 5, dtype=torch.float64)).float()
    sums = Moments(5)
    for part in rows.split(37):
        sums.update(part)
    found = sums.gaussian()
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(rows.double().numpy(), rowvar=False), atol=1e-7)
    assert sums.products.dtype == torch.float64 and sums.products.device.type == "cpu" and sums.n == 4000


def test_published_statistics_are_a_reference(tmp_path, monkeypatch, caplog):
    data = Shades(True, root=str(tmp_path))
    train_rows = halves(data.load_split("train").x[:, 0].numpy())
    file = published(tmp_path / "ref.npz", train_rows)
    x = to_unit(data.read_split("test").x[:300])
    split = evaluated(data, tmp_path / "a", monkeypatch, x, "test", reference="train")
    row = evaluated(data, tmp_path / "b", monkeypatch, x, "test", reference=str(file))
    assert row["test/fid"] == pytest.approx(split["test/fid"], abs=1e-6) and "against ref.npz" in row["protocol"]
    assert "test/kid" in split and not {"test/kid", "test/precision"} & set(row)  # these need the images
    assert "of another resize" not in caplog.text
    other = published(tmp_path / "other.npz", train_rows + 10)
    with caplog.at_level("INFO"):
        evaluated(data, tmp_path / "c", monkeypatch, x, "test", reference=str(other))
    assert "is of other images than Shades-True, or of another resize: 400 training images are at FID" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "has no mu and no sigma .it has arr_0.: a reference needs"),
        ({"mu": np.zeros(2)}, "has no sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "is of 3 features, callbacks.metrics.features are 2 .halves."),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu of float64, shape \(2,\), and sigma of float64, shape \(3, 3\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, r"mu of <U1, shape \(2,\), and sigma of float64"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "has a sigma that is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "has a sigma that is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5.0], [5.0, 1.0]])}, "variance in some direction is negative"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "cannot be read as an .npz file of arrays"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.array("quarters")}, "in other features .quarters."),
    ],
)
def test_statistics_that_do_not_fit_are_one_sentence(arrays, sentence, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        load_statistics(tmp_path / "x.npz", 2, "halves")


@pytest.mark.parametrize("kind", [">f8", "<g", "i4", "f4"])
def test_statistics_of_other_numbers_are_read(kind, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.arange(2).astype(kind), sigma=np.eye(2).astype(kind))
    found = load_statistics(tmp_path / "x.npz", 2, "halves")
    assert found.mean.tolist() == [0, 1] and found.covariance.dtype == torch.float64


def test_references_that_are_no_files(tmp_path):
    file = tmp_path / "x.npz"
    np.savez_compressed(file, mu=np.zeros(300), sigma=np.eye(300))
    whole = file.read_bytes()
    np.save(tmp_path / "y.npy", np.zeros(2))
    for damaged in (b"no archive", whole[:100] + b"\xff" * 40 + whole[140:], (tmp_path / "y.npy").read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as an .npz"):
            load_statistics(file, 300, "halves")
    with pytest.raises(UserError, match="reference: file not found: .*nowhere.npz"):
        load_statistics(tmp_path / "nowhere.npz", 2, "halves")
    with pytest.raises(ValueError, match="reference must be train, val, test or an .npz file, got 'trian'"):
        ImageMetrics(Halves(), reference="trian")


def test_exported_samples_are_those_that_were_judged(tmp_path, monkeypatch):
    data, file = Shades(True, root=str(tmp_path)), tmp_path / "new" / "samples.npz"
    x = to_unit(data.read_split("test").x[:250])
    row = evaluated(data, tmp_path, monkeypatch, x, "test", export=str(file), batch_size=100, reference="val")
    with np.load(file, allow_pickle=False) as found:  # as guided-diffusion's evaluator reads it
        assert found.files == ["arr_0"] and found["arr_0"].shape == (250, 8, 8, 3) and found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"][..., 1], to_uint8(x)[:, 0].numpy())
    assert sorted(p.name for p in file.parent.iterdir()) == ["samples.npz", "samples.stats.npz"]
    statistics = load_statistics(file.with_suffix(".stats.npz"), 2, Halves().protocol)
    with pytest.raises(UserError, match=r"a reference needs mu and sigma, as .*samples\.stats\.npz has them"):
        load_statistics(file, 2, Halves().protocol)
    np.testing.assert_allclose(statistics.covariance, np.cov(halves(to_uint8(x)[:, 0].numpy()), rowvar=False))
    again = evaluated(data, tmp_path / "again", monkeypatch, x, "test", reference=str(file.with_suffix(".stats.npz")))
    assert again["test/fid"] == pytest.approx(0, abs=1e-6) and row["test/fid"] > 1e-3
    with pytest.raises(UserError, match="samples.npz is there already; delete it, or choose another name"):
        evaluated(data, tmp_path, monkeypatch, x, "test", export=str(file))


def test_statistics_of_another_classifier_are_refused(tmp_path, capsys):
    """The same class, settings and size of features, trained on other images; before training begins."""
    first, second = (ClassifierFeatures(8, steps=2) for _ in range(2))
    data = Shades(True, root=str(tmp_path))
    before = first.protocol
    first.prepare(data)
    second.prepare(Digits(root=str(tmp_path)))
    np.savez(tmp_path / "x.npz", mu=np.zeros(8), sigma=np.eye(8), features=np.array(first.protocol))
    assert first.protocol.startswith(f"{before} trained ")
    load_statistics(tmp_path / "x.npz", 8, before)  # before the features are there
    load_statistics(tmp_path / "x.npz", 8, first.protocol)
    with pytest.raises(UserError, match="was made in other features .*classifier-2 8 2 128 0 trained"):
        load_statistics(tmp_path / "x.npz", 8, second.protocol)
    words = ["model=mlp", "model.network.width=8", "steps=2", "eval_every=2", "trainer=cpu", "logger=none"]
    words += ["callbacks.metrics.features={_target_: callbacks.ClassifierFeatures, width: 8, steps: 2}"]
    words += [f"callbacks.metrics.reference={tmp_path / 'x.npz'}", f"root={tmp_path / 'runs'}", f"data.root={tmp_path}"]
    assert train.main(words) == 2
    assert "was made in other features (classifier-2 8 2 128 0 trained" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Interrupted(list):
    """Samples of which the second batch never comes."""

    def __getitem__(self, place):
        return self

    def split(self, size):
        yield torch.zeros(10, 1, 8, 8)
        raise KeyboardInterrupt


def stopped(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_an_interrupted_export_leaves_nothing(when, tmp_path, monkeypatch):
    data, file = Shades(True, root=str(tmp_path)), tmp_path / "new" / "samples.npz"
    if when == "writing":
        monkeypatch.setattr("callbacks.export.save_statistics", stopped)
    samples = Interrupted(range(50)) if when == "drawing" else torch.zeros(50, 1, 8, 8)
    with pytest.raises(KeyboardInterrupt):
        evaluated(data, tmp_path, monkeypatch, samples, "test", export=str(file))
    assert not list(file.parent.iterdir())


def expected(path, n, shape):
    export = Export(path)
    export.expect(n, shape)
    return export


def test_two_ranks_write_one_file(tmp_path):
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    ranks = [expected(tmp_path / "x.npz", 7, (3, 4, 4)) for _ in range(2)]
    ranks[0].check(2)  # on rank 0 alone
    strategy = SimpleNamespace(barrier=lambda name: None, reduce_boolean_decision=lambda fine, all: fine)
    trainers = [
        SimpleNamespace(global_rank=r, world_size=2, is_global_zero=r == 0, strategy=strategy) for r in range(2)
    ]
    for rank, trainer in zip(ranks, trainers):
        rank.begin(trainer)
    for rank, export in enumerate(ranks):
        for part in images[rank::2].split(2):
            export.add(part)
    for export, trainer in reversed(list(zip(ranks, trainers))):
        export.finish(trainer, moments_of(torch.randn(9, 2)), "two")
        export.abandon()
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], images.permute(0, 2, 3, 1).numpy())


def test_places_that_cannot_hold_an_export(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="export must be the name of an .npz file"):
        expected("samples.png", 10, (1, 8, 8)).check(2)
    with pytest.raises(UserError, match="nothing can be written to /proc/nowhere"):
        expected("/proc/nowhere/x.npz", 10, (1, 8, 8)).check(2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"export of 50000 samples needs 0.307 GB in .*, which has 0.001 GB left"):
        expected(tmp_path / "x.npz", 50_000, (3, 32, 32)).check(2)


def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch):
    data, file = Shades(True, root=str(tmp_path)), tmp_path / "new" / "samples.npz"
    own, opened = Path.open, []

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def seek(self, place):
            return None

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(path, mode="r", *args, **kwargs):
        found = own(path, mode, *args, **kwargs)
        opened.append(path.name)
        return Full(found) if path.name.endswith(".raw") and mode == "r+b" else found

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="export: cannot write to .*/new .No space left on device.: make room"):
        evaluated(data, tmp_path, monkeypatch, torch.zeros(50, 1, 8, 8), "test", export=str(file))
    assert ".samples.npz.raw" in opened and not list(file.parent.iterdir())
    assert "test/fid" in json.loads((tmp_path / "fid.json").read_text())[-1]  # what was drawn is judged


def test_two_exports_to_one_name(tmp_path):
    """The second is refused, before it computes or when it would begin, and the first is not touched."""
    first, second, late = (expected(tmp_path / "x.npz", 3, (3, 4, 4)) for _ in range(3))
    fine = SimpleNamespace(barrier=lambda name: None, reduce_boolean_decision=lambda fine, all: fine)
    trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, strategy=fine)
    for export in (first, second, late):
        export.check(2)
    first.begin(trainer)
    with pytest.raises(UserError, match=r"\.x.npz.raw is there already"):
        expected(tmp_path / "x.npz", 3, (3, 4, 4)).check(2)
    second.begin(trainer)
    images = torch.randint(1, 256, (3, 3, 4, 4), dtype=torch.uint8)
    for export in (second, first):
        export.add(images)
    second.finish(trainer, moments_of(torch.randn(9, 2)), "two")
    second.abandon()
    assert "another test writes to it, or was killed: delete it then" in second.lost
    first.finish(trainer, moments_of(torch.randn(9, 2)), "two")
    first.abandon()
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], images.permute(0, 2, 3, 1).numpy())
    late.begin(trainer)
    late.add(255 - images)
    late.finish(trainer, moments_of(torch.randn(9, 2)), "two")
    late.abandon()
    assert not first.lost and "is there by now, of another test" in late.lost
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "x.stats.npz"]


def test_export_is_for_tests(capsys):
    assert train.main(["export=x.npz"]) == 2
    assert "export keeps the samples of a test: train.py test" in capsys.readouterr().err


def test_training_on_everything(tmp_path, caplog):
    data = MNIST(root=str(write_mnist(tmp_path, n=40)), batch_size=4, val_size=0, download=False)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert len(data.split("train")) == len(data.split("val")) == 40  # at most 5,000
    assert "all images are trained on; validation takes 40 of them" in caplog.text
    assert (data.reference_split, data.unseen) == ("train", "test")
    held_out = MNIST(root=str(tmp_path), batch_size=4, val_size=10, download=False)
    assert (held_out.reference_split, held_out.unseen) == ("stage", "val")
    assert held_out.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match="val_size must lie between 0 and"):
        MNIST(val_size=-1)


def test_statistics_survive_their_file(tmp_path):
    found = moments_of(torch.randn(50, 3))
    save_statistics(tmp_path / "x.npz", found, "three")
    again = load_statistics(tmp_path / "x.npz", 3, "three")
    assert isinstance(again, Gaussian) and torch.equal(again.covariance, found.covariance)


def test_only_samples_that_are_judged_by_name_are_exported(tmp_path, monkeypatch):
    """Not those of a point of a curve, when the default sampler has lost its chains."""
    data, file = Shades(True, root=str(tmp_path)), tmp_path / "new" / "samples.npz"
    options = {"export": str(file), "kid_subset": 10, "sampler": "lost"}

    def drawn(trainer, model, n, batch_size, seed, sampler):
        if sampler == "lost":
            raise UserError("chains are lost")
        yield torch.zeros(n, 1, 8, 8)

    monkeypatch.setattr("callbacks.metrics.draw", drawn)
    trainer, model = fake_trainer(data, Drawn(), tmp_path), Drawn()
    model.samplers = {**model.samplers, "lost": SimpleNamespace(calls=1, interacting=False)}
    metrics = ImageMetrics(Halves(), n=40, n_test=40, **options)
    metrics.setup(trainer, model, "test")
    metrics.prepare(trainer, model, "test")
    assert metrics.findings(trainer, model, "test", "lost").values["test/fid"] == math.inf
    assert metrics.findings(trainer, model, "test", "noise").values["test/fid"] > 0
    assert not file.exists()


def test_more_calls_than_were_asked_for_are_said(tmp_path, caplog):
    judge = SimpleNamespace(metrics=(Metric("fid"),), findings=lambda *args: None)
    model = SimpleNamespace(samplers={"slow": AnnealedDynamics(levels=4), "ode": ProbabilityFlow()})
    with caplog.at_level("INFO"):
        CallsCurve([1, 5], judge).on_test_epoch_end(fake_trainer(None, model, tmp_path), model)
    assert "slow needs more network calls than were asked for: it takes 2 for 1" in caplog.text
    assert "ode needs" not in caplog.text


def test_points_that_were_judged_are_kept_when_a_test_is_stopped(tmp_path):
    found = [Findings({"test/fid": fid}, {"protocol": "two"}) for fid in (3.0, math.inf)]
    model = SimpleNamespace(samplers={"ode": ProbabilityFlow()}, loaded_step=0)
    trainer = fake_trainer(SimpleNamespace(remark=""), model, tmp_path)

    def stopped(*args):
        if not found:
            raise KeyboardInterrupt
        return found.pop(0)

    judge = SimpleNamespace(metrics=(Metric("fid"),), findings=stopped)
    with pytest.raises(KeyboardInterrupt):
        CallsCurve([5, 9, 19], judge).on_test_epoch_end(trainer, model)
    rows = json.loads((tmp_path / "calls.json").read_text())
    assert [(row["calls"], row["fid"], row["protocol"]) for row in rows] == [(5, 3.0, "two"), (9, None, "two")]
    found.append(Findings({"test/fid": 2.0}, {"protocol": "two"}))  # the same test again, stopped earlier
    with pytest.raises(KeyboardInterrupt):
        CallsCurve([5, 9, 19], judge).on_test_epoch_end(trainer, model)
    again = json.loads((tmp_path / "calls.json").read_text())
    assert sorted((row["calls"], row["fid"]) for row in again if row["fid"]) == [(5, 2.0)] and len(again) == 2
