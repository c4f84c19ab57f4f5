"""Weights out and in: an exported folder draws what its checkpoint draws, and is refused where it is not whole."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bd_lightning
import train
from bd_lightning import checkpoints
from bd_lightning.addresses import digest
from bd_lightning.checks import UserError
from bd_lightning.cli import export
from bd_lightning.latents import TrainedLatents, check_codes
from callbacks import drawing
from conftest import ROOT
from small_run import contents
from tiny_data import write_autoencoder

QUIET = ["callbacks.progress=null"]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def exported(run, tmp_path) -> Path:
    target = tmp_path / "exported"
    assert train.main(["export", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"to={target}", *QUIET]) == 0
    return target


def test_an_exported_folder_draws_what_its_checkpoint_draws(run, exported, tmp_path):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.yaml", "model.safetensors", "samples.png",
    ]  # fmt: skip
    checkpoint = run / "checkpoints" / "last.ckpt"
    words = ["n=6", "seed=3", f"root={tmp_path / 'out'}", "run_id=drawn", *QUIET]
    assert train.main(["predict", f"ckpt_path={checkpoint}", "n=6", "seed=3", *QUIET]) == 0
    assert train.main(["predict", f"ckpt_path={exported}", *words]) == 0
    ours, theirs = run / "predict-ode-seed3", tmp_path / "out" / "bellman-diffusion" / "drawn" / "predict-ode-seed3"
    assert len(pictures(ours)) == 7 and pictures(ours) == pictures(theirs)
    first, second = bd_lightning.load(checkpoint), bd_lightning.load(exported)
    assert torch.equal(first.sample(5, seed=1), second.sample(5, seed=1))
    assert list(second.samplers) == ["ode"] and second.model.loaded_step == 4
    x, sigma = torch.randn(3, 1, 8, 8), torch.ones(3)
    assert all(torch.equal(a, b) for a, b in zip(first.fields(x, sigma), second.fields(x, sigma)))


def test_a_card_says_what_weights_and_numbers_were_and_quotes_on_one_line(run, tmp_path):
    injected = {"step": 4, "drawn": None, "val/fid": 40.0, "protocol": "one | two\n# three"}
    (run / "fid.json").write_text(json.dumps([injected]))
    last, folders = run / "checkpoints" / "last.ckpt", [tmp_path / name for name in ("half", "again", "third")]
    assert train.main(["export", f"ckpt_path={last}", f"to={folders[0]}", "precision=fp16", *QUIET]) == 0
    for source, target in zip(folders, folders[1:]):
        assert train.main(["export", f"ckpt_path={source}", f"to={target}", *QUIET]) == 0
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert "Measured in float32, before the weights were rounded to fp16." in card
        assert "| one \\| two # three |" in card and "runs nothing that they bring along" in card
    (folders[0] / "config.yaml").write_text(
        re.sub(r"^data:\n(  .*\n)+", "data: 3\n", (folders[0] / "config.yaml").read_text(), flags=re.M)
    )
    with pytest.raises(UserError, match="the data of its config are no mapping"):
        bd_lightning.load(folders[0])


def test_a_config_that_leaves_the_machine_names_none_of_its_folders(run, exported, tmp_path):
    text = (exported / "config.yaml").read_text() + (exported / "README.md").read_text()
    assert str(tmp_path) not in text and str(run.parent) not in text and "accelerator" not in text


@pytest.mark.parametrize(("precision", "bits"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_stored_in_the_precision_that_is_asked_for(run, tmp_path, precision, bits):
    checkpoint, target = run / "checkpoints" / "last.ckpt", tmp_path / precision
    assert train.main(["export", f"ckpt_path={checkpoint}", f"to={target}", f"precision={precision}", *QUIET]) == 0
    stored, whole = load_file(target / "model.safetensors"), checkpoints.read(checkpoint)["state_dict"]
    assert {one.dtype for one in stored.values()} == {bits} and stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name].to(bits)) for name in whole)
    assert next(bd_lightning.load(target).model.parameters()).dtype == torch.float32


def test_the_card_quotes_what_was_measured_at_that_step(run, tmp_path, capsys):
    last = run / "checkpoints" / "last.ckpt"
    drawn = bd_lightning.load(last).model.drawing("ode")
    rows = [{"step": step, "drawn": drawn, "val/fid": 10.0 * step, "protocol": f"at {step}"} for step in (2, 4)]
    (run / "fid.json").write_text(json.dumps(rows))
    target = tmp_path / "card"
    assert train.main(["export", f"ckpt_path={last}", f"to={target}", *QUIET]) == 0
    card = (target / "README.md").read_text()
    assert "| val/fid 40 | at 4 |" in card and "at 2" not in card and "![samples](samples.png)" in card
    assert json.loads((target / "fid.json").read_text()) == rows[1:]
    (run / "metrics.json").write_text('{"val/fid": {"mode": "min", "digits": 1}}')
    capsys.readouterr()
    assert train.main(["compare", str(run), str(target), f"out={tmp_path / 'page.html'}"]) == 0
    told = capsys.readouterr().out
    (fid,) = [line for line in told.splitlines() if line.startswith("val/fid")]
    assert fid.endswith("40.0 (40.0 at 4)") and "facts." not in told
    again = tmp_path / "again"
    assert train.main(["export", f"ckpt_path={target}", f"to={again}", *QUIET]) == 0
    assert json.loads((again / "fid.json").read_text()) == rows[1:]


def test_the_card_leaves_out_numbers_of_samples_drawn_otherwise(run, tmp_path, capsys, monkeypatch):
    last = run / "checkpoints" / "last.ckpt"
    ode = bd_lightning.load(last).model.drawing("ode")
    assert "steps=3.0" in ode and ode.endswith("before=1.0, transition=None)")
    few = ode.replace("steps=3.0", "steps=7.0")
    own = [{"step": 4, "val/fid": 40.0, "protocol": "as drawn now", "drawn": ode}]
    own += [{"step": 4, "val/fid": 39.0, "protocol": "by a sampler that it has no more", "drawn": "sde"}]
    own += [{"step": 4, "val/fid": 38.0, "protocol": "before the run was resumed with another sampler", "drawn": few}]
    own += [{"step": 4, "val/fid": 37.0, "protocol": "of a suite that did not say how"}]
    (run / "fid.json").write_text(json.dumps(own))
    numbers = [{"step": 4, "drawn": None, "val/bits": 2.5, "protocol": "no sampler has a part in it"}]
    (run / "likelihood.json").write_text(json.dumps(numbers))
    for k, (drawn, weights) in enumerate([(ode, digest(last)), (few, digest(last)), (ode, "of another file")]):
        folder = run / f"test-last-0000004-{k}"
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps({"checkpoints": [weights]}))
        row = {"step": 4, "drawn": drawn, "test/fid": 41.0 + k, "protocol": "a test"}
        (folder / "fid.json").write_text(json.dumps([row]))

    def quoted(source, name, *words):
        assert train.main(["export", f"ckpt_path={source}", f"to={tmp_path / name}", *words, *QUIET]) == 0
        file = tmp_path / name / "fid.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        return [row.get("val/fid", row.get("test/fid")) for row in rows], (tmp_path / name / "README.md").read_text()

    settings = run / "test-last-0000004-2" / "settings.json"
    for text, sentence in [("{", "settings.json is damaged"), ("[]", "it holds no dict")]:
        settings.write_text(text)
        with monkeypatch.context() as patched:
            patched.setattr(export, "draw", lambda plan, folder: pytest.fail("samples were drawn for nothing"))
            assert train.main(["export", f"ckpt_path={last}", f"to={tmp_path / 'none'}", *QUIET]) == 2
        assert sentence in capsys.readouterr().err
    for text in ("{}", '{"checkpoints": 3}', '{"checkpoints": []}'):
        settings.write_text(text)
        assert quoted(last, f"own{len(text)}")[0] == [40.0, 41.0]
    rows, card = quoted(last, "own")
    assert rows == [40.0, 41.0] and "| val/bits 2.5 | no sampler has a part in it |" in card
    assert quoted(last, "few", "model.samplers.ode.steps=7")[0] == [38.0, 42.0]
    torch.save({**torch.load(last, weights_only=True), "made_by": "average"}, last.with_name("length-0.05.ckpt"))
    assert quoted(last.with_name("length-0.05.ckpt"), "average")[0] == []
    (tmp_path / "own" / "likelihood.json").unlink()
    rows, card = quoted(tmp_path / "own", "other", "model.samplers.ode.steps=5")
    assert rows == [] and "Nothing was measured with the samplers and guidance of this folder." in card


def test_a_place_that_cannot_be_written_is_said_by_its_key(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(
        capsys, "export", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"to={tmp_path / 'file' / 'a'}"
    )
    assert "give to= another place" in message


def test_a_folder_whose_facts_ask_for_too_much_or_are_missing_is_refused_in_a_sentence(exported, capsys):
    config = yaml.safe_load((exported / "config.yaml").read_text())
    for change, sentence in (
        ({"facts": {**config["facts"], "shape": [1, 2**20, 2**20]}}, "asks for more memory than this machine has"),
        ({"facts": None}, "says nothing of its data"),
    ):
        changed = {key: value for key, value in {**config, **change}.items() if value is not None}
        (exported / "config.yaml").write_text(yaml.safe_dump(changed))
        assert train.main(["predict", f"ckpt_path={exported}", "n=1", *QUIET]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_a_latent_model_takes_its_autoencoder_along(tmp_path):
    root = tmp_path / "here"
    autoencoder = write_autoencoder(root / "ae.ckpt", (1, 8, 8), "Digits")
    words = ["data=digits_latent", f"data.autoencoder.ckpt_path={autoencoder}", "model=relative", "run_id=fields"]
    words += [
        "model.network.width=16",
        "model.network.depth=1",
        "model.samplers.sde.levels=4",
        "steps=2",
        "eval_every=2",
    ]
    words += [f"callbacks.{name}=null" for name in ("metrics", "best", "grid", "trajectory", "memorisation")]
    assert train.main([*words, f"root={root}", f"data.root={root}", "trainer=cpu", "logger=none", *QUIET]) == 0
    checkpoint, target = root / "bellman-diffusion" / "fields" / "checkpoints" / "last.ckpt", tmp_path / "exported"
    before = bd_lightning.load(checkpoint).sample(4, labels=["3", 8])
    assert before.shape == (4, 1, 8, 8)
    assert train.main(["export", f"ckpt_path={checkpoint}", f"to={target}", *QUIET]) == 0
    for precision in ("float32", "fp16"):  # the codes are those of one autoencoder, however its file is written
        copy = tmp_path / precision
        assert train.main(["export", f"ckpt_path={target}", f"to={copy}", f"precision={precision}", *QUIET]) == 0
        for one, other in ((checkpoint, copy), (copy, target)):
            words = [f"merge={{{other}: 1.0}}", "n=2", f"root={tmp_path / 'out'}", f"run_id={precision}", *QUIET]
            assert train.main(["predict", f"ckpt_path={one}", *words]) == 0
    root.rename(tmp_path / "gone")  # neither data nor autoencoder are where they were
    assert torch.equal(bd_lightning.load(target).sample(4, labels=["3", 8]), before)
    moved = target.rename(tmp_path / "elsewhere")
    drawn = ["predict", f"ckpt_path={moved}", "n=2", f"root={tmp_path / 'out'}", "run_id=drawn", *QUIET]
    assert train.main(drawn) == 0
    words = ["test", f"ckpt_path={moved}", f"root={tmp_path / 'out'}", "run_id=judged", *QUIET]
    assert train.main([*words, f"data.root={tmp_path}", f"data.images.root={tmp_path}"]) == 0  # the codes are its own


def test_an_autoencoder_of_other_codes_is_refused(tmp_path, capsys):
    folder = Path(__file__).resolve().parents[1] / "pretrained" / "mnist"
    other = write_autoencoder(tmp_path / "ae.ckpt", (1, 28, 28), "MNIST")
    words = [f"data.autoencoder.ckpt_path={other}", f"root={tmp_path}", "run_id=drawn", "n=2", *QUIET]
    assert train.main(["predict", f"ckpt_path={folder}", *words]) == 2
    assert "and the model's samples have [32]: give data.autoencoder the one" in capsys.readouterr().err
    fits = write_autoencoder(tmp_path / "fits.ckpt", (1, 28, 28), "MNIST", (32,))
    with pytest.warns(UserWarning, match="this autoencoder is not the file that the model learned in"):
        check_codes(TrainedLatents(str(fits)), [32], "another")


def test_an_autoencoder_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    source = Path(__file__).resolve().parents[1] / "pretrained" / "mnist"
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in ("model.safetensors", "config.yaml"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "autoencoder").symlink_to(source / "autoencoder")
    with pytest.raises(UserError, match="names an autoencoder outside its folder"):
        bd_lightning.load(folder)


def test_the_model_of_this_repository_draws_classes_in_codes():
    folder = Path(__file__).resolve().parents[1] / "pretrained" / "mnist"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6e6
    for path in folder.rglob("*.safetensors"):  # a changed byte is refused
        assert len(safe_open(path, "pt").metadata()["sha256"]) == 64
    model = bd_lightning.load(folder)
    images = model.sample(20, labels=[0, 1])
    assert torch.equal(model.sample(2, labels=1), model.sample(2, labels=[1, 1]))
    ink = (images.clamp(-1, 1) + 1).sum((1, 2, 3))
    assert images.shape == (20, 1, 28, 28) and ink[::2].mean() > 1.5 * ink[1::2].mean()  # a 0 takes more ink than a 1


@pytest.mark.parametrize("experiment", ["gaussians_2d", "autoencoder"])
def test_models_of_other_kinds(experiment, tmp_path, capsys):
    words = [
        f"experiment={experiment}",
        "steps=2",
        "eval_every=2",
        "logger=none",
        "trainer=cpu",
        "run_id=small",
        *QUIET,
    ]
    words += [f"root={tmp_path}", f"data.root={tmp_path}"]
    words += ["data=digits"] if experiment == "autoencoder" else ["model.network.width=16"]
    names = ["metrics", "best", "trajectory", "grid"]
    assert train.main([*words, *(f"callbacks.{name}=null" for name in names)]) == 0
    checkpoint, target = tmp_path / "bellman-diffusion" / "small" / "checkpoints" / "last.ckpt", tmp_path / "out"
    assert train.main(["export", f"ckpt_path={checkpoint}", f"to={target}", *QUIET]) == 0
    assert (target / "samples.csv").is_file() == (experiment == "gaussians_2d")
    card, said = (target / "README.md").read_text(), capsys.readouterr().out
    if experiment == "autoencoder":  # it draws no samples: what is written down is what can be done
        assert "data.autoencoder.ckpt_path=" in said and "train.py predict" not in said + card
        (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
        names = {"images": torch.zeros(2, 1, 8, 8)}
        exec(code.replace("FOLDER", str(target)), names)
        assert names["codes"].shape[0] == 2
        assert "Autoencoder is none" in refused(capsys, "test", f"ckpt_path={checkpoint}", "likelihood=ode")
    else:
        assert "train.py predict" in said and "bd_lightning.load(" in card
    state = checkpoints.read(checkpoint)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in checkpoints.read(target)["state_dict"].items())


def test_a_sampler_that_is_not_there_is_a_sentence(exported):
    with pytest.raises(UserError, match="no sampler 'nope'; there are ode"):
        bd_lightning.load(exported).sample(2, sampler="nope")


def test_a_root_of_the_command_line_reaches_data_within_data(tmp_path):
    """Where a stranger's folder would have looked for images, and written them, is not looked."""
    from bd_lightning.cli import config

    stored = checkpoints.read(ROOT / "pretrained" / "mnist")["hyper_parameters"]
    stored["data"]["images"]["root"] = str(tmp_path / "theirs")
    words = ["test", "ckpt_path=x", f"data.root={tmp_path / 'mine'}"]
    assert config.compose(config.parse(words), stored)["data"]["images"]["root"] == str(tmp_path / "mine")
    own = [*words, f"data.images.root={tmp_path / 'own'}"]
    assert config.compose(config.parse(own), stored)["data"]["images"]["root"] == str(tmp_path / "own")
    assert config.compose(config.parse(words[:2]), stored)["data"]["images"]["root"] == str(tmp_path / "theirs")
    record = tmp_path / "config.yaml"  # of a run folder, repeated elsewhere
    record.write_text(yaml.safe_dump({key: value for key, value in stored.items() if key != "facts"}))
    again = config.compose(config.parse(["--config", str(record), words[2]]))
    assert again["data"]["images"]["root"] == str(tmp_path / "mine")


