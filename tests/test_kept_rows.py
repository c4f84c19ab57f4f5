"""Benchmarks that are stopped and repeated, and given other settings: what is kept, counted and shown."""

import contextlib
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bd_lightning.checks import UserError
from bd_lightning.dynamics import MultistepDynamics
from bd_lightning.fields import batched, combine
from bd_lightning.modules import RelativeDensities
from bd_lightning.networks import MLP, UNet
from benchmarks import (
    arguments,
    common,
    fields,
    images,
    images_costs,
    linearity,
    linearity_requests,
    trace,
    trace_learning,
)
from benchmarks.rows import Rows, sound
from callbacks import ClassifierFeatures
from small_run import launch
from tiny_data import write_autoencoder

FLOW, OURS = "flow matching", images.DEFAULT
COST = {"step": 1.0, "milliseconds": 1.0, "sampling": 1.0, "memory": 1.0}
SMALL = ["model.network.channels=[8]", "model.network.attention=[]", "data=digits"]
SMALL += ["callbacks.metrics.features.steps=2"]


class Bench:
    """A benchmark that is called again and again with a folder, and can be stopped before a call of a function."""

    def __init__(self, module, folder, patch, capsys):
        self.module, self.folder, self.patch, self.capsys = module, folder, patch, capsys

    def __call__(self, *words):
        """Rows that a call adds, and what it prints."""
        before = len(self.rows())
        self.patch.setattr("sys.argv", ["bench.py", "--out", str(self.folder), *words])
        self.capsys.readouterr()
        self.module.main()
        return self.rows()[before:], self.capsys.readouterr().out

    def warned(self, sentence, *words):
        """A call that says a sentence beside what it prints."""
        self.patch.setattr("sys.argv", ["bench.py", "--out", str(self.folder), *words])
        self.module.main()
        assert sentence in self.capsys.readouterr().err

    def rows(self):
        return list(Rows(self.folder / "rows.jsonl"))

    def stopped(self, place, name, after, *words):
        """A call that is interrupted when place.name is called once more than `after` times."""
        own, calls = getattr(place, name), []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return own(*args, **kwargs)

        with self.patch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, counted)
            self(*words)


@pytest.fixture
def pictures(tmp_path, monkeypatch, capsys):
    """images.py with features of the first run, and without its timing."""
    monkeypatch.setattr(images, "speed", lambda suite, names: dict.fromkeys(names, COST))
    monkeypatch.setattr(images, "optional", lambda package: None)  # diffusers, which the timing of DDPM alone needs
    bench = Bench(images, tmp_path / "out", monkeypatch, capsys)
    words = ["--experiment", "score_matching", *SMALL, f"data.root={tmp_path}", "--steps", "4", "--n", "12"]
    return lambda *more: (bench, [*words, "--n-curve", "0", *more])


def scores(rows, **values):
    return [{k: v for k, v in row.items() if k in ("name", "sampler", "fid")} for row in rows
            if row["kind"] in ("score", "habit") and all(row[k] == v for k, v in values.items())]  # fmt: skip


def test_a_score_that_is_missing_is_computed_from_the_kept_weights(pictures, monkeypatch):
    """Stopped between the two samplers of the default, then with all rows lost but the weights."""
    bench, words = pictures("--only", OURS)
    bench.stopped(images.Suite, "score", 1, *words)
    assert [(row["sampler"], row["kind"]) for row in bench.rows() if row["kind"] != "speed"] == [("sde", "score")]
    monkeypatch.setattr(images.Suite, "train", lambda *_: pytest.fail("trained again"))
    added, _ = bench(*words)
    assert [(row["name"], row["sampler"]) for row in added] == [(OURS, "ode"), ("no averaging", "ode")]
    whole = scores(bench.rows())
    assert len(whole) == 3 and bench(*words)[0] == []
    averaged, raw = (next(one["fid"] for one in whole if one["name"] == name and one["sampler"] == "ode")
                     for name in (OURS, "no averaging"))  # fmt: skip
    assert averaged != raw
    (bench.folder / "rows.jsonl").unlink()
    assert scores(bench(*words)[0]) == whole
    assert [row["n"] for row in bench(*words, "--n", "16")[0]] == [16] * 3  # another score of the same training


