"""FID, its features and its caches."""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from bd_lightning.checks import UserError
from callbacks import ClassifierFeatures, DINOv2Features, ImageMetrics, InceptionFeatures, references
from callbacks import features as features_module
from callbacks.memorisation import memorisation, nearest_two, some_images
from callbacks.metrics import frechet_distance, precision_recall, rank_zero_first
from callbacks.moments import Gaussian, frechet, moments_of
from callbacks.vision_transformer import VisionTransformer
from datamodules import Digits, to_uint8
from datamodules.cache import load_cached, save_cached
from datamodules.images import ByteImages, to_unit
from fake_images import Drawn, Halves, Shades, evaluated, fake_trainer


def features(root, **options):
    made = ClassifierFeatures(steps=150, **options)
    made.prepare(Digits(root=str(root)))
    return made


def test_a_distance_of_a_set_to_itself_is_not_below_zero():
    """By rounding it is at a third of these; means that are no numbers have no distance."""
    sets = [torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert all(0 <= frechet_distance(rows, rows) < 1e-9 for rows in sets)
    lost = Gaussian(torch.full((2,), math.nan), torch.eye(2))
    assert math.isnan(frechet(lost, Gaussian(torch.zeros(2), torch.eye(2))))


def test_frechet_distance_of_gaussians():
    """‖μ1 − μ2‖² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½) for diagonal covariances: Σ (σ1 − σ2)²."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * scale + 0.5
    assert frechet_distance(a, b) == pytest.approx(3 * 0.25 + float((scale - 1).square().sum()), rel=0.02)
    assert abs(frechet_distance(a, a)) < 1e-6


def test_precision_and_recall_of_a_set_that_misses_half():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 2, generator=generator)
    real[:500, 0] += 20
    half = torch.randn(1000, 2, generator=generator)  # what it makes is real, but it makes half of it
    precision, recall = precision_recall(half, real)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)
    assert precision_recall(real, half) == pytest.approx((recall, precision))


def test_copies_of_training_images_are_found(tmp_path):
    data = Digits(root=str(tmp_path))
    train, held_out = data.load_split("train").x, data.load_split("test").x
    copies = (train[100:150].int() + torch.randint(-8, 9, train[100:150].shape)).clamp(0, 255).to(torch.uint8)
    found, index = nearest_two(copies, data)
    assert index[:, 0].tolist() == list(range(100, 150))
    assert (nearest_two(copies.flip(-1), data)[1][:, 0] != index[:, 0]).any()
    mirrored = Digits(root=str(tmp_path), flip=True)  # whose training shows both
    for shown in (copies, copies.flip(-1)):
        near, place = nearest_two(shown, mirrored)
        assert torch.equal(place[:, 0], index[:, 0]) and torch.allclose(near[:, 0], found[:, 0])
        assert (place[:, 0] != place[:, 1]).all()  # an image and its mirror image are one
    expected = ((copies.double() - train[100:150].double()) / 255).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-2, atol=1e-3)
    test, _ = nearest_two(held_out, data)
    values = memorisation(found, test)
    assert values["copies"] > 0.9 and values["close"] > 0.9 and values["distance_ratio"] < 0.3
    values = memorisation(test[::2], test[1::2])
    assert values["copies"] < 0.05 and values["close"] < 0.05
    assert values["distance_ratio"] == pytest.approx(1, abs=0.1)


def test_the_memory_of_metrics_does_not_grow_with_the_samples(tmp_path, monkeypatch):
    """FID uses every sample and keeps none; at most KEPT features stay for the other metrics."""
    kept, batches = [], []

    class Watched(KernelInceptionDistance):
        def update(self, imgs, real):
            super().update(imgs, real)
            kept.append(sum(map(len, self.real_features)) + sum(map(len, self.fake_features)))

    def noise(trainer, model, n, batch_size, seed, sampler):
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, n, batch_size):
            batches.append(torch.rand(min(batch_size, n - start), 1, 8, 8, generator=generator) * 2 - 1)
            yield batches[-1]

    monkeypatch.setattr("callbacks.metrics.KernelInceptionDistance", Watched)
    monkeypatch.setattr("callbacks.metrics.draw", noise)
    monkeypatch.setattr("callbacks.references.KEPT", 300)
    data, model = Digits(root=str(tmp_path)), Drawn()
    trainer = fake_trainer(data, model, tmp_path)
    metrics = ImageMetrics(ClassifierFeatures(steps=50), n=5000, batch_size=100, kid_subset=100)
    metrics.setup(trainer, model, "test")
    metrics.on_test_epoch_end(trainer, model)
    assert max(kept) <= 600 and sum(map(len, batches)) == 5000
    rows = torch.cat([metrics.features(to_uint8(x)) for x in batches])
    expected = frechet(metrics.references["test"].gaussian, moments_of(rows))
    assert model.logged["test/fid"] == pytest.approx(expected, rel=1e-5)
    assert model.logged["test/kid"] > 0 and model.logged["test/precision"] < 0.5


def test_one_image_is_no_reference(tmp_path, monkeypatch):
    data = Shades(True, root=str(tmp_path))
    data.sizes = {**data.sizes, "val": 1}
    with pytest.raises(UserError, match="the val images of Shades-True are one, and FID is of two at least"):
        evaluated(data, tmp_path, monkeypatch, to_unit(data.read_split("train").x))


def test_the_order_of_the_data_does_not_matter(tmp_path, monkeypatch):
    """Where fewer images are taken than there are, they are a random subset, not the first class."""
    rows = {}
    for shuffled in (True, False):
        data, folder = Shades(shuffled, root=str(tmp_path)), tmp_path / str(shuffled)
        fresh = to_unit(Shades(True).read_split("test").x)  # as good as samples can be
        rows[shuffled] = evaluated(data, folder, monkeypatch, fresh, kept=1000)  # more than are taken of it
        assert "; floor: 1500 train images, at random;" in rows[shuffled]["protocol"]
        half = evaluated(data, tmp_path / f"{shuffled}-half", monkeypatch, fresh[fresh.mean((1, 2, 3)) < fresh.mean()])
        assert half["val/precision"] > 0.9 and half["val/recall"] == pytest.approx(0.5, abs=0.15)
    for name in ("val/precision", "val/recall"):
        assert rows[True][name] > 0.9 and rows[False][name] == pytest.approx(rows[True][name], abs=0.06)
    assert rows[False]["floor"] < 0.02 * rows[False]["noise"] and rows[True]["floor"] < 0.02 * rows[True]["noise"]
    assert rows[False]["val/fid"] == pytest.approx(rows[True]["val/fid"], rel=1e-3)  # the reference is whole
    assert max(abs(row["val/kid"]) for row in rows.values()) < 0.4  # a reference of the first classes: above 1


def test_what_is_cached_is_of_the_samples_not_of_the_name_of_the_data(tmp_path):
    """An argument of a data set of one's own may change all that it holds."""

    class Brighter(Shades):
        more = 0

        def read_split(self, split):
            rows = super().read_split(split)
            return ByteImages(rows.x + self.more, rows.labels)

    found = []
    for more in (0, 20, 0):
        data = Brighter(True, root=str(tmp_path))
        data.more = more
        found.append(references.of_split(Halves(), data, "val", torch.device("cpu")))
    means = [one.gaussian.mean for one in found]
    assert torch.equal(means[1], means[0] + 20) and torch.equal(means[2], means[0])
    assert len(list((tmp_path / ".cache").iterdir())) == 2


def test_the_others_do_not_wait_for_a_rank_that_fails():
    passed = []
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=passed.append))
    with pytest.raises(UserError), rank_zero_first(trainer):
        raise UserError("one class")
    assert len(passed) == 1


