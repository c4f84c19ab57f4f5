"""One grammar, layers in order, and one sentence for each mistake."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import yaml

from bd_lightning.checks import UserError
from bd_lightning.cli import build, plan, signatures
from bd_lightning.cli import config as configs
from bd_lightning.cli.build import check, instantiate
from bd_lightning.cli.config import ConfigError, compose, parse
from bd_lightning.upgrade import FORMAT
from tiny_data import write_autoencoder, write_folder


def composed(*argv: str, stored=None) -> dict:
    config = compose(parse(argv), stored)
    check(config)
    return config


def test_grammar(tmp_path):
    request = parse(
        ["test", "data=mnist", "--model.lr=1e-3", "--config", "a.yaml", "--config=b.yaml", "labels=[3, cat]"]
    )
    assert dataclasses.asdict(request) == {
        "command": "test",
        "files": ["a.yaml", "b.yaml"],
        "choices": {"data": "mnist"},
        "values": [("model.lr", 1e-3), ("labels", [3, "cat"])],
    }
    assert parse([]).command == "fit"


def test_layers_apply_in_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 40\neval_every: 20\ndata: {batch_size: 32}\nmodel: {lr: 0.5}\n")
    assert composed()["data"]["batch_size"] == 128
    assert composed("experiment=mnist_small")["steps"] == 5000
    config = composed("experiment=mnist_small", "--config", str(file), "model.lr=0.25")
    assert config["data"]["_target_"] == "datamodules.MNIST"  # experiment
    assert config["data"]["batch_size"] == 32  # file over experiment
    assert config["model"]["lr"] == 0.25  # command line over file


def test_a_batch_size_that_would_not_be_used_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {total_batch_size: 256}")
    assert composed("--config", str(file), "data.num_workers=1")["data"]["total_batch_size"] == 256
    last = composed("data.batch_size=64", "--config", str(file), "data.total_batch_size=null")["data"]
    assert (last["batch_size"], last["total_batch_size"]) == (64, None)
    for words in (
        ["data.batch_size=64", "data.total_batch_size=256"],
        ["data.total_batch_size=256", "data.batch_size=64"],
        ["--config", str(file), "data.batch_size=64"],
    ):
        with pytest.raises(ConfigError, match="'data.batch_size' 64 is not used beside 'data.total_batch_size' 256"):
            composed(*words)
    file.write_text("data: {total_batch_size: 256, batch_size: 8}")
    with pytest.raises(ConfigError, match="leave one out"):
        composed("--config", str(file))
    assert composed("experiment=ffhq64", "data=digits")["data"].get("total_batch_size") is None


def test_group_files_set_values_over_the_base():
    """Also the files that train.yaml itself chooses."""
    base = configs.load(configs.CONFIG_DIR / "train.yaml")
    chosen = configs.load(configs.CONFIG_DIR / "model" / f"{base['defaults']['model']}.yaml")
    assert base["model"]["lr"] != chosen["lr"]
    assert composed()["model"]["lr"] == chosen["lr"]
    assert composed("model=unet_large")["model"]["samplers"]["ode"]["sigma_max"] == 80.0
    assert composed("model=unet_large")["model"]["kernel"] == base["model"]["kernel"]


def test_choosing_a_group_starts_it_afresh():
    config = composed("experiment=mnist_small", "data=digits", "trainer=ddp_cpu")
    assert config["data"] == {"root": "data", "_target_": "datamodules.Digits", "batch_size": 128}
    assert config["steps"] == 5000 and config["trainer"]["devices"] == 2


@pytest.mark.parametrize("experiment", ["paper_digits", "gaussians_2d"])
def test_a_run_is_repeated_from_its_resolved_config(experiment, tmp_path):
    first = composed(f"experiment={experiment}", "callbacks.diagnostics=null", "model.lr=0.1", "logger.tags=[a]")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**first, "format": FORMAT}))
    assert composed("--config", str(file)) == first  # without callbacks of train.yaml's own that it did not have
    assert composed("--config", str(file), "model.lr=0.2")["model"] == {**first["model"], "lr": 0.2}
    assert composed(stored=first) == first


def test_plain_meanings_are_taken():
    config = composed("labels=3", "remove=cat", "steps=1e3", "eval_every=5e2", "n=2.0")
    assert (config["labels"], config["remove"], config["steps"], config["eval_every"]) == ([3], ["cat"], 1000, 500)
    assert all(isinstance(config[key], int) for key in ("steps", "eval_every", "n"))


def test_another_class_drops_the_arguments_of_the_old_one():
    config = composed("model.network._target_=bd_lightning.networks.MLP", "model.network.width=32")
    assert config["model"]["network"] == {"_target_": "bd_lightning.networks.MLP", "width": 32}


@pytest.mark.parametrize(
    ("words", "network"),
    [
        ("model.network.a=1 model.network._target_=my.Net", {"_target_": "my.Net", "a": 1}),
        ("model.network.a.b=1 model.network.c=2 model.network._target_=my.Net",
         {"_target_": "my.Net", "a": {"b": 1}, "c": 2}),
        ("model.network={_target_: your.Net, x: 1} model.network._target_=my.Net", {"_target_": "my.Net"}),
        ("model.network={a: 1} model.network._target_=my.Net", {"_target_": "my.Net", "a": 1}),
        ("model.network={a: 1} model.network.b=2 model.network._target_=my.Net",
         {"_target_": "my.Net", "a": 1, "b": 2}),
        ("model.network={a: {b: 1}} model.network.a._target_=my.A model.network._target_=my.Net",
         {"_target_": "my.Net", "a": {"_target_": "my.A", "b": 1}}),
        ("model.network.a=1 model.network=null model.network._target_=my.Net", {"_target_": "my.Net"}),
        ("model.network={_target_: your.Net, x: 1} model.network.a=1 model.network._target_=my.Net",
         {"_target_": "my.Net", "a": 1}),
        ("model.network._target_=your.Net model.network.a=1 model.network._target_=my.Net",
         {"_target_": "my.Net", "a": 1}),
        ("model.network._target_=my.Net model.network={_target_: your.Net, x: 1}", {"_target_": "your.Net", "x": 1}),
    ],
)  # fmt: skip
def test_a_class_keeps_what_was_said_of_it_before(words, network):
    assert compose(parse(re.split(r" (?=model)", words)))["model"]["network"] == network


def test_short_runs_are_validated_once():
    assert composed("steps=7")["eval_every"] == 7


def test_interpolations_are_resolved():
    assert composed("logger.name=${data.root}-${steps}")["logger"]["name"] == "data-1000"


def test_a_root_reaches_a_data_set_of_another_class_within_one(tmp_path, monkeypatch):
    def data(*words):
        return compose(parse(["experiment=cifar10_latent", *words]))["data"]

    folder = ["data.images._target_=datamodules.ImageFolder", "data.images.folder=/x"]
    for words in ([*folder, "data.root=/r"], ["data.root=/r", *folder]):
        assert data(*words)["images"]["root"] == "/r"
    own = data(*folder, "data.root=/r", "data.images.root=/s")
    assert (own["root"], own["images"]["root"]) == ("/r", "/s")
    (tmp_path / "own_images.py").write_text(
        "from datamodules import MNIST\n\n\nclass Own(MNIST):\n    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n\n\nclass Bare:\n    def __init__(self, size):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert data("data.images._target_=own_images.Own", "data.root=/r")["images"]["root"] == "/r"
    assert "root" not in data("data.images._target_=own_images.Bare", "data.images.size=3", "data.root=/r")["images"]
    assert signatures.arguments("own_images.Bare") is None
    assert "root" not in data("data.root=/r")["autoencoder"]


GAMES = {"rl_breakout": "minatar", "rl_asterix": "minatar", "rl_lunar_lander": "Box2D"}
"""What the environments of some experiments need besides gymnasium."""
LATENT = {"digits_latent": ((1, 8, 8), "Digits"), "mnist_latent": ((1, 28, 28), "MNIST")}
LATENT |= dict.fromkeys(("cifar10_latent", "cifar10_latent_relative"), ((3, 32, 32), "CIFAR10", (4, 8, 8), (8, 8)))
LATENT |= dict.fromkeys(
    ("paper_mnist_latent", "mnist_latent_cond", "mnist_latent_few", "mnist_latent_relative"), LATENT["mnist_latent"]
)


def needed(name: str, folder) -> list[str]:
    """What a config leaves to the command line."""
    if name in LATENT:
        return [f"data.autoencoder.ckpt_path={write_autoencoder(folder / 'ae.ckpt', *LATENT[name])}"]
    if name.endswith("64") and name != "unet_64":
        small = ["model.network.channels=[8,8,8,8]", "model.network.blocks=1"]
        return [f"data.folder={write_folder(folder / 'pictures', n=20)}", f"data.root={folder}", *small]
    return ["data.folder=somewhere"] if name == "folder" else []


@pytest.mark.parametrize("name", configs.names("experiment"))
def test_every_experiment_is_valid_and_builds_its_model(name, tmp_path):
    if name.startswith("rl_"):
        pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")
    if name in GAMES:
        pytest.importorskip(GAMES[name], reason=f"{GAMES[name]} is not installed: uv sync --group games")
    config = composed(f"experiment={name}", *needed(name, tmp_path))
    data = instantiate(config["data"], "data")
    model = instantiate(config["model"], "model", data.facts.arguments)
    batch = (torch.randn(2, *data.facts.shape), torch.zeros(2, dtype=torch.long))
    if name.startswith("rl_"):
        batch = data.held_out_transitions("val")[[0, 1]]
    values, _ = model.compute(batch, None)
    assert all(value.isfinite() for value in values.values()) and "loss" in values


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in configs.GROUPS for name in configs.names(group)]
)
def test_every_group_file_is_valid(group, name, tmp_path):
    composed(f"{group}={name}", *needed(name, tmp_path))


MISTAKES = [
    ("data=mnist data.bath_size=3", "unknown key 'data.bath_size' for MNIST. Did you mean 'batch_size'?"),
    ("model.lr=fast", "'model.lr' must be float, got 'fast'"),
    ("model.lr=true", "'model.lr' must be float, got True"),
    ("data.batch_size=1.5", "'data.batch_size' must be int, got 1.5"),
    ("model.optimizer.betas=[0.9]", "'model.optimizer.betas' must be tuple of float, float, got [0.9]"),
    ("data=cifar100", "no data config named 'cifar100'. Did you mean 'cifar10'?"),
    ("experiment=mnits", "no experiment config named 'mnits'. Did you mean 'mnist'?"),
    ("fti", "no command 'fti'. Did you mean 'fit'?"),
    ("dta.batch_size=3", "unknown key 'dta'. Did you mean 'data'?"),
    ("steps", "no command 'steps'."),
    ("model.lr", "A setting is written model.lr=VALUE."),
    ("root=x predict n=2", "the command comes first: train.py predict"),
    ("--confg=x", "unknown key 'confg'. Did you mean '--config'?"),
    ("data={_target_:mine.D}", "data= chooses a file of configs/data; a class is data._target_=module.Class"),
    ("callbacks.grdi=null", "no callback 'grdi' to leave out. Did you mean 'grid'?"),
    ("fit steps", "cannot read 'steps': expected key=value, group=name or --config FILE"),
    ("--config nowhere.yaml", "config file not found: nowhere.yaml"),
    ("fit --config", "--config needs the path of a YAML file"),
    ("steps=many", "'steps' must be int, got 'many'"),
    ("steps=0", "'steps' must be at least 1, got 0"),
    ("seed=-1", "'seed' must lie between 0 and 4294967295, got -1"),
    ("model._target_=builtins.int", "'model._target_' must be a Module, got 'builtins.int'"),
    ("callbacks.grid._target_=.callbacks.SampleGrid", "'callbacks.grid._target_': cannot import"),
    ("model.lr=[1", "cannot read the value of 'model.lr': '[1' is not valid YAML"),
    ("model.lr=${nothing}", "cannot resolve 'model.lr': Interpolation key 'nothing' not found"),
    ("model.network._target_=bd_lightning.networks.Unet", "has no class 'Unet'. Did you mean 'UNet'?"),
    (
        "model.network._target_=nowhere.UNet",
        "cannot import 'nowhere.UNet' (No module named 'nowhere': nowhere.py has to be beside train.py, or",
    ),
    ("model.network=3", "'model.network' must be Network, got 3"),
    ("data.keep={_target_:os.system}", "'data.keep' must be"),
    ("model.lr={_target_:os.system}", "'model.lr' must be float, got"),
    ("logger.tags=[{_target_:os.system}]", "'logger.tags' must be"),
    ("trainer.plugins={_target_:os.system}", "'trainer.plugins._target_': 'os' has no class 'system'"),
    ("trainer.plugins={_target_:subprocess.Popen}", "'trainer.plugins' must be"),
    ("callbacks.x={_target_:os.system}", "'callbacks.x._target_': 'os' has no class 'system'"),
    ("callbacks.x={_target_:callbacks.ImageWriter}", "'callbacks.x.folder' is missing: ImageWriter needs it"),
    ("data=frozen_lake data.options={x:{_target_:os.system}}", "'data.options.x' must be Any, got"),
    ("model.network._target_=callbacks.metrics.FrechetInceptionDistance", "has no class 'FrechetInceptionDistance'"),
    ("model.kernel._target_=bd_lightning.networks.MLP", "'model.kernel' must be Kernel"),
    ("model.kernel.epsilon=x", "'model.kernel.epsilon' must be float, got 'x'"),
    ("trainer.precision=17", "'trainer.precision' must be"),
    ("trainer.device=2", "unknown key 'trainer.device' for Trainer. Did you mean 'devices'?"),
    ("callbacks.ema.decy=0.9", "unknown key 'callbacks.ema.decy' for AveragedWeights. Did you mean 'decay'?"),
    ("callbacks.grid=5", "'callbacks.grid' must be a mapping with a _target_, got 5"),
    ("callbacks.mine.n=5", "'callbacks.mine' has no _target_"),
    ("logger.projct=a", "unknown key 'logger.projct' for WandB. Did you mean 'project'?"),
    ("data=folder", "'data.folder' is missing: ImageFolder needs it"),
]


def test_the_name_of_a_file_where_its_content_belongs(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, told in (("logger: none", True), ("logger: nobody", False), ("logger: {_target_: 3}", False)):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            composed("--config", str(file))
        assert ("configs/logger/none.yaml is chosen by logger=none on the command line" in str(caught.value)) == told


def test_a_mapping_wants_spaces():
    with pytest.raises(UserError, match="YAML wants a space after each colon of '{3:0.7,8:0.3}'"):
        composed("mix={3:0.7,8:0.3}")


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_named(words, message):
    argv = [word.replace(":", ": ") if "{" in word else word for word in words.split(" ")]
    with pytest.raises(UserError) as caught:
        composed(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files_are_named(tmp_path):
    for text, message in (
        ("a: [1", "cannot read"),
        ("- 1\n- 2", "expected a mapping"),
        ("defaults: {dta: x}", "'dta'"),
        ("defaults: [mnist]", "'defaults' in .*broken.yaml must be a mapping"),
        ("format: 9\nsteps: 3", "written by a later version"),
    ):
        file = tmp_path / "broken.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            composed("--config", str(file))
    file.write_text("format: 2\nmodel: {lr: 0.5}\ntrust: true")
    assert (config := composed("--config", str(file)))["model"]["lr"] == 0.5 and config["trust"] is True


def test_facts_reach_nested_nodes_and_explicit_values_win():
    facts = {"shape": (1, 8, 8), "num_classes": 10, "sigma_data": 0.75}
    model = instantiate(composed()["model"], "model", facts)
    assert model.fields.sigma_data == 0.75 and model.shape == (1, 8, 8)
    model = instantiate(composed("model.sigma_data=0.5", "model.network.conditional=true")["model"], "model", facts)
    assert (
        model.fields.sigma_data == 0.5 and model.fields.network.embed.classes.num_embeddings == 11
    )  # ten, and no class


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.lr=-1", "'model' (BellmanDiffusion): lr must be positive, got -1"),
        ("model.kernel.epsilon=0", "'model.kernel' (ClosedFormSlices): epsilon must be positive, got 0"),
        ("model.samplers.ode.steps=0", "'model.samplers.ode' (ProbabilityFlow): steps must be positive, got 0"),
        ("model.sampler=od", "sampler must be one of sde, ode; got 'od'"),
        ("model.noise=null", "model=paper has all that a single scale needs"),
        ("model.scalar_network={_target_: bd_lightning.networks.MLP, conditional: true}", "must be the same: set both"),
        ("model.objective.trace=stain", "'model.objective' (FieldDivergence): trace must be one of stein,"),
        ("model.objective.trace=stain", "got 'stain'"),
        ("model.objective._target_=bd_lightning.objectives.FieldDivergance", "Did you mean 'FieldDivergence'?"),
    ],
)
def test_refusals_of_classes_name_the_key(word, message):
    facts = {"shape": (1, 8, 8), "num_classes": 10, "sigma_data": 0.75}
    with pytest.raises(ConfigError) as caught:
        instantiate(composed(word)["model"], "model", facts)
    assert message in str(caught.value)


def test_help_and_misspelt_keys_need_no_torch():
    code = "import sys, train; train.main(['--help']); assert train.main(['sed=3']) == train.main(['dta=x']) == 2; "
    words = ("model.lrr=1", "trainer.max_step=3", "callbacks.metrics.features.widht=3", "callbacks.best.mointor=x")
    code += f"assert [train.main([word]) for word in {words}] == {[2] * len(words)}; "
    code += "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=configs.CONFIG_DIR.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("data=mnist", "ckpt_path", "eval_every", "cifar10", "paper_digits"):
        assert word in done.stdout


def test_names_read_from_source_are_those_of_the_signature():
    """For every class that a shipped config names."""
    files = [configs.load(path) for path in configs.CONFIG_DIR.rglob("*.yaml")]
    paths = set().union(*map(build.targets, files))
    for path in sorted(paths):
        assert set(signatures.arguments(path) or ()) == set(build.signature_of(build.locate(path, path))), path
    assert signatures.arguments("tests.nothing.Here") is signatures.arguments("") is None


def test_what_a_choice_leaves_out_is_said(tmp_path):
    def said(*words):
        request = parse([str(word) for word in words])
        return plan.dropped(request, configs.compose(request))

    mine, other, record = (tmp_path / f"{name}.yaml" for name in ("mine", "other", "record"))
    mine.write_text("ckpt_path: last\nmodel: {lr: 1.0e-2}\nsteps: 4\n")
    other.write_text("defaults: {model: relative}\n")
    lost = (
        "experiment=mnist_latent is left out where it says model.noise.antithetic=0.5, model.noise.stratified=True, "
        "model.optimizer._target_=bd_lightning.optimizers.Muon (now bd_lightning.optimizers.AdamW)"
    )
    end = ": choices of whole groups replace what is said before"
    rate = f"--config {mine} is left out where it says model.lr=0.01 (now 0.001)"
    assert said("experiment=mnist_latent", "--config", mine, "model=relative") == f"{lost}; {rate}{end}"
    assert said("--config", mine, "--config", other) == rate + end  # by a file
    for kept in ("model.lr=5e-3", "model.lr=0.3"):  # said again, or otherwise
        assert said("experiment=mnist_latent", "model=relative", kept) == lost + end
    assert not said("experiment=mnist_latent", "--config", mine, "model.noise.std=2.0", "trainer=cpu")
    assert not said("experiment=mnist_small", "data=mnist", "data.batch_size=64")  # nothing is lost
    assert not said("experiment=gaussians_2d", "callbacks=points", "callbacks.metrics=null", "callbacks.figures=null")
    assert not said("experiment=mnist_latent", "model.optimizer._target_=bd_lightning.optimizers.AdamW")
    config = {"format": FORMAT, **configs.compose(parse(["experiment=mnist_latent"]))}
    record.write_text(yaml.dump(config))
    assert f"--config {record} is left out where it says model._target_=" in said("--config", record, "model=relative")
    assert "experiment=mnist_small is left out where it says data.batch_size=64" in said(
        "--config", record, "experiment=mnist_small"
    )
    assert not said("--config", record, "model.lr=3")
