"""What is said while one waits, and what is not."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bd_lightning import progress
from bd_lightning.checks import UserError
from bd_lightning.cli import config as configs
from bd_lightning.cli import objects
from bd_lightning.cli.quiet import LINES, quiet
from callbacks import ClassifierFeatures, ImageMetrics
from datamodules import Digits


@pytest.fixture
def at_once(monkeypatch):
    """Bars appear without a delay and are written at every step."""
    progress.show(True)  # whatever a run before this asked for
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "SELDOM", 0.0)
    yield
    progress.show(True)


def test_the_classifier_says_what_and_how_much(at_once, tmp_path, capfd):
    features = ClassifierFeatures(steps=3, batch_size=8)
    features.prepare(Digits(root=str(tmp_path)))
    said = capfd.readouterr().err
    assert "classifier of Digits for FID" in said and "/3 [" in said
    features.prepare(Digits(root=str(tmp_path)))  # kept
    assert "classifier" not in capfd.readouterr().err


def test_sigterm_ends_the_training_of_the_classifier(tmp_path):
    """It takes minutes of a slow machine, and a cluster waits for seconds."""
    trainer = SimpleNamespace(
        datamodule=Digits(root=str(tmp_path)), is_global_zero=True, strategy=SingleDeviceStrategy(), world_size=1
    )
    trainer.received_sigterm = True
    metrics, module = ImageMetrics(ClassifierFeatures()), SimpleNamespace(samplers={}, device=torch.device("cpu"))
    metrics.setup(trainer, module, "fit")
    with pytest.raises(SIGTERMException):
        metrics.prepare(trainer, module, "val")
    assert not list(tmp_path.rglob("*classifier*.pt"))
    metrics.teardown(trainer, module, "fit")
    metrics.features.heed()


def test_training_does_not_wait_for_what_the_first_validation_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(ClassifierFeatures, "_train", lambda *args: pytest.fail("trained before the first step"))
    trainer = SimpleNamespace(
        datamodule=Digits(root=str(tmp_path)), is_global_zero=True, strategy=SingleDeviceStrategy()
    )
    metrics, module = ImageMetrics(ClassifierFeatures()), SimpleNamespace(samplers={}, device=torch.device("cpu"))
    metrics.setup(trainer, module, "fit")
    trainer.datamodule.class_names = ("one",)
    with pytest.raises(UserError, match="a classifier needs two classes, and .* has 1 here"):  # this is said at once
        metrics.setup(trainer, module, "fit")


@pytest.mark.parametrize("word", ["", "callbacks.progress=null", "trainer.enable_progress_bar=false"])
def test_no_bars_without_a_progress_bar_in_the_config(word, at_once, capfd):
    shown = not word
    objects.prepare(configs.compose(configs.parse(["trainer=cpu", *word.split()])))
    with progress.bar("codes", 2) as bar:
        bar.update(2)
    assert ("codes" in capfd.readouterr().err) == shown


def test_no_bars_on_other_ranks(at_once, monkeypatch, capfd):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with progress.bar("codes", 2) as bar:
        bar.update(2)
    assert capfd.readouterr().err == ""


def test_short_work_has_no_bar(capfd):
    with progress.bar("codes", 2) as bar:
        bar.update(2)
    assert "codes" not in capfd.readouterr().err


def test_lines_that_help_nobody_are_not_printed(caplog):
    quiet()
    quiet()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    assert len([f for f in logger.filters if f.__module__ == "bd_lightning.cli.quiet"]) == 1
    with caplog.at_level(logging.INFO):
        for line in (*LINES, "", "An SIGTERMException was raised with message: , saved checkpoint to x"):
            rank_zero_info(line)
        rank_zero_info("GPU available: True (cuda), used: True")
    assert "GPU available: True" in caplog.text and caplog.text.count("\n") == 1


def test_remarks_of_libraries_are_not_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        float(torch.ones((), requires_grad=True) * 2)
        warnings.warn("`torch.jit.script` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["another"]
