"""What the README shows runs as it is printed there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import train
from callbacks import references
from callbacks.metrics import ImageMetrics
from datamodules import Digits

ROOT = Path(__file__).resolve().parent.parent


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Trains for two steps with a module `mine`; returns the run folder."""

    def train_with(mine, *words):
        (tmp_path / "mine.py").write_text(mine)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        words = [*words, "steps=2", "eval_every=2", "callbacks.figures=null", "logger=none"]
        assert train.main([*words, f"root={tmp_path}", "run_id=mine"]) == 0
        return tmp_path / "bellman-diffusion" / "mine"

    return train_with


@pytest.fixture
def run(launch, tmp_path):
    """Trains on points with a module `mine` and a config; returns the run folder."""

    def train_with(mine, config, *words):
        (tmp_path / "mine.yaml").write_text(config)
        small = ["callbacks.metrics.n=100", "callbacks.trajectory=null"]
        return launch(mine, "experiment=gaussians_2d", "--config", str(tmp_path / "mine.yaml"), *small, *words)

    return train_with


def test_the_python_example_samples_what_it_was_trained_on(capsys):
    example, _ = blocks("README.md", "python")
    names = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    assert names["samples"].shape == (1000, 2)
    assert abs(float((names["samples"][:, 0] < 0).float().mean()) - 0.7) < 0.1
    assert capsys.readouterr().out.startswith("left mode: 0.")


def test_the_recipe_for_a_density_trains(run):
    _, mine = blocks("README.md", "python")
    folder = run(mine, *blocks("README.md", "yaml"), "data.size=2000", "data.held_out=200")
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_the_recipes_for_everything_else_train(run, capsys):
    page = "docs/guide/extending.md"
    folder = run("\n".join(blocks(page, "python")), *blocks(page, "yaml"))
    ckpt = folder / "checkpoints" / "last.ckpt"
    assert "val/largest" in (folder / "metrics.csv").read_text()
    assert "radius" in (folder / "radius.json").read_text()
    assert train.main(["predict", f"ckpt_path={ckpt}", "n=4", "trust=true"]) == 0
    assert "4 rows of samples.csv" in capsys.readouterr().out


def test_the_recipes_for_returns_train(launch):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")
    words = ["experiment=rl_frozen_lake", "model.representation._target_=mine.Cramer"]
    words += ["model.preference._target_=mine.Entropic", "callbacks.returns.episodes=10", "data.warmup=20"]
    folder = launch("\n".join(blocks("docs/guide/extending.md", "python")), *words)
    assert "by Entropic(risk=0.5)" in (folder / "returns.json").read_text()


def test_the_recipe_for_an_environment_trains(launch, tmp_path, monkeypatch):
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    mine, environment = blocks("docs/guide/returns.md", "python")
    (tmp_path / "mine_env.py").write_text(environment)
    (tmp_path / "corridor.yaml").write_text(blocks("docs/guide/returns.md", "yaml")[0])
    words = ["experiment=rl_frozen_lake", "--config", str(tmp_path / "corridor.yaml"), "callbacks.returns.episodes=10"]
    folder = launch(mine, *words, "data.warmup=20")
    assert "Corridor-v0" in (folder / "returns.json").read_text()


def test_the_recipe_for_features_judges_images(tmp_path):
    (tmp_path / "features.py").write_text("\n".join(blocks("docs/guide/extending.md", "python")))
    spec = importlib.util.spec_from_file_location("features", tmp_path / "features.py")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    features = own.BlockMeans(4)
    data = Digits(root=str(tmp_path))
    features.prepare(data)
    reference = references.of_split(features, data, "val", torch.device("cpu"))
    assert (
        ImageMetrics(features).features is features
        and reference.rows.shape[1] == 4
        and reference.floor < reference.noise
    )
    features.key = None
    with pytest.raises(ValueError, match="features: BlockMeans must say its key"):
        ImageMetrics(features)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / "README.md").read_text()))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