def test_load_needs_no_more_than_the_wheel_does(exported):
    code = (
        "import sys, bd_lightning\n"
        "banned = ('torchvision', 'torchmetrics', 'wandb', 'sklearn', 'pandas', 'PIL', 'matplotlib', 'datamodules')\n"
        "before = {name for name in banned if name in sys.modules}\n"
        f"model = bd_lightning.load({str(exported)!r})\n"
        "assert model.sample(2).shape == (2, 1, 8, 8)\n"
        "print([name for name in ('datamodules', 'callbacks') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- refusals


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert train.main([*words, *QUIET]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_mistakes_in_an_export(run, exported, tmp_path, capsys):
    checkpoint = f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"
    before = contents(tmp_path)
    assert "export needs to=FOLDER" in refused(capsys, "export", checkpoint)
    assert "is there already" in refused(capsys, "export", checkpoint, f"to={exported}")
    assert "is there already" in refused(capsys, "export", checkpoint, f"to={exported / 'README.md'}")
    assert "upload it with" in refused(capsys, "export", checkpoint, "to=hf://me/model")
    message = refused(capsys, "export", checkpoint, f"to={tmp_path / 'new'}", "precision=int8")
    assert "precision must be one of float32, bf16, fp16" in message
    assert "what a run computes in is trainer.precision" in refused(capsys, "predict", checkpoint, "precision=bf16")
    assert "export needs ckpt_path" in refused(capsys, "export", f"to={tmp_path / 'new'}")
    assert "leave data= out" in refused(capsys, "export", checkpoint, "data=mnist")
    assert contents(tmp_path) == before


def test_a_weight_that_half_precision_cannot_hold(run, tmp_path, capsys):
    path = run / "checkpoints" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    name = next(iter(stored["state_dict"]))
    stored["state_dict"][name].view(-1)[0] = 1e6
    torch.save(stored, path)
    message = refused(capsys, "export", f"ckpt_path={path}", f"to={tmp_path / 'half'}", "precision=fp16")
    assert f"{name} cannot be stored in fp16: its largest entry is 1e+06" in message
    assert not list(tmp_path.glob("*half*"))


def test_a_folder_that_is_not_whole(exported, capsys):
    def tried(sentence: str) -> None:
        assert sentence in refused(capsys, "predict", f"ckpt_path={exported}", "n=1")

    weights, config = exported / "model.safetensors", exported / "config.yaml"
    whole, words = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    tried("is damaged, or was cut off")
    weights.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    tried("bytes have changed: its checksum is another one): fetch it again")
    weights.unlink()
    tried("has no model.safetensors")
    weights.write_bytes(whole)
    config.write_text(words.replace("format: 3", "format: 99"))
    tried("was written by a later version")
    config.write_text("- one\n- two\n")
    tried("config.yaml is damaged")
    config.write_text(words)
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    tried("do not fit the model")


def test_nothing_that_an_exported_config_names_is_called(exported, capsys):
    config = exported / "config.yaml"
    words = config.read_text()
    config.write_text(words.replace("bd_lightning.networks.MLP", "subprocess.Popen"))
    assert "names 'subprocess.Popen', which is no class of this suite" in refused(
        capsys, "predict", f"ckpt_path={exported}"
    )
    with pytest.raises(UserError, match=r"subprocess\.Popen"):
        bd_lightning.load(exported)
    config.write_text(words.replace("seed: 0", "seed: ${oc.env:HOME}"))
    assert "refers to something outside it" in refused(capsys, "predict", f"ckpt_path={exported}")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("seed: !!python/object/apply:os.mkdir [called]", "config.yaml is damaged"),
        ("seed: !!python/name:os.system", "config.yaml is damaged"),
        ("data: {_target_: datamodules.Digits, autoencoder: {ckpt_path: /etc/passwd}}", "outside its folder"),
    ],
)
def test_a_config_that_reaches_out(line, sentence, exported, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = line.partition(":")[0]
    kept = re.sub(rf"^{key}:.*\n(  .*\n)*", "", (exported / "config.yaml").read_text(), flags=re.M)
    (exported / "config.yaml").write_text(f"{line}\n{kept}")
    assert sentence in refused(capsys, "predict", f"ckpt_path={exported}")
    assert not (tmp_path / "called").exists()


def test_an_exported_model_cannot_be_trained_on(exported, capsys, tmp_path):
    words = [f"ckpt_path={exported}", "steps=8", f"root={tmp_path / 'out'}", "run_id=further"]
    assert "only weights to evaluate and sample from" in refused(capsys, *words)


def test_sigterm_ends_a_test_that_draws(run, tmp_path, monkeypatch):
    moved = []

    def strike(*args):
        moved.append(args)
        if len(moved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(drawing, "_move", strike)
    target = tmp_path / "samples.npz"
    words = ["callbacks.metrics._target_=callbacks.ImageMetrics", "callbacks.metrics.n_test=500", f"export={target}"]
    features = "callbacks.metrics.features={_target_: callbacks.ClassifierFeatures, steps: 5}"
    words += [features, "callbacks.metrics.batch_size=50", "trainer=cpu", *QUIET]
    with pytest.raises(SystemExit) as stop:
        train.main(["test", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", *words])
    assert stop.value.code == 143 and len(moved) == 2 and not list(tmp_path.glob(".samples*"))