def test_scores_on_the_way_change_no_training(pictures):
    weights = []
    for curve in ("0", "12"):  # as many as are scored in the end draw subsets for KID
        bench, words = pictures("--only", OURS, "--n-curve", curve)
        bench(*words)
        kept = [path for path in sorted(bench.folder.glob("*.pt")) if "averaging" not in path.name]
        weights.append(torch.load(kept[0], weights_only=True))
        shutil.rmtree(bench.folder)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_is_trained_is_what_rows_say(pictures, monkeypatch):
    """A habit is switched, and --bf16 is the precision of every pass, also where samples are drawn."""
    recipes, halves, own, forward = [], set(), images.Training.__init__, UNet.forward

    def watched(self, *args, **options):
        halves.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **options)

    monkeypatch.setattr(
        images.Training, "__init__", lambda self, model, recipe: (recipes.append(recipe), own(self, model, recipe))[1]
    )
    monkeypatch.setattr(UNet, "forward", watched)
    for more, half in (([], False), (["--bf16"], True)):
        bench, words = pictures("--only", OURS, "--only", "no clipping", *more)
        bench(*words)
        default, switched = recipes
        assert default.clip and default.bf16 == half and switched == replace(default, clip=None)
        assert halves == {half}
        recipes.clear()
        halves.clear()


def test_a_curve_that_was_interrupted_counts_once(pictures):
    bench, words = pictures("--only", FLOW, "--n-curve", "8")
    bench.stopped(images.Suite, "score", 2, *words)
    assert [row["done"] for row in bench.rows() if row["kind"] == "curve"] == [1, 2]
    assert not list(bench.folder.glob("*.pt"))
    bench(*words)
    assert [row["done"] for row in bench.rows() if row["kind"] == "curve"] == [1, 2, 3, 4]
    added, said = bench(*words, "--n-curve", "9")
    assert added == [] and "quarter" not in said  # the training is kept, of which there is no such curve


def test_images_of_other_settings_are_other_rows(pictures, tmp_path):
    bench, words = pictures("--only", FLOW)
    first, said = bench(*words)
    assert [row["kind"] for row in first] == ["speed", "score"]
    for more in (["--steps", "8"], ["--bf16"], ["model.lr=1e-3"], ["--experiment", "mnist_small"]):
        added, other = bench(*words, *more)
        timed = ["speed"] * (more[0] in ("--bf16", "--experiment"))  # neither steps nor rates change what a step costs
        assert [row["kind"] for row in added] == [*timed, "score"], more
        assert sum(line.startswith(f"| {FLOW} | Heun") for line in other.splitlines()) == 1 and "±" not in other
    assert len(list(bench.folder.glob("*.pt"))) == 5
    assert bench(*words) == ([], said)
    figure = tmp_path / "grid.png"
    assert bench(*words, "--figure", str(figure))[0] == [] and figure.is_file()
    for row in bench.rows()[:2] * 2:  # as a second process would have, and another seed and method
        Rows(bench.folder / "rows.jsonl").add(**{**row, "fid": 9.0})
        Rows(bench.folder / "rows.jsonl").add(**{**row, "seed": 1})
        Rows(bench.folder / "rows.jsonl").add(**{**row, "name": "score matching"})
    assert bench(*words) == ([], said)
    for path in bench.folder.glob("*.pt"):
        path.unlink()
    figure.unlink()
    bench.warned(f"--figure leaves '{FLOW}' out: file of weights not found", *words, "--figure", str(figure))
    assert not figure.exists()


def test_names_with_commas_are_quoted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ClassifierFeatures, "prepare", lambda *_: pytest.fail("features before names were read"))
    call = ["bench.py", "--out", str(tmp_path), "data=digits", "--only"]
    monkeypatch.setattr("sys.argv", [*call, "a, b"])
    with pytest.raises(UserError, match="no 'a, b'; there are 'Bellman.*, 'no clipping'"):
        images.main()
    monkeypatch.setattr("sys.argv", [*call, images.UNAVERAGED])
    with pytest.raises(SystemExit):
        images.main()
    assert "comes beside 'Bellman" in capsys.readouterr().err


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, weights = tmp_path / "out" / "a.pt", {"w": torch.ones(3)}

    def torn(weights, part):
        part.write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", torn)
        common.save(weights, path)
    assert not path.exists()
    common.save(weights, path)
    assert torch.equal(torch.load(path, weights_only=True)["w"], weights["w"])


