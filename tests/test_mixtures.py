"""Mixtures of classes from the command line, end to end on digits."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import train
from bd_lightning.checks import UserError
from bd_lightning.combinations import class_name, corrected
from callbacks import ClassifierFeatures
from datamodules import Digits

WORDS = ["model=relative", "model.network.width=128", "model.network.depth=2", "data.batch_size=256", "trainer=cpu"]
WORDS += ["model.samplers.sde.levels=40", "callbacks.metrics=null", "callbacks.best=null", "callbacks.trajectory=null"]
WORDS += ["callbacks.grid=null", "logger=none", "model.lr=4e-3"]


FK = "model.samplers.fk={_target_: bd_lightning.dynamics.FeynmanKac, levels: 3}"


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def fit(root: Path, name: str, steps: int, *words: str) -> Path:
    command = [*WORDS, f"steps={steps}", f"eval_every={steps}", f"run_id={name}", f"root={root / 'runs'}", *words]
    assert train.main(command) == 0
    return root / "runs" / "bellman-diffusion" / name / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def whole(root) -> Path:
    return fit(root, "whole", 300)


@pytest.fixture(scope="session")
def halves(root) -> tuple[Path, Path]:
    return (
        fit(root, "low", 350, "data.keep=[0,1,2,3,4]"),
        fit(root, "high", 350, "data.keep=[5,6,7,8,9]"),
    )


@pytest.fixture(scope="session")
def classify(root):
    features = ClassifierFeatures()
    features.prepare(Digits(root=str(root / "data")))

    def count(folder: Path) -> torch.Tensor:
        """Shares of the classes in the images of a folder."""
        images = torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("0*.png"))])
        return torch.bincount(features.classify(images), minlength=10) / len(images)

    return count


def predict(checkpoint: Path, seed: int, *words: str) -> Path:
    assert train.main(["predict", f"ckpt_path={checkpoint}", "n=200", f"seed={seed}", *words]) == 0
    (folder,) = checkpoint.parent.parent.glob(f"predict-sde-seed{seed}*")
    assert len(list(folder.glob("0*.png"))) == 200 and (folder / "grid.png").is_file()
    return folder


def test_mix_asks_for_weights_of_classes(whole, classify):
    shares = classify(predict(whole, 1, "mix={3: 0.75, 0: 0.25}"))
    assert shares[3] == pytest.approx(0.75, abs=0.15) and shares[0] == pytest.approx(0.25, abs=0.15)
    assert shares[3] + shares[0] > 0.75


def test_calibration_brings_the_shares_to_what_was_asked(whole, classify):
    """As the fields of a short training see them: the classifier finds 0.62 with and without."""
    shares = classify(predict(whole, 8, "mix={3: 0.75, 0: 0.25}", "calibrate=1000"))
    assert shares[3] == pytest.approx(0.75, abs=0.18) and shares[3] + shares[0] > 0.75


def test_pilot_samples_are_all_different_and_none_that_a_user_draws(monkeypatch):
    drawn = []

    class Model:
        def sample(self, indices, seed, fields):
            drawn.append((list(indices), seed, fields))
            return torch.zeros(len(indices), 2)

    monkeypatch.setattr("bd_lightning.fields.calibrated", lambda mixture, draw: len(draw(mixture)))
    assert corrected(Model(), "a mixture", 1200) == 1200
    assert [index for indices, *_ in drawn for index in indices] == list(range(1200)) and len(drawn) > 1
    assert all(seed >= 2**32 and fields == "a mixture" for _, seed, fields in drawn)
    assert corrected(Model(), "a mixture", 0) == "a mixture"


def test_remove_leaves_a_class_out(whole, classify):
    before, after = classify(predict(whole, 2)), classify(predict(whole, 3, "remove=[4, 6]"))
    assert before[[4, 6]].sum() > 0.1 and after[[4, 6]].sum() < before[[4, 6]].sum() / 3


def test_labels_ask_for_classes_one_by_one(whole, classify):
    shares = classify(predict(whole, 4, "labels=[2]"))
    assert shares[2] > 0.8


def test_guidance_without_labels_asks_for_all_classes_in_turn(whole, classify):
    """At predict as in a test and for the card of an export."""
    folder = predict(whole, 10, "model.guidance=2")
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("0*.png"))])
    features = ClassifierFeatures()
    features.prepare(Digits(root=str(whole.parents[4] / "data")))
    assert (features.classify(images) == torch.arange(200) % 10).float().mean() > 0.8


def test_merge_joins_models_of_disjoint_data(halves, classify):
    low, high = halves
    alone = classify(predict(low, 5))
    assert alone[:5].sum() > 0.7
    both = classify(predict(low, 6, f"merge={{{high}: 1.0}}"))
    assert 0.3 < both[:5].sum() < 0.7
    mixed = classify(predict(low, 7, f"merge={{{high}: 1.0}}", "mix={1: 0.5, 7: 0.5}"))
    assert mixed[[1, 7]].sum() > 0.6 and (mixed[[1, 7]] > 0.15).all()


def test_a_pattern_merges_all_that_it_stands_for(halves, classify):
    low, _ = halves
    pattern = low.parents[2] / "[lh]*" / "checkpoints" / "last.ckpt"
    both = predict(low, 9, f"merge={{'{pattern}': 1.0}}")
    assert both.name.endswith("highx1") and 0.3 < classify(both)[:5].sum() < 0.7


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["merge={'nowhere/*.ckpt': 1.0}"], "is at 'nowhere/*.ckpt': check the pattern, or name them one by one"),
        (["mix={cat: 1.0}"], "no class 'cat' was learned"),
        (["mix={3: -1.0}"], "the weights of the mixture sum to -1; they must sum to a positive number"),
        (["remove=[0,1,2,3,4,5,6,7,8,9]"], "sum to a positive number, and a class in remove has none"),
        (["mix={1: 1, '1': 2}"], "is not valid YAML (Conflicting integer and string keys: 1 and '1')"),
        (["mix={3: much}"], "'mix.3' must be float, got 'much'"),
        (["remove={7: 1}"], "'remove' must be"),
        (["remove=[7,7]"], "remove names class '7' twice"),
        (["mix={}"], "'mix' is empty: name what it is for, or leave it out"),
        (["mix={3: .nan, 8: 1.0}"], "weights of a mixture are numbers between 1e-30 and 1e+30 in size, or 0, got nan"),
        (["mix={3: 1.0e-60, 8: 1.0e-61}"], "numbers between 1e-30 and 1e+30 in size, or 0, got 1e-60"),
        (["mix={true: 2.0}"], "'mix' must be"),
        (["merge={1: 1.0}"], "'merge' must be"),
        (["merge=a.ckpt"], "got 'a.ckpt': write merge='{NAME: 1.0}', say"),
        (["mix={3: 1.0}", "calibrate=100000000000000"], "'calibrate' must lie between 0 and 1,000,000"),
        (["merge={'': 1.0}"], "a checkpoint has the empty path ''"),
        (["mix={3: 1.0}", "calibrate=-1"], "'calibrate' must lie between 0 and 1,000,000, got -1"),
        (["merge={nowhere.ckpt: 1.0}"], "checkpoint not found: nowhere.ckpt"),
        (["mix={3: 1.0}", "labels=[3]"], "give one of the two"),
        (["mix={3: 1.0}", "model.guidance=2"], "a mixture has none: add model.guidance=1"),
        (["labels=[3,8]", "model.sampler=fk", FK], "resamples chains of one class among each other: give one"),
        (["calls=[5]"], "'calls' is for train.py test"),
        (["data=mnist"], "predict draws what the checkpoint has learned: leave data= out"),
    ],
)
def test_mistakes(words, sentence, whole, capsys):
    assert train.main(["predict", f"ckpt_path={whole}", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_merged_models_are_named_once_and_mix_says_the_weights(halves, capsys):
    low, high = halves
    pattern = high.parents[2] / "hig*" / "checkpoints" / "last.ckpt"
    for words, sentence in (
        ([f"merge={{{high}: -1.0, '{pattern}': 1.0}}"], "merge names "),
        ([f"merge={{{high}: -1.0}}", "mix={1: 0.5, 7: 0.5}"], "mix says the weights of all classes"),
    ):
        assert train.main(["predict", f"ckpt_path={low}", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_a_number_is_the_name_of_a_class_where_names_are_numbers():
    assert class_name(1, ["cat", "dog"]) == "dog" and class_name(8, ["3", "8"]) == "8"
    with pytest.raises(UserError, match="no class '0' was learned. The classes are 3, 8."):
        class_name(0, ["3", "8"])
    with pytest.raises(UserError, match="this data set has no classes, so '0' is none of them: leave classes out"):
        class_name(0, [])


@pytest.mark.parametrize("command", ["test", "export"])
@pytest.mark.parametrize("word", ["mix={3: 1.0}", "labels=[3]", "remove=[3]", "n=3", "calibrate=9"])
def test_what_is_asked_of_samples_is_for_predict(command, word, whole, capsys):
    assert train.main([command, f"ckpt_path={whole}", word]) == 2
    assert f"'{word.partition('=')[0]}' is for train.py predict" in capsys.readouterr().err


def fit_tables(root: Path) -> list[Path]:
    """Models of tables: two around different means, and two of other columns around one that was given."""
    found = []
    for name, columns, shift, words in (
        ("near", "a,b", 0, []),
        ("far", "a,b", 50, []),
        ("left", "c,d", 0, ["data.center=[0,0]", "data.scale=[2,2]"]),
        ("right", "c,d", 50, ["data.center=[0,0]", "data.scale=[2,2]"]),
    ):
        rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + shift
        path = root / f"{name}.csv"
        path.write_text(f"{columns}\n" + "\n".join(f"{a},{b}" for a, b in rows.tolist()))
        own = ["data=table", f"data.file={path}", "data.batch_size=32", "model=relative", *words]
        own += ["model.network.per_class=false", "callbacks=points", "callbacks.best=null", "callbacks.metrics=null"]
        own += ["callbacks.figures=null", "callbacks.trajectory=null", "trainer=cpu", "logger=none", f"run_id={name}"]
        assert train.main([*own, "steps=1", f"root={root / 'runs'}"]) == 0
        found.append(root / "runs" / "bellman-diffusion" / name / "checkpoints" / "last.ckpt")
    return found


def test_models_that_do_not_fit_each_other(whole, root, capsys):
    def refused(*words):
        words = words if words[1:] else (*words, f"ckpt_path={whole}")
        assert train.main(["predict", *words]) == 2
        return capsys.readouterr().err

    other = fit(root, "other", 1, "model.noise.std=1.0")
    assert "cannot be merged with" in (message := refused(f"merge={{{other}: 1.0}}"))
    assert "noise.mean and noise.std [-0.5, 1.0] against [-0.5, 1.5]" in message
    points = root / "runs" / "bellman-diffusion" / "points" / "checkpoints" / "last.ckpt"
    words = ["data=wine", "model=relative", "model.network.per_class=false", "callbacks=points", "callbacks.best=null"]
    words += ["callbacks.metrics=null", "callbacks.figures=null", "callbacks.trajectory=null", "data.batch_size=32"]
    assert train.main([*words, "steps=1", "logger=none", f"root={root / 'runs'}", "run_id=points"]) == 0
    assert "shape of a sample [13] against [1, 8, 8]" in refused(f"merge={{{points}: 1.0}}")
    units = fit_tables(root)
    message = refused(f"merge={{{units[1]}: 1.0}}", f"ckpt_path={units[0]}")
    assert "center (data.center, what each column is standardised around)" in message
    assert "columns ('a', 'b') against ('c', 'd')" in refused(f"merge={{{units[0]}: 1.0}}", f"ckpt_path={units[2]}")
    assert train.main(["predict", f"ckpt_path={units[2]}", f"merge={{{units[3]}: 1.0}}", "n=8"]) == 0
    plain = root / "runs" / "bellman-diffusion" / "plain" / "checkpoints" / "last.ckpt"
    command = ["model=mlp", "steps=1", *WORDS[3:5], *WORDS[6:11], f"root={root / 'runs'}", "run_id=plain"]
    assert train.main(command) == 0
    assert train.main(["predict", f"ckpt_path={plain}", "mix={3: 1.0}"]) == 2
    assert "train with model=relative" in capsys.readouterr().err


def test_sigterm_ends_a_prediction(whole, monkeypatch):
    """At once, with the status that shells give it: Lightning alone looks for it while it trains."""

    def write(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("callbacks.writers.ImageWriter.write_on_batch_end", write)
    with pytest.raises(SystemExit) as end:
        train.main(["predict", f"ckpt_path={whole}", "mix={3: 1.0}", "n=4"])
    assert end.value.code == 128 + signal.SIGTERM


def test_chains_that_depend_on_each_other_are_kept_apart_by_the_number_of_devices(whole, monkeypatch):
    """Each device resamples its own: a folder of one does not go on with two."""
    words = ["predict", f"ckpt_path={whole}", "n=4", "seed=7", FK, "model.samplers.sde.levels=3"]
    for sampler in ("fk", "sde"):
        assert train.main([*words, f"model.sampler={sampler}"]) == 0
    monkeypatch.setattr("lightning.Trainer.world_size", 2)  # as it is told to predict; one process draws
    for sampler in ("fk", "sde"):
        assert train.main([*words, f"model.sampler={sampler}"]) == 0
    run = whole.parent.parent
    assert sorted(folder.name for folder in run.glob("predict-*-seed7*")) == [
        "predict-fk-seed7", "predict-fk-seed7-2", "predict-sde-seed7",
    ]  # fmt: skip