def test_what_is_cached_is_of_the_weights_of_the_features(tmp_path):
    """A classifier that is trained again, by another processor, has the key of the first and other weights."""

    class Retrained(Halves):
        protocol = "halves b"

        def forward(self, images):
            return super().forward(images) + 1

    data = Shades(True, root=str(tmp_path))
    one, other = (references.of_split(made, data, "val", torch.device("cpu")) for made in (Halves(), Retrained()))
    assert torch.equal(other.gaussian.mean, one.gaussian.mean + 1)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (torch.zeros(4, 3), r"Halves of 4 images must be a tensor of the shape \[4, 2\], got the shape \[4, 3\]"),
        (torch.full((4, 2), torch.nan), "Halves gave features that are not finite"),
        (torch.zeros(4, 2).numpy(), "got a ndarray"),
    ],
)
def test_features_of_ones_own_are_looked_at(rows, sentence, monkeypatch):
    monkeypatch.setattr(Halves, "forward", lambda self, images: rows)
    with pytest.raises(UserError, match=sentence):
        features_module.features_of(Halves(), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))


def test_held_out_images_of_memorisation_are_a_random_subset(tmp_path):
    data = Shades(False, root=str(tmp_path))
    found = some_images(data, "test", 200)
    shades = (found.float().mean((1, 2, 3)) / 20).long()  # classes, by their brightness
    assert len(found) == 200 and len(set(shades.tolist())) >= 10
    assert torch.equal(found, some_images(data, "test", 200))  # and the same at every test
    assert len(some_images(data, "test", 5000)) == 1500


