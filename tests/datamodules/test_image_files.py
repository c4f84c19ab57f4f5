"""Folders of images as people have them: depths, links, names, sizes, and files that are none."""

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder
from datamodules.base import DataError
from datamodules.image_files import find, read
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


@pytest.mark.parametrize(("dtype", "what"), [(np.float32, "floating point"), (np.int32, "32 bits")])
def test_pixels_without_a_known_scale_are_refused(dtype, what, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save("a.tif")
    with pytest.raises(DataError, match=f"a.tif: pixels of .*{what}.*save it with 8 or 16 bits"):
        read(Path("a.tif"), 1)
    write_folder(tmp_path / "f")
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "f" / "cat" / "b.tif")
    with pytest.raises(DataError, match=f"1 of 25 image files cannot be read: .*b.tif .pixels of .*{what}"):
        ImageFolder("f", size=8)


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
    with pytest.raises(DataError, match="one image is not enough"):
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
        assert str(error).startswith(("one image is not enough", "no images for the")) and "\n" not in str(error)
    list(find(root, set()))