@pytest.fixture
def traces(tmp_path, monkeypatch, capsys):
    """trace.py with little to measure."""
    monkeypatch.setattr(trace, "LEVELS", (0.3,))
    ways = {name: trace.WAYS[name] for name in ("Stein", "combined")}
    for place in (trace, trace_learning):
        monkeypatch.setattr(place, "WAYS", ways)
    return Bench(trace, tmp_path / "out", monkeypatch, capsys)


def test_variances_of_other_settings_are_other_rows(traces):
    words = ["--problems", "mixture_2d", "--seeds", "1", "--steps", "2"]
    first, said = traces(*words, "--draws", "4")
    assert len(first) == len(trace.KERNELS) and "±" not in said
    for more in (["--draws", "5"], ["--draws", "4", "--steps", "3"]):
        added, other = traces(*words, *more)
        assert len(added) == len(first) and "±" not in other and other != said
    assert traces(*words, "--draws", "4") == ([], said)
    path = traces.folder / "rows.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert traces(*words, "--draws", "4") == (first[:1], said)  # the same whatever was measured before
    whole = path.read_text()
    path.write_text(whole.replace('"a"', '"b"', 1))
    with pytest.raises(UserError, match=r"rows.jsonl, line 1 is damaged, its row has no 'a': delete that line"):
        traces(*words, "--draws", "4")
    path.write_text(whole)
    seeds, other = traces(*words, "--draws", "4", "--seeds", "2")
    assert len(seeds) == len(first) and "±" in other
    Rows(traces.folder / "rows.jsonl").add(**{**first[0], "combined": 9.0})
    assert traces(*words, "--draws", "4") == ([], said)


def test_what_is_learned_in_other_settings_is_other_rows(traces):
    traces.patch.setattr(trace_learning, "KERNELS", {"constant": trace.KERNELS["constant"]})
    words = ["--problems", "mixture_2d", "--seeds", "1", "--learn"]
    traces.stopped(trace_learning, "errors", 2, *words, "4")
    assert [row["done"] for row in traces.rows()] == [1, 2]
    added, said = traces(*words, "4")
    assert [row["done"] for row in added[:2]] == [3, 4] and len(traces.rows()) == 2 * 4
    longer, other = traces(*words, "8")
    assert [row["done"] for row in longer[:4]] == [2, 4, 6, 8] and "±" not in other
    assert traces(*words, "4") == ([], said)


def test_speeds_are_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fields, "speeds", lambda: dict.fromkeys(fields.NAMES, 2.0))
    monkeypatch.setattr(fields, "optional", lambda name: None)
    do = lambda task, tasks: asked.append(tasks) or []  # noqa: E731
    monkeypatch.setattr(fields.common, "workers", lambda jobs: contextlib.nullcontext(do))
    asked: list[list] = []
    bench = Bench(fields, tmp_path, monkeypatch, capsys)
    added, said = bench()
    assert [row["kind"] for row in added] == ["speed"] and said.count("| 0.50 |") == len(fields.NAMES)
    monkeypatch.setattr(fields, "speeds", lambda: pytest.fail("measured again"))
    assert bench() == ([], said)
    target, name, seed, steps = asked[0][0]
    Rows(bench.folder / "rows.jsonl").add(target=target, name=name, seed=seed, steps=steps + 1)
    assert bench() == ([], said) and asked[-1] == asked[0]  # of another length


