"""A checkpoint from a stranger runs nothing: its config names the suite's classes, where they belong, or is refused."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import bd_lightning
import faults
import fuzz
import train
from bd_lightning import checkpoints
from bd_lightning.checks import UserError
from bd_lightning.cli import build, plan
from bd_lightning.cli import config as configs
from bd_lightning.upgrade import upgrade
from tiny_data import write_autoencoder

V1 = Path(__file__).parent / "checkpoints" / "v1"
PLACES = {
    "an argument of data": ("data", "keep"),
    "data": ("data",),
    "a callback": ("callbacks", "more"),
    "an argument of a callback": ("callbacks", "diagnostics", "nonfinite"),
    "the progress bar": ("callbacks", "progress"),
    "trainer": ("trainer",),
    "an argument of the trainer": ("trainer", "plugins"),
    "a list in the trainer": ("trainer", "callbacks"),
    "model": ("model",),
    "the network": ("model", "network"),
    "an argument of the network": ("model", "network", "width"),
    "a sampler": ("model", "samplers", "sde"),
    "the objective": ("model", "objective"),
    "logger": ("logger",),
    "an autoencoder": ("data", "autoencoder"),
    "a key of the top": ("calibrate",),
    "the facts": ("facts", "name"),
}


def doctored(path: Path, place: tuple[str, ...], node: dict, name: str = "default") -> Path:
    """A checkpoint whose config has a node where it does not belong."""
    checkpoint = torch.load(V1 / f"{name}.ckpt", weights_only=True)
    stored = copy.deepcopy(upgrade(checkpoint["hyper_parameters"]))
    at = stored
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = [node] if place[-1] == "callbacks" else node
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, "hyper_parameters": stored}, path)
    return path


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(argv: list[str], outside: Path, capsys) -> str:
    """The one sentence that a command line is refused with, while nothing is written."""
    before = files(outside)
    assert train.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and "Traceback" not in said
    assert files(outside) == before
    return said


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["predict", "fit", "test"])
def test_nothing_runs_from_a_checkpoint(place, command, tmp_path, capsys):
    mark = tmp_path / "outside" / "mark"
    mark.parent.mkdir()
    path = doctored(tmp_path / "a.ckpt", PLACES[place], {"_target_": "os.system", "command": f"touch {mark}"})
    words = [command, f"ckpt_path={path}", f"root={tmp_path / 'outside' / 'runs'}", f"data.root={tmp_path / 'data'}"]
    said = refused(words if PLACES[place] != ("data",) else words[:-1], mark.parent, capsys)
    assert "os.system" in said
    if place == "the facts":
        assert "the fact name of a data module must be" in said
    else:
        assert "name the class on the command line too, or add trust=true" in said
        refused([*words, "trust=true"], mark.parent, capsys)  # it is no class, and does not belong there


def places(node, path=()):
    """Every place of a config: values, items of lists, new keys, and the classes themselves."""
    if isinstance(node, dict):
        yield (*path, "_target_") if "_target_" in node else (*path, "more")
        for key, value in node.items():
            if key != "_target_":
                yield (*path, key)
                yield from places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield (*path, i)
            yield from places(value, (*path, i))


def placed(node, path, stranger):
    """A config with a stranger at a place."""
    if not path:
        return stranger
    copied = list(node) if isinstance(node, list) else dict(node)
    copied[path[0]] = placed(copied.get(path[0]) if isinstance(copied, dict) else copied[path[0]], path[1:], stranger)
    if path == ("_target_",):
        copied["_target_"] = stranger["_target_"]
    return copied


@pytest.mark.parametrize("config", fuzz.shipped())
def test_no_place_of_a_shipped_config_takes_a_stranger(config, tmp_path, monkeypatch):
    """Neither from the command line nor, without a look at what it is, from a checkpoint."""
    called = []
    monkeypatch.setattr(os, "system", called.append)
    group = config.split("=")[0]
    for name, shape in (("digits", (1, 8, 8)), ("mnist", (1, 28, 28))) if "latent" in config else ():
        write_autoencoder(tmp_path / f"{name}.ckpt", shape, name)
    if "cifar10_latent" in config:
        write_autoencoder(tmp_path / "cifar10.ckpt", (3, 32, 32), "CIFAR10", (8, 8, 8), (8, 8))
    composed = configs.compose(configs.parse(fuzz.needed(config, tmp_path)))
    build.check(composed)
    tried = 0
    for path in places(composed):
        if group != "experiment" and path[0] != group:
            continue
        for target in ("os.system", "faults.Stranger"):
            doctored = placed(composed, path, {"_target_": target, "command": "true"})
            with pytest.raises(UserError):
                build.check(doctored)
            with pytest.raises(UserError, match="which is no class of this suite"):
                build.refuse_strangers(doctored, "this file")
            tried += 1
    assert tried >= 2 or composed[group] in (None, {}) and not called
    assert not called and faults.Stranger.calls == 0


def test_the_command_line_takes_no_stranger(tmp_path, capsys):
    """The whole way, for a few places."""
    mark = tmp_path / "outside" / "mark"
    mark.parent.mkdir()
    node = f"{{_target_: os.system, command: 'touch {mark}'}}"
    for place in ("data.keep", "callbacks.more", "trainer.plugins", "model.network", "model.samplers.ode", "labels"):
        refused([f"{place}={node}", f"root={mark.parent / 'runs'}", "logger=none"], mark.parent, capsys)


@pytest.mark.parametrize("command", ["predict", "fit", "test"])
def test_an_environment_of_a_checkpoint_imports_nothing(command, tmp_path, capsys, monkeypatch):
    """gymnasium imports the module of an id `module:Id`."""
    pytest.importorskip("gymnasium")
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.ckpt"
    checkpoint = torch.load(V1 / "returns.ckpt", weights_only=True)
    stored = copy.deepcopy(upgrade(checkpoint["hyper_parameters"]))
    stored["data"]["env"] = "stranger:CartPole-v1"
    torch.save({**checkpoint, "hyper_parameters": stored}, path)
    if command != "predict":  # which needs no environment
        said = refused([command, f"ckpt_path={path}", f"root={tmp_path / 'runs'}", "logger=none"], tmp_path, capsys)
        assert "an id with ':' runs the code of a module" in said
    else:
        assert train.main([command, f"ckpt_path={path}", f"root={tmp_path / 'runs'}", "logger=none", "n=1"]) == 0
        capsys.readouterr()
    assert not (tmp_path / "mark").exists()
    said = refused(["data=cart_pole", "model=returns", "callbacks=returns", "data.env=stranger:CartPole-v1",
                    f"root={tmp_path / 'runs2'}", "logger=none"], tmp_path, capsys)  # fmt: skip
    assert "an id with ':' runs the code of a module" in said and not (tmp_path / "mark").exists()


def test_a_stored_config_refers_to_nothing(tmp_path, capsys, monkeypatch):
    """A name such as ${oc.env:SECRET} would be sent to W&B, or become a folder."""
    monkeypatch.setenv("SECRET", "42")
    path = doctored(tmp_path / "a.ckpt", ("data", "root"), "${oc.env:SECRET}")
    said = refused(["predict", f"ckpt_path={path}", f"root={tmp_path / 'runs'}"], tmp_path, capsys)
    assert "42" not in said and "refers to something" in said


OUTSIDE = {
    ("model", "sampler"): "../../../outside/x", ("callbacks", "last", "dirpath"): "OUTSIDE",
    ("callbacks", "last", "filename"): "../../../outside/x",
    ("logger",): {"_target_": "bd_lightning.loggers.WandB", "project": "../../outside"},
}  # fmt: skip


@pytest.mark.parametrize("place", OUTSIDE)
def test_names_of_a_stored_config_lead_nowhere_else(place, tmp_path, capsys):
    """Samplers give their names to folders and files; checkpoints go where a callback says."""
    value = str(tmp_path / "outside") if OUTSIDE[place] == "OUTSIDE" else OUTSIDE[place]
    path = doctored(tmp_path / "a.ckpt", place, value)
    if place == ("model", "sampler"):
        stored = torch.load(path, weights_only=True)
        samplers = stored["hyper_parameters"]["model"]["samplers"]
        samplers[value] = samplers.pop("ode")
        torch.save(stored, path)
    command = "predict" if place[0] == "model" else "fit"
    words = [command, f"ckpt_path={path}", f"root={tmp_path / 'runs'}", f"data.root={tmp_path / 'd'}"]
    said = refused(words, tmp_path, capsys)
    assert "outside" in said


def test_a_stored_root_is_not_where_new_folders_go(tmp_path, capsys, monkeypatch):
    path = doctored(tmp_path / "a" / "b" / "a.ckpt", ("root",), str(tmp_path / "outside"))
    monkeypatch.chdir(tmp_path)
    assert train.main(["predict", f"ckpt_path={path}", "n=1", "run_id=x", "callbacks.progress=null"]) == 0
    assert (tmp_path / "runs" / "bellman-diffusion" / "x" / "predict-ode-seed0" / "000000.png").is_file()
    assert not (tmp_path / "outside").exists()


def test_trust_reaches_the_autoencoder(tmp_path, capsys, monkeypatch):
    code = "from bd_lightning.modules import Autoencoder\n\n\nclass Mine(Autoencoder):\n    pass\n"
    (tmp_path / "myencoder.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), "Digits")
    stored = torch.load(encoder, weights_only=True)
    stored["hyper_parameters"]["model"]["_target_"] = "myencoder.Mine"
    torch.save(stored, encoder)
    words = ["data=digits_latent", f"data.autoencoder.ckpt_path={encoder}", "model=mlp"]
    assert "names 'myencoder.Mine'" in refused([*words, f"root={tmp_path / 'runs'}"], tmp_path, capsys)
    plan.resolve([*words, f"root={tmp_path / 'runs'}", "run_id=x", "trust=true"])
    with pytest.raises(UserError, match="names 'myencoder.Mine'"):  # trust ends with its command line
        plan.resolve([*words, f"root={tmp_path / 'runs'}", "run_id=x"])


@pytest.mark.parametrize("target", ["subprocess.Popen", "os.system", "builtins.exec", "bd_lightning.upgrade.upgrade"])
def test_nothing_runs_from_an_autoencoder_or_a_merged_checkpoint(target, tmp_path, capsys):
    mark = tmp_path / "outside" / "mark"
    mark.parent.mkdir()
    node = {"_target_": target, "args": f"touch {mark}", "shell": True}
    for place in (("model",), ("model", "network")):
        other = doctored(tmp_path / "other.ckpt", place, node, "relative")
        words = ["predict", f"ckpt_path={V1 / 'relative.ckpt'}", f"merge={{{other}: 1.0}}", "logger=none"]
        refused([*words, f"root={mark.parent / 'runs'}"], mark.parent, capsys)
        with pytest.raises(UserError):
            checkpoints.load(other)
    encoder = write_autoencoder(tmp_path / "ae.ckpt", (1, 8, 8), "Digits")
    stored = torch.load(encoder, weights_only=True)
    torch.save({**stored, "hyper_parameters": {**stored["hyper_parameters"], "model": node}}, encoder)
    words = ["data=digits_latent", f"data.autoencoder.ckpt_path={encoder}", "model=mlp", "logger=none"]
    said = refused([*words, f"root={mark.parent / 'runs'}"], mark.parent, capsys)
    assert "data.autoencoder" in said


def test_classes_that_a_stored_config_names_are_not_even_imported(tmp_path, capsys, monkeypatch):
    """Importing a module runs it."""
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Callback: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = doctored(tmp_path / "a.ckpt", ("callbacks", "more"), {"_target_": "stranger.Callback"})
    assert train.main(["predict", f"ckpt_path={path}"]) == 2
    assert "names 'stranger.Callback', which is no class of this suite" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


OWN = "import lightning as L\n\n\nclass Mine(L.Callback):\n    pass\n"


def test_a_class_of_ones_own_is_named_again_or_trusted(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = doctored(tmp_path / "run" / "checkpoints" / "a.ckpt", ("callbacks", "more"), {"_target_": "mine.Mine"})
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"]["trust"] = True  # what the file says of itself does not count
    torch.save(stored, path)
    words = ["predict", f"ckpt_path={path}", "n=2", f"root={tmp_path}", "run_id=run", "callbacks.progress=null"]
    assert train.main(words) == 2
    assert "if you trust the file, name the class on the command line too, or add trust=true" in capsys.readouterr().err
    assert train.main([*words, "trust=true"]) == 0
    assert train.main([*words, "callbacks.more={_target_: mine.Mine}"]) == 0
    assert train.main([*words, "callbacks.more=null"]) == 0
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"callbacks": {"more": {"_target_": "mine.Mine"}}}))
    assert train.main([*words, f"--config={tmp_path / 'mine.yaml'}"]) == 0


def test_what_one_command_does_is_not_a_checkpoints_to_say(tmp_path, capsys):
    """Where an export goes, what is read, and other checkpoints that are fetched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    said = {"to": str(outside / "a"), "export": str(outside / "b.npz"), "images": str(outside), "upscale": 2}
    said |= {"merge": {"hf://evil/repo": 1.0}, "labels": [99], "draws": 3}
    for key, value in said.items():
        path = doctored(tmp_path / "run" / "checkpoints" / "a.ckpt", (key,), value)
        words = [f"ckpt_path={path}", f"root={tmp_path}", "run_id=run", "callbacks.progress=null"]
        assert train.main(["predict", *words, "n=2", f"seed={len(key)}"]) == 0, key
    path = doctored(path, ("to",), said["to"])
    assert train.main(["export", *words]) == 2
    assert "export needs to=FOLDER" in capsys.readouterr().err and not files(outside)


