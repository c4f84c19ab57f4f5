"""A run that is stopped at any step, in any way, goes on as if it had not been stopped."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import train
from bd_lightning import checkpoints
from bd_lightning.cli.folders import short
from bd_lightning.cli.resumed import carry_over
from bd_lightning.modules import BellmanDiffusion
from callbacks.checkpoints import uninterrupted
from conftest import ROOT
from small_run import launch

EPOCH, EVERY, STEPS = 6, 4, 16  # batches of an epoch, steps between validations, steps
WORDS = [
    "data.batch_size=250", "data.flip=true", "model=mlp", "model.network.width=32", "model.network.depth=1",
    "model.network.dropout=0.1", "model.samplers.sde=null", "model.samplers.ode.steps=3", "model.warmup_steps=5",
    "callbacks.metrics.features.steps=40", "callbacks.metrics.n=80", "callbacks.metrics.kid_subset=40",
    "callbacks.metrics.batch_size=40", "callbacks.grid=null", "callbacks.trajectory=null", "callbacks.progress=null",
    "callbacks.last.every=2", "data.eval_batch_size=100", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1", "logger=none", f"steps={STEPS}", f"eval_every={EVERY}",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


def words(root: Path, run_id: str, *more: str) -> list[str]:
    return [*WORDS, f"root={root / 'runs'}", f"data.root={root / 'data'}", f"run_id={run_id}", *more]


def folder(root: Path, run_id: str) -> Path:
    return root / "runs" / "bellman-diffusion" / run_id


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """A run that nothing happened to, with a checkpoint of every step."""
    every = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, save_top_k: -1, "
    more = every + "filename: 'at-{step}', auto_insert_metric_name: false}"
    assert train.main(words(root, "whole", "trainer=cpu", f"callbacks.every={more}")) == 0
    return folder(root, "whole")


def table(folder: Path) -> list[dict[str, float]]:
    """Every row of metrics.csv, without what depends on the clock."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [
        {key: float(value) for key, value in row.items() if value and key != "train/samples_per_second"} for row in rows
    ]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["train/loss"]) for row in table(folder) if "train/loss" in row]


def assert_same(one: Path, other: Path) -> None:
    """Two runs logged the same and ended with the same state."""
    a, b = table(one), table(other)
    assert [row["step"] for row in losses_of(a)] == list(range(STEPS)) == [row["step"] for row in losses_of(b)]
    key = lambda row: (row["step"], sorted(row))  # noqa: E731
    for first, second in zip(sorted(a, key=key), sorted(b, key=key), strict=True):
        assert first == pytest.approx(second, rel=1e-5, nan_ok=True)
    rows = [json.loads((run / "fid.json").read_text()) for run in (one, other)]
    scores = [{row["step"]: row["val/fid"] for row in one} for one in rows]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and scores[0]
    for name in ("last", "best"):
        states = [torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (one, other)]
        for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
            torch.testing.assert_close(
                *(state[part] for state in states), msg=lambda text, part=part: f"{part}: {text}"
            )
        best = [
            [float(s["best_model_score"]) for k, s in state["callbacks"].items() if "'val/fid'" in k]
            for state in states
        ]
        assert best[0] == pytest.approx(best[1], rel=1e-5) and best[0]


def losses_of(rows):
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("step", [1, EVERY + 1, EPOCH - 1, EPOCH, EPOCH + 1])
def test_any_step_can_be_resumed_from(whole, tmp_path, step):
    """In the middle of an epoch, at its end and after it."""
    copy = tmp_path / "runs" / "bellman-diffusion" / "whole"
    shutil.copytree(whole, copy)
    (copy / "checkpoints" / f"at-{step}.ckpt").rename(copy / "checkpoints" / "last.ckpt")
    assert train.main([f"ckpt_path={copy}/checkpoints/last.ckpt", "callbacks.every=null"]) == 0
    assert_same(whole, copy)