def test_words_of_problems():
    words = ["data.root=R", "data.autoencoder.ckpt_path=A"]
    assert trace.words_of("mixture_2d", words) == [] and trace.words_of("mnist_pixels", words) == ["data.root=R"]
    assert trace.words_of("mnist_codes", words) == sorted(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["foo.bar=1", "--problems", "mixture_2d"], "'foo.bar=1' would not be read: leave it out"),
        (["data.root=R", "--problems", "mixture_2d"], "data.root=R: not for mixture_2d, leave it out"),
        (["--problems", "mixture_2d", "--seeds", "1", "model.foo=1", "--problems", "mnist_pixels"], "key 'model.foo'"),
        (["--problems", "mnist_pixels", "data.autoencoder.ckpt_path=A"], "ckpt_path=A: not for mnist_pixels"),
        (["--problems", "mnist_pixels", "model.init=A"], "'model.init=A' would not be read: networks are trained anew"),
        (["--problems", "mnist_pixels", "model.objective.trace=stein"], "all are compared, by a network"),
    ],
)
def test_words_that_no_problem_takes_are_refused(traces, words, sentence):
    with pytest.raises(UserError, match=sentence):
        traces(*words)
    assert not traces.folder.exists()


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        (trace, "--draws 1", "--draws: must be a whole number, at least 2, got '1'"),
        (trace, "--seeds -1", "--seeds: must be a whole number, at least 1, got '-1'"),
        (trace, "--steps 0", "--steps: must be a whole number, at least 1"),
        (trace, "--learn 4 --figure f.png", "--figure draws variances"),
        (images, "--seeds 0", "--seeds: must be a whole number, at least 1"),
        (images, "--n 3", "--n: must be a whole number, at least 4"),
        (images, "--n-curve -1", "--n-curve: must be a whole number, at least 0"),
        (images, "--steps many", "--steps: must be a whole number, at least 1, got 'many'"),
        (images, "--device foo", "--device: must be cpu or cuda, got 'foo'"),
        (images, "--device cuda:99", "--device: there is no GPU for 'cuda:99'"),
        (images, f"--out {__file__}", "is a file, not a folder"),
        (images, "--figure f.foo", "--figure: must end in .png"),
        (images, "--figure no/such/f.png", "--figure: there is no folder no/such"),
        (trace, f"--out {__file__}/out", "is a file, not a folder"),
        (trace, "--figure f.foo", "--figure: must end in .png"),
        (trace, "--learn 4 --draws 7", "--draws is for variances, which --learn does not take"),
        (fields, "--seeds 0", "--seeds: must be a whole number"),
        (fields, f"--out {__file__}", "is a file, not a folder"),
        (linearity, "--n 0", "--n: must be a whole number"),
        (linearity, f"--out {__file__}", "is a file, not a folder"),
        (linearity, "--model pretrained/mnist --seeds 2 --steps 9", "trained already: leave --steps, --seeds out"),
        (linearity, "--steps 7", "--steps: must be a whole number, at least 8, got '7'"),
        (linearity, "--figure a.png --only union", "--figure shows weighting 0, without 1"),
        (linearity, "--only foo", "--only finds none of weighting 0"),  # before an autoencoder is trained
        (linearity, "--figure no/such/f.png", "--figure: there is no folder no/such"),
    ],
)
def test_numbers_without_a_meaning_are_refused(module, words, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trainer.precision=bf16-mixed", "would not be read: use --bf16"),
        ("seed=5", "would not be read: use --seeds"),
        ("ckpt_path=foo.ckpt", "would not be read: leave it out"),
        ("callbacks.ema=null", "would not be read"),
        ("callbacks.ema._target_=callbacks.PowerAverages", "would not be read"),
        ("callbacks.metrics=null", "would not be read"),
        ("callbacks=points", "this benchmark is of images"),
        ("model.samplers.sde.levels=4", "all methods make as many network calls"),
        ("model.samplers.sde=null", "'model.samplers.sde' must be Sampler"),
        ("model=relative", "must be a BellmanDiffusion"),
        ("word", "cannot read 'word': expected KEY=VALUE"),
        ("model.lr=1e-4 model.lr=1e-1", "'model.lr=1e-1' and 'model.lr=1e-4' contradict each other"),
        ("model.noise={mean:0} model.noise.std=1", "'model.noise={mean:0}' and 'model.noise.std=1' contradict"),
    ],
)
def test_words_that_images_does_not_read_are_refused(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "Suite", lambda options: pytest.fail("computed"))
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(tmp_path / "out"), "data=digits", *words.split()])
    with pytest.raises(UserError, match=re.escape(sentence)):
        images.main()
    assert not (tmp_path / "out").exists()