def test_trust_ends_with_its_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = doctored(tmp_path / "a.ckpt", ("model", "network", "_target_"), "mine.Mine")
    for words in (["trust=true"], ["callbacks.more={_target_: mine.Mine}"]):
        train.main(
            [
                "predict",
                f"ckpt_path={V1 / 'default.ckpt'}",
                "n=1",
                f"root={tmp_path}",
                f"run_id={len(words[0])}",
                *words,
            ]
        )
        with pytest.raises(UserError, match="names 'mine.Mine', which is no class of this suite"):
            checkpoints.load(path)
    with pytest.raises(UserError, match="must be"):  # imported, and of another kind than is expected there
        bd_lightning.load(path, trust=True)
    with pytest.raises(UserError, match="names 'mine.Mine', which is no class of this suite"):
        bd_lightning.load(path)


@pytest.mark.parametrize("damage", ["truncated", "one byte", "not a mapping", "no weights", "other model"])
def test_damaged_checkpoints_are_one_sentence(damage, tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    shutil.copy(V1 / "default.ckpt", path)
    words = ["predict", f"ckpt_path={path}", f"root={tmp_path}", "callbacks.progress=null"]
    if damage == "truncated":
        os.truncate(path, 30_000)
    elif damage == "one byte":
        whole, weights = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["state_dict"]
        place = whole.find(max(weights.values(), key=torch.Tensor.numel).numpy().tobytes())
        whole[place] ^= 1  # the last bit of a weight
        path.write_bytes(whole)
    elif damage == "not a mapping":
        torch.save([1, 2], path)
    elif damage == "no weights":
        checkpoint = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, path)
    else:
        words.append("model.network.width=16")
    said = refused(words, tmp_path, capsys)
    assert ("do not fit the model: leave model as it was" if damage == "other model" else "is not a checkpoint") in said


def test_classes_cannot_have_been_seen_less_often_than_never(tmp_path, capsys):
    """Counts are the weights of mixtures."""
    checkpoint = torch.load(V1 / "relative.ckpt", weights_only=True)
    checkpoint["state_dict"]["fields.counts"][1] *= -1
    torch.save(checkpoint, path := tmp_path / "a.ckpt")
    said = refused(["predict", f"ckpt_path={path}", f"root={tmp_path}", "mix={0: 1}"], tmp_path, capsys)
    assert "the checkpoint is damaged" in said and "fields.counts" in said
    assert "the checkpoint is damaged" in refused(["fit", f"ckpt_path={path}", f"root={tmp_path}"], tmp_path, capsys)


def test_calibrating_needs_a_mixture(capsys):
    assert train.main(["predict", f"ckpt_path={V1 / 'relative.ckpt'}", "calibrate=100"]) == 2
    assert "calibrate corrects the weights of a mixture" in capsys.readouterr().err
