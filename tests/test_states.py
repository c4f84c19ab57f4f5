"""States of a checkpoint, which Lightning believes, change nothing outside the run, and are refused where damaged."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import train
from bd_lightning.cli import resumed
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
    "path",
    [
        "/z/../{0}",
        "local://{0}",
        "{0}",
        "/z/local://{0}",
        "/z//{0}.ckpt",
        "/z/a/../..{0}.ckpt",
        "{1}/../../../../victim.ckpt",
    ],
)
def test_paths_of_a_checkpoint_delete_nothing(path, resume, tmp_path):
    """Lightning removes what it takes for an earlier checkpoint, a folder with all that is in it."""
    files = [tmp_path / name / "file" for name in ("victim", "victim.ckpt")]
    for file in files:
        file.parent.mkdir()
        file.touch()
    own = tmp_path / "runs" / "bellman-diffusion" / "a" / "checkpoints"
    place = path.format(tmp_path / "victim", own)

    def change(checkpoint):
        for name, state in checkpoint["callbacks"].items():
            if "Checkpoint" in name:
                state |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), place)
                state |= {
                    "dirpath": str(own) if "{1}" in path else "/z",
                    "best_k_models": {place: torch.tensor(1e9)},
                    "kth_value": torch.tensor(1e9),
                }

    status, _ = resume(change)
    assert status == 0 and all(file.is_file() for file in files)
    assert sorted(path.name for path in (tmp_path / "runs").rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("k", "mode", "kept", "worst"),
    [
        (3, "min", "abc", "b"),
        (4, "min", "abc", ""),
        (2, "min", "ac", "c"),
        (1, "max", "b", "b"),
        (0, "min", "", ""),
        (-1, "max", "abc", ""),
    ],
)
def test_files_of_the_run_are_carried_over(k, mode, kept, worst, tmp_path):
    """Those that are there, as many as are kept now; in a folder of a metric's name, too, as Lightning makes them."""
    names = {"a": "val/loss=1:2.ckpt", "b": "b.ckpt", "c": "c.ckpt"}
    for name in (*names.values(), "last.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scores = {"a": 1.0, "b": 3.0, "c": 2.0}
    state = {"dirpath": "/old", "best_model_path": "/old/gone.ckpt", "last_model_path": "/older/last.ckpt"}
    state |= {"best_k_models": {f"/old/{names[key]}": torch.tensor(score) for key, score in scores.items()}}
    state["best_k_models"]["/old/gone.ckpt"] = torch.tensor(2.5)
    carry_over(ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=k, mode=mode), state)
    place = {key: str(tmp_path / name) for key, name in names.items()}
    best = {"min": "a", "max": "b"}[mode] if kept else ""
    assert sorted(state["best_k_models"]) == sorted(place[key] for key in kept)
    assert state["best_model_path"] == place.get(best, "") and state["kth_best_model_path"] == place.get(worst, "")
    assert state["kth_value"] == scores.get(worst, math.inf if mode == "min" else -math.inf)
    assert state["last_model_path"] == "" and state["dirpath"] == str(tmp_path)


SCORES = {
    "text": "x", "meta": torch.empty((), device="meta"), "nan": torch.tensor(math.nan),
    "sparse": torch.tensor([1.0]).to_sparse(),
}  # fmt: skip


@pytest.mark.parametrize("name", ["text", "meta", "nan", "sparse", "sums", "step"])
def test_damaged_states_are_one_sentence(name, resume):
    def change(checkpoint):
        if name == "step":
            checkpoint["optimizer_states"][0]["state"][0]["step"] = torch.tensor(True)
        elif name == "sums":
            checkpoint["callbacks"]["FieldDiagnostics"]["sums"]["count"] = "many"
        else:
            state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
            state["best_k_models"] = {f"{state['dirpath']}/best.ckpt": SCORES[name]}

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


def test_a_run_ends_with_its_last_step(tmp_path):
    """Batches that do not fill a step are left out of an epoch, so that validations keep their steps; the last
    checkpoint holds the scores of all others.
    """
    words = ["data.batch_size=100", "model=mlp", "model.network.width=8", "model.network.depth=1"]
    words += ["callbacks=points", "callbacks.metrics=null", "callbacks.figures=null", "callbacks.trajectory=null"]
    words += ["callbacks.report=null", "callbacks.progress=null", "callbacks.best=null", "logger=none", "run_id=a"]
    words += ["callbacks.last.every=0", "trainer.accumulate_grad_batches=2", "steps=12", "eval_every=4"]
    node = f"{BEST[:-1]}, mode: max, save_top_k: 2}}".replace("filename: best", "filename: 'w{val/loss:.3f}{step}'")
    words += [f"root={tmp_path / 'runs'}", f"data.root={tmp_path}", f"callbacks.more={node}"]
    assert train.main(words) == 0
    (folder,) = tmp_path.rglob("checkpoints")
    last = torch.load(folder / "last.ckpt", weights_only=True)
    (state,) = (state for key, state in last["callbacks"].items() if key.startswith("ModelCheckpoint"))
    assert last["global_step"] == 12 and last["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] >= 1
    assert sorted(state["best_k_models"]) == sorted(str(path) for path in folder.rglob("*step=*.ckpt"))
    assert train.main([f"ckpt_path={folder / 'last.ckpt'}", "steps=16", "callbacks.progress=null"]) == 0


def test_a_split_that_fills_no_step_is_refused(tmp_path, capsys):
    """Of 1,500 images two batches of 750 are the most."""
    words = ["data.batch_size=1000", "trainer.accumulate_grad_batches=2", "steps=2", "eval_every=2", "logger=none"]
    assert train.main([*words, f"root={tmp_path / 'runs'}", f"data.root={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert (
        "for each of 2 that are accumulated; set data.batch_size to 750 or less" in said and said.count("error: ") == 1
    )


@pytest.mark.parametrize(("key", "value", "said"), [
    ("metrics", {"reference": "train", "n": 500}, True), ("metrics", {"reference": "val", "n": 500}, False),
    ("ema", {"decay": 0.9}, False),
])  # fmt: skip
def test_scores_of_another_protocol_are_said_not_to_compare(key, value, said):
    before = {"callbacks": {"metrics": {"reference": "val", "n": 500}, "ema": {"decay": 0.99}}}
    now = {"callbacks": before["callbacks"] | {key: value}}
    remark = resumed.changed(SimpleNamespace(checkpoint={"hyper_parameters": before}, config=now))
    assert ("scores from here on do not compare with those before" in remark) == said
    assert bool(remark) == (now != before)