def test_classifier_is_trained_once_and_cached(tmp_path, monkeypatch):
    state = torch.get_rng_state()
    first = features(tmp_path)
    assert torch.equal(state, torch.get_rng_state())  # training randomness untouched
    assert first.accuracy > 0.8 and not any(p.requires_grad for p in first.parameters())
    images = to_uint8(torch.stack([Digits().load_split("val")[i][0] for i in range(50)]))
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierFeatures, "_train", lambda *args: pytest.fail("trained twice"))
        second = features(tmp_path)
        torch.testing.assert_close(second(images), first(images))
        assert (second.accuracy, second.kid_scale) == (first.accuracy, first.kid_scale)
        with pytest.raises(pytest.fail.Exception):
            features(tmp_path, seed=1)  # another classifier is another file
    (file,) = (tmp_path / ".cache").glob("*classifier*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert features(tmp_path).accuracy == first.accuracy  # a broken cache is made anew


def test_features_tell_digits_from_noise(tmp_path):
    made = features(tmp_path)
    real, other = (Digits().load_split(split).x for split in ("train", "val"))
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8)
    near, far = frechet_distance(made(real), made(other)), frechet_distance(made(real), made(noise))
    assert near < far / 10
    labels = Digits().load_split("val").labels
    assert float((made.classify(other) == labels).float().mean()) == pytest.approx(made.accuracy)


def test_cache_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "a" / "b.pt"
    assert load_cached(path) is None
    path.parent.mkdir()
    for rubbish in ([1, 2], {"y": 1}):
        torch.save(rubbish, path)
        assert load_cached(path, "x") is None
    save_cached({"x": torch.ones(2)}, path)
    assert load_cached(path)["x"].sum() == 2 and [p.name for p in path.parent.iterdir()] == ["b.pt"]


def test_data_without_classes_needs_other_features(tmp_path):
    data = Digits(root=str(tmp_path))
    data.class_names = ()
    with pytest.raises(
        UserError, match="a classifier needs two classes, and .* has 0 here.*use callbacks.InceptionFeatures"
    ):
        ClassifierFeatures().prepare(data)


@pytest.fixture
def inception_weights(tmp_path, monkeypatch):
    """A weights file of the right shapes, with random values: the real ones cannot be downloaded here."""
    from torch_fidelity import feature_extractor_inceptionv3 as source

    with monkeypatch.context() as patch:
        patch.setattr(source, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **options: None)
        network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_from_a_file(inception_weights):
    made = InceptionFeatures(str(inception_weights))
    made.prepare(Digits())
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    out = made(grey)
    assert out.shape == (2, 2048) and out.isfinite().all()
    torch.testing.assert_close(out, made(grey.expand(-1, 3, -1, -1)))
    assert float((out[0] - out[1]).abs().max()) > 0


