import csv
import time
from types import SimpleNamespace

import pytest
import wandb

from bd_lightning.loggers import MetricsCSV, WandB
from wandb_records import read_records


def test_csv_appends_across_parts_of_a_run(tmp_path):
    for step, metrics in ((1, {"a": 1.0}), (2, {"a": 2.0, "b": 3.0})):
        logger = MetricsCSV(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.save()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1.0", ""), ("2", "2.0", "3.0")]


def log_one(logger):
    logger.log_metrics({"val/fid": 3.0}, step=7)
    logger.close()


def test_no_key_means_offline_without_a_question(tmp_path, caplog):
    log_one(WandB(tmp_path / "run-7", tags=["a"], notes="n", group="g"))
    (path,) = (tmp_path / "run-7").glob("wandb/offline-run-*/run-run-7.wandb")
    assert read_records(path).history == [pytest.approx({"val/fid": 3.0, "trainer/global_step": 7} | extras(path))]


def extras(path):
    """W&B's own columns of the first row."""
    return {k: v for k, v in read_records(path).history[0].items() if k.startswith("_")}


def test_unreachable_server_means_offline_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    log_one(WandB(tmp_path / "run-8", timeout=2.0))
    assert time.monotonic() - start < 60
    (path,) = (tmp_path / "run-8").glob("wandb/offline-run-*/run-run-8.wandb")
    assert read_records(path).history[0]["val/fid"] == 3.0


def test_disabled_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_one(WandB(tmp_path / "run-9"))
    assert not list((tmp_path / "run-9").rglob("*.wandb"))


def test_an_empty_mode_is_none_and_a_wrong_one_is_named(tmp_path, monkeypatch):
    for run, mode in (("run-13", "auto"), ("run-15", "offline")):
        monkeypatch.setenv("WANDB_MODE", "")
        log_one(WandB(tmp_path / run, mode=mode))
        assert list((tmp_path / run).glob(f"wandb/offline-run-*/run-{run}.wandb"))
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(ValueError, match="WANDB_MODE must be one of auto, online, offline, disabled; got 'off'"):
        WandB(tmp_path / "run-14")


def test_steps_that_the_server_has_are_not_sent_twice(tmp_path, monkeypatch):
    """There is no server here: a stand-in for what W&B gives when a run is resumed."""
    sent = []
    summary = {"trainer/global_step": 30}
    run = SimpleNamespace(url="", resumed=True, summary=summary, log=sent.append, define_metric=lambda *a, **k: None)
    monkeypatch.setattr(WandB, "_start", lambda self, mode: run)
    logger = WandB(tmp_path / "run-10", mode="online", resumed_at=10)
    for step in (10, 20, 30, 40):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    assert [row["trainer/global_step"] for row in sent] == [30, 40]
    evaluation = WandB(tmp_path / "run-10", mode="online")  # of best.ckpt, which is of an earlier step
    evaluation.log_metrics({"test/fid": 1.0}, step=20)
    assert sent[2]["trainer/global_step"] == 20 and sent[2]["test/fid"] == 1.0


def test_metrics_are_summed_up_as_the_callbacks_say(tmp_path):
    log_one(WandB(tmp_path / "run-11", mode="offline", summaries={"val/fid": "min", "val/return": "max"}))
    (path,) = (tmp_path / "run-11").glob("wandb/offline-run-*/run-run-11.wandb")
    metrics = read_records(path).metrics
    assert metrics["val/fid"] == "min" and metrics["val/return"] == "max"


def test_a_background_process_that_has_ended_is_replaced(tmp_path, monkeypatch):
    """What a child of a notebook inherits when the notebook's own W&B has ended."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_SERVICE", f"3-1-unix-{tmp_path / 'socket'}")
    log_one(WandB(tmp_path / "run-12"))
    assert list((tmp_path / "run-12").glob("wandb/offline-run-*/run-run-12.wandb"))


@pytest.mark.parametrize("resumed_at", [None, 20])
def test_a_row_that_may_be_cut_in_its_last_number_is_dropped(tmp_path, resumed_at):
    path = tmp_path / "metrics.csv"
    path.write_text("a,step,z\n1.0,9,5.25\n2.0,19,4")
    logger = MetricsCSV(tmp_path, resumed_at=resumed_at)
    logger.log_metrics({"a": 3.0, "z": 6.5}, step=20)
    logger.save()
    assert [row["z"] for row in csv.DictReader(path.open())] == ["5.25", "6.5"]
