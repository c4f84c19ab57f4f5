"""predict … images=FOLDER with inpaint=MASK or upscale=K."""

import json

import numpy as np
import pytest
from PIL import Image

import train
from datamodules import Digits
from small_run import WORDS
from tiny_data import write_autoencoder


@pytest.fixture
def digits(tmp_path):
    """Six 8×8 digits, as files, and a mask of their lower half."""
    rows = Digits(root=str(tmp_path / "data")).load_split("test")
    for i in range(6):
        save(tmp_path / "images" / f"{i}.png", rows.x[i, 0].numpy())
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[4:] = 255
    save(tmp_path / "mask.png", mask)
    return tmp_path


def save(path, pixels):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


FK = "model.samplers.fk={_target_: bd_lightning.dynamics.FeynmanKac, levels: 3}"


def predict(run, *words):
    return train.main(["predict", f"ckpt_path={run}/checkpoints/last.ckpt", *words])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_kept_pixels_are_kept(run, digits, capsys):
    assert predict(run, f"images={digits / 'images'}", f"inpaint={digits / 'mask.png'}", "n=5") == 0
    folder = run / "predict-inpaint-ode-seed0"
    said = capsys.readouterr().out
    errors = json.loads((folder / "errors.json").read_text())
    assert errors["images"] == 5 and f"{errors['nearest pixel']:.4f} (nearest pixel)" in said
    assert (folder / "given.png").is_file() and (folder / "grid.png").is_file()
    for i in range(5):
        drawn, given = pixels(folder / f"{i:06d}.png"), pixels(digits / "images" / f"{i}.png")
        assert (drawn[:4] == given[:4]).all() and (drawn[4:] != given[4:]).any()
    assert not (folder / "000005.png").exists()


def test_enlarged_images_have_the_means_that_were_given(run, digits):
    for i in range(2):
        small = pixels(digits / "images" / f"{i}.png").reshape(4, 2, 4, 2).mean((1, 3)).round().astype(np.uint8)
        save(digits / "small" / f"{i}.png", small)
    words = [f"images={digits / 'small'}", "upscale=2", "model.samplers.ode.steps=12"]
    assert predict(run, *words) == 0
    folder = run / "predict-upscale2-ode-seed0"
    for i in range(2):
        drawn, given = pixels(folder / f"{i:06d}.png"), pixels(digits / "small" / f"{i}.png")
        assert drawn.shape == (8, 8)
        assert abs(drawn.reshape(4, 2, 4, 2).mean((1, 3)) - given).mean() < 30
    assert not (folder / "errors.json").exists()


def test_the_mean_of_draws_is_nearer_to_the_truth(run, digits):
    """Whole images are shrunk first; the mean of two is that of the draw of the seed and of one that no seed shares."""
    words = [f"images={digits / 'images'}", "upscale=2", "n=3", "model.samplers.ode.steps=9"]
    for more in (["seed=0"], ["seed=1"], ["draws=2"], ["draws=3"]):
        assert predict(run, *words, *more) == 0
    names = ("-ode-seed0", "-ode-seed1", "-mean2-ode-seed0", "-mean3-ode-seed0")
    folders = [run / f"predict-upscale2{name}" for name in names]
    one, other, two, three = (pixels(folder / "000002.png") for folder in folders)
    second, third = 2 * two - one, 3 * three - 2 * two  # within 3 and 5 for rounding
    assert -3 <= second.min() and second.max() <= 258
    for first, draw in ((one, second), (other, second), (one, third), (other, third), (second, third)):
        assert abs(first - draw).max() > 20
    errors = [json.loads((folder / "errors.json").read_text()) for folder in folders]
    assert errors[0]["images"] == 3 and errors[0]["repeated pixels"] == errors[2]["repeated pixels"] > 0
    assert errors[3]["drawn"] <= max(error["drawn"] for error in errors[:2])


