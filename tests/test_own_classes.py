"""Mistakes in classes of the user's own are one sentence, and what was trained with them is found again."""

import collections
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
TWO = "class_names = ('a', 'b')"
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
        (
            "",
            "[(one.numpy(), 0) for one in x]",
            "a sample is a ndarray; torch.as_tensor(x).float() makes a tensor of it",
        ),
        (TWO, "[(one, 'a' if i > 7 else 0) for i, one in enumerate(x)]", "has samples that make no batch"),
        (TWO, "[(one, 'a' if i > 0 else 0) for i, one in enumerate(x)]", "samples that make no batch"),
        ("", "Rows(x.double())", "samples of torch.float64, and models take torch.float32"),
        ("", "Rows(x.masked_fill(x > 2, torch.nan))", "samples are not finite, the first of them in row"),
        ("", "Rows(x, torch.ones(200, dtype=torch.long))", "the label 1, and there are 0 class_names"),
        ("class_names = ('a', 'b')", "Rows(x, torch.zeros(9))", "200 samples cannot have 9 labels"),
        ("sigma_data = None", "Rows(x)", "Own must say its sigma_data"),
        ("sigma_data = 'wide'", "Rows(x)", "Own: shape must be whole numbers, sigma_data a number"),
        ("sigma_data = -1", "Rows(x)", "sizes of shape and sigma_data must be positive"),
        ("shape = 2", "Rows(x)", "Own: shape must be whole numbers"),
        ("class_names = 'ab'", "Rows(x)", "class_names a list of names"),
        ("", "Rows(x[:0] if split == 'val' else x)", "the val split has no samples: give it two at least"),
        (TWO, "Rows(x, torch.arange(200) // 199 * 9)", "the label 9, and there are 2 class_names"),
        (TWO, "Rows(x, -torch.arange(200))", "the label -1, and there are 2 class_names"),
        (TWO, "Rows(x, torch.rand(200))", "labels of torch.float32 and the shape [200]"),
        (TWO, "Rows(x, torch.zeros(200, 2, dtype=torch.long))", "the train split must be a data set of pairs"),
        (TWO, "Rows(x, torch.arange(200).numpy() % 2)", "labels must be a tensor, got a ndarray"),
        ("class_names = (name for name in 'ab')", "Rows(x)", "class_names a list of names"),
        (TWO, "[(one, i // 199 * 9) for i, one in enumerate(x)]", "the label 9, and there are 2 class_names"),
        ("", "[(one[: 2 - i // 199], 0) for i, one in enumerate(x)]", "samples that make no batch"),
        ("", "[(one / (i < 199), 0) for i, one in enumerate(x)]", "samples that are not finite"),
    ],
)
def test_data_that_no_model_could_learn_from(declared, rows, message, own):
    status, said = own(DATA.format(declared=declared, rows=rows), config=CONFIG)
    assert status == 2 and message in said and said.count("error: ") == 1


def test_what_data_say_in_numbers_of_another_kind_and_keep_in_a_list(own, tmp_path):
    """A split may be any data set of pairs, and numpy's numbers are numbers; what is trained on them is read again."""
    declared = "shape = (numpy.int64(2),)\n    sigma_data = torch.tensor(1.0)\n    class_names = (0, 1)"
    rows = "[(one, i % 2) for i, one in enumerate(x)]"
    mine = "import numpy\n" + DATA.replace("    shape = (2,)\n    sigma_data = 1.0\n", "")
    assert own(mine.format(declared=declared, rows=rows), config=CONFIG)[0] == 0
    path = next(tmp_path.rglob("last.ckpt"))
    assert train.main(["predict", f"ckpt_path={path}", "trust=true", "n=3", f"root={tmp_path}"]) == 0


@pytest.mark.parametrize(
    "labels",
    [
        "torch.arange(200) % 2 == 0",
        "(torch.arange(200) % 2).byte()",
        "(torch.arange(200) % 2).to(torch.int16)",
        "pairs",
    ],
)
def test_labels_of_any_whole_numbers_are_classes(labels, own):
    rows = "[(one, i % 2 == 0) for i, one in enumerate(x)]" if labels == "pairs" else f"Rows(x, {labels})"
    words = "model.network.conditional=true", "model.label_dropout=0.1", "callbacks.metrics.repeats=1"
    assert own(DATA.format(declared=TWO, rows=rows), *words, config=CONFIG)[0] == 0


