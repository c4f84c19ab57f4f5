from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bd_lightning import facts
from bd_lightning.facts import SampleFacts
from datamodules import CIFAR10, MNIST, Digits, ImageFolder, SampleRequests, to_uint8
from datamodules.images import to_unit
from datamodules.splits import DataError
from datamodules.subsets import random_subset
from tiny_data import write_cifar, write_folder, write_mnist


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return {
        "digits": Digits(batch_size=4),
        "mnist": MNIST(root=str(write_mnist(tmp_path / "m")), batch_size=4, val_size=10, download=False),
        "cifar10": CIFAR10(root=str(write_cifar(tmp_path / "c")), batch_size=4, val_size=10, flip=True, download=False),
        "folder": ImageFolder(str(write_folder(tmp_path / "f")), size=8, batch_size=4),
    }


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "folder"])
def test_contract(modules, name):
    """Whatever the data set: shapes, ranges, labels, and splits that do not overlap."""
    data = modules[name]
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (4, *data.shape) and x.dtype == torch.float32 and y.shape == (4,)
    assert -1 <= x.min() < -0.2 and 0.2 < x.max() <= 1
    assert 0 <= y.min() and y.max() < len(data.class_names)
    assert data.facts == SampleFacts(data.name, data.shape, data.sigma_data, tuple(data.class_names))
    assert facts.read(data.facts.plain()) == data.facts
    images = {split: [image.numpy().tobytes() for image, _ in data.load_split(split)] for split in ("train", "val")}
    assert images["train"] and images["val"] and not set(images["train"]) & set(images["val"])
    order = [next(iter(data.val_dataloader()))[1].tolist() for _ in range(2)]
    assert order[0] == order[1]