@pytest.fixture
def heard():
    """Ctrl-C reaches Python, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_best_score_moves_with_the_folder(tmp_path):
    def best(folder):
        return ModelCheckpoint(dirpath=str(tmp_path / folder / "checkpoints"), filename="best", monitor="val/fid")

    old, new = best("old"), best("new")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / "checkpoints" / "best.ckpt").touch()
    old.best_model_score = torch.tensor(3.0)
    old.best_model_path = old.kth_best_model_path = f"{old.dirpath}/best.ckpt"
    old.best_k_models = {old.best_model_path: old.best_model_score}
    checkpoint = {"callbacks": {old.state_key: old.state_dict()}}
    carry_over(new, checkpoint["callbacks"][new.state_key])
    new.load_state_dict(checkpoint["callbacks"][new.state_key])
    assert new.best_model_score == 3 and list(new.best_k_models) == [f"{new.dirpath}/best.ckpt"]


def status(words: list[str]) -> int:
    """What the command exits with."""
    try:
        return train.main(words)
    except SystemExit as stop:
        return stop.code


def start(root: Path, run_id: str, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """A run as a process of its own."""
    command = [sys.executable, *launcher, "train.py", *words(root, run_id, *more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


KILLED = {"batch": (2 * EPOCH + 1, 2 * EPOCH), "validation": (2 * EVERY, EPOCH), "saving": (EPOCH + 3, EPOCH + 2)}


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(where, whole, root, tmp_path):
    step, saved = KILLED[where]
    killer = f"callbacks.killer={{_target_: faults.KillAt, step: {step}, where: {where}}}"
    done = start(root, where, "trainer=cpu", killer)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    run = folder(root, where)
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    assert last.with_name("last.ckpt.part").is_file() == (where == "saving")
    assert train.main([f"ckpt_path={last}", "callbacks.killer=null"]) == 0
    assert_same(whole, run)
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("signum", "where"),
    [
        *(("SIGTERM", where) for where in ("batch", "step", "validation", "drawing", "end")),
        *(("SIGINT", where) for where in ("batch", "step", "validation", "end")),
    ],
)
def test_a_stopped_run_saves_first_and_says_how_to_resume(signum, where, whole, root, capsys, heard):
    name = f"{signum}-{where}"
    step = STEPS if where == "end" else 2 * EVERY  # the last validation
    killer = f"callbacks.killer={{_target_: faults.KillAt, step: {step}, where: {where}, signum: {signum}}}"
    found = status(words(root, name, "trainer=cpu", killer, "callbacks.last.every=0", "ckpt_path=last"))
    assert found == (143 if signum == "SIGTERM" else 130)
    last = folder(root, name) / "checkpoints" / "last.ckpt"
    assert f"to resume: train.py ckpt_path={short(last)}" in capsys.readouterr().out
    assert torch.load(last, weights_only=True)["global_step"] >= 2 * EVERY
    where = f"root={root / 'runs'}", f"run_id={name}"
    assert train.main([*where, "ckpt_path=last", "callbacks.killer=null"]) == 0  # what a requeued job does
    assert_same(whole, folder(root, name))
    before = {path: path.read_bytes() for path in folder(root, name).rglob("*") if path.is_file()}
    assert train.main([*where, "ckpt_path=last", "callbacks.killer=null"]) == 0  # and once more
    assert {path: path.read_bytes() for path in folder(root, name).rglob("*") if path.is_file()} == before
    assert "nothing is left to train" in capsys.readouterr().out


UNJUDGED = ["callbacks.metrics=null", "callbacks.best=null"]


@pytest.mark.parametrize(
    ("stopped", "step", "every"),
    [
        *(("step", EPOCH - 1, 1), ("step", EPOCH, 2), ("step", EVERY, 8), ("step", EVERY + 2, 16)),
        *(("saved", 3, 1), ("saved", EPOCH, 2), ("saved", 2 * EVERY, 16), ("validation", 2 * EVERY, 16)),
    ],
)
def test_a_run_that_validates_at_other_steps_trains_as_before(stopped, step, every, whole, tmp_path, heard):
    run = folder(tmp_path, "other")
    if stopped == "saved":
        shutil.copytree(whole, run)
        (run / "checkpoints" / f"at-{step}.ckpt").rename(run / "checkpoints" / "last.ckpt")
    else:
        killer = f"callbacks.killer={{_target_: faults.KillAt, step: {step}, where: {stopped}, signum: SIGINT}}"
        assert status(words(tmp_path, "other", "trainer=cpu", killer, "callbacks.last.every=0", *UNJUDGED)) == 130
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    known = [int(row["step"]) + 1 for row in table(run) if "val/loss" in row and row["step"] < step]
    own = ["callbacks.every=null"] if stopped == "saved" else ["callbacks.killer=null"]
    assert train.main([f"ckpt_path={last}", f"eval_every={every}", *own, *UNJUDGED]) == 0
    assert [row for row, _ in losses(run)] == list(range(STEPS))
    assert dict(losses(run)) == pytest.approx(dict(losses(whole)), rel=1e-5)
    validated = [int(row["step"]) + 1 for row in table(run) if "val/loss" in row]
    begun = step if step not in known else step + 1
    assert validated == known + [one for one in range(begun, STEPS + 1) if one % every == 0]
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (whole, run)]
    for part in ("current_model_state", "state_dict", "optimizer_states"):
        torch.testing.assert_close(*(state[part] for state in states))


def test_a_run_that_no_longer_averages_goes_on_from_its_current_weights(whole, tmp_path):
    found = []
    for name, more in (("averaged", []), ("plain", ["callbacks.ema=null"])):
        run = folder(tmp_path, name)
        shutil.copytree(whole, run)
        last = (run / "checkpoints" / f"at-{EPOCH}.ckpt").rename(run / "checkpoints" / "last.ckpt")
        assert train.main([f"ckpt_path={last}", "callbacks.every=null", *UNJUDGED, *more]) == 0
        found.append((losses(run), torch.load(last, weights_only=True)))
    (averaged, one), (plain, other) = found
    assert dict(plain) == pytest.approx(dict(averaged), rel=1e-5) and "current_model_state" not in other
    torch.testing.assert_close(other["state_dict"], one["current_model_state"])


def test_another_number_of_accumulated_batches_is_refused(whole, tmp_path, capsys):
    last, own = whole / "checkpoints" / f"at-{EPOCH}.ckpt", [f"root={tmp_path}", "run_id=other"]
    assert train.main([f"ckpt_path={last}", "trainer.accumulate_grad_batches=2", *own]) == 2
    assert "was trained with trainer.accumulate_grad_batches=1, by which its batches are counted, not 2" in (
        capsys.readouterr().err
    )
    assert train.main(["trainer.fast_dev_run=true", *own]) == 2
    assert "'trainer.fast_dev_run' is set by train.py; leave it out (steps and eval_every" in capsys.readouterr().err


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_loses_no_gradients_that_are_accumulated(signum, tmp_path, capsys, heard):
    """It is asked to stop at the first of three batches of a step."""
    rows = ["trainer.accumulate_grad_batches=3", "data.batch_size=100", "steps=5", "eval_every=5", "trainer=cpu"]
    rows += ["callbacks.metrics=null", "callbacks.best=null", "callbacks.last.every=0", "callbacks.memorisation=null"]
    assert train.main(words(tmp_path, "whole", *rows)) == 0
    killer = f"callbacks.killer={{_target_: faults.KillAt, step: 2, signum: {signum}}}"
    assert status(words(tmp_path, "stopped", *rows, killer, "ckpt_path=last")) > 128
    last = [folder(tmp_path, name) / "checkpoints" / "last.ckpt" for name in ("whole", "stopped")]
    assert torch.load(last[1], weights_only=True)["global_step"] == 3
    assert train.main([f"ckpt_path={last[1]}", "callbacks.killer=null"]) == 0
    states = [torch.load(path, weights_only=True) for path in last]
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        torch.testing.assert_close(*(state[part] for state in states))
    steps = [[step for step, _ in losses(path.parent.parent)] for path in last]
    assert steps[0] == steps[1]


def test_a_run_that_fails_between_accumulated_batches_repeats_their_step(tmp_path, monkeypatch):
    """Every step that is logged is of three batches, before and after."""
    rows = ["trainer.accumulate_grad_batches=3", "data.batch_size=100", "steps=5", "eval_every=5", "trainer=cpu"]
    rows += ["callbacks.metrics=null", "callbacks.best=null", "callbacks.last.every=0", "callbacks.memorisation=null"]
    compute, calls = BellmanDiffusion.compute, []

    def broken(self, *args):
        if self.training and calls.append(self.trainer.global_step) is None and len(calls) == 8:
            raise RuntimeError("a broken disk")
        return compute(self, *args)

    monkeypatch.setattr(BellmanDiffusion, "compute", broken)
    with pytest.raises(RuntimeError, match="a broken disk"):
        train.main(words(tmp_path, "failed", *rows))
    last = folder(tmp_path, "failed") / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2 and calls[6:] == [2, 2]
    calls[:] = [0] * 10  # no more faults
    assert train.main([f"ckpt_path={last}"]) == 0
    assert calls[10:] == [2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [step for step, _ in losses(last.parent.parent)] == list(range(5))


def test_an_interrupt_waits_for_what_must_not_be_half_done(heard):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
        done.append("more")
    assert done == ["all of it"]


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(whole, root, capsys):
    full = f"callbacks.full={{_target_: faults.FillDisk, step: {EPOCH + 3}}}"
    assert train.main(words(root, "full", "trainer=cpu", full)) == 2
    last = folder(root, "full") / "checkpoints" / "last.ckpt"
    printed = capsys.readouterr()
    assert re.search(r"error: cannot write the checkpoint .*last.ckpt \(No space left on device\)", printed.err)
    assert "is intact" in printed.err and "Traceback" not in printed.err and "to resume: train.py" in printed.out
    assert torch.load(last, weights_only=True)["global_step"] == EPOCH + 2
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert train.main([f"ckpt_path={last}", "callbacks.full=null"]) == 0
    assert_same(whole, folder(root, "full"))


def test_steps_that_are_not_finite_are_left_out_and_counted(root):
    poison = "callbacks.poison={_target_: faults.Poison, steps: [3, 5]}"
    skip = "callbacks.diagnostics.nonfinite=skip"
    assert (
        train.main(words(root, "skip", "trainer=cpu", poison, skip, "callbacks.metrics=null", "callbacks.best=null"))
        == 0
    )
    run = folder(root, "skip")
    counts = {int(row["step"]): row["train/skipped_steps"] for row in table(run) if "train/skipped_steps" in row}
    assert (counts[3], counts[5], max(counts.values())) == (1, 2, 2)
    logged = dict(losses(run))
    assert [step for step, loss in logged.items() if not math.isfinite(loss)] == [3, 5]
    kept = torch.load(run / "nonfinite-batch-rank0.pt", weights_only=True)
    assert kept["step"] == 5 and kept["batch"][0].isinf().all()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in state["current_model_state"].values())


def test_two_processes_resume_alike(root):
    """Killed, then asked to stop, each by a signal to one of them; with a batch on one that both leave out."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    poison = "callbacks.poison={_target_: faults.Poison, steps: [3], rank: 1}"
    skip = "callbacks.diagnostics.nonfinite=skip"
    both = "trainer=ddp_cpu", "data.batch_size=125", f"data.root={root / 'fresh'}", poison, skip
    done = start(root, "two", *both, launcher=torchrun)
    assert done.returncode == 0, done.stdout + done.stderr
    killer = f"callbacks.killer={{_target_: faults.KillAt, step: {EPOCH + 3}}}"
    assert start(root, "two-killed", *both, killer).returncode != 0
    last = folder(root, "two-killed") / "checkpoints" / "last.ckpt"
    killer = f"callbacks.killer={{_target_: faults.KillAt, step: {3 * EVERY}, signum: SIGTERM, rank: 1}}"
    done = start(root, "two-killed", f"ckpt_path={last}", killer, "callbacks.last.every=0", *both, launcher=torchrun)
    assert done.returncode != 0 and "to resume: train.py" in done.stdout, done.stdout + done.stderr
    assert torch.load(last, weights_only=True)["global_step"] == 3 * EVERY + 1
    done = start(root, "two-killed", f"ckpt_path={last}", "callbacks.killer=null", "callbacks.last.every=2", *both)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder(root, "two"), folder(root, "two-killed"))


def test_weights_that_are_not_finite_overwrite_no_checkpoint(tmp_path, caplog):
    """Nobody else looks: the diagnostics that would have stopped the run are left out."""
    words = ["callbacks.diagnostics=null", "callbacks.report=null", "callbacks.last.every=2", "run_id=a"]
    assert launch(tmp_path / "root", *words) == 0
    last = tmp_path / "root" / "bellman-diffusion" / "a" / "checkpoints" / "last.ckpt"
    words = ["callbacks.ema=null", "model.lr=1e30", "trainer.gradient_clip_val=0", "steps=12", f"ckpt_path={last}"]
    with caplog.at_level("INFO"):
        assert launch(tmp_path / "root", *words) == 2
    kept = checkpoints.read(last)
    assert all(value.isfinite().all() for value in kept["state_dict"].values()) and kept["global_step"] < 12
    assert "weights are not finite at step 12: last.ckpt stays as it is" in caplog.text
