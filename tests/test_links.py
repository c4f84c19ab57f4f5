"""Nothing is written, or shown, outside a run's own folder: not by its checkpoints, and not through links in it."""

import os
from pathlib import Path

import pytest

import train
from small_run import contents, launch, refused

REPORT = "callbacks.report={_target_: callbacks.Report}"
LINKS = [
    ".lock", "metrics.json", "metrics.csv", "report.html", "config.yaml.part", "samples/ode-0000001.png", "fid.json",
    "checkpoints/last.ckpt.part", "checkpoints/best.ckpt", "test-last-0000004", "predict-ode-seed0",
]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_no_link_is_followed_out_of_a_run_folder(name, command, run, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = run / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(outside, link.parent))
    before = contents(tmp_path)
    assert train.main([command, f"ckpt_path={run}/checkpoints/last.ckpt", "steps=6", "logger=none"]) == 2
    said = capsys.readouterr().err
    assert f"{name} is a link that leads out of its run folder" in said and len(said.splitlines()) == 1
    assert contents(tmp_path) == before


def test_links_inside_and_those_of_wandb_are_left_alone(run, tmp_path):
    (run / "checkpoints" / "mine.ckpt").symlink_to("last.ckpt")
    (run / "wandb").mkdir()
    (run / "wandb" / "debug.log").symlink_to("/nowhere/debug.log")
    assert launch(run.parents[1], f"ckpt_path={run}/checkpoints/last.ckpt", "steps=6") == 0


def test_pipes_are_no_records(run, capsys):
    os.mkfifo(run / "fid.json")
    assert train.main([f"ckpt_path={run}/checkpoints/last.ckpt", "steps=6"]) == 2
    assert "fid.json is neither a file nor a folder" in capsys.readouterr().err


def test_a_checkpoint_that_is_a_link_into_another_run(run, tmp_path, capsys):
    other = tmp_path / "theirs" / "checkpoints"
    other.mkdir(parents=True)
    (other.parent / "config.yaml").write_text("a: 1")
    (other / "last.ckpt").symlink_to(run / "checkpoints" / "last.ckpt")
    before = contents(tmp_path)
    assert train.main([f"ckpt_path={other}/last.ckpt", "steps=6"]) == 2
    assert "is a link out of its run folder: give" in capsys.readouterr().err and contents(tmp_path) == before


def test_pages_show_no_linked_file(run, tmp_path, capsys):
    """`compare` reads run folders alone."""
    (run / "fid.json").symlink_to("/etc/hostname")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("a: 1")
    assert train.main(["compare", str(run), str(other), f"out={tmp_path / 'a.html'}"]) == 2
    assert "fid.json is a link that leads out" in capsys.readouterr().err


BEST = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/loss, "


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("dirpath: OTHER/checkpoints}", "outside the run folder"),
        ("filename: ../../one/checkpoints/last}", "must be the name"),
        ("filename: OTHER/checkpoints/best}", "must be the name"), ("filename: last}", "what a run resumes from"),
        ("filename: '{epoch}/../../x'}", "must be the name"), ("filename: ..}", "must be the name"),
    ],
)  # fmt: skip
def test_checkpoints_stay_in_their_run(more, reason, run, capsys):
    root = run.parents[1]
    assert reason in refused(root, capsys, "run_id=two", f"callbacks.best={BEST}{more}".replace("OTHER", str(run)))


def test_names_of_metrics_in_a_name_are_fine(tmp_path):
    more = "filename: 'at-{step}-{val/loss:.2f}', auto_insert_metric_name: false}"
    assert launch(tmp_path / "root", "run_id=x", "steps=2", f"callbacks.best={BEST}{more}") == 0
    folder = tmp_path / "root" / "bellman-diffusion" / "x" / "checkpoints"
    assert len(list(Path(folder).glob("at-2-*.ckpt"))) == 1
