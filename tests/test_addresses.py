"""Models by the address of a hub, from stand-ins on this machine."""

import shutil
from pathlib import Path

import pytest
import torch

import bd_lightning
import train
from bd_lightning import addresses
from bd_lightning.checks import UserError
from hubs import COMMIT, WeightsHub, as_cached, hub
from small_run import WORDS

constants = pytest.importorskip("huggingface_hub.constants", reason="no huggingface_hub (uv sync --group hub)")
QUIET = ["callbacks.progress=null"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An exported model."""
    root = tmp_path_factory.mktemp("hub")
    assert train.main([*WORDS, f"root={root}", f"data.root={root}", "run_id=one"]) == 0
    checkpoint = root / "bellman-diffusion" / "one" / "checkpoints" / "last.ckpt"
    assert train.main(["export", f"ckpt_path={checkpoint}", f"to={root / 'model'}", *QUIET]) == 0
    (root / "model" / "training_data.bin").write_bytes(b"not asked for")
    return root / "model"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the client, which knows no server."""
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "cache"), "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    addresses._hugging_face.cache_clear()
    addresses._wandb.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def server(model, cache, monkeypatch):
    with hub(model) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        yield running


def test_paths_are_left_alone(tmp_path):
    for path in ("runs/one/checkpoints/best.ckpt", str(tmp_path), "C:/models/one"):
        assert addresses.local(path) == path
    assert addresses.weights_of(tmp_path) == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("hf://digits", "it is written hf://owner/name[@revision]"),
        ("hf://me/digits@", "it is written hf://owner/name[@revision]"),
        ("hf://me/../../etc", "it is written hf://owner/name[@revision]"),
        ("wandb://me/digits:v0", "it is written wandb://entity/project/artifact:alias"),
        ("wandb://me/project/../x:v0", "it is written wandb://entity/project/artifact:alias"),
        ("hgf://me/digits", "it begins with hf:// or wandb://. Did you mean 'hf'?"),
        ("hf:/me/digits", "it is written hf://owner/name[@revision]"),
        ("wandb:me/p/digits:v0", "it is written wandb://entity/project/artifact:alias"),
        ("s3://bucket/model", "it begins with hf:// or wandb://"),
    ],
)
def test_what_is_no_address(address, sentence):
    with pytest.raises(UserError) as refusal:
        addresses.local(address)
    assert sentence in str(refusal.value)


def test_a_cached_repository_is_read_without_a_network(model, cache, monkeypatch, tmp_path):
    snapshot = as_cached(model, cache, "me/digits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ours = bd_lightning.load(model).sample(3)
    assert torch.equal(bd_lightning.load("hf://me/digits").sample(3), ours)
    assert torch.equal(bd_lightning.load(f"hf://me/digits@{COMMIT}").sample(3), ours)
    words = ["predict", "ckpt_path=hf://me/digits", "n=2", f"root={tmp_path / 'out'}", "run_id=drawn", *QUIET]
    assert train.main(words) == 0
    assert len(list((tmp_path / "out").rglob("00000*.png"))) == 2 and not list(snapshot.rglob("predict*"))
    with pytest.raises(UserError, match="hf://me/other is not in the local cache, and the hub cannot be reached"):
        bd_lightning.load("hf://me/other")


def test_a_repository_is_fetched_without_what_is_no_part_of_a_model(model, server, cache, capsys, tmp_path):
    ours = bd_lightning.load(model).sample(3)
    assert torch.equal(bd_lightning.load("hf://me/digits@v1").sample(3), ours)
    assert not any("training_data.bin" in asked for asked in server.asked if asked.startswith("GET me/"))
    asked = len(server.asked)
    bd_lightning.load("hf://me/digits@v1")
    assert len(server.asked) == asked
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "fid.json").write_text('[{"step": 4, "val/fid": 3.0, "protocol": "so"}]')
    page = f"out={tmp_path / 'page.html'}"
    assert train.main(["compare", "hf://me/digits@v1", str(tmp_path / "copy"), page]) == 0
    assert "hf://me/digits@v1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("hf://me/secret", "hf://me/secret does not exist, or is private: check the name, or log in"),
        ("hf://me/digits@v9", "hf://me/digits@v9: the repository has no revision 'v9'"),
    ],
)
def test_repositories_that_are_not_to_be_had(address, sentence, server, capsys):
    assert train.main(["predict", f"ckpt_path={address}", *QUIET]) == 2
    assert sentence in capsys.readouterr().err


def test_a_download_that_is_cut_off_is_gone_on_from_and_never_half_used(model, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    server.cut = {"model.safetensors"}
    with pytest.raises(UserError) as refusal:
        bd_lightning.load("hf://me/digits")
    assert "could not be fetched whole" in str(refusal.value) or "was not fetched whole" in str(refusal.value)
    server.cut = set()
    assert torch.equal(bd_lightning.load("hf://me/digits").sample(3), bd_lightning.load(model).sample(3))


# ---- Weights & Biases


@pytest.fixture
def artifacts(model, cache, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    with hub(model, WeightsHub) as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "artifacts"))
        monkeypatch.setenv("WANDB_SILENT", "true")
        wandb.teardown()
        yield running
        wandb.teardown()


def test_an_artifact_is_fetched_once_and_read_from_the_cache_afterwards(model, artifacts, monkeypatch, tmp_path):
    ours = bd_lightning.load(model).sample(3)
    address = "wandb://me/project/digits:latest"
    assert torch.equal(bd_lightning.load(address).sample(3), ours)
    folder = Path(addresses.local(address))
    assert folder.name == "v0" and folder.is_relative_to(tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"README.md", "config.yaml", "model.safetensors", "samples.png"}
    with pytest.raises(UserError, match="wandb://me/project/other:v0 does not exist, or is private"):
        addresses.local("wandb://me/project/other:v0")
    addresses._wandb.cache_clear()
    monkeypatch.setattr(addresses, "TIMEOUT", 1)
    artifacts.shutdown()
    artifacts.server_close()
    assert addresses.local(address) == str(folder) == addresses.local(address.replace("latest", "v0"))
    with pytest.raises(UserError, match="wandb://me/project/digits:old is not in the local cache, and could not be"):
        addresses.local("wandb://me/project/digits:old")


@pytest.mark.parametrize(
    ("answer", "denied"),
    [
        ("HTTP 404: artifact", True),
        ("run or artifact not found", True),
        ("cannot reach http://127.0.0.1:34019/graphql", False),
        ("http://127.0.0.1:403/graphql: connection refused", False),
        ("timed out after 1403 ms", False),
    ],
)
def test_a_refusal_is_told_from_a_server_out_of_reach(answer, denied):
    assert addresses._denied(RuntimeError(answer)) == denied


def test_without_a_key_nobody_is_asked_for_one(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "artifacts"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="W&B has no key here: wandb login, or set WANDB_API_KEY"):
        addresses.local("wandb://me/project/digits:v0")