def test_codes_are_filled_through_their_decoder(run, digits):
    ae = write_autoencoder(digits / "ae.ckpt", (1, 8, 8), Digits(root=str(digits / "data")).name)
    from small_run import launch

    words = ["data=digits_latent", f"data.autoencoder.ckpt_path={ae}", "run_id=codes", "callbacks.diagnostics=null"]
    assert launch(run.parent.parent, *words, "callbacks.report=null") == 0
    codes = run.parent / "codes"
    assert predict(codes, f"images={digits / 'images'}", f"inpaint={digits / 'mask.png'}", "n=2") == 0
    assert (codes / "predict-inpaint-ode-seed0" / "000001.png").is_file()


def test_results_of_other_images_lie_elsewhere(run, digits):
    words = [f"images={digits / 'images'}", "upscale=2", "n=2", "model.samplers.ode.steps=4"]
    assert predict(run, *words) == 0 == predict(run, *words)
    before = len(list(run.glob("predict-upscale2-*")))
    save(digits / "images" / "0.png", np.full((8, 8), 255, dtype=np.uint8))
    assert predict(run, *words) == 0
    assert len(list(run.glob("predict-upscale2-*"))) == before + 1


def test_a_model_that_is_told_the_class_fills_too(digits):
    words = [*WORDS, "model.network.conditional=true", f"root={digits}", f"data.root={digits}", "run_id=told"]
    assert train.main(words) == 0
    run = digits / "bellman-diffusion" / "told"
    given = [f"images={digits / 'images'}", f"inpaint={digits / 'mask.png'}", "n=2"]
    assert predict(run, *given, "labels=[3,8]", "model.samplers.ode.steps=4") == 0
    folder = run / "predict-inpaint-ode-seed0"
    for i in range(2):
        assert (pixels(folder / f"{i:06d}.png")[4:] != pixels(digits / "images" / f"{i}.png")[4:]).any()


def test_mistakes_are_one_sentence(run, digits, capsys):
    save(digits / "wide.png", np.zeros((8, 9), dtype=np.uint8))
    save(digits / "black.png", np.zeros((8, 8), dtype=np.uint8))
    (digits / "none").mkdir()
    save(digits / "mixed" / "0.png", np.zeros((8, 8), dtype=np.uint8))
    save(digits / "mixed" / "1.png", np.zeros((4, 4), dtype=np.uint8))
    save(digits / "odd" / "0.png", np.zeros((5, 4), dtype=np.uint8))
    images, mask = f"images={digits / 'images'}", f"inpaint={digits / 'mask.png'}"
    for words, sentence in [
        ([images, f"inpaint={digits / 'wide.png'}"], "has 8 × 9 pixels, and this model's images 8 × 8"),
        ([images, f"inpaint={digits / 'black.png'}"], "needs pixels that are to be filled (white)"),
        ([images, f"inpaint={digits / 'no.png'}"], "mask not found"),
        ([images, mask, "upscale=2"], "two tasks: give one of them"),
        ([images], "images=FOLDER needs a task"),
        ([mask], "inpaint and upscale need images=FOLDER"),
        ([mask, f"images={digits / 'none'}"], "no images in"),
        ([images, "upscale=3"], "upscale must divide 8 × 8"),
        ([images, "upscale=0"], "'upscale' must be 2 or more, got 0"),
        ([f"images={digits / 'mixed'}", "upscale=2"], "has 4 × 4 pixels, and what is asked for takes 8 × 8"),
        ([f"images={digits / 'odd'}", "upscale=2"], "has 5 × 4 pixels, and what is asked for takes 4 × 4 or 8 × 8"),
        ([images, "upscale=2", "draws=0"], "'draws' must lie between 1 and 1,000, got 0"),
        ([images, "upscale=2", "model.sampler=fk", FK], "FeynmanKac are those of guidance alone"),
        (["draws=4"], "inpaint and upscale need images=FOLDER"),
    ]:
        assert predict(run, *words) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("error: ") == 1
    assert predict(run, images, mask, "mix={3: 1.0}") == 2
    assert "leave mix, remove and merge out" in capsys.readouterr().err
    assert train.main(["test", f"ckpt_path={run}/checkpoints/last.ckpt", mask]) == 2
    assert "'inpaint' is for train.py predict" in capsys.readouterr().err
    assert not list(run.glob("predict-*"))
