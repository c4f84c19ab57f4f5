"""The chain autoencoder → fields of its codes, end to end on digits, and its mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from bd_lightning import facts
from bd_lightning.latents import DiffusersLatents, LatentSpace, TrainedLatents
from bd_lightning.modules import Autoencoder
from datamodules import Digits, Latents
from datamodules.splits import DataError
from tiny_data import write_mnist

FEATURES = ["callbacks.metrics.features.steps=60", "trainer=cpu"]


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="session")
def autoencoder(root) -> Path:
    """The checkpoint of an autoencoder of digits."""
    command = ["experiment=autoencoder", "data=digits", "steps=200", "eval_every=200", "run_id=ae", "model.latent=[12]"]
    command += ["callbacks.metrics.n=297", f"root={root / 'runs'}", f"data.root={root / 'data'}", *FEATURES]
    assert train.main(command) == 0
    return root / "runs" / "bellman-diffusion" / "ae" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def latent_run(root, autoencoder) -> Path:
    command = ["data=digits_latent", f"data.autoencoder.ckpt_path={autoencoder}", "model=mlp", "run_id=fields"]
    command += ["model.network.width=64", "model.network.depth=1", "model.samplers.sde.levels=8", "steps=60"]
    command += ["eval_every=60", "data.batch_size=64", "callbacks.metrics.n=100", "callbacks.trajectory.n=4"]
    assert train.main([*command, *FEATURES, f"root={root / 'runs'}", f"data.root={root / 'data'}"]) == 0
    return root / "runs" / "bellman-diffusion" / "fields"


def test_reconstructions_resemble_their_images(root, autoencoder):
    space = TrainedLatents(str(autoencoder))
    images = torch.stack([x for x, _ in Digits().load_split("val")])
    error = (space.decode(space.encode(images)) - images).square().mean()
    spread = (images - images.mean(0)).square().mean()
    assert error < 0.25 * spread


def test_a_damaged_autoencoder_is_not_one_to_train(tmp_path):
    for content, first in ((None, True), (b"half", False)):
        if content is not None:
            (tmp_path / "ae.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint") as refused:
            TrainedLatents(str(tmp_path / "ae.ckpt"))
        assert ("train an autoencoder first" in str(refused.value)) == first


def test_codes_say_what_images_would(autoencoder, tmp_path, caplog):
    class Late(Digits):
        class_names = ()

        def __init__(self, **options):
            super().__init__(**options)
            self.class_names = Digits.class_names

    space = TrainedLatents(str(autoencoder))
    with pytest.raises(DataError, match="keep=.*was not obeyed: Late has no classes"):
        Latents(Late(keep=[3]), space, any_data=True, root=str(tmp_path)).setup("fit")
    images = Digits()
    images.train_on_all("data.images.val_size=0")
    Latents(images, space, root=str(tmp_path)).setup("fit")
    assert "data.images.val_size=0: all images are trained on; validation takes" in caplog.text


def test_batches_of_codes_are_not_the_images(autoencoder, tmp_path):
    images = Digits(keep=[3], batch_size=1000, root=str(tmp_path))
    codes = Latents(images, TrainedLatents(str(autoencoder)), batch_size=16, any_data=True, root=str(tmp_path))
    codes.setup("fit")
    assert 16 <= len(codes.split("train")) < images.batch_size
    with pytest.raises(DataError, match="fewer than one batch; set data.batch_size to"):
        images.setup("fit")


def test_each_image_is_reconstructed_once(root, autoencoder, capsys):
    """Digits hold 149 out for the test, and the config asks for 10,000."""
    ae = autoencoder.parents[1]
    words = [f"root={root / 'runs'}", f"data.root={root / 'data'}", f"export={root / 'drawn.npz'}"]
    assert train.main(["test", f"ckpt_path={autoencoder}", *words]) == 0
    assert np.load(root / "drawn.npz")["arr_0"].shape == (149, 8, 8, 3)
    out = capsys.readouterr().out
    assert "149 samples (reconstruction" in out and "precision, recall: 149 of each" in out
    assert " too): train.py data=digits_latent model=mlp data.autoencoder.ckpt_path=" in out
    rows = json.loads(next(ae.glob("test-last-*/fid.json")).read_text())
    assert rows[-1]["protocol"].startswith("149 samples")


def test_codes_are_known_by_what_was_trained(root, autoencoder):
    """Also where it was exported, from a folder or in another precision; caches tell them apart."""
    folders = [root / "exported", root / "rounded"]
    for source, target in zip([autoencoder, *folders], folders):
        assert train.main(["export", f"ckpt_path={source}", f"to={target}", "precision=bf16"]) == 0
    found = [TrainedLatents(str(path)) for path in (autoencoder, *folders)]
    assert {one.space for one in found} == {str(found[0].key)} and found[1].key != found[0].key


def test_codes_are_standardised(root, autoencoder):
    data = Latents(Digits(root=str(root / "data")), TrainedLatents(str(autoencoder)), root=str(root / "data"))
    codes = data.split("train").x
    assert codes.shape == (1500, 12) and data.facts.sigma_data == 1.0
    assert codes.mean(0).abs().max() < 0.1 and (codes.std(0) - 1).abs().max() < 0.1


def test_codes_are_cached_under_the_autoencoder_and_the_split(root, autoencoder, tmp_path):
    class Counted(LatentSpace):
        def __init__(self, inner):
            self.inner, self.key, self.images = inner, inner.key, 0

        def encode(self, x):
            self.images += len(x)
            return self.inner.encode(x)

        def decode(self, z):
            return self.inner.decode(z)

    def load(space, flip=False):
        return Latents(Digits(root=str(tmp_path), flip=flip), space, root=str(tmp_path)).load_split("train")

    space = Counted(TrainedLatents(str(autoencoder)))
    first = load(space)
    encoded = space.images
    again = load(space)
    assert torch.equal(first.x, again.x) and space.images == encoded + 1  # one, to learn the shape
    assert torch.equal(first.labels, Digits().load_split("train").labels)
    both = load(space, flip=True)
    assert len(both) == 3000 and torch.equal(both.x[:1500], first.x) and torch.equal(both.labels[1500:], first.labels)
    space.key = ["another"]
    load(space)
    assert space.images > encoded + 3000


def test_fields_of_codes_are_shown_and_judged_as_images(latent_run, autoencoder):
    (row,) = json.loads((latent_run / "fid.json").read_text())
    assert row["val/fid"] < row["noise"] and "images of Digits;" in row["protocol"]
    with Image.open(latent_run / "samples" / "ode-0000060.png") as image:
        assert image.size[0] > 8 * 8
    assert (latent_run / "samples" / "trajectory-sde.gif").is_file()
    checkpoint = torch.load(latent_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["facts"]["shape"] == [12]
    assert not any("decoder" in name for name in checkpoint["state_dict"])  # the autoencoder has a file of its own


def test_predict_decodes(latent_run, root):
    assert train.main(["predict", f"ckpt_path={latent_run / 'checkpoints' / 'last.ckpt'}", "n=5"]) == 0
    with Image.open(latent_run / "predict-ode-seed0" / "000004.png") as image:
        assert image.size == (8, 8) and image.mode == "L"
        assert image.getextrema()[1] > 100  # ink on paper, not codes read as pixels


@pytest.mark.parametrize("latent", [(10,), (3, 4, 3)])
def test_shapes_of_codes(latent):
    module = Autoencoder((3, 15, 12), latent, (8, 16)).eval()
    x = torch.randn(4, 3, 15, 12)
    assert module.encode(x).shape == (4, *latent) and module.decode(module.encode(x)).shape == x.shape


def test_kl_weighs_the_precision_of_codes():
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    module = Autoencoder((1, 8, 8), (4,), (8,), kl_weight=2.0)
    values, _ = module.compute((x, None), torch.Generator().manual_seed(0))
    values = {name: float(value.detach()) for name, value in values.items()}
    assert values["loss"] == pytest.approx(values["squared_error"] + 2 * values["kl"])
    mean, log_variance = module.encoder(x)
    mean = (mean - mean.mean(0)) / mean.std(0, unbiased=False)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert values["kl"] == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("model.latent=[4, 3, 3]", "latent must be [d], or [c, 2, 2] after 2 halvings of 8×8 pixels; got [4, 3, 3]"),
        ("model.channels=[]", "channels needs at least one entry"),
        ("model.latent=[0]", "latent[0] must be positive"),
        ("model.kl_weight=-1", "kl_weight must lie between 0 and inf"),
        ("model.latent=sixteen", "'model.latent' must be"),
    ],
)
def test_mistakes_in_an_autoencoder(key, sentence, root, capsys):
    assert train.main(["experiment=autoencoder", "data=digits", key, f"root={root / 'bad'}"]) == 2
    assert sentence in capsys.readouterr().err


def test_mistakes_in_the_chain(root, autoencoder, latent_run, tmp_path, capsys):
    def refused(*words):
        assert train.main([*words, "model=mlp", f"root={root / 'bad'}", *FEATURES]) == 2
        return capsys.readouterr().err

    key = "data.autoencoder.ckpt_path"
    assert f"'{key}' is missing" in refused("data=digits_latent")
    assert "checkpoint not found: nowhere.ckpt; train an autoencoder first" in refused(
        "data=digits_latent", f"{key}=nowhere.ckpt"
    )
    fields = latent_run / "checkpoints" / "last.ckpt"
    assert "is of class BellmanDiffusion" in refused("data=digits_latent", f"{key}={fields}")
    write_mnist(tmp_path)
    message = refused("data=mnist_latent", f"{key}={autoencoder}", f"data.root={tmp_path}")
    assert "trained on images of shape (1, 8, 8), MNIST has (1, 28, 28)" in message
    space = TrainedLatents(str(autoencoder))
    space.data_name = "Letters"
    with pytest.raises(ValueError, match=r"trained on Letters, the images are Digits; .* data\.any_data=true"):
        Latents(Digits(), space)
    assert Latents(Digits(), space, any_data=True).shape == (12,)


def test_a_diffusers_autoencoder_from_a_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (uv sync --group diffusers)")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=[8, 8], norm_num_groups=4, latent_channels=2, sample_size=8, scaling_factor=0.5,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    space = DiffusersLatents(str(tmp_path / "vae"))
    data = Latents(Digits(root=str(tmp_path)), space, root=str(tmp_path))
    total = sum(float(p.double().sum()) for p in model.parameters())
    for last in (total, total * (1 + 1e-13)):  # of another number of threads, as written before
        stored = data.facts.plain() | {"space": str([*space.key[:3], last])}
        assert facts.read(stored).space == data.facts.space
    assert facts.read(stored | {"space": str([*space.key[:3], total + 0.01])}).space != data.facts.space
    assert data.shape == (2, 4, 4) and data.decode(data.split("val").x[:3]).shape == (3, 1, 8, 8)
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(space.encode(x), 0.5 * model.eval().encode(x).latent_dist.mean, atol=1e-5)
    with pytest.raises(ValueError, match="no AutoencoderKL could be loaded from"):
        DiffusersLatents(str(tmp_path / "nothing"))