def test_what_noise_levels_are_told_is_not_for_the_single_level_of_the_paper():
    words = ["data=digits", "model=mlp", "model.noise.mean=-1", "data.batch_size=8"]
    for name in images.OURS:
        config = common.compose(*images.words_of(name, words))
        assert config["data"]["batch_size"] == 8
        assert config["model"]["noise"] is None if name == images.PAPER else config["model"]["noise"]["mean"] == -1


def test_rows_know_what_an_autoencoder_is_whatever_its_path(tmp_path):
    file = tmp_path / "ae.ckpt"
    words = ["data.root=data", f"data.autoencoder.ckpt_path={file}"]
    known = []
    for content in ("one", "two", "one"):
        file.write_text(content)
        known.append(common.contents(words))
    assert known[0] == known[2] != known[1] and known[0][0] == words[0]
    file.unlink()
    with pytest.raises(UserError, match="autoencoder not found"):
        common.contents(words)


def test_memory_of_a_step_is_that_of_its_precision():
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64))

    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def loss(self, x, label):
            return self.network(x).square().mean()

    def bytes_of(bf16):
        suite = SimpleNamespace(
            device=torch.device("cpu"),
            mirrored=False,
            build=lambda name, seed: Method(),
            recipe_of=lambda method: common.Recipe(1, 1e-3),
            batches=lambda seed, mirrored: iter([(torch.randn(512, 64), torch.zeros(512, dtype=torch.long))]),
            precision=lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        )
        return images_costs.step_memory(suite, "any")

    assert bytes_of(True) < 0.75 * bytes_of(False)


def test_settings_are_applied_in_the_order_that_rows_name_them():
    words = ["data.images.folder=F", "model.lr=1", "data.images._target_=T", "data=d"]
    assert arguments.settings(words, ("data", "data.", "model."), {}) == sorted(words)


def test_what_is_remembered_is_nearer_to_training_images_than_to_test_images():
    drawn = torch.randint(256, (1200, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    train, test, other = drawn.split([300, 300, 600])
    assert linearity.nearer(train, train, test) == 1.0
    assert linearity.nearer(test, train, test) == 0.0
    assert linearity.nearer(other, train, test) == pytest.approx(0.5, abs=0.08)  # four standard errors
    assert linearity.nearer(other, train, test[:30]) < 0.75  # 30 of either: of 300 and 30 it is 0.9


def test_shares_that_explain_what_was_counted_are_those_that_were_drawn():
    alone = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.0, 0.1, 0.9]])
    drawn = torch.tensor([0.5, 0.2, 0.3])
    assert torch.allclose(linearity.explained(drawn @ alone, alone).float(), drawn, atol=1e-6)
    assert linearity.explained(torch.tensor([0.8, 0.2, 0.0]), alone)[1:].tolist() == [0.0, 0.0]  # none is negative


def test_weightings_are_judged_without_the_mistakes_of_the_classifier(capsys):
    """By the classes drawn alone by the same seed, in whatever order the models name them."""
    alone = {"only 8": ([0.0, 1.0], [0.25, 0.75]), "only 3": ([1.0, 0.0], [1.0, 0.0])}
    rows = {
        name: [{"seed": 0, "n": 4, "asked": asked, "counted": counted, "l1": 0.5}]
        for name, (asked, counted) in alone.items()
    }
    rows["weighting 0"] = [
        {"seed": 0, "n": 4, "asked": [0.6, 0.4], "counted": [0.7, 0.3], "l1": 0.2},
        {"seed": 1, "n": 4, "asked": [0.6, 0.4], "counted": [0.6, 0.4], "l1": 0.4},
    ]
    linearity.report(rows, list(rows))
    text = capsys.readouterr().out
    assert "2 of weighting, fields: L1 0.300 ± 0.141, 0.000 of the shares that explain what was counted, 0.000 " in text
    assert re.search(r"\| weighting 0 \| 0.000 \| 0\.[1-9]\d* \| 0.000 \| 0\.[1-9]\d* \|", text)  # of 4 samples each
    rows["only 8"][0]["counted"] = {"8": 1.0}
    with pytest.raises(UserError, match="has a row with a value that is none of its kind"), sound(Path("rows.jsonl")):
        linearity.report(rows, list(rows))
    capsys.readouterr()
    linearity.report({"weighting 0": rows["weighting 0"]}, list(rows))
    assert "explain" not in capsys.readouterr().out