def test_data_that_leave_out_what_all_data_need(own):
    mine = DATA.format(declared="def __init__(self, batch_size=64):\n        self.own = 1", rows="Rows(x)")
    status, said = own(mine, config=CONFIG)
    assert status == 2 and "Own.__init__ has to call super().__init__(batch_size)" in said and "Traceback" not in said


def test_points_that_are_all_the_same_are_measured(own):
    """Real points are then at no distance from each other, which nothing is relative to."""
    assert own(DATA.format(declared="", rows="Rows(torch.ones_like(x))"), config=CONFIG)[0] == 0


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
    [
        ("yield from ()", "that of step 0 is torch.float32 of the shape (0,)"),
        ("yield self.first(noise)[:, :1]", "that of step 0 is torch.float32 of the shape (50, 1)"),
        ("yield self.first(noise); yield self.first(noise)[:9]", "that of step 1 is torch.float32 of the shape (9, 2)"),
        ("yield self.first(noise).long()", "that of step 0 is torch.int64"),
        ("yield self.first(noise); yield None", "that of step 1 is a NoneType"),
        ("yield self.first(noise)", None),
    ],
)
def test_states_of_a_sampler_have_the_shape_of_samples(path, had, own):
    """Weights are kept: such a sampler gives no metrics, and the run goes on."""
    node = "{own: {_target_: own_parts.Own, sigma_max: 10.0, sigma_min: 0.02}}"
    words = f"model.samplers={node}", "model.sampler=own", "callbacks.metrics.repeats=1"
    status, said = own(SAMPLER.format(path=path), *words)
    assert status == 0
    assert ("Own.path must yield states" in said) == (had is not None)
    assert had is None or f"(50, 2), {had}" in said


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
        ("Findings({'val/mean': 'low'}, {})", "Own: values of Findings are plain numbers by name, got 'low'"),
        ("Findings({'val/mean': None}, {})", "Own: values of Findings are plain numbers by name, got None"),
        ("Findings({}, None)", "Own: Findings are a dictionary of numbers to log and one of what is written"),
        ("Findings({}, {'all': [1.0, float('nan')]})", "rows of own.json must hold plain numbers and text"),
    ],
)
def test_findings_of_an_evaluation(found, message, own):
    status, said = own(EVALUATION.replace("{found}", found), "callbacks.own._target_=own_parts.Own")
    assert status == 2 and message in said


def test_a_module_with_a_syntax_error(own):
    status, said = own("class Own(:\n", "callbacks.own._target_=own_parts.Own")
    assert status == 2 and "cannot import 'own_parts.Own' (invalid syntax (own_parts.py, line 1))" in said


def test_an_export_of_ones_own_classes_says_that_it_needs_trust(own, tmp_path, capsys):
    node = "{own: {_target_: own_parts.Own, sigma_max: 10.0, sigma_min: 0.02}}"
    words = f"model.samplers={node}", "model.sampler=own", "callbacks.metrics.repeats=1"
    assert own(SAMPLER.format(path="yield self.first(noise)"), *words)[0] == 0
    path, folder = next(tmp_path.rglob("last.ckpt")), tmp_path / "exported"
    words = ["callbacks.progress=null", f"root={tmp_path}"]
    assert train.main(["export", f"ckpt_path={path}", f"to={folder}", "trust=true", *words]) == 0
    command = capsys.readouterr().out.rpartition("train.py ")[2].split()
    assert command[-2:] == ["trust=true", "n=64"] and train.main([*command[:-1], "n=2", *words]) == 0
    card = (folder / "README.md").read_text()
    assert "FOLDER trust=true n=64" in card and 'load("FOLDER", trust=True)' in card
    assert "runs nothing" not in card and "names classes that are not the suite's" in card


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
    assert not list(tmp_path.rglob("last.ckpt"))  # weights that are not finite are of no use


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