@pytest.mark.parametrize("features", [InceptionFeatures, DINOv2Features])
def test_features_by_other_weights_are_other_features(features, tmp_path, monkeypatch):
    """References and statistics are found again by the key; the published file is what is downloaded."""
    made = {}
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        made[name] = features(str(tmp_path / name))
    known = [features(), *made.values()]
    assert len({one.key for one in known}) == len({one.protocol for one in known}) == 3
    assert made["a"].key == features(str(tmp_path / "a")).key
    assert made["a"].description.endswith(f"weights {hashlib.sha256(b'a').hexdigest()[:8]}")
    monkeypatch.setattr(InceptionFeatures, "published", hashlib.sha256(b"a").hexdigest()[:8])
    same = InceptionFeatures(str(tmp_path / "a"))
    assert (same.key, same.description) == (InceptionFeatures().key, InceptionFeatures().description)


def test_inception_weights_of_an_older_torch(inception_weights):
    """The published file is older than torch's present format; and weights that are lost are refused."""
    state = torch.load(inception_weights, weights_only=True)
    torch.save(state, inception_weights, _use_new_zipfile_serialization=False)
    made = InceptionFeatures(str(inception_weights))
    made.prepare(Digits())
    assert made.loaded
    name = next(iter(state))
    torch.save({**state, name: torch.full_like(state[name], torch.nan)}, inception_weights)
    with pytest.raises(UserError, match=f"could not be read from .*{name} is not finite"):
        InceptionFeatures(str(inception_weights)).prepare(Digits())


def test_inception_weights_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="weights: file not found: nowhere.pth"):
        InceptionFeatures("nowhere.pth")
    wrong = tmp_path / "wrong.pth"
    words = ["", "it is no file of weights, or holds more than numbers", "it holds no tensors by name"]
    for content, reason in zip(({"a": torch.ones(1)}, {"a": nn.Identity}, [1.0]), words):
        torch.save(content, wrong)
        with pytest.raises(UserError, match=f"could not be read from .*wrong.pth.*{reason}") as told:
            InceptionFeatures(str(wrong)).prepare(Digits())
        assert "\x1b" not in str(told.value) and "weights_only" not in str(told.value)
    wrong.write_bytes(b"")
    with pytest.raises(UserError, match=r"could not be read from .*wrong.pth \(\w+"):
        InceptionFeatures(str(wrong)).prepare(Digits())
    from torch_fidelity import feature_extractor_inceptionv3 as source

    def no_network(*args, **options):
        raise OSError("no network here")

    monkeypatch.setattr(source, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="could not be downloaded .*no network here.*ClassifierFeatures"):
        InceptionFeatures().prepare(Digits())


def test_inception_features_are_those_of_torch_fidelity(inception_weights):
    """The published protocol: its own resize, of bytes, to 299×299, bit by bit."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not here")
    made = InceptionFeatures(str(inception_weights))
    made.prepare(Digits())
    theirs = source.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(made(images), theirs(images)[0])


def test_images_are_prepared_for_dinov2_as_edm2_does(tmp_path, monkeypatch):
    from PIL import Image
    from torchvision.transforms.v2 import functional

    small = VisionTransformer(width=32, depth=2, heads=2)
    for p in small.parameters():
        nn.init.normal_(p, std=0.2)
    torch.save(small.state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(features_module, "VisionTransformer", lambda width: VisionTransformer(width, 2, 2))
    monkeypatch.setattr(DINOv2Features, "num_features", 32)
    made = DINOv2Features(str(tmp_path / "dino.pth"))
    made.prepare(Digits())
    for side in (32, 400):  # up, and down, where antialiasing matters
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        x = functional.resize(images.float(), [224, 224], functional.InterpolationMode.BICUBIC, antialias=True)
        mean, deviation = [255 * m for m in (0.485, 0.456, 0.406)], [255 * s for s in (0.229, 0.224, 0.225)]
        torch.testing.assert_close(made.standardised(images), functional.normalize(x, mean, deviation))
        torch.testing.assert_close(made(images), small.eval()(made.standardised(images)).detach())
    pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    ours = (made.standardised(images[:1])[0] * made.deviation + made.mean) * 255
    assert float((ours - functional.pil_to_tensor(pillow)).abs().mean()) < 1  # of 255: the reference's slow resize
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert made(grey).shape == (2, 32)
    with pytest.raises(UserError, match="DINOv2 weights could not be read from .*wrong.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / "wrong.pth")
        DINOv2Features(str(tmp_path / "wrong.pth")).prepare(Digits())
