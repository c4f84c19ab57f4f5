"""Images of a folder that are decoded once, and training on all of them."""

import json
import os
import sys
import time

import pytest
import torch
from PIL import Image

import train
from datamodules import ImageFolder, decoded, folder
from datamodules.cache import keep
from datamodules.images import ByteImages
from datamodules.splits import DataError, moved
from small_run import WORDS
from tiny_data import write_folder


def whole(data, split):
    rows = data.load_split(split)
    found = [rows[i] for i in range(len(rows))]
    return torch.stack([x for x, _ in found]), torch.tensor([int(label) for _, label in found])


def files(root):
    return sorted(path.name for path in (root / ".cache").glob("*decoded*"))


def test_bytes_are_those_of_the_files_and_nothing_is_decoded_twice(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "f", splits=("train", "test"))
    plain, kept = (ImageFolder(str(root), size=8, root=str(tmp_path), cache=cache) for cache in (False, True))
    kept.prepare_data()
    assert len(files(tmp_path)) == 3 and all(name.endswith(".bytes") for name in files(tmp_path))
    monkeypatch.setattr(folder, "read", lambda *args: pytest.fail("decoded again"))
    fresh = ImageFolder(str(root), size=8, root=str(tmp_path), sigma_data=0.5)
    fresh.prepare_data()
    found = {split: whole(fresh, split) for split in ("train", "val", "test")}
    monkeypatch.undo()
    for split, (x, labels) in found.items():
        expected = whole(plain, split)
        assert torch.equal(x, expected[0]) and torch.equal(labels, expected[1])
    rows = fresh.load_split("train")
    assert isinstance(rows, ByteImages) and not moved(rows, torch.device("cpu"))
    if sys.platform != "linux":
        return
    with open("/proc/self/maps") as maps:
        assert fresh._place("train").name in maps.read()


def test_labels_that_are_damaged_are_made_anew(tmp_path):
    root = write_folder(tmp_path / "f")
    data = ImageFolder(str(root), size=8, root=str(tmp_path))
    data.prepare_data()
    before, place = data.read_split("train").labels.clone(), data._place("train")
    place.write_bytes(place.read_bytes()[:-8] + b"\xff" * 8)
    assert torch.equal(data.read_split("train").labels, before)


def test_what_is_derived_of_a_changed_file_is_made_anew(tmp_path):
    """Even where the file is as large as before, as those without compression are."""
    root = write_folder(tmp_path / "f")
    (root / "cat" / "0.png").unlink()
    prints = []
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 16), colour).save(root / "cat" / "0.bmp")
        prints.append(ImageFolder(str(root), size=8, root=str(tmp_path)).fingerprint)
    assert prints[0] != prints[1] and prints[1] == ImageFolder(str(root), size=8, root=str(tmp_path)).fingerprint


def test_images_that_are_no_bytes_and_classes_without_images(tmp_path, caplog):
    with pytest.raises(DataError, match="ByteImages are of torch.uint8, 0 to 255, got torch.float32"):
        ByteImages(torch.zeros(4, 1, 8, 8))
    root = write_folder(tmp_path / "f")
    (root / "ant").mkdir()
    with caplog.at_level("INFO"):
        ImageFolder(str(root), size=8, root=str(tmp_path))
    assert "no images of their own for ant: empty folders, or links to others" in caplog.text


@pytest.mark.parametrize("change", ["content", "name", "class", "size"])
def test_another_folder_has_another_file(change, tmp_path):
    root = write_folder(tmp_path / "f")
    ImageFolder(str(root), size=8, root=str(tmp_path)).prepare_data()
    before = files(tmp_path)
    if change == "content":
        Image.new("RGB", (20, 16), "red").save(root / "cat" / "0.png")
    if change == "name":
        (root / "cat" / "0.png").rename(root / "cat" / "00.png")
    if change == "class":  # of no images: labels of the others move
        (root / "ant").mkdir()
    data = ImageFolder(str(root), size=4 if change == "size" else 8, root=str(tmp_path))
    data.prepare_data()
    assert len(files(tmp_path)) > len(before)
    assert torch.equal(whole(data, "train")[1], torch.tensor([label for _, label in data.files["train"]]))


