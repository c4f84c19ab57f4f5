"""States of a checkpoint, which Lightning believes, change nothing outside the run, and are refused where damaged."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import train
from bd_lightning.cli.resumed import carry_over

V1 = Path(__file__).parent / "checkpoints" / "v1" / "default.ckpt"
BEST = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, filename: best, monitor: val/loss}"


@pytest.fixture
def resume(tmp_path, capsys):
    """Resumes a checkpoint whose states are changed first; returns the exit status and what was said."""

    def begin(change) -> tuple[int, str]:
        checkpoint = torch.load(V1, weights_only=True)
        last = next(key for key in checkpoint["callbacks"] if key.startswith("LastCheckpoint"))
        best = ModelCheckpoint(monitor="val/loss")
        checkpoint["callbacks"][best.state_key] = copy.deepcopy(checkpoint["callbacks"][last])
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "stranger.ckpt")
        words = [f"ckpt_path={tmp_path / 'stranger.ckpt'}", f"root={tmp_path / 'runs'}", "run_id=a", "logger=none"]
        words += [f"data.root={tmp_path}", "steps=24", "eval_every=2", "callbacks.progress=null"]
        status = train.main([*words, f"callbacks.best={BEST}"])
        return status, capsys.readouterr().err

    return begin


@pytest.mark.parametrize(
    "path", ["/z/../{0}", "local://{0}", "{0}", "/z/local://{0}", "/z//{0}.ckpt", "/z/a/../..{0}.ckpt"]
)
def test_paths_of_a_checkpoint_delete_nothing(path, resume, tmp_path):
    """Lightning removes what it takes for an earlier checkpoint, a folder with all that is in it."""
    files = [tmp_path / name / "file" for name in ("victim", "victim.ckpt")]
    for file in files:
        file.parent.mkdir()
        file.touch()
    place = path.format(tmp_path / "victim")

    def change(checkpoint):
        for name, state in checkpoint["callbacks"].items():
            if "Checkpoint" in name:
                state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), place)
                state |= {"dirpath": "/z", "best_k_models": {place: torch.tensor(1e9)}, "kth_value": torch.tensor(1e9)}

    status, _ = resume(change)
    assert status == 0 and all(file.is_file() for file in files)
    assert sorted(path.name for path in (tmp_path / "runs").rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_files_of_the_run_are_carried_over():
    """In a folder of a metric's name, too, as Lightning makes them."""
    score = torch.tensor(1.0)
    state = {"dirpath": "/old", "best_model_path": "/old/a/b=1.ckpt", "kth_best_model_path": "/old/c.ckpt"}
    state |= {"last_model_path": "/older/last.ckpt", "best_k_models": {"/old/a/b=1.ckpt": score, "/old/c.ckpt": score}}
    callback = ModelCheckpoint("/new", monitor="val/loss", save_top_k=3)
    carry_over(callback, state)
    assert state["best_model_path"] == "/new/a/b=1.ckpt" and list(state["best_k_models"])[1] == "/new/c.ckpt"
    assert state["kth_best_model_path"] == "/new/c.ckpt" and state["last_model_path"] == ""
    carry_over(callback, state | {"kth_best_model_path": ""})  # Lightning names the worst when there are three


@pytest.mark.parametrize(
    "name", ["best_model_score", "kth_value", "best_k_models", "kth_best_model_path", "sums", "step"]
)
def test_damaged_states_are_one_sentence(name, resume):
    def change(checkpoint):
        if name == "step":
            checkpoint["optimizer_states"][0]["state"][0]["step"] = torch.tensor(True)
        elif name == "sums":
            checkpoint["callbacks"]["FieldDiagnostics"]["sums"]["count"] = "many"
        else:
            state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
            state["best_k_models"] = {f"{state['dirpath']}/best.ckpt": torch.tensor(1.0)}
            state["kth_best_model_path"] = state["best_model_path"] = f"{state['dirpath']}/best.ckpt"
            state[name] = {"best_k_models": {"a": "x"}}.get(name, "x")

    status, said = resume(change)
    assert status == 2 and said.count("error: ") == 1 and "its states are damaged" in said and "Traceback" not in said


LOOPS = {
    "epoch_loop.val_loop.batch_progress": ("total", "ready"),
    "epoch_loop.automatic_optimization.optim_progress": ("optimizer", "step", "total", "ready"),
    "epoch_progress": ("current", "completed"),
    "epoch_loop.batch_progress": ("is_last_batch",),
}


@pytest.mark.parametrize("place", LOOPS)
@pytest.mark.parametrize("value", [{}, None, [], "x", -1, 1.5])
def test_counts_that_are_none_are_one_sentence(place, value, resume):
    def change(checkpoint):
        at = checkpoint["loops"]["fit_loop"][place]
        *way, last = LOOPS[place]
        for key in way:
            at = at[key]
        at[last] = value

    status, said = resume(change)
    assert status == 2 and said.count("error: ") == 1 and place in said and "Traceback" not in said