def doctor(stored, how):
    """Change something in the states of a checkpoint."""
    optimiser, schedule = stored["optimizer_states"][0], stored["lr_schedulers"][0]
    adamw = optimiser["parts"][1]
    first = next(iter(adamw["state"].values()))
    if how == "shape":
        first["exp_avg"] = torch.zeros(7)
    if how == "scalar":
        first["exp_avg"] = torch.zeros(())
    if how == "nan":
        first["exp_avg"] *= torch.nan
    if how == "negative":
        first["exp_avg_sq"] -= 1
    if how == "missing":
        del first["exp_avg"]
    if how == "rate":
        optimiser["param_groups"][0]["lr"] = torch.nan
    if how == "steps":
        first["step"] -= 100
    if how == "part":
        optimiser["parts"].pop()
    if how == "place":
        schedule["last_epoch"] = "here"
    if how == "weights":
        next(iter(stored["current_model_state"].values())).fill_(torch.nan)
    if how == "settings":
        adamw["param_groups"][0] |= {"amsgrad": True, "maximize": True, "eps": torch.nan, "betas": (2.0, 0.9)}
    if how == "called":
        schedule |= {"step": collections.OrderedDict, "lr_lambdas": [3]}
    return stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a short run."""
    root = tmp_path_factory.mktemp("trained")
    words = "callbacks.metrics=null", "callbacks.best=null", "model.optimizer={_target_: bd_lightning.optimizers.Muon}"
    assert train.main([*WORDS, f"root={root}", *words]) == 0
    return next(root.rglob("last.ckpt"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", "exp_avg of weights of the shape [16, 64] has the shape [7]"),
        ("scalar", "has the shape []"),
        ("nan", "is not finite"),
        ("negative", "is not finite, or below zero"),
        ("missing", "some weights have"),
        ("rate", "lr of the optimiser is nan"),
        ("steps", "have had -96.0 steps"),
        ("part", "its states are damaged"),
        ("place", "the schedule is at step 'here'"),
        ("weights", "are not finite"),
    ],
)
def test_training_does_not_go_on_with_damaged_states(how, message, trained, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    torch.save(doctor(torch.load(trained, weights_only=True), how), path)
    status = train.main([*WORDS, f"root={tmp_path}", f"ckpt_path={path}", "run_id=again", "steps=8"])
    said = "".join(capsys.readouterr())
    assert status == 2 and message in said and "to resume" not in said and said.count("error: ") == 1


@pytest.mark.parametrize("how", ["settings", "called"])
def test_what_is_not_a_state_is_not_taken_from_a_checkpoint(how, trained, tmp_path):
    ends = []
    for way in (None, how):
        path = tmp_path / str(way) / "last.ckpt"
        path.parent.mkdir()
        torch.save(doctor(torch.load(trained, weights_only=True), way), path)
        words = f"root={path.parent}", f"ckpt_path={path}", "run_id=again", "steps=8", "callbacks.metrics=null"
        assert train.main([*WORDS, *words, "callbacks.best=null"]) == 0
        ends.append(torch.load(next(path.parent.rglob("again/**/last.ckpt")), weights_only=True)["state_dict"])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize(("line", "reason"), [("1 / 0", "division by zero"), ("raise SystemExit(0)", "SystemExit(0)")])
def test_a_module_that_fails_while_it_is_imported(line, reason, own):
    status, said = own(line + "\n", "callbacks.own._target_=own_parts.Own")
    assert status == 2 and "cannot import 'own_parts.Own'" in said and reason in said


KERNEL = """
from bd_lightning.kernels import Constant
from bd_lightning.objectives import FieldDivergence
from bd_lightning.kernels import Kernel
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Open(Constant):
    def mobility(self, density, x, sigma):
        return Kernel.mobility(self, density, x, sigma)


@dataclass(frozen=True)
class Column(Constant):
    def __call__(self, *args, **options):
        m, slope = super().__call__(*args, **options)
        return m[:, None], slope


@dataclass(frozen=True)
class Mean(FieldDivergence):
    def __call__(self, *args, **options):
        losses = super().__call__(*args, **options)
        return replace(losses, gradient=losses.gradient.mean())
"""


def test_a_kernel_without_a_closed_form_is_judged_by_its_samples_alone(own):
    status, said = own(
        KERNEL,
        "model.kernel={_target_: own_parts.Open, epsilon: 0.01}",
        "callbacks.figures._target_=callbacks.FieldFigures",
    )
    assert status == 0, said
    assert "no errors of the fields: Open knows no closed form of its mobility" in said and "W2" in said


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.kernel={_target_: own_parts.Column, epsilon: 0.01}",
         "Column must return the mobility of shape [64] and its gradient of shape [64, 2], one for each point"),
        ("model.objective={_target_: own_parts.Mean}", "an objective's Losses are numbers of shape (B,)"),
    ],
)  # fmt: skip
def test_what_has_another_shape_than_the_points_is_refused(word, message, own):
    status, said = own(KERNEL, word)
    assert status == 2 and message in said
