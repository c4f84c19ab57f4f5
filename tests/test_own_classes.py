"""Mistakes in classes of the user's own are one sentence, and what was trained with them is found again."""

import sys

import pytest
import torch

import train

WORDS = [
    "experiment=gaussians_2d", "model.network.width=16", "data.batch_size=64", "callbacks.figures=null",
    "callbacks.trajectory=null", "callbacks.diagnostics=null", "callbacks.report=null", "callbacks.progress=null",
    "callbacks.metrics.n=50", "trainer=cpu", "logger=none", "steps=4", "eval_every=4", "run_id=own",
]  # fmt: skip
DATA = """
import torch
from datamodules.base import DataModule, Rows


class Own(DataModule):
    shape = (2,)
    sigma_data = 1.0
    {declared}

    def load_split(self, split):
        x = torch.randn(200, 2, generator=torch.Generator().manual_seed(len(split)))
        return {rows}
"""
CONFIG = "data: {_target_: own_parts.Own, batch_size: 64}\n"


@pytest.fixture
def own(tmp_path, monkeypatch, capsys, caplog):
    """Trains with a module `own_parts`; returns the exit status and what was said."""

    def begin(mine, *words, config=None):
        (tmp_path / "own_parts.py").write_text(mine)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_parts", raising=False)
        if config is not None:
            (tmp_path / "own.yaml").write_text(config)
            words = ("--config", str(tmp_path / "own.yaml"), *words)
        status = train.main([*WORDS, f"root={tmp_path}", *words])
        return status, "".join([*capsys.readouterr(), caplog.text])

    return begin


@pytest.mark.parametrize(
    ("declared", "rows", "message"),
    [
        ("", "x", "the train split must be a data set of pairs"),
        ("", "None", "the train split must be a data set of pairs"),
        ("", "Rows(x.numpy())", "samples must be a tensor, got a ndarray"),
        ("", "Rows(x[:, :1])", "samples of the shape (1,), and its shape is said to be (2,)"),
        ("", "Rows(x.double())", "samples of torch.float64, and models take torch.float32"),
        ("", "Rows(x.masked_fill(x > 2, torch.nan))", "samples are not finite, the first of them in row"),
        ("", "Rows(x, torch.ones(200, dtype=torch.long))", "the label 1, and there are 0 class_names"),
        ("class_names = ('a', 'b')", "Rows(x, torch.zeros(9))", "200 samples cannot have 9 labels"),
        ("sigma_data = None", "Rows(x)", "Own must say its sigma_data"),
    ],
)
def test_data_that_no_model_could_learn_from(declared, rows, message, own):
    status, said = own(DATA.format(declared=declared, rows=rows), config=CONFIG)
    assert status == 2 and message in said and said.count("error: ") == 1


SAMPLER = """
from dataclasses import dataclass
from bd_lightning.dynamics import MultiScaleSampler


@dataclass(frozen=True)
class Own(MultiScaleSampler):
    calls = 1

    def path(self, fields, noise):
        {path}
"""


@pytest.mark.parametrize(
    ("path", "had"),
    [("yield from ()", "(0,)"), ("yield self.first(noise)[:, :1]", "(50, 1)"), ("yield self.first(noise)", None)],
)
def test_states_of_a_sampler_have_the_shape_of_samples(path, had, own):
    """Weights are kept: such a sampler gives no metrics, and the run goes on."""
    node = "{own: {_target_: own_parts.Own, sigma_max: 10.0, sigma_min: 0.02}}"
    words = f"model.samplers={node}", "model.sampler=own", "callbacks.metrics.repeats=1"
    status, said = own(SAMPLER.format(path=path), *words)
    assert status == 0
    assert ("Own.path must yield states" in said) == (had is not None)
    assert had is None or f"(50, 2), the last had {had}" in said


EVALUATION = """
import torch
from callbacks.evaluation import Evaluation, Findings


class Own(Evaluation):
    kind, record = "vectors", "own.json"

    def draw(self, trainer, module, stage, sampler):
        return torch.zeros(2)

    def judge(self, trainer, module, stage, sampler, drawn):
        return {found}
"""


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("Findings({}, {'mean': drawn.mean()})", "rows of own.json must hold plain numbers and text"),
        ("{'val/mean': 0.0}", "Own.judge must return Findings or None, got a dict"),
    ],
)
def test_findings_of_an_evaluation(found, message, own):
    status, said = own(EVALUATION.replace("{found}", found), "callbacks.own._target_=own_parts.Own")
    assert status == 2 and message in said


def test_a_module_with_a_syntax_error(own):
    status, said = own("class Own(:\n", "callbacks.own._target_=own_parts.Own")
    assert status == 2 and "cannot import 'own_parts.Own' (invalid syntax (own_parts.py, line 1))" in said


CALLBACK = "import lightning as L\n\n\nclass Own(L.Callback):\n    pass\n"


def test_the_command_that_is_printed_at_the_end_is_one_that_runs(own, tmp_path, capsys):
    status, said = own(CALLBACK, "callbacks.own._target_=own_parts.Own", "callbacks.report._target_=callbacks.Report")
    command = said.rpartition("to sample: train.py ")[2].split()
    assert status == 0 and command[-2:] == ["trust=true", "n=64"]
    page = next(tmp_path.rglob("report.html")).read_text()
    loading = [line for line in page.splitlines() if ".ckpt" in line and "train.py " in line]
    assert len(loading) == 3 and all("trust=true" in line for line in loading)
    assert train.main([*command[:-1], "n=2", f"root={tmp_path}", "run_id=own"]) == 0
    status, said = own(CALLBACK, "run_id=without")
    assert status == 0 and "trust" not in said


def test_a_run_that_diverged_ends_with_a_status_of_its_own(own, tmp_path):
    status, said = own("", "model.lr=1e30", "trainer.gradient_clip_val=null")
    assert status == 2 and "error: training has diverged" in said and "to sample" not in said
    assert (tmp_path / "bellman-diffusion" / "own" / "checkpoints" / "last.ckpt").is_file()


def test_weights_that_are_not_finite_to_begin_with_are_not_the_fault_of_the_rate(own):
    network = """
from bd_lightning.networks import MLP


class Own(MLP):
    def __init__(self, shape: tuple[int, ...], width: int = 16) -> None:
        super().__init__(shape, width=width)
        self.enter.weight.data.fill_(float("nan"))
"""
    status, said = own(network, "model.network={_target_: own_parts.Own}")
    assert status == 2 and "the loss was nan at the first step" in said and "lower model.lr" not in said


def damaged(path, how):
    """A checkpoint whose optimiser has other moments."""
    stored = torch.load(path, weights_only=True)
    for part in stored["optimizer_states"][0]["parts"]:
        for state in part["state"].values() if how != "rate" else ():
            for name, value in state.items():
                if value.dim():
                    state[name] = torch.zeros(7) if how == "shape" else torch.full_like(value, torch.nan)
    if how == "rate":
        stored["optimizer_states"][0]["param_groups"][0]["lr"] = torch.nan
    torch.save(stored, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [("shape", "has the shape [7]"), ("nan", "is not finite"), ("rate", "rates of the optimiser are [nan")],
)
def test_training_does_not_go_on_with_damaged_moments(how, message, own, tmp_path):
    assert own("", "callbacks.metrics=null", "callbacks.best=null")[0] == 0
    path = tmp_path / "bellman-diffusion" / "own" / "checkpoints" / "last.ckpt"
    damaged(path, how)
    status, said = own("", f"ckpt_path={path}", "steps=8")
    assert status == 2 and "its states are damaged" in said and message in said