def test_digits():
    data = Digits()
    sizes = {split: len(data.load_split(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1500, "val": 148, "test": 149} and data.reference_split == "train"
    images = [image.numpy().tobytes() for split in sizes for image in data.load_split(split).x]
    assert len(set(images)) == len(images)  # no image is in two splits
    assert float(to_unit(data.load_split("train").x).std()) == pytest.approx(data.sigma_data, abs=1e-3)


def test_real_mnist(real_data):
    data = MNIST(root=str(real_data), download=False)
    data.prepare_data()
    sizes = {split: len(data.load_split(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 55000, "val": 5000, "test": 10000}
    assert float(to_unit(data.load_split("train").x).std()) == pytest.approx(data.sigma_data, abs=1e-3)


def test_real_cifar_as_a_folder(real_data):
    data = ImageFolder(str(real_data / "cifar10_jpg"))
    assert data.class_names == CIFAR10.class_names
    assert {split: len(files) for split, files in data.files.items()} == {"train": 45000, "val": 5000, "test": 10000}
    assert data.sigma_data == pytest.approx(CIFAR10.sigma_data, abs=0.02)


def test_scaling_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]


def mirror(data, x, batch, training=True):
    """Images as a trainer gets them at the start of a batch of the first epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=0, ready=batch))
    loop = SimpleNamespace(epoch_progress=progress, epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(training=training, global_rank=0, fit_loop=loop)
    return data.on_before_batch_transfer((x, torch.zeros(len(x))), 0)[0]


def test_only_training_images_are_flipped(tmp_path, modules):
    for data in (modules["cifar10"], ImageFolder(str(write_folder(tmp_path / "g")), size=8, flip=True, batch_size=4)):
        rows = data.load_split("train")
        original = torch.stack([rows[i][0] for i in range(8)])
        draws = [mirror(data, original, batch=batch) for batch in range(4)]
        mirrored = [(d == original).flatten(1).all(1) | (d == original.flip(-1)).flatten(1).all(1) for d in draws]
        assert all(m.all() for m in mirrored) and any((d != original).any() for d in draws)
        assert torch.equal(draws[2], mirror(data, original, batch=2))  # the same whenever the batch is met
        assert torch.equal(mirror(data, original, batch=2, training=False), original)


def test_folder_crops_and_splits(tmp_path):
    wide = ImageFolder(str(write_folder(tmp_path / "a", size=(20, 40))), size=10, channels=1, val_fraction=0.25)
    assert wide.shape == (1, 10, 10) and wide.load_split("train")[0][0].shape == (1, 10, 10)
    assert (len(wide.files["train"]), len(wide.files["val"]), len(wide.files["test"])) == (18, 6, 6)
    split = ImageFolder(str(write_folder(tmp_path / "b", splits=("train", "test"))), size=8)
    assert {s: len(f) for s, f in split.files.items()} == {"train": 22, "val": 2, "test": 24}
    assert "train" not in split.class_names
    flat = write_folder(tmp_path / "c", classes=("",))
    assert ImageFolder(str(flat), size=8).class_names == ()


def test_workers_are_seeded_and_fill_batches(tmp_path):
    data = ImageFolder(str(write_folder(tmp_path / "a")), size=8, batch_size=4, num_workers=2, flip=True)
    assert [x.shape for x, _ in data.train_dataloader()] == [torch.Size([4, 3, 8, 8])] * 5


def test_fingerprints_tell_data_apart(tmp_path):
    a, b = (ImageFolder(str(write_folder(tmp_path / name)), size=8) for name in ("x", "y"))
    assert a.fingerprint == ImageFolder(str(tmp_path / "x"), size=8).fingerprint != b.fingerprint
    Image.new("RGB", (8, 8)).save(tmp_path / "x" / "cat" / "new.png")
    assert ImageFolder(str(tmp_path / "x"), size=8).fingerprint != a.fingerprint


def test_requests():
    items = [SampleRequests(5, seed=7, labels=[3, 8])[i] for i in range(5)]
    assert [int(i["label"]) for i in items] == [3, 8, 3, 8, 3] and [int(i["index"]) for i in items] == [0, 1, 2, 3, 4]
    assert {int(i["seed"]) for i in items} == {7}


def test_bad_data_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="image folder not found: .*nowhere; set data.folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images for the train split"):
        ImageFolder(str(tmp_path / "empty"), sigma_data=0.5)
    root = write_folder(tmp_path / "a")
    cut = (root / "cat" / "0.png").read_bytes()[:400]  # a whole header, and not all of the pixels
    (root / "cat" / "0.png").write_bytes(cut)
    with pytest.raises(
        DataError, match=r"cannot be read: .*cat/0.png .image file is truncated.. Repair or delete them"
    ):
        data = ImageFolder(str(root), size=8, sigma_data=0.5)
        [item for split in ("train", "val") for item in data.load_split(split)]
    with pytest.raises(DataError, match="fewer than one batch; set data.batch_size to 21 or less"):
        ImageFolder(str(write_folder(tmp_path / "b")), size=8, batch_size=22, val_fraction=0.125).setup("fit")
    with pytest.raises(ValueError, match="channels must be 1"):
        ImageFolder(str(root), channels=2)
    with pytest.raises(ValueError, match="at least 2"):
        Digits(batch_size=1)
    with pytest.raises(DataError, match="leaves none of the 40 images"):
        MNIST(root=str(write_mnist(tmp_path / "m")), val_size=40).load_split("train")
    with pytest.raises(
        DataError, match="fewer than one batch of two samples, the least there is: hold out or accumulate fewer"
    ):
        MNIST(root=str(tmp_path / "m"), val_size=39).setup("fit")
    with pytest.raises(DataError, match="set data.total_batch_size to 32$"):
        few = MNIST(root=str(tmp_path / "m"), val_size=24, total_batch_size=64)
        few.share(2)
        few.setup("fit")
    with pytest.raises(DataError, match="MNIST cannot be read from .*set data.root"):
        MNIST(root=str(tmp_path / "n"), download=False).prepare_data()

    def no_network(*args, **options):
        raise RuntimeError("no network here")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    with pytest.raises(DataError, match="nor downloaded: no network here. Put MNIST/raw"):
        MNIST(root=str(tmp_path / "n")).prepare_data()


def test_truncated_mnist_is_named(tmp_path):
    root = write_mnist(tmp_path)
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="MNIST cannot be read"):
        MNIST(root=str(root), val_size=10, download=False).load_split("train")


def test_keep_chooses_classes_and_thins_them():
    whole = Digits()
    labels = whole.load_split("train").labels
    few = Digits(keep=[7, "2"])
    assert few.class_names == ("2", "7") and few.facts.num_classes == 2
    train = few.load_split("train")
    expected = whole.load_split("train").x[(labels == 2) | (labels == 7)]
    assert torch.equal(train.x, expected) and set(train.labels.tolist()) == {0, 1}
    assert (
        len(few.load_split("val"))
        == ((whole.load_split("val").labels == 2) | (whole.load_split("val").labels == 7)).sum()
    )
    thin = Digits(keep={3: 0.1, 0: 0})
    counts, before = (torch.bincount(rows.labels) for rows in (thin.load_split("train"), whole.load_split("train")))
    assert thin.class_names == tuple("123456789") and counts[2] == -(-before[3] // 10)
    assert torch.equal(counts[[0, 1, 3, 8]], before[[1, 2, 4, 9]])
    threes = whole.load_split("train").x[labels == 3]
    kept = thin.load_split("train").x[thin.load_split("train").labels == 2]
    assert not torch.equal(kept, threes[: len(kept)])  # not the first ones: their order may have a meaning
    assert torch.equal(kept, Digits(keep={3: 0.1, 0: 0}).load_split("train").x[thin.load_split("train").labels == 2])
    held_out = torch.bincount(thin.load_split("val").labels)
    assert held_out[2] == (whole.load_split("val").labels == 3).sum()  # only training images are thinned
    assert len({str(data.fingerprint) for data in (whole, few, thin, Digits(keep={3: 0.2}))}) == 4


def test_keep_needs_labels():
    class Pairs(Digits):
        def read_split(self, split):
            return [(torch.zeros(1, 8, 8), 0)] * 4

    with pytest.raises(DataError, match="Pairs: data.keep chooses rows by their labels, and read_split gives a list"):
        Pairs(keep=["0"]).load_split("train")


def test_random_subsets_are_spread_out_and_fixed():
    chosen = random_subset(999, 500)
    assert chosen == sorted(set(chosen)) == random_subset(999, 500) and len(chosen) == 500
    assert sum(i < 500 for i in chosen) == pytest.approx(250, abs=40)
    assert random_subset(3, 5) == [0, 1, 2] and random_subset(999, 500, seed=1) != chosen


def test_keep_that_was_read_before_the_classes_were_named():
    class Late(Digits):
        class_names = ()

        def __init__(self, **options):
            super().__init__(**options)
            self.class_names = Digits.class_names

    with pytest.raises(DataError, match="keep=.*was not obeyed: Late has no classes, or names them after"):
        Late(keep=[3]).setup("fit")
    late = Late(keep=[3])
    late.choose_classes()
    late.setup("fit")
    assert late.class_names == ("3",)


def test_keep_in_a_folder(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog", "eel"), n=10)
    data = ImageFolder(str(tmp_path), size=8, keep=["eel", "cat"], cache=False)
    rows = data.load_split("train")
    assert data.class_names == ("cat", "eel") and len(rows) + len(data.load_split("val")) == 20
    assert {(path.parent.name, rows[i][1]) for i, (path, _) in enumerate(rows.files)} == {("cat", 0), ("eel", 1)}


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        (["cat"], "keep: no class 'cat'; the classes are 0, 1"),
        ({3: 1.5}, r"keep\['3'\] must lie between 0 and 1, got 1.5"),
        (dict.fromkeys(range(10), 0.0), "keep leaves no class"),
    ],
)
def test_mistakes_in_keep(keep, sentence):
    with pytest.raises(ValueError, match=sentence):
        Digits(keep=keep)


def at(rank: int, **attributes) -> SimpleNamespace:
    """A trainer at its first batch, as far as randomness looks at it."""
    progress = SimpleNamespace(processed=0, ready=0)
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=progress),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=progress)),
    )
    return SimpleNamespace(training=True, global_rank=rank, fit_loop=loop, **attributes)


def test_runs_of_other_seeds_mirror_other_images(monkeypatch):
    data, batch = Digits(flip=True), (torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.long))

    def mirrored(seed, rank):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data.trainer = at(rank)
        return (data.on_before_batch_transfer(batch, 0)[0] != batch[0]).flatten(1).any(1).tolist()

    first = mirrored(0, 0)
    assert mirrored(0, 0) == first and 16 < sum(first) < 48
    assert mirrored(1, 0) != first != mirrored(0, 1)
