"""Configs and checkpoints of the first format load, go on and draw what they drew when they were written.

`checkpoints/v1` holds checkpoints of small runs of 20 steps, what `predict n=4 seed=3` wrote from each, and the losses
of the same runs resumed to step 30, all by the code that wrote them. Paths in them were made relative.
Samples are drawn from the noise of then.
Losses of returns are of today: a run that goes on no longer meets the experience that it began with; so are those of
`default`, whose kernel weighted them otherwise.
Validation losses are kept where the held-out data are the same today; those of the digits were cut in two since.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train
from bd_lightning import checkpoints, facts
from bd_lightning.checks import UserError
from bd_lightning.cli import build, config
from bd_lightning.upgrade import FORMAT, MOVED, refuse_old, upgrade
from earlier_noise import earlier_noise

V1 = Path(__file__).parent / "checkpoints" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
OBJECTIVE = "bd_lightning.objectives."


@pytest.fixture(params=EXPECTED)
def old(request, tmp_path) -> tuple[str, Path]:
    """The name and a copy of a checkpoint, where a run would have it."""
    if request.param == "returns":
        pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")
    folder = tmp_path / "runs" / "bellman-diffusion" / request.param / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(V1 / f"{request.param}.ckpt", folder / "last.ckpt")
    (folder.parent / "config.yaml").write_text("format: 1\n")  # marks a run folder
    return request.param, folder / "last.ckpt"


def test_old_checkpoints_draw_what_they_drew(old):
    name, path = old
    expected = EXPECTED[name]
    if "folder" not in expected:
        pytest.skip("an autoencoder draws nothing")
    with earlier_noise():
        assert train.main(["predict", f"ckpt_path={path}", "n=4", "seed=3", "callbacks.progress=null"]) == 0
    folder = path.parent.parent / expected["folder"]
    if "rows" in expected:
        rows = list(csv.reader((folder / "samples.csv").open()))[1:]
        assert np.array(rows, dtype=float) == pytest.approx(np.array(expected["rows"]), rel=1e-5, abs=1e-6)
    else:
        images = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(4)]
        assert np.abs(np.stack(images).astype(int) - np.array(expected["images"])).max() <= 1  # rounding to bytes


def test_old_checkpoints_go_on_as_they_did(old):
    name, path = old
    words = [f"ckpt_path={path}", "steps=30", "eval_every=10", "trainer.log_every_n_steps=2", "callbacks.progress=null"]
    place = path.parents[4]
    assert train.main([*words, f"root={place / 'runs'}", f"data.root={place / 'data'}"]) == 0
    rows = list(csv.DictReader((path.parent.parent / "metrics.csv").open()))
    for key, losses in EXPECTED[name]["losses"].items():
        found = {row["step"]: float(row[key]) for row in rows if row.get(key)}
        assert found == pytest.approx(losses, rel=1e-5), key
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert stored["format"] == FORMAT and "kind" in stored["facts"]
    assert yaml.safe_load((path.parent.parent / "config.yaml").read_text())["format"] == FORMAT


@pytest.mark.parametrize("name", EXPECTED)
def test_old_configs_are_valid_in_todays_words(name, tmp_path):
    """As a checkpoint's, and as a record given by --config."""
    stored = torch.load(V1 / f"{name}.ckpt", weights_only=True)["hyper_parameters"]
    before = json.dumps(stored)
    new = upgrade(stored)
    assert json.dumps(stored) == before and upgrade(new) == new
    assert facts.read(new["facts"]).plain() == new["facts"]
    record = {key: value for key, value in stored.items() if key != "facts"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    composed = config.compose(config.parse(["--config", str(tmp_path / "config.yaml")]))
    build.check(composed)
    since = {"trust": False, "export": None, "calls": None, "likelihood": None, "inpaint": None}
    since |= dict.fromkeys(("upscale", "draws", "images", "to", "precision", "length", "score"))
    assert {**composed, "format": FORMAT} == {**{k: v for k, v in new.items() if k != "facts"}, **since}


def test_what_the_first_format_left_out_is_what_it_took():
    model = {"_target_": "bd_lightning.modules.BellmanDiffusion", "kernel": {"_target_": "k"}, "samplers": {}}
    new = upgrade({"model": model})["model"]
    assert new["objective"] == {"_target_": OBJECTIVE + "FieldDivergence", "trace": "stein", "scalar_weight": 0.1}
    assert new["noise"] == {"_target_": OBJECTIVE + "NoiseLevels", "mean": -0.8, "std": 1.2}
    assert new["partners"] == {"_target_": OBJECTIVE + "Partners", "pairs": "all", "queries": None, "gather": False}
    new = upgrade({"model": {**model, "estimator": "divergence", "multi_scale": False}})["model"]
    assert new["objective"]["trace"] == "hutchinson" and new["noise"] is None
    new = upgrade({"model": {**model, "estimator": "denoising", "trace": "sliced"}})["model"]
    assert new["objective"]["trace"] == "stein"  # the first format did not look at trace here
    proposal = {"_target_": "bd_lightning.divergences.Proposal", "uniform": 0.4}
    new = upgrade({"model": {**model, "estimator": "regression", "proposal": proposal}})["model"]
    assert new["objective"]["proposal"] == {"_target_": OBJECTIVE + "Proposal", "box": 0.4}


def test_adam_of_the_second_format_is_an_optimizer_now():
    new = upgrade({"format": 2, "model": {"_target_": "m", "betas": [0.9, 0.95], "lr": 0.1}})
    adam = {"_target_": "bd_lightning.optimizers.AdamW", "betas": [0.9, 0.95]}
    assert new["model"] == {"_target_": "m", "lr": 0.1, "optimizer": adam} and new["format"] == FORMAT


def test_a_later_format_is_refused_by_name(tmp_path, capsys):
    checkpoint = torch.load(V1 / "default.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["format"] = FORMAT + 1
    path = tmp_path / "later.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(
        UserError, match=f"later.ckpt was written by a later version of this suite .format {FORMAT + 1}"
    ):
        checkpoints.read(path)
    (tmp_path / "config.yaml").write_text(f"format: {FORMAT + 1}\nsteps: 3\n")
    assert train.main(["--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"this code reads up to {FORMAT}): update it" in said and len(said.splitlines()) == 1
    (tmp_path / "config.yaml").write_text("format: new\n")
    assert train.main(["--config", str(tmp_path / "config.yaml")]) == 2
    assert "the format 'new', which is not one of this suite's" in capsys.readouterr().err


OLD_WORDS = [
    ("model.estimator=denoising", "'model.estimator=denoising' is now 'model.objective.trace=stein'"),
    ("model.estimator=divergence", "'model.estimator=divergence' is now 'model.objective.trace=hutchinson'"),
    ("model.estimator=regression", "is now 'model.objective._target_=bd_lightning.objectives.KernelRegression'"),
    ("model.estimator=denosing", "'model.estimator' is now 'model.objective': model.objective.trace=stein, model.ob"),
    ("model.multi_scale=false", "'model.multi_scale' is now 'model.noise': model.noise=null is a single scale"),
    ("model.kernel={_target_: bd_lightning.kernels.Relative}", "is now model=relative"),
    ("model.proposal={_target_: bd_lightning.divergences.Proposal}", "is now bd_lightning.objectives.Proposal"),
    ("model.samplers.sde.churn=0.5", "'model.samplers.sde.churn' is now 'model.samplers.sde.relaxation'"),
    ("model.weight_decay=0.1", "'model.weight_decay' is now 'model.optimizer.weight_decay'"),
    ("model=relative model.noise_mean=-0.5", "'model.noise_mean' is now 'model.noise.mean'"),
    ("model=returns model.uniform=1", "'model.uniform' is now 'model.uniform_policy'"),
    *((f"model.{key}=1", f"'model.{key}' is now 'model.{MOVED[key]}'") for key in MOVED),
]


@pytest.mark.parametrize(("words", "answer"), OLD_WORDS)
def test_old_words_are_answered_by_the_new_ones(words, answer, tmp_path):
    argv = words.split(" ") if words.startswith("model=") else [words]
    with pytest.raises(UserError) as caught:
        build.check(config.compose(config.parse(argv)))
    assert answer in str(caught.value) and "\n" not in str(caught.value)
    if len(argv) == 1:  # the same in a fragment
        key, _, text = words.partition("=")
        nested = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested))
        with pytest.raises(UserError) as caught:
            build.check(config.compose(config.parse(["--config", str(tmp_path / "mine.yaml")])))
        assert answer in str(caught.value)


def test_words_that_still_mean_something_are_left_alone():
    composed = config.compose(config.parse(["model.samplers.ode.churn=2.0"]))
    refuse_old(composed)
    build.check(composed)