def test_interruption_leaves_no_half_file(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "f")
    data = ImageFolder(str(root), size=8, root=str(tmp_path), sigma_data=0.5)
    monkeypatch.setattr(decoded, "CHUNK", 5)
    plain, count = folder.FolderImages.decode, []

    def interrupted(self, index):
        count.append(index)
        if len(count) == 12:
            raise KeyboardInterrupt
        return plain(self, index)

    monkeypatch.setattr(folder.FolderImages, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert files(tmp_path) == []
    monkeypatch.setattr(folder.FolderImages, "decode", plain)
    killed = data._place("train").with_suffix(".123.part")
    killed.write_bytes(b"half")
    os.utime(killed, (0, time.time() - 2 * decoded.STALE))
    data.prepare_data()
    assert len(files(tmp_path)) == 2 and not killed.exists()  # val and test are one
    killed.write_bytes(b"half")
    os.utime(killed, (0, time.time() - 2 * decoded.STALE))
    data.prepare_data()
    assert not killed.exists()


def test_processes_of_one_number_do_not_share_a_file(tmp_path, monkeypatch, recwarn):
    """As in two containers with one `data.root`."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    place = tmp_path / "a.bytes"

    def write(file):
        file.write(b"whole")
        if not place.exists():
            assert keep(place, lambda other: other.write(b"others"))

    assert keep(place, write) and place.read_bytes() == b"whole" and not recwarn.list


def test_a_file_of_another_length_is_made_again(tmp_path):
    root = write_folder(tmp_path / "f")
    data = ImageFolder(str(root), size=8, root=str(tmp_path))
    data.prepare_data()
    place = data._place("train")
    right = place.read_bytes()
    place.write_bytes(right[:-1])
    data.prepare_data()
    assert place.read_bytes() == right


def test_where_nothing_can_be_kept_images_are_decoded_as_before(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    with pytest.warns(UserWarning, match="nothing can be kept in"):
        data = ImageFolder(str(write_folder(tmp_path / "f")), size=8, root=str(tmp_path), sigma_data=0.5)
        data.prepare_data()
    assert isinstance(data.load_split("train"), folder.FolderImages)


@pytest.mark.parametrize("splits", [(), ("train",), ("train", "test")])
def test_training_on_all_images_of_a_folder(splits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(folder, "SEEN", 5)
    root = write_folder(tmp_path / "f", splits=splits)
    data = ImageFolder(str(root), size=8, root=str(tmp_path), val_fraction=0, batch_size=4)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert len(data.files["train"]) == 24 and len(data.files["val"]) == 5
    assert set(data.files["val"]) < set(data.files["train"])
    assert "data.val_fraction=0: all images are trained on; validation takes 5 of them" in caplog.text
    assert (data.reference_split, data.unseen) == ("train", "test" if "test" in splits else "val")
    assert (data.files["test"] == data.files["val"]) == ("test" not in splits)
    some = ImageFolder(str(root), size=8, root=str(tmp_path), batch_size=4)
    assert some.reference_split == "stage" and some.fingerprint != data.fingerprint


def test_a_held_out_split_stays_held_out(tmp_path):
    root = write_folder(tmp_path / "f", splits=("train", "val"))
    data = ImageFolder(str(root), size=8, root=str(tmp_path), val_fraction=0)
    assert data.reference_split == "stage" and not set(data.files["val"]) & set(data.files["train"])


def test_a_run_on_all_images(tmp_path, caplog):
    root = write_folder(tmp_path / "f", splits=("train", "test"), n=20)
    words = [*WORDS, "data=folder", f"data.folder={root}", "data.size=8", "data.batch_size=16", "data.val_fraction=0"]
    words += [f"root={tmp_path / 'runs'}", f"data.root={tmp_path}", "run_id=x"]
    with caplog.at_level("INFO"):
        assert train.main(words) == 0
    assert "all images are trained on" in caplog.text


def test_what_protocols_say_of_images_that_are_all_trained_on(tmp_path, caplog):
    """No split is called a test's, no floor is given, and nothing is compared with images held out."""
    root = write_folder(tmp_path / "f", splits=("train",), n=20)
    left = ("callbacks.metrics", "callbacks.memorisation", "callbacks.best")
    words = [word for word in WORDS if not word.startswith(left)]
    words += [
        "callbacks.metrics.features.steps=20",
        "callbacks.metrics.n=40",
        "data=folder",
        f"data.folder={root}",
        "data.size=8",
    ]
    words += [
        "data.batch_size=16",
        "data.val_fraction=0",
        f"root={tmp_path / 'runs'}",
        f"data.root={tmp_path}",
        "run_id=x",
    ]
    assert train.main(words) == 0
    (last,) = (tmp_path / "runs").rglob("last.ckpt")
    with caplog.at_level("INFO"):
        assert (
            train.main(
                ["test", f"ckpt_path={last}", "callbacks.memorisation.n=10", "likelihood=ode", "data.cache=false"]
            )
            == 0
        )
    (path,) = (tmp_path / "runs").rglob("test*/fid.json")
    row = json.loads(path.read_text())[-1]
    assert "against 40 train images" in row["protocol"] and "floor: none, all images are trained on" in row["protocol"]
    assert "not as in training" not in row["protocol"]  # where images are decoded changes none
    assert "floor" not in row and "real images" not in row["summary"]
    assert "Memorisation: left out, data.val_fraction=0 holds no images out" in caplog.text
    assert not list((tmp_path / "runs").rglob("memorisation.json"))
    (path,) = (tmp_path / "runs").rglob("likelihood*.json")
    assert "samples of the train split of ImageFolder" in json.loads(path.read_text())[-1]["protocol"]
    stored = torch.load(last, weights_only=True)["hyper_parameters"]["facts"]
    words = ["data.val_fraction=0.3", f"data.sigma_data={stored['sigma_data']}", "callbacks.memorisation=null"]
    assert train.main(["test", f"ckpt_path={last}", *words, "data.eval_batch_size=8", "calls=4"]) == 0
    remark = (
        "data not as in training (data.sigma_data, data.val_fraction): what is held out here may have been trained on"
    )
    rows = [json.loads(path.read_text())[-1] for path in (tmp_path / "runs").rglob("test*/fid.json")]
    (row,) = [row for row in rows if "12 test images" in row["protocol"]]
    assert remark in row["protocol"] and remark in row["summary"]
    (path,) = (tmp_path / "runs").rglob("calls.json")
    assert all(remark in row["protocol"] for row in json.loads(path.read_text()))
    assert remark in path.with_suffix(".md").read_text()
    assert train.main([f"ckpt_path={last}", "steps=4", "data.val_fraction=0.3", *words[1:2]]) == 0


def test_a_folder_in_which_nothing_can_be_decoded_ends(tmp_path):
    root = write_folder(tmp_path / "f", size=(40, 40))
    for path in root.rglob("*.png"):
        data, half = path.read_bytes(), len(path.read_bytes()) // 2
        path.write_bytes(data[:half] + bytes(40) + data[half + 40 :])
    images = ImageFolder(str(root), size=8, root=str(tmp_path), max_broken=1, sigma_data=0.5)
    with pytest.raises(DataError, match="none of the .* images can be decoded, the first of them"):
        images.prepare_data()


def test_too_much_damage_is_one_sentence(tmp_path):
    root = write_folder(tmp_path / "f", size=(40, 40))
    path = root / "cat" / "7.png"
    data, half = path.read_bytes(), len(path.read_bytes()) // 2
    path.write_bytes(data[:half] + bytes(40) + data[half + 40 :])
    images = ImageFolder(str(root), size=8, root=str(tmp_path), max_broken=0, sigma_data=0.5)
    with pytest.raises(DataError, match="raise data.max_broken to"):
        images.prepare_data()
    assert files(tmp_path) == [] or "train" not in str(files(tmp_path))