def test_counting_explains_as_much_as_it_does():
    """A matrix without mistakes: L1 of two counted shares of n samples is 2 √(2 q (1 − q) / (π n)), by the normal."""
    asked, n = torch.tensor([0.6, 0.4]), 1000
    told, near = linearity.chance(asked, torch.eye(2), [n, n, n], draws=2000)
    assert told == pytest.approx(near, rel=1e-4)
    assert told == pytest.approx(2 * (2 * 0.24 / math.pi / n) ** 0.5, rel=0.05)
    mistaken = torch.tensor([[0.8, 0.2], [0.2, 0.8]])  # the inverse widens what counting the mixture costs by 1 / 0.6
    told, near = linearity.chance(asked, mistaken, [n, n, n], draws=2000)
    assert told > 1.2 * near
    assert linearity.apart(asked @ mistaken, asked, mistaken) == pytest.approx((0, 0), abs=1e-6)


def test_memory_of_experts_grows_with_their_number():
    asked = {count: batched(linearity.apart_experts(8, count)) for count in (1, 5)}
    before = [linearity.mebibytes(mixture) for mixture in asked.values()]
    assert all(seconds > 0 for seconds in linearity.seconds_of(asked, n=3, rounds=1).values())
    after = [linearity.mebibytes(mixture) for mixture in asked.values()]
    assert before[1] == pytest.approx(5 * before[0])
    assert after == pytest.approx([2 * one for one in before], rel=0.01)  # once stacked


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Checkpoints of two models that saw one digit each, 8 and 3."""
    root = tmp_path_factory.mktemp("experts")
    words = ["model=relative", "model.network.width=16", "model.network.depth=1"]
    words += [f"model.samplers.{name}.levels=4" for name in ("sde", "tracked")]
    words += ["model.samplers.sde._target_=bd_lightning.dynamics.MultistepDynamics"]
    for digit in (8, 3):
        assert launch(root, *words, f"data.keep=[{digit}]", f"run_id=of{digit}") == 0
    return [str(root / "bellman-diffusion" / f"of{k}" / "checkpoints" / "last.ckpt") for k in (8, 3)]


def test_classes_are_counted_under_their_own_names(tmp_path, monkeypatch, capsys, experts):
    """Experts of two of ten digits, in another order than the data's."""
    bench = Bench(linearity, tmp_path, monkeypatch, capsys)
    given = ["--model", *experts, "--data", str(tmp_path), "--n", "8", "--n-averaged", "4"]
    given += ["--figure", str(tmp_path / "f.png")]
    rows, text = bench(*given, "--only", "only|weighting 0, (tracked|averaged scores|class first)$")
    ways = [f"weighting 0, {way}" for way in ("tracked", "class first", "averaged scores")]
    assert [row["request"] for row in rows] == [*ways, "only 8", "only 3"]
    assert [len(row["counted"]) for row in rows] == [10] * 5
    assert [[c for c, share in enumerate(row["asked"]) if share] for row in rows] == [[3, 8]] * 3 + [[8], [3]]
    with Image.open(tmp_path / "f.gif") as frames:
        assert frames.n_frames > 2
    assert "of the shares that explain what was counted" in text


def test_experts_that_are_given_are_added_up(tmp_path, experts):
    """Their names one after the other, on all the data: with equal weights and as asked for."""
    paths = experts[::-1]
    models = linearity_requests.Models(SimpleNamespace(model=paths, data=tmp_path / "data"), 0)
    assert list(models.names) == ["3", "8"] and models.data.keep is None
    asked = linearity_requests.requests(models)
    assert sorted(asked) == ["only 3", "only 8", *(f"weighting {k}" for k in range(10)), "without 8"]
    assert [asked[f"only {digit}"]()[1].tolist() for digit in (3, 8)] == [[1.0, 0.0], [0.0, 1.0]]
    mixture, wanted = asked["weighting 0"]()
    assert len(mixture.terms) == 2 and float(wanted.sum()) == pytest.approx(1)
    rest, left = asked["without 8"]()
    assert left.tolist() == [1.0, 0.0]
    x, sigma = torch.randn(4, 1, 8, 8), torch.ones(4)
    shares = torch.cat(mixture.posterior(x, sigma), 1)
    assert shares.shape == (4, 2) and torch.allclose(shares.sum(1), torch.ones(4), atol=1e-5)
    alone = models.given[0][0]
    assert torch.allclose(rest.score(x, sigma), combine([(alone, ["3"], 1.0)]).score(x, sigma), atol=1e-5)


