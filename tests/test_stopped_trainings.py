"""Trainings of benchmarks: the order of their batches, and what is left of one that is stopped."""

import os
import signal
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from bd_lightning.checks import UserError
from benchmarks import common, images
from datamodules import Digits
from tests.test_kept_rows import OURS, pictures  # noqa: F401
from tiny_data import write_folder


class Watching(L.LightningModule):
    """Notes the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, index):
        self.seen.append(batch[0].clone())
        return self.w * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_batches_come_in_the_order_of_train_py(tmp_path, monkeypatch):
    """Shuffled anew in each epoch, by the seed."""
    data = Digits(root=str(tmp_path), batch_size=500)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    watching = Watching()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_steps=8, accelerator="cpu", limit_val_batches=0, **quiet).fit(watching, data)
    data.trainer = None
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    own = [x for (x, _), _ in zip(common.batches(data, 3), range(8))]
    assert all(torch.equal(a, b) for a, b in zip(own, watching.seen)) and len(watching.seen) == 8
    per_epoch = len(data.split("train")) // 500
    other = [x for (x, _), _ in zip(common.batches(data, 0), range(8))]
    assert per_epoch < 8 and not torch.equal(own[0], own[per_epoch]) and not torch.equal(own[0], other[0])


def test_a_training_that_is_stopped_goes_on(pictures, tmp_path, monkeypatch):  # noqa: F811
    """As if nothing had been, across epochs, noise, mirrored images and averages; a damaged state is a sentence."""
    bench, words = pictures("--only", OURS, "--n-curve", "8", "data=folder", "data.size=8", "data.batch_size=16")
    folder = write_folder(tmp_path / "pictures", n=24, splits=("train", "test"))
    words = [word for word in words if word != "data=digits"] + [f"data.folder={folder}"]
    words[words.index("--steps") + 1] = "8"
    monkeypatch.setattr(common, "KEEP", -1.0)
    bench.stopped(common.Training, "step", 5, *words)
    (kept,) = bench.folder.glob("*.training")
    whole, state = kept.read_bytes(), torch.load(kept, weights_only=True)
    lost = {**state["model"], "w": next(iter(state["model"].values()))}
    for damaged in (whole[:1000], b"", {"done": 8}, {"done": -1}, {"done": "4"}, {"model": lost}):
        if isinstance(damaged, dict):
            torch.save({**state, **damaged}, kept)
        else:
            kept.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged, or of another training: delete it to train anew"):
            bench(*words)
    kept.write_bytes(whole)
    steps, own = [], common.Training.step
    monkeypatch.setattr(common.Training, "step", lambda self, loss: (steps.append(1), own(self, loss)))
    bench(*words)
    assert len(steps) == 3 and not list(bench.folder.glob("*.training"))
    rows = [row for row in bench.rows() if row["kind"] != "speed"]
    bench.folder = tmp_path / "other"
    bench(*words)
    assert [row for row in bench.rows() if row["kind"] != "speed"] == rows and len(steps) == 3 + 8


def test_a_habit_that_is_trained_is_kept(pictures, monkeypatch):  # noqa: F811
    bench, words = pictures("--only", "no clipping")
    bench.stopped(images.Suite, "score", 0, *words)
    monkeypatch.setattr(images.Suite, "train", lambda *_: pytest.fail("trained again"))
    added, _ = bench(*words)
    assert [(row["kind"], row["name"]) for row in added] == [("habit", "no clipping")]
    assert not list(bench.folder.glob("*.training"))


def test_configs_of_one_name_are_told_apart():
    """An experiment's rate, say, that has changed since; costs do not depend on the rate."""
    config = {"trainer": {}, "callbacks": {"ema": {"decay": 0.9}, "metrics": {"features": {}}}, "data": {}}
    slow, fast, codes = (
        SimpleNamespace(config=config | {"model": {"lr": lr}}, facts=SimpleNamespace(space=space))
        for lr, space in ((1e-3, None), (2e-3, None), (1e-3, "those of an autoencoder"))
    )
    assert images.Suite.digest(slow) != images.Suite.digest(codes)
    assert images.Suite.digest(slow) != images.Suite.digest(fast)
    assert images.Suite.digest(slow, lr=None) == images.Suite.digest(fast, lr=None)


def test_sigterm_is_a_sentence(capsys):
    """As Ctrl-C is, by which what is finished is kept; the signal is then again what it was."""

    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code == 130 and capsys.readouterr().err == "\nstopped\n"
    assert signal.getsignal(signal.SIGTERM) is usual
