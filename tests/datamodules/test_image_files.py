"""Folders of images as people have them: depths, links, names, sizes, and files that are none."""

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import train
from datamodules import ImageFolder
from datamodules.image_files import find, read
from datamodules.splits import DataError
from small_run import WORDS
from tiny_data import write_folder

RAMP = np.linspace(0, 65535, 64).reshape(8, 8)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_keep_their_scale(name):
    Image.fromarray(RAMP.astype(np.uint16)).save(name)
    for channels in (1, 3):
        found = np.asarray(read(Path(name), channels)).reshape(64, channels)
        assert abs(found - RAMP.reshape(64, 1) / 257).max() <= 0.5
    with Image.open(name) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.asarray(image.convert("L")).mean() > 200  # what Pillow makes of it


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation):
    """As Pillow itself turns them."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save("a.jpg", exif=exif)
    with Image.open("a.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (np.asarray(read(Path("a.jpg"), 3)) == expected).all()


def test_images_outside_the_class_folders_are_named(tmp_path):
    root = write_folder(tmp_path / "f", splits=("train", "test"))
    (root / "test" / "cat").rename(root / "test" / "cow")
    with pytest.raises(DataError, match="12 images under .*test are in none of the class folders cat, dog, the first"):
        ImageFolder(str(root), size=8)


@pytest.mark.parametrize(("dtype", "what"), [(np.float32, "floating point"), (np.int32, "32 bits")])
def test_pixels_without_a_known_scale_are_refused(dtype, what, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save("a.tif")
    with pytest.raises(DataError, match=f"a.tif: pixels of .*{what}.*save it with 8 or 16 bits"):
        read(Path("a.tif"), 1)
    write_folder(tmp_path / "f")
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "f" / "cat" / "b.tif")
    with pytest.raises(DataError, match=f"1 of 25 image files cannot be read: .*b.tif .pixels of .*{what}"):
        ImageFolder("f", size=8)


def test_samples_that_were_drawn_are_read_without_their_grid(tmp_path):
    folder = tmp_path / "predict-ode-seed0"
    folder.mkdir()
    for name in ("00000.png", "grid.png"):
        Image.new("L", (8, 8)).save(folder / name)
    assert [path.name for path in find(folder, set())] == ["00000.png", "grid.png"]  # of people's own
    (folder / "settings.json").write_text("{}")
    assert [path.name for path in find(folder, set())] == ["00000.png"]


def test_links_are_followed_once(tmp_path):
    root = write_folder(tmp_path / "f", splits=("train", "test"))
    for name, target in (("train/cat/loop", root), ("train/dog/up", root / "train"), ("train/cat/held", root / "test")):
        (root / name).symlink_to(target)
    (tmp_path / "far").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "far" / "far.png")
    (root / "train" / "cat" / "real").symlink_to(tmp_path / "far")
    data = ImageFolder(str(root), size=8, val_fraction=0.2)
    paths = [os.path.realpath(path) for split in ("train", "val", "test") for path, _ in data.files[split]]
    assert len(paths) == len(set(paths)) == 24 + 1 + 24
    assert sum("far.png" in path for path in paths) == 1
    assert all("/test/" in os.path.realpath(path) for path, _ in data.files["test"])


def test_broken_files_are_named_together_or_left_out(tmp_path, capsys):
    root = write_folder(tmp_path / "f", n=20)
    (root / "cat" / "empty.png").touch()
    (root / "cat" / "dead.jpg").symlink_to("nowhere")
    (root / "dog" / "text.png").write_text("hello")
    (root / "dog" / "._3.png").write_text("macOS")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").write_text("hello")
    with pytest.raises(DataError) as refused:
        ImageFolder(str(root), size=8)
    message = str(refused.value)
    assert message.startswith("3 of 43 image files cannot be read: ") and message.endswith(
        "set data.max_broken=0.07 to leave them out"
    )
    for words in ("empty.png (empty)", "dead.jpg (a link to nothing)", "text.png (cannot identify image file)"):
        assert words in message
    data = ImageFolder(str(root), size=8, max_broken=0.07, batch_size=4)
    assert sum(len(data.load_split(split)) for split in ("train", "val")) == 40
    assert data.class_names == ("cat", "dog")
    assert len([x for x, _ in data.load_split("train")]) == 36


def test_one_image_is_one_sentence(tmp_path):
    Image.new("RGB", (20, 16)).save(tmp_path / "only.png")
    with pytest.raises(DataError, match="1 images in .* are not enough: two to learn from"):
        ImageFolder(str(tmp_path), size=8)


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "pictures")
    assert len(ImageFolder("~/pictures", size=8).load_split("train")) == 22


@pytest.mark.parametrize("seed", range(20))
def test_any_folder_is_read_or_refused_in_a_sentence(seed, tmp_path):
    """Formats, depths, modes, sizes, names, links and rubbish, drawn from a seed; many more by hand: range(2000)."""
    draw = random.Random(seed)
    root = tmp_path / "f"
    folders = [root]
    for k in range(draw.randrange(1, 8)):
        folders.append(draw.choice(folders) / draw.choice(["a", "b é", ".c", "train", "test", f"d{k}"]))
        folders[-1].mkdir(parents=True, exist_ok=True)
    for k in range(draw.randrange(1, 30)):
        place = draw.choice(folders) / (
            draw.choice(["", "._", "x y "]) + f"{k}" + draw.choice([".png", ".PNG", ".tif"])
        )
        kind = draw.choice(["L", "RGB", "RGBA", "P", "1", "LA", "I;16", "F", "empty", "text", "dead", "loop"])
        size = (draw.choice([1, 7, 40]), draw.choice([1, 8, 33]))
        if kind in ("empty", "text"):
            place.write_text("" if kind == "empty" else "hello")
        elif kind == "dead":
            place.symlink_to(root / "nowhere")
        elif kind == "loop":
            place.with_suffix("").symlink_to(draw.choice(folders))
        elif kind == "I;16":
            Image.fromarray(np.full(size, 40_000, np.uint16)).save(place)
        elif kind == "F":
            Image.fromarray(np.full(size, 0.5, np.float32)).save(place.with_suffix(".tif"))
        else:
            Image.new(kind, size).save(place)
    try:
        data = ImageFolder(
            str(root), size=8, channels=draw.choice([1, 3]), max_broken=1.0, sigma_data=0.5, batch_size=2
        )
        for split in ("train", "val", "test"):
            for x, label in data.load_split(split):
                assert x.shape == data.shape and x.isfinite().all() and 0 <= label <= len(data.class_names)
        assert sum(len(files) for files in data.files.values()) > 0 and torch.is_tensor(x)
    except DataError as error:
        known = ("are not enough: two", "no images for the", "in none of the class folders")
        assert any(words in str(error) for words in known) and "\n" not in str(error)
    list(find(root, set()))


def damaged(root: Path, kind: str) -> Path:
    """A folder of images with one that is cut off, or damaged inside."""
    folder = write_folder(root, n=60, size=(40, 40))
    path = folder / "cat" / "7.png"
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] if kind == "cut" else data[:half] + bytes(40) + data[half + 40 :])
    return folder


def test_a_file_that_was_cut_off_is_known_at_once(tmp_path):
    folder = damaged(tmp_path / "a", "cut")
    with pytest.raises(DataError, match=r"cat/7.png \(image file is truncated.*set data.max_broken=0.01 to leave"):
        ImageFolder(str(folder), size=8, root=str(tmp_path), max_broken=0)
    data = ImageFolder(str(folder), size=8, root=str(tmp_path))
    assert not any(
        path.name == "7.png" and path.parent.name == "cat" for files in data.files.values() for path, _ in files
    )


def test_more_after_the_end_of_a_file_is_no_damage(tmp_path):
    """As in photos that have a film behind them."""
    folder = write_folder(tmp_path / "a", n=12)
    with (folder / "cat" / "7.png").open("ab") as file:
        file.write(bytes(1000))
    assert sum(map(len, ImageFolder(str(folder), size=8, max_broken=0, root=str(tmp_path)).files.values())) == 24 + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_inside_is_named_when_it_is_met(workers, tmp_path, capsys):
    folder = damaged(tmp_path / "a", "inside")
    words = [*WORDS, "data=folder", f"data.folder={folder}", "data.size=8", "data.sigma_data=0.5", "data.batch_size=16"]
    words += [f"root={tmp_path / 'runs'}", f"data.root={tmp_path}", "eval_every=20", "steps=20"]
    words += [f"data.num_workers={workers}"]
    assert train.main([*words, "run_id=x", "data.max_broken=0"]) == 2
    said = capsys.readouterr()
    assert "cat/7.png" in said.err and "raise data.max_broken to 0.01 or above" in said.err
    assert "Traceback" not in said.err and len([x for x in said.err.splitlines() if x.startswith("error: ")]) == 1
    if "to resume" in said.out:  # it was not in the first batch
        words += ["ckpt_path=last"]
    assert train.main([*words, "run_id=x" if "to resume" in said.out else "run_id=y", "data.max_broken=0.01"]) == 0


def test_a_file_that_breaks_moves_no_other_image(tmp_path):
    """Not even between runs of one folder: what was trained on never comes into validation."""
    root = write_folder(tmp_path / "f", n=60)
    before = ImageFolder(str(root), size=8, val_fraction=0.2)
    (lost, _), *_ = before.files["train"]
    lost.write_text("broken")
    after = ImageFolder(str(root), size=8, val_fraction=0.2, max_broken=0.1)
    assert after.files["val"] == before.files["val"]
    assert after.files["train"] == before.files["train"][1:]


def test_validation_takes_what_is_trained_on(tmp_path):
    """Of a class that is thinned the rows that are left, not others of it."""
    root = write_folder(tmp_path / "f", n=40)
    data = ImageFolder(str(root), size=8, val_fraction=0, keep={"cat": 0.2}, cache=False, batch_size=8)
    trained, seen = ({path for path, _ in data.split(split).files} for split in ("train", "val"))
    assert seen <= trained and len([path for path in trained if path.parent.name == "cat"]) == 8


def test_splits_of_one_image_are_refused(tmp_path):
    """Losses are means over pairs; without any there is nothing for a monitor to watch."""
    root = write_folder(tmp_path / "f", splits=("train", "val"))
    for path in sorted((root / "val").rglob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(DataError, match="the val split has 1 sample: give it two at least"):
        ImageFolder(str(root), size=8).split("val")
    with pytest.raises(ValueError, match="eval_batch_size must be at least 2"):
        ImageFolder(str(root), size=8, eval_batch_size=1)