def test_models_that_cannot_be_asked_are_refused(tmp_path, monkeypatch, capsys, experts):
    stored = torch.load(experts[0], weights_only=True)
    model = stored["hyper_parameters"]["model"]
    samplers = model["samplers"]
    samplers["tracked"], samplers["sde"] = samplers.pop("sde"), None
    model["sampler"] = "tracked"
    torch.save(stored, path := tmp_path / "other.ckpt")
    bench = Bench(linearity, tmp_path, monkeypatch, capsys)
    with pytest.raises(UserError, match="samples are drawn by its sampler sde, and it has tracked"):
        bench("--model", str(path))
    stored = torch.load(experts[1], weights_only=True)
    stored["hyper_parameters"]["facts"]["sigma_data"] = 0.7
    torch.save(stored, other := tmp_path / "scale.ckpt")
    with pytest.raises(UserError, match=r"--model: .*scale.ckpt does not fit .*: .*sigma.* 0.7 against"):
        bench("--model", experts[0], str(other))
    stored = torch.load(experts[0], weights_only=True)
    stored["hyper_parameters"]["facts"]["class_names"] = ["3", "8"]
    stored["hyper_parameters"]["model"]["network"]["per_class"] = False  # one density of both
    torch.save(stored, whole := tmp_path / "whole.ckpt")
    with pytest.raises(UserError, match="a model of all its data as one density knows no class"):
        bench("--model", str(whole))
    with pytest.raises(UserError, match="--model: several have the class 8: give models of different classes"):
        bench("--model", experts[0], experts[1], experts[0])


def test_requests_of_other_settings_are_other_rows(tmp_path, monkeypatch, capsys):
    network = MLP((2,), 10, per_class=True, width=8)
    model, asked = RelativeDensities(network, (2,), 10, 1.0, {"sde": MultistepDynamics()}), []
    model.fields.count(torch.arange(10))

    class Judge:
        test = torch.zeros(1)

        def __init__(self, models):
            self.models = models

    def measure(judge, name, mixture, wanted, way, n):
        asked.append(n)
        return {"asked": wanted.tolist(), "counted": wanted.tolist(), "l1": float(len(asked)), "fid": 1.0}

    monkeypatch.setattr(linearity, "Judge", Judge)
    monkeypatch.setattr(linearity, "measure", measure)
    monkeypatch.setattr(linearity.Models, "__missing__", lambda self, name: model)
    bench = Bench(linearity, tmp_path, monkeypatch, capsys)
    given = ["--autoencoder", "pretrained/mnist/autoencoder"]
    for words, value in (([], 1), (["--steps", "8"], 2), (["--n", "40"], 3), ([], 1)):
        _, text = bench(*given, "--n", "30", "--only", "union$", *words)
        assert f"| union | {value}.000 |" in text
    _, text = bench(*given, "--n", "30", "--only", "union$", "--seeds", "2")
    assert "| union | 2.500 ± 2.121 |" in text  # of the values 1 and 4
    assert asked == [30, 30, 40, 30]
    shutil.copytree(given[1], tmp_path / "moved")
    bench("--autoencoder", str(tmp_path / "moved"), "--n", "30", "--only", "union$")
    assert asked == [30, 30, 40, 30]  # the same codes
    other = write_autoencoder(tmp_path / "other.ckpt", (1, 28, 28), "MNIST", (32,))
    bench("--autoencoder", str(other), "--n", "30", "--only", "union$")
    assert asked == [30, 30, 40, 30, 30]
    Judge.test = torch.ones(1)  # of other images
    bench(*given, "--n", "30", "--only", "union$")
    assert asked == [30, 30, 40, 30, 30, 30]
    for word, sentence in (("(", "is no regular expression, missing )"), ("wieghting", "--only finds none of ")):
        with pytest.raises(SystemExit) as stop:
            bench(*given, "--only", word)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"No space left on device\): add this row there by hand: \{.*\"l1\": 7"):
        bench(*given, "--n", "50", "--only", "union$")
