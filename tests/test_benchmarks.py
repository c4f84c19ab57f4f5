"""What the benchmarks share, and that each of them starts."""

import importlib
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from bd_lightning.checks import UserError
from bd_lightning.kernels import ClosedFormSlices
from bd_lightning.modules.base import learning_rate
from benchmarks import common, copies, decoding, images, kernels, mode_weights, peers, returns_tables
from benchmarks.rows import Rows, mean_sd, table
from datamodules.folder import FolderImages
from tiny_data import write_folder

NAMES = (
    "copies",
    "decoding",
    "few_steps",
    "fields",
    "gpu",
    "images",
    "kernels",
    "linearity",
    "mode_weights",
    "returns",
    "scaling",
    "soak",
    "trace",
)
OPTIONAL = ("azula", "diffusers", "torchcfm")


def test_every_benchmark_is_imported_without_its_peers(monkeypatch, capsys):
    """In this process with the packages hidden; --help prints the benchmark's own text."""
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 0
        assert f"benchmarks/{name}.py" in capsys.readouterr().out


def test_a_missing_peer_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "azula", None)
    with pytest.raises(UserError, match="compares with azula.*not installed"):
        common.optional("azula")
    monkeypatch.setattr(sys, "argv", ["fields.py"])
    with pytest.raises(SystemExit) as stop:
        common.run(importlib.import_module("benchmarks.fields").main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: this benchmark compares with azula")


def test_rows_are_kept_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "out" / "rows.jsonl"
    rows = Rows(path)
    assert len(rows) == 0 and not path.exists()
    rows.add(name="a", seed=0, fid=math.inf)
    rows.add(name="a", seed=1, fid=2.5)
    rows.add(kind="speed", values={"a": 1.0})
    with path.open("a") as file:
        file.write('{"name": "b", "se')  # killed here
    again = Rows(path)
    assert list(again) == list(rows)
    assert again.where(name="a", seed=1) == [{"name": "a", "seed": 1, "fid": 2.5}]
    assert not again.where(name="b") and len(again.where(name="a")) == 2
    Rows(path).add(name="a", seed=2)  # by another process
    again.add(name="b", seed=0)
    assert list(Rows(path)) == [*rows, {"name": "a", "seed": 2}, {"name": "b", "seed": 0}]


def test_a_last_row_without_the_end_of_its_line_is_a_row(tmp_path):
    """As an editor leaves it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n{"seed": 1}')
    assert list(Rows(path)) == [{"seed": 0}, {"seed": 1}]
    Rows(path).add(seed=2)
    assert list(Rows(path)) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n{"seed": 2}\n'


@pytest.mark.parametrize("line", ['{"name": "b", "se', "", "3", "\xff"])
def test_a_damaged_row_is_one_sentence(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"seed": 0}\n' + line.encode("latin-1") + b'\n{"seed": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is damaged"):
        Rows(path)


def test_rows_of_one_seed_count_once(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    for seed, fid in ((1, 5.0), (0, 1.0), (0, 2.0), (2, 9.0)):
        rows.add(name="a", seed=seed, fid=fid)
    assert [row["fid"] for row in rows.of_seeds(range(2), name="a")] == [1.0, 5.0]


def test_damaged_weights_are_one_sentence(tmp_path):
    path, module = tmp_path / "a.pt", torch.nn.Linear(2, 1)
    with pytest.raises(UserError, match="file of weights not found: .*a.pt"):
        common.restore(module, path)
    common.save(module.state_dict(), path)
    whole = path.read_bytes()
    common.restore(module, path)
    common.save(torch.nn.Linear(3, 1).state_dict(), path)
    other = path.read_bytes()
    common.save({name: value * torch.nan for name, value in module.state_dict().items()}, path)
    for content in (b"", b"PK", whole[: len(whole) // 2], other, path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt is damaged.*delete it"):
            common.restore(module, path)


def test_a_seed_that_was_run_twice_counts_once(capsys):
    rows = [(0, 0.0), (0, 0.0), (1, 10.0)]
    row = {"example": "caution", "trained": (20,)}
    returns_tables.linear_table(
        [{**row, "way": way, "seed": s, "numbers": {"mean": v}} for way in "ab" for s, v in rows][:4]
    )
    said = capsys.readouterr().out
    assert "| a | 5 ± 5 | 2 |" in said and "| b | 0 | 1 |" in said


def test_tables():
    cells = [mean_sd([1.0, 2.0, 3.0], 1), mean_sd([0.5]), mean_sd([])]
    assert cells == ["2.0 ± 1.0", "0.50", "–"]
    assert mean_sd([1.0, math.inf]) == mean_sd([math.nan]) == "not finite"
    assert table(["x", "FID"], [["a", 1], ["b", "2.0 ± 1.0"]]) == (
        "\n| x | FID |\n|---|---|\n| a | 1 |\n| b | 2.0 ± 1.0 |"
    )


def test_turns_alternate_and_ratios_are_taken_step_by_step(monkeypatch):
    turns = common.Turns(["a", "b"], skip=1)
    assert [turns.next() for _ in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
    turns.seconds = {"a": [99.0, 2.0, 30.0, 4.0], "b": [1.0, 1.0, 10.0, 4.0]}
    assert turns.ratio("a", "b") == 2.0 and turns.median("a") == 4.0 and turns.ratio("b", "b") == 1.0
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    with turns.clock("b"):
        pass
    assert turns.seconds["b"][-1] == 2.5


def test_training_is_that_of_train_py(tmp_path):
    """Weights and averages after a few steps, against Lightning with the same batches and noise."""
    import lightning as L

    from callbacks import AveragedWeights

    steps, words = 6, ["model=points", "data=gaussians_1d", "data.batch_size=32", "callbacks=points"]
    config = common.compose(*words, "model.warmup_steps=2")
    data = common.make_data(config)
    facts = data.facts.arguments
    batches = [batch for _, batch in zip(range(steps), common.batches(data, 0))]

    ours = common.make_model(config, facts, seed=3)
    recipe = common.Recipe.of(ours, config, steps)
    assert (recipe.warmup_steps, recipe.clip, recipe.averaging, recipe.decay) == (2, 1.0, 0.995, True)
    training = common.Training(ours, recipe)
    for k, (x, label) in enumerate(batches):
        torch.manual_seed(k)
        training.step(lambda x=x, label=label: ours.losses(x, label).total)

    theirs = common.make_model(config, facts, seed=3)
    theirs.on_train_batch_start = lambda batch, batch_idx: torch.manual_seed(batch_idx)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[AveragedWeights(0.995)], default_root_dir=tmp_path,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(theirs, torch.utils.data.DataLoader(batches, batch_size=None))
    averaged = training.averaged.state_dict()
    for name, value in theirs.state_dict().items():  # Lightning leaves the averaged weights in the module
        torch.testing.assert_close(averaged[name], value, rtol=1e-6, atol=1e-7)
    moved = [(a - b).abs().max() for a, b in zip(ours.state_dict().values(), averaged.values())]
    assert max(moved) > 1e-4


def test_the_learning_rate():
    assert learning_rate(0, 4) == pytest.approx(0.2) and learning_rate(99, 4) == 1
    assert learning_rate(50, 0, 100) == pytest.approx(0.5) and learning_rate(100, 0, 100) == pytest.approx(0)
    assert learning_rate(500, 0, 100) == pytest.approx(0)  # not up again


FACTS = {"shape": (2,), "num_classes": 3, "sigma_data": 2.0}
CONFIG = {"model": {"network": {"_target_": "bd_lightning.networks.MLP", "width": 8, "depth": 1}}}


class Fixed(torch.nn.Module):
    """A network that answers with the same vector everywhere, and remembers what it was told."""

    conditional = False

    def forward(self, x, c_noise, label=None):
        self.told = x, c_noise, label
        return torch.ones_like(x) / 2, None


def test_flow_matching():
    noise, x = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, -2.0], [4.0, 1.0]])
    point, target = peers.straight_path(noise, x, torch.tensor([0.25, 1.0]))
    assert torch.equal(point, torch.tensor([[1.5, 1.0], [4.0, 1.0]]))
    assert torch.equal(target, torch.tensor([[2.0, -4.0], [4.0, 0.0]]))
    peer = peers.FlowMatching(CONFIG, FACTS)
    peer.network = Fixed()
    torch.manual_seed(0)
    loss = peer.loss(x, torch.zeros(2, dtype=torch.long))
    torch.manual_seed(0)
    noise, t = torch.randn(2, 2), torch.rand(2)
    assert loss == pytest.approx(float((x / 2 - noise - 0.5).square().mean()))
    torch.testing.assert_close(peer.network.told[0], (1 - t)[:, None] * noise + t[:, None] * x / 2)
    torch.testing.assert_close(peer.network.told[1], ((1 - t) / t).log() / 4)
    assert peer.network.told[2] is None


def test_ddpm():
    alphas = peers.alphas_cumprod()
    assert alphas[0] == pytest.approx(1 - 1e-4) and alphas[1] == pytest.approx((1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999))
    assert alphas[-1] == pytest.approx(4.04e-5, rel=1e-2)
    noised = peers.noised(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([0.36]))
    torch.testing.assert_close(noised, torch.tensor([[0.6 * 3 + 0.8, 1.6]]))
    peer, x = peers.DDPM(CONFIG, FACTS), torch.tensor([[3.0, -2.0], [4.0, 1.0]])
    peer.network = Fixed()
    torch.manual_seed(0)
    loss = peer.loss(x, torch.zeros(2, dtype=torch.long))
    torch.manual_seed(0)
    noise, t = torch.randn(2, 2), torch.randint(0, 1000, (2,))
    assert loss == pytest.approx(float((noise - 0.5).square().mean()))
    torch.testing.assert_close(peer.network.told[0], peers.noised(x / 2, noise, alphas[t]))
    torch.testing.assert_close(peer.network.told[1], ((1 - alphas[t]) / alphas[t]).sqrt().log() / 4)


def test_the_line_is_that_of_torchcfm():
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    noise, x, t = torch.randn(5, 1, 4, 4), torch.randn(5, 1, 4, 4), torch.rand(5)
    _, point, target = matching.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, x, t)
    for found, expected in zip(peers.straight_path(noise, x, t), (point, target)):
        torch.testing.assert_close(found, expected)


def test_the_betas_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
    torch.testing.assert_close(peers.alphas_cumprod(), scheduler.alphas_cumprod)
    x, noise, t = torch.randn(5, 2), torch.randn(5, 2), torch.arange(0, 1000, 200)
    torch.testing.assert_close(peers.noised(x, noise, peers.alphas_cumprod()[t]), scheduler.add_noise(x, noise, t))
    peer = peers.DDPM(CONFIG, FACTS)
    for sampler in peer.samplers.values():
        with torch.no_grad():
            assert sampler(peer, range(3), None).isfinite().all()


def test_solvers_of_diffusers_make_the_calls_that_they_are_asked_for(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks import few_steps

    config = common.compose("experiment=score_matching", "data=digits", "model.network.channels=[8]")
    data = common.make_data(config)
    data.prepare_data()
    data.setup("fit")
    torch.save(peers.DDPM(config, data.facts.arguments).state_dict(), tmp_path / "ddpm.pt")
    peer = few_steps.Peer(str(tmp_path / "ddpm.pt"), config, [5, 8])
    calls = []
    peer.ddpm.network.register_forward_hook(lambda *_: calls.append(1))
    for name, sampler in peer.samplers.items():
        calls.clear()
        x = peer.sample(range(3), name, seed=2)
        assert x.isfinite().all() and len(calls) == sampler.calls == int(name.partition("@")[2])
    assert not torch.equal(x, peer.sample(range(3), name, seed=3))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the weights of a DDPM"):
        few_steps.Peer(str(tmp_path / "other.pt"), config, [5])


def test_heun_follows_the_velocity():
    """A constant velocity of ½ takes every start ½ further, in units of the data."""
    peer = peers.FlowMatching(CONFIG, FACTS)
    start = peer.start(range(4))
    network, calls = Fixed(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    peer.start, peer.network = lambda rows: start, network
    torch.testing.assert_close(peer.samplers["Heun"](peer, range(4), None), 2.0 * (start + 0.5))
    assert len(calls) == peers.CALLS


def test_variances_of_traces(monkeypatch, tmp_path, capsys):
    from benchmarks import trace

    monkeypatch.setattr(trace, "LEVELS", (0.1, 3.0))
    words = ["--seeds", "1", "--steps", "30", "--draws", "16", "--problems", "mixture_2d", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["trace.py", *words, "--figure", str(tmp_path / "trace.png")])
    trace.main()
    said = capsys.readouterr().out
    assert said.count("mixture_2d") == 2 and (tmp_path / "trace.png").is_file()
    rows = {(row["kernel"], row["level"]): row for row in trace.Rows(tmp_path / "rows.jsonl")}
    low, high = rows["constant", 0.1], rows["constant", 3.0]
    assert low["Hutchinson"] < 0.5 < 2 < high["Hutchinson"] and low["combined"] < 0.5 and low["antithetic"] < 0.7
    assert low["a"] < 0.4 and high["a"] > 0.8  # the best weight of Stein's identity


def test_what_ways_of_taking_the_trace_learn(monkeypatch, tmp_path, capsys):
    from benchmarks import trace, trace_learning

    ways = {name: trace.WAYS[name] for name in ("Stein", "combined, antithetic")}
    monkeypatch.setattr(trace_learning, "WAYS", ways)
    words = ["--learn", "40", "--seeds", "1", "--problems", "mixture_2d", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["trace.py", *words])
    trace.main()
    said = capsys.readouterr().out
    rows = trace.Rows(tmp_path / "rows.jsonl")
    assert len(rows) == 2 * 2 * 4 and "errors at σ/σ_data" in said
    assert all(len(row["errors"]["g"]) == len(trace_learning.JUDGED) and row["minutes"] > 0 for row in rows)
    constant = rows.where(kernel="constant", way="Stein")
    assert max(constant[-1]["errors"]["s"]) < 1e-5  # its mobility is one
    assert constant[-1]["errors"]["g"][2] < constant[0]["errors"]["g"][2]
    trace.main()
    assert len(trace.Rows(tmp_path / "rows.jsonl")) == len(rows)  # nothing is computed again
    for wrong in ("6", "-4"):
        monkeypatch.setattr("sys.argv", ["trace.py", "--learn", wrong])
        with pytest.raises(SystemExit):
            trace.main()


def test_the_best_weight_is_the_minimum_of_the_parabola():
    from benchmarks.trace import best, spread

    g = torch.Generator().manual_seed(0)
    stein, probe = 3 * torch.randn(500, 4, generator=g), torch.randn(500, 4, generator=g)
    a = best(stein, probe)
    around = [spread(w * stein + (1 - w) * probe) for w in (a - 0.05, a, a + 0.05)]
    assert around[1] < min(around[0], around[2]) and a == pytest.approx(0.1, abs=0.05)


def test_duplicated_images_are_a_class_and_are_found_again():
    codes = torch.randn(6000, 3)
    x, label = copies.duplicated(codes, torch.zeros(6000, dtype=torch.long))
    assert len(x) == 6000 + copies.DUPLICATED * (copies.TIMES - 1)
    prints = label == copies.PRINTS
    assert int(prints.sum()) == copies.DUPLICATED * copies.TIMES + copies.ORDINARY
    counts = x[prints].unique(dim=0, return_counts=True)[1]
    assert int((counts == copies.TIMES).sum()) == copies.DUPLICATED and int((counts == 1).sum()) == copies.ORDINARY
    often = copies.shuffled(6000)[: copies.DUPLICATED]
    distance, index = copies.two_nearest(codes[often] + 1e-4, codes)
    assert torch.equal(index, often) and (distance[:, 0] < distance[:, 1]).all()


def test_a_ratio_of_means_has_the_error_of_both():
    """By the delta method: the error of mean(a) / mean(b) for independent pairs, against many drawings of it."""
    generator = torch.Generator().manual_seed(0)
    floor = 1 + 0.1 * torch.randn(400, 50, generator=generator)
    found = 2 * floor + 0.2 * torch.randn(400, 50, generator=generator)
    said = [re.fullmatch(r"(.+) \((.+)\)", mode_weights.relative(a, b)).groups() for a, b in zip(found, floor)]
    ratios, errors = torch.tensor([tuple(map(float, pair)) for pair in said]).T
    assert float(ratios.mean()) == pytest.approx(2, abs=0.01)
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.15)
    none = torch.empty(0)
    assert mode_weights.relative(none, floor[0]) == "–"
    assert mode_weights.relative(torch.tensor([3.0]), torch.tensor([2.0])) == "1.50"


def test_weights_of_modes_are_of_their_own_data(monkeypatch):
    path = Path(__file__).parent / "checkpoints" / "v1" / "default.ckpt"
    monkeypatch.setattr(sys, "argv", ["mode_weights.py", "--checkpoint", str(path), "--chains", "4"])
    with pytest.raises(UserError, match="must be of a run of experiment=gaussians_2d"):
        mode_weights.main()


def test_how_far_the_mobility_is_from_a_constant():
    """Data in one point: m = (2π(ε + σ² + σ²‖n‖²/d))^{−1/2}, in closed form at every noised point."""
    n = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread, slope = kernels.variation(
        ClosedFormSlices(), torch.zeros(5, 4).double(), torch.zeros(200, 4).double(), 0.5, n
    )
    total = 1e-3 + 0.25 + 0.25 * n.square().sum(1) / 4
    assert spread == pytest.approx(float((-0.5 * total.log()).std()), rel=1e-9)
    assert slope == pytest.approx(float((0.25 * n / (4 * total[:, None])).square().mean().sqrt()), rel=1e-9)


def test_the_mobility_of_a_config_is_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--mobility", "100"])
    kernels.main()
    out = capsys.readouterr().out
    assert "64 dimensions, 100 partners, 50 points" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(kernels.LEVELS) and all(0 < float(row[1]) < 1 for row in rows)
    level, slope, share = float(rows[1][0].strip("| ")), float(rows[1][2]), float(rows[1][3].rstrip("% |"))
    assert level == 0.3 and share == pytest.approx(100 * slope / (0.3 / math.sqrt(1 + 0.3**2)), abs=0.02)
    other = ["kernels.py", "--mobility", "100", "model.kernel._target_=bd_lightning.kernels.Constant"]
    monkeypatch.setattr(sys, "argv", other)
    kernels.main()
    out = capsys.readouterr().out
    assert "Constant(epsilon=0.001), 64 dimensions" in out and "| 0.000 | 0.00000 | 0.00 % |" in out
    many = ["kernels.py", "--mobility", "940"]  # an epoch leaves the last of 1,500 digits out
    monkeypatch.setattr(sys, "argv", many)
    with pytest.raises(UserError, match="takes 1410 samples, and an epoch of training has 1408"):
        kernels.main()
    monkeypatch.setattr(sys, "argv", ["kernels.py", "data=mnist"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "settings go with --mobility" in capsys.readouterr().err


def test_batches_of_later_epochs_are_decoded_too(tmp_path, monkeypatch, capsys):
    """They came from memory, beyond the first epoch."""
    folder, decoded, own = write_folder(tmp_path / "f", n=140, size=(8, 8)), [], FolderImages.decode
    monkeypatch.setattr(FolderImages, "decode", lambda self, index: decoded.append(index) or own(self, index))
    monkeypatch.setattr(sys, "argv", ["decoding.py", str(folder), "--size", "8", "--batches", "4"])
    decoding.main()
    assert len(decoded) >= 280 + 3 * (4 + 1) * 128 and "280 images to 8×8" in capsys.readouterr().out


def test_an_experiment_that_is_not_measured_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "digit"])
    with pytest.raises(UserError, match="there is no experiment 'digit' here. Did you mean 'digits'"):
        importlib.import_module("benchmarks.scaling").main()


def test_settings_of_a_method_are_not_taken_for_those_of_the_command_line(capsys):
    words = ["data=digits", "model.lr=1e-3"]
    for names, said in ((["Bellman Diffusion"], ""), (["Bellman Diffusion, AdamW"], "keeps its own model.lr=3.0e-3")):
        images.check(SimpleNamespace(experiment="mnist_small", words=words, only=names))
        err = capsys.readouterr().err
        assert said in err if said else not err


@pytest.mark.parametrize(("status", "error"), [(0, None), (130, KeyboardInterrupt), (2, UserError)])
def test_a_training_that_is_stopped_is_no_failure(monkeypatch, status, error):
    monkeypatch.setattr(train, "main", lambda words: status)
    with pytest.raises(error) if error else nullcontext():
        common.train_py("steps=1")
