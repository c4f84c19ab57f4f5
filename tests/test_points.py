"""Low-dimensional experiments and tables through the command line, and the callbacks they use."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib.quiver import Quiver
from PIL import Image, ImageSequence

import train
from bd_lightning import checkpoints, distances
from callbacks import PointMetrics
from callbacks.figures import column_names, field_figure, sample_figure
from callbacks.points import field_errors, mode_shares, true_fields
from datamodules import Synthetic, Table
from oracles import square
from wandb_records import read_records

SHORT = [
    "steps=20", "eval_every=10", "trainer=cpu", "trainer.log_every_n_steps=5", "callbacks.progress=null",
    "model.network.width=32", "model.network.depth=1", "callbacks.trajectory.n=50",
    "callbacks.trajectory.frames=6", "callbacks.metrics.n=200",
]  # fmt: skip
SYNTHETIC = ["data.size=4000", "data.held_out=700", "data.batch_size=128", "model.partners.queries=64"]


def launch(root, *words):
    return train.main([*words, f"root={root}", f"data.root={root}"])


def last_row(folder):
    return json.loads((folder / "distances.json").read_text())[-1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("points")
    assert launch(root, "experiment=gaussians_2d", *SHORT, *SYNTHETIC, "run_id=x") == 0
    return root / "bellman-diffusion" / "x"


def test_run_folder_has_numbers_and_figures(finished):
    row = last_row(finished)
    fields = {
        f"val/{f}_error_{where}_sigma_{s}" for f in "sg" for where in ("data", "grid") for s in ("0.1", "0.3", "1")
    }
    modes = {f"val/mode_{k}" for k in range(4)} | {"val/mode_error"}
    assert {"val/w2", "val/w2_ratio", "val/mmd", "w2_floor", "mmd_floor", "summary"} | fields | modes <= row.keys()
    assert sum(row[f"val/mode_{k}"] for k in range(4)) == pytest.approx(1)
    assert row["val/w2_ratio"] == pytest.approx(row["val/w2"] / row["w2_floor"], rel=1e-4)
    assert (
        "600 samples (sde, 30 network calls, seed 1), 200 at a time, against 200 points of the val" in row["protocol"]
    )
    logged = [r for r in csv.DictReader((finished / "metrics.csv").open()) if r.get("val/w2")]
    assert [float(r["val/w2"]) for r in logged][-1] == pytest.approx(row["val/w2"], rel=1e-4)
    for name in ("fields", "samples"):
        with Image.open(finished / "figures" / f"{name}-0000020.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 24)
            assert min(picture.size) > 300 and len(colours) > 50
    with Image.open(finished / "samples" / "trajectory-sde.gif") as animation:
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 6 and len(set(frames)) == 6


def test_wandb_has_figures_and_animation(finished):
    (path,) = finished.glob("wandb/offline-run-*/run-*.wandb")
    records = read_records(path)
    logged = {key.split("/_type")[0] for row in records.history for key in row}
    text = " ".join(logged)
    assert "figures/fields" in text and "figures/samples" in text and "trajectory/sde" in text
    assert records.metrics["val/w2"] == "min"


def test_logged_numbers_are_those_of_the_checkpoint(finished):
    """Recomputed from the checkpoint with averaged weights, by the pure functions."""
    model, _ = checkpoints.load(finished / "checkpoints" / "last.ckpt")
    data = Synthetic(square(), size=4000, held_out=700, batch_size=128)
    x, held_out = model.sample(range(600), seed=1), data.split("val").x
    row = last_row(finished)
    assert {k: row[f"val/{k}"] for k in mode_shares(x, square())} == pytest.approx(mode_shares(x, square()), abs=1e-6)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    chunks = [distances.wasserstein2(x[i : i + 200], held_out[order[i : i + 200]]) for i in (0, 200, 400)]
    assert row["val/w2"] == pytest.approx(sum(chunks) / 3, rel=1e-3)
    grid = torch.cartesian_prod(*[torch.linspace(-3, 3, 61)] * 2)
    errors = field_errors(model, square(), grid, 0.3, true_fields(model, square(), grid, 0.3))
    assert row["val/g_error_grid_sigma_0.3"] == pytest.approx(errors["g_error"], rel=1e-3)
    assert row["val/s_error_grid_sigma_0.3"] == pytest.approx(errors["s_error"], rel=1e-3)


def test_predicted_vectors_are_a_csv_file(finished, capsys):
    words = ["predict", f"ckpt_path={finished}/checkpoints/last.ckpt", "n=70", "seed=4", "callbacks.progress=null"]
    assert train.main(words) == 0
    folder = finished / "predict-sde-seed4"
    assert "70 rows of samples.csv in" in capsys.readouterr().out
    lines = list(csv.reader((folder / "samples.csv").open()))
    assert lines[0] == ["x0", "x1"] and len(lines) == 71 and not list(folder.glob("part-*"))
    assert len({tuple(line) for line in lines}) == 71


@pytest.mark.parametrize("name", ["gaussians_1d", "uniform_1d", "moons", "rings"])
def test_experiments_run(name, tmp_path):
    words = [f"experiment={name}", *SHORT, *SYNTHETIC, "run_id=x", "logger=none", "steps=4", "eval_every=4"]
    assert launch(tmp_path, *words) == 0
    row = last_row(tmp_path / "bellman-diffusion" / "x")
    assert 0 < row["val/s_error_data_sigma_0.3"] < 1 and row["val/w2"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["model=regression", "model.partners.queries=64"],
        [
            "model=regression",
            "model.partners.queries=64",
            "model.kernel.epsilon=0.02",
            "model.noise={_target_: bd_lightning.objectives.NoiseLevels}",
        ],
        ["model=paper"],
        ["model.objective.trace=gaussian", "model.partners.pairs=single"],
        ["model.kernel={_target_: bd_lightning.kernels.Sliced, slices: 3}"],
        ["model.kernel._target_=bd_lightning.kernels.Exact", "model.parametrisation=direct"],
    ],
    ids=["regression", "multi-scale regression", "paper", "divergence", "sliced", "exact"],
)
def test_objectives_are_chosen_by_config(words, tmp_path):
    quick = ["steps=4", "eval_every=4", "logger=none", "run_id=x"]
    if "model=regression" in words or "model=paper" in words:
        quick.append("model.samplers.sde.steps=20")
    if any("NoiseLevels" in word for word in words):
        sampler = "{_target_: bd_lightning.dynamics.MultistepDynamics, levels: 8}"
        quick = [word for word in quick if "sde.steps" not in word] + [f"model.samplers.sde={sampler}"]
    choice = [word for word in words if word.startswith("model=")]
    rest = [word for word in words if not word.startswith("model=")]
    assert launch(tmp_path, "experiment=gaussians_1d", *choice, *SHORT, *SYNTHETIC[:3], *rest, *quick) == 0
    row = last_row(tmp_path / "bellman-diffusion" / "x")
    single = "model=regression" in words and not any("NoiseLevels" in word for word in words)
    if single:  # the paper's own fields have errors of their own
        assert {"val/p_error_data", "val/grad_p_error_grid"} <= row.keys()


def test_tables_are_sampled_in_their_own_units(tmp_path):
    path = tmp_path / "heights.csv"
    generator = torch.Generator().manual_seed(0)
    height = 170 + 8 * torch.randn(400, generator=generator)
    weight = 0.9 * height - 85 + 5 * torch.randn(400, generator=generator)
    path.write_text("height,weight\n" + "\n".join(f"{h:.3f},{w:.3f}" for h, w in zip(height, weight)))
    words = ["experiment=tabular", "data=table", f"data.file={path}", "data.batch_size=64", *SHORT, "run_id=x"]
    assert launch(tmp_path, *words, "steps=300", "eval_every=300", "logger=none", "model.lr=5e-3") == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    assert (folder / "figures" / "samples-0000300.png").is_file()
    assert train.main(["predict", f"ckpt_path={folder}/checkpoints/last.ckpt", "n=500"]) == 0
    lines = list(csv.reader((folder / "predict-sde-seed0" / "samples.csv").open()))
    assert lines[0] == ["height", "weight"]
    x = torch.tensor([[float(cell) for cell in line] for line in lines[1:]])
    assert x.mean(0).tolist() == pytest.approx([170, 68], abs=3)
    assert x.std(0).tolist() == pytest.approx([8, 8.8], rel=0.3)
    assert float(torch.corrcoef(x.T)[0, 1]) > 0.6


def test_wine_is_a_word(tmp_path):
    assert launch(tmp_path, "experiment=tabular", *SHORT, "run_id=x", "logger=none", "steps=4", "eval_every=4") == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    assert "36 points of the val split of Table-wine" in last_row(folder)["protocol"]
    assert not (folder / "figures" / "fields-0000004.png").exists()  # thirteen dimensions
    table = Table(dataset="wine", batch_size=64, val_fraction=0.2, test_fraction=0.2)
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]["facts"]
    assert stored["columns"] == list(table.columns) and stored["scale"] == table.scale.tolist()


def test_figures_of_tables_name_and_show_all_columns():
    table = Table(dataset="wine", batch_size=64)
    trainer = SimpleNamespace(datamodule=table)
    names, rows = column_names(trainer), table.split("val").x
    figure = sample_figure(rows, rows, None, 3.0, names)
    titles = [axes.get_title().replace("\n", "") for axes in figure.axes]
    assert titles == list(table.columns) and len(titles) == 13
    assert column_names(trainer, 2) == ("alcohol", "malic_acid")
    numbered = column_names(SimpleNamespace(datamodule=Synthetic(square(), size=200, held_out=50)))
    assert numbered == ("column 0", "column 1")
    figure = sample_figure(rows, rows, None, 3.0, ["$a^", "$b_", *names[2:]])  # not mathematics
    figure.canvas.draw()


def test_held_out_data_is_drawn_where_there_is_no_density():
    rows = torch.randn(50, 1)
    figure = sample_figure(rows, rows, None, 3.0, ["x"])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["held out", "samples"]


def test_arrows_of_a_density_that_ends_somewhere(monkeypatch):
    """Outside a box the gradient is no number; the arrows inside have a length all the same."""
    monkeypatch.setattr("callbacks.figures.fields_at", lambda module, x, level: (x[:, 0], x))
    for size in (0.5, 0.0):

        def true(module, density, x, level, size=size):
            inside = x.abs().amax(1, keepdim=True) < 1
            return x[:, 0], torch.where(inside, size * x, torch.nan)

        monkeypatch.setattr("callbacks.figures.true_fields", true)
        figure = field_figure(SimpleNamespace(dim=2), object(), 0.1, 2.0)
        figure.canvas.draw()
        scales = [child.scale for axes in figure.axes for child in axes.get_children() if isinstance(child, Quiver)]
        assert len(scales) == 2 and all(0 < scale < 100 for scale in scales)


MISTAKES = [
    ("data=gaussians_2d", "a U-Net needs images of shape (channels, height, width), the data has shape (2,)"),
    (
        "data=gaussians_2d model=points",
        "is for images, and a sample has shape (2,): choose callbacks=points",
    ),
    ("experiment=rings data=digits", "PointMetrics is for vectors, and a sample has shape (1, 8, 8)"),
    ("experiment=rings data.density.noise=0", "noise must be at least"),
    ("experiment=gaussians_2d data.density.sd=-1", "sd must be one positive number"),
    ("experiment=gaussians_2d data.density.weigths=[1]", "Did you mean 'weights'?"),
    ("experiment=gaussians_2d model.kernel.epsilon=0", "epsilon must be positive, got 0"),
    ("experiment=gaussians_2d model.kernel.epsilon=-0.1", "epsilon must be positive, got -0.1"),
    ("experiment=gaussians_2d model.samplers.sde.levels=0", "levels must be positive, got 0"),
    ("experiment=gaussians_2d model.samplers.sde.sigma_min=-1.0", "sigma_min must be positive, got -1.0"),
    ("experiment=gaussians_2d model.samplers.sde.relaxation=-1.0", "relaxation must lie between 0 and inf, got -1.0"),
    ("experiment=gaussians_2d model.samplers.sde.start=cube", "start must be one of gaussian, uniform; got 'cube'"),
    (
        "experiment=moons model=regression model.samplers.sde.step_size=0.0",
        "step_size must be positive, got 0.0",
    ),
    ("experiment=gaussians_2d model=regression model.samplers.sde.steps=-5", "steps must be positive, got -5"),
    ("experiment=gaussians_2d model.noise.std=0.0", "std must be positive, got 0.0"),
    ("experiment=gaussians_2d model.partners.queries=0", "queries must be at least 1, got 0"),
    (
        "experiment=gaussians_2d model.objective._target_=bd_lightning.objectives.KernelRegression",
        "KernelRegression needs kernel=Exact",
    ),
    ("experiment=gaussians_2d callbacks.metrics.n=0", "n must be positive, got 0"),
    ("experiment=gaussians_2d callbacks.figures.level=-1.0", "level must not be negative, got -1.0"),
    ("experiment=tabular data=table data.file=nowhere.csv", "table not found: nowhere.csv; set data.file"),
    ("experiment=tabular data=table", "give data.file or data.dataset"),
    (
        "experiment=tabular data.batch_size=500",
        "the training split has 106 samples, fewer than one batch; set data.batch_size",
    ),
]


def test_distances_are_of_whole_parts():
    """A left-over part has another bias; of fewer points than one part all are taken."""
    metrics = PointMetrics(n=2000, repeats=3)
    for points, total in ((500, 500), (2001, 2000), (5999, 4000), (6001, 6000), (9000, 6000)):
        data = SimpleNamespace(split=lambda name, points=points: range(points))
        assert metrics._total(data) == total


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_sentence(words, message, tmp_path, capsys):
    small = ["data.size=2000"] if "digits" not in words and "tabular" not in words else []
    assert launch(tmp_path, *words.split(), *small, "logger=none", "trainer=cpu") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed


def test_values_are_refused_when_the_config_is_read(tmp_path, capsys):
    """Before the data is looked at: the folder of images does not exist either."""
    words = ["data=folder", "data.folder=nowhere", "model.kernel.epsilon=-1.0", "logger=none"]
    assert launch(tmp_path, *words) == 2
    assert "epsilon must be positive, got -1.0" in capsys.readouterr().err
