"""The benchmark of returns: the steps of train.py, and that it is stopped and goes on without loss."""

import dataclasses
import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch

import train
from bd_lightning.checks import UserError
from bd_lightning.cli import config as configs
from bd_lightning.modules import returns as learners
from bd_lightning.returns import CVaR
from bd_lightning.returns.finite import Outcomes

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")

from benchmarks import common, returns, returns_peer, returns_tables
from benchmarks import returns_linearity as linearity
from benchmarks import returns_training as benchmark
from benchmarks.rows import Rows


@pytest.mark.parametrize("method", returns_tables.METHODS)
def test_a_method_keeps_what_the_experiment_says_of_the_model(method):
    """Its representation alone is another: the caution and the convolution stay, and it is as model=METHOD has it."""
    _, _, (cautious,) = benchmark.build(benchmark.words_of("rl_frozen_cliff_cautious", method, 3e-3), [0])
    _, _, (own,) = benchmark.build(["experiment=rl_frozen_cliff", f"model={method}"], [0])
    same = [torch.equal(a, b) for a, b in zip(cautious.representation.buffers(), own.representation.buffers())]
    assert cautious.policy.preference == CVaR(0.1) and cautious.lr == 3e-3
    assert type(cautious.representation) is type(own.representation) and all(same) and same
    composed = configs.compose(configs.parse(benchmark.words_of("rl_breakout", method, 3e-3)))["model"]
    assert composed["features"]["channels"] == [16] and composed["hidden"] == [128]


@pytest.mark.parametrize("method", ["returns", "c51"])
def test_the_benchmark_trains_as_train_py_does(method, tmp_path):
    """Weights after 60 steps of two runs at once against those of train.py, and the evaluations on the way."""
    words = ["experiment=rl_frozen_lake", f"model={method}", "data.warmup=100", "callbacks.returns.worst=0.5"]
    config, data, models = benchmark.build(words, [3, 4])
    runs, streams = benchmark.Seeds(models), [d.open(d.seed) for d in data]
    for stream in streams:
        stream.fill()
    for _ in range(60):
        for stream, action in zip(streams, runs.explore(np.stack([s.observation for s in streams]))):
            stream.step(action)
        runs.step([stream.draw() for stream in streams])
    options = [
        "steps=60",
        "eval_every=30",
        "seed=4",
        "run_id=x",
        "logger=none",
        "callbacks.figures=null",
        "callbacks.progress=null",
    ]
    assert train.main([*words, *options, f"root={tmp_path}", "trainer.enable_progress_bar=false"]) == 0
    folder = tmp_path / "bellman-diffusion" / "x"
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for i, p in enumerate(runs.parameters):
        name = f"network.{2 * (i // 2)}.{'weight' if i % 2 == 0 else 'bias'}"
        assert torch.allclose(p[1], stored[name], atol=2e-5), name
    found = benchmark.learn(words, [3, 4], 60, 30)
    assert found["returns"][1] == [row["val/return_worst"] for row in json.loads((folder / "returns.json").read_text())]
    assert found["env_steps"] == [100 + 4 * 30, 100 + 4 * 60]


@pytest.mark.parametrize(
    ("experiment", "steps", "level"), [("rl_cartpole", 500, 60.0), ("rl_frozen_lake_slippery", 1600, 0.3)]
)
def test_the_other_experiments_learn_and_a_broken_target_does_not(experiment, steps, level, monkeypatch):
    words = [f"experiment={experiment}", "model.lr=2e-3"]
    assert benchmark.learn(words, [0], steps, steps)["returns"][0][-1] > level
    whole = learners.bellman_target
    monkeypatch.setattr(
        learners, "bellman_target", lambda rep, y, r, discount, policy: whole(rep, y, r, 0 * discount, policy)
    )
    assert benchmark.learn(words, [0], steps, steps)["returns"][0][-1] < level


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["returns.py", *words])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common.run(returns.main)


def test_a_script_that_fails_is_one_sentence(tmp_path):
    script = tmp_path / "c51.py"
    script.write_text("raise SystemExit('no tyro here')")
    with pytest.raises(UserError, match="c51.py failed by .*, give --python one that .*; it said: no tyro here"):
        returns_peer.cleanrl(0, script, sys.executable)
    for text in (
        script.read_bytes(),
        b"\xff\xfe\x00",
        b"class QNetwork(nn.Modul): pass\ndef linear_schedule\nwith torch.no_grad():\n"
        + b" " * 20
        + b"_, next_pmfs\nif global_step % 100 == 0",
    ):
        script.write_bytes(text)
        with pytest.raises(UserError, match="c51.py has no network and update as cleanrl's c51.py has them"):
            returns_peer.same_update(script)
    script.write_text("print('done')")
    with pytest.raises(UserError, match="c51.py printed no 'global_step"):
        returns_peer.cleanrl(0, script, sys.executable)
    with pytest.raises(UserError, match="no episode ended between steps 2000 and 4000"):
        returns_peer.windows([(step, 1.0) for step in range(0, 20_000, 500) if not 2000 <= step < 4000])


def test_a_night_is_rehearsed_and_not_repeated(tmp_path, monkeypatch, capsys):
    words = [
        "night",
        "--smoke",
        "--envs",
        "rl_frozen_lake",
        "--examples",
        "expected updates",
        "transfer",
        "--jobs",
        "1",
    ]
    command(monkeypatch, *words, "--out", str(tmp_path))
    said = capsys.readouterr().out
    for name in (
        "| rl_frozen_lake | 0.95 |",
        "| continuous | 0.9 | c51, raw |",
        "| one drawn |",
        "mixed, 300 backups",
    ):
        assert name in said, name
    monkeypatch.setattr(returns, "work", lambda job: pytest.fail(f"done again: {job}"))
    command(monkeypatch, *words, "--out", str(tmp_path))
    table = said[said.index("| experiment |") :]
    assert capsys.readouterr().out == table
    command(monkeypatch, "table", "--smoke", "--envs", "rl_frozen_lake", "--out", str(tmp_path))
    assert capsys.readouterr().out == table


RUN = {"env": "rl_cliff", "method": "c51", "rate": 1e-3, "seeds": [0], "seconds": 1.0, "env_steps": [500, 1000],
       "returns": [[-9.0, -9.0]]}  # fmt: skip


@pytest.mark.parametrize(
    "name, row",
    [
        ("control, line 1", {"env": "rl_frozen_lake", "method": "returns", "rate": 1e-3, "seeds": 3}),
        ("control", RUN | {"method": "fields"}),
        ("control", RUN | {"env": "frozen_lake"}),
        ("control, line 1", RUN | {"env": ["rl_cliff"]}),
        ("control, line 1", RUN | {"env_steps": []}),
        ("control, line 1", RUN | {"env_steps": ["500"]}),
        ("control, line 1", RUN | {"seeds": [0, 1]}),
        ("control, line 1", RUN | {"returns": "high"}),
        ("control, line 1", RUN | {"returns": [[-9.0]]}),
        ("control, line 1", RUN | {"returns": [["-9", "-9"]]}),
        ("control, line 1", RUN | {"rate": "1e-3"}),
        ("control, line 1", RUN | {"seconds": None}),
        ("control, line 1", RUN | {"seconds": -1.0}),
        ("control, line 1", RUN | {"rate": True}),
        ("control, line 1", RUN | {"env_steps": [1000, 500]}),
        ("evaluate", {"rewards": "discrete"}),
        ("peer", {"name": "a", "windows": "b"}),
        ("linear, line 1", [1]),
    ],
)
def test_rows_that_were_edited_by_hand_are_named(tmp_path, monkeypatch, capsys, name, row):
    name, comma, line = name.partition(",")
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"job": "a", "seconds": 1, "rows": [row]}) + "\n")
    with pytest.raises(SystemExit):
        command(monkeypatch, "table", "--out", str(tmp_path))
    said = capsys.readouterr().err.strip()
    assert f"{name}.jsonl{comma}{line} has a row with a value that is none of its kind" in said and "\n" not in said


def test_a_job_that_was_cut_leaves_nothing_and_is_done_anew(tmp_path, monkeypatch, capsys):
    """Ctrl-C after the first row of the second job: one sentence, and all rows of both jobs in the end."""

    def rows(way, seeds, steps):
        for k in range(2):
            yield way, k, {"number": 1.0}
            if way == "b" and not again:
                raise KeyboardInterrupt

    again = False
    monkeypatch.setitem(linearity.EXAMPLES, "caution", linearity.Example(rows, ["a", "b"], 1))
    words = ["linear", "--examples", "caution", "--jobs", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *words)
    said = capsys.readouterr().err
    assert stop.value.code == 130 and "stopped: 1 of 2 jobs of" in said and "Traceback" not in said
    kept = returns_tables.finished(tmp_path / "linear.jsonl")
    assert [row["way"] for row in kept] == ["a", "a"]
    again = True
    command(monkeypatch, *words)
    assert [row["way"] for row in returns_tables.finished(tmp_path / "linear.jsonl")] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("control --envs rl_cartpol", "--envs: there is no 'rl_cartpol'. Did you mean 'rl_cartpole'?"),
        ("linear --examples risk", "--examples: there is no 'risk'. Known: caution, "),
        ("evaluate --seeds 0", "--seeds must be at least 1, got 0"),
        ("night --jobs -1", "--jobs must be at least 1, got -1"),
        ("control --rates 0", "--rates must lie between 0 and 1, got 0"),
        ("peer --script nowhere.py", "cleanrl's c51.py not found: nowhere.py"),
        ("peer --script FILE --python nowhere", "--python nowhere is no program that runs"),
        ("table --out FILE", "--out: FILE is a file, not a folder"),
        ("table", "nothing is finished in runs yet"),
        ("table --out old", "holds a row a line, as an earlier version wrote it"),
    ],
)
def test_mistakes_are_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    Rows(tmp_path / "old" / "linear.jsonl").add(job="a", example="caution")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *(["--out", "runs"] if words == "table" else []), *words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1


def test_runs_whose_seeds_are_not_all_there_are_said_to_be_left_out(capsys):
    row = {"env": "rl_cliff", "method": "c51", "rate": 1e-3, "seeds": [0, 1], "seconds": 1.0, "env_steps": [500],
           "returns": [[-9.0]] * 2, "trained": (20_000, 500)}  # fmt: skip
    returns_tables.control_table([row, {**row, "seeds": [100], "returns": [[-9.0]]}], [returns_tables.ENVS["rl_cliff"]])
    said = capsys.readouterr()
    assert said.err.startswith("rl_cliff, C51 at 0.001 is left out: 2 of 10 seeds are there (see --seeds)\n")
    assert "rl_cliff is left out: a line of the table needs all reported seeds of fields" in said.err and not said.out
    two = [dataclasses.replace(returns_tables.ENVS["rl_cliff"], seeds=2, tuning=1, rates=(1e-3,))]
    rows = [
        {**row, "method": m, "seeds": s, "returns": [[-9.0]] * len(s)}
        for m in ("c51", "returns")
        for s in ([0, 1], [100])
    ]
    assert returns_tables.control_table(rows, two) and not capsys.readouterr().err
    assert returns_tables.control_table([{**row, "trained": (20, 10)} for row in rows] + rows, two)
    assert (
        "rl_cliff: trainings of 20 optimiser steps are left out, it takes 20,000 (see --smoke)"
        in capsys.readouterr().err
    )


def test_a_table_of_experiments_that_have_no_rows_is_one_sentence_and_a_line_is_there_once(tmp_path, capsys):
    row = {"env": "rl_cliff", "rate": 2.5e-4, "seconds": 1.0, "env_steps": [500], "trained": (20_000, 500)}
    rows = [
        {**row, "method": method, "seeds": [seed], "returns": [[-9.0]]}
        for method in ("c51", "returns")
        for seed in (0, 100)
    ]
    for number, kept in enumerate(rows):
        job = ("control", ("rl_cliff", kept["method"], 2.5e-4, range(number, number + 1), 20_000, 500))
        Rows(tmp_path / "control.jsonl").add(job=repr(job), seconds=1.0, rows=[kept])
    with pytest.raises(UserError, match="of the --envs that are asked for: it has rl_cliff"):
        returns_tables.table(tmp_path, [returns_tables.ENVS["rl_acrobot"]], None)
    setting = dataclasses.replace(returns_tables.ENVS["rl_cliff"], seeds=1, tuning=1, rates=(2.5e-4,))
    assert len(returns_tables.control_table(rows, [setting])) == 1  # the best rate is the common one
    assert capsys.readouterr().out.count("| rl_cliff | -100 |") == 1


def test_a_policy_that_never_arrives_is_worth_nothing_and_nothing_is_divided_by_it():
    """Two states and an end, which the second action reaches from the second state alone."""
    pair, share = torch.tensor([0, 1, 2, 3, 4, 5]), torch.ones(6)
    reward, discount = torch.tensor([0, 0, 0, 1.0, 0, 0]), torch.tensor([0.9, 0.9, 0.9, 0, 0, 0])
    outcomes = Outcomes(3, 2, pair, share, reward, discount, torch.tensor([0, 1, 0, 2, 2, 2]))
    assert str(linearity.value_of(outcomes, torch.tensor([0, 1, 0]))) == "0.0"
    assert linearity.value_of(outcomes, torch.tensor([1, 1, 0])) == pytest.approx(0.9)


def test_a_number_that_is_none_is_no_result(tmp_path):
    path = tmp_path / "evaluate.jsonl"
    for number in ("NaN", "[1.0, Infinity]"):
        path.write_text('{"job": "a", "rows": [{"w1": ' + number + "}]}\n")
        with pytest.raises(UserError, match=r"evaluate\.jsonl, line 1 has a row .* it holds (nan|inf)"):
            returns_tables.finished(path)
    for damaged in ('{"job": ["x"], "rows": [{}]}', '{"rows": [{}]}', '{"job": "a", "rows": []}'):
        path.write_text(damaged + "\n")
        with pytest.raises(UserError, match=r"evaluate\.jsonl, line 1 "):
            returns_tables.finished(path)


def test_rates_of_returns_are_chosen_from_all_jobs_of_a_row_and_looked_for_beyond_the_ends():
    """Two jobs of a row of synthetic evaluations, of which the second ended early."""
    env, method = "rl_lunar_lander", "c51"
    setting = returns_tables.ENVS[env]
    assert [len(c) for c in setting.chunks(100, 12)] == [10, 2]

    def row(rate, seeds, steps, returns):
        return {"env": env, "method": method, "rate": rate, "seeds": seeds, "seconds": 1.0,
                "env_steps": [1000 * k for k in range(1, steps + 1)], "returns": returns,
                "trained": (setting.steps, setting.eval_every)}  # fmt: skip

    slow = row(5e-4, [100, 101, 102], 5, [[-9, -9, 0, 250, 250]] * 3)
    first, second = row(1e-3, [100, 101], 5, [[-9, 0, 0, 250, 250]] * 2), row(1e-3, [102], 3, [[0, 250, 250]])
    assert returns_tables.gathered([slow, second], setting, method, 1e-3, returns_tables.TUNING_SEEDS) is None
    found = returns_tables.gathered([second, first], setting, method, 1e-3, returns_tables.TUNING_SEEDS)
    assert found["env_steps"][-1] == 5000 and found["returns"][2] == [0, 250, 250, 250, 250]
    assert found["seconds"] == 1 and found["milliseconds"] == pytest.approx(1000 / (13_000 / 3))  # a step of one run
    assert returns_tables.score(found, setting, 5000) == pytest.approx(
        (2000 * 2000 * 1000 * 4000 * 4000 * 2000) ** (1 / 6)
    )
    lost = row(1e-3, [100, 101, 102], 5, [[-9, 0, 0, 0, 0], [-9] * 5, [0, 250, 250, 250, 250]])
    other = {**lost, "env": "rl_cliff", "env_steps": [9000]}
    rehearsed = {**lost, "trained": (20, 10), "env_steps": [9000], "returns": [[250]] * 3}
    assert returns_tables.budget([lost, second, other, rehearsed], setting) == 5000
    assert returns_tables.gathered([rehearsed, second, first], setting, method, 1e-3, 100) == found
    assert returns_tables.score(lost, setting, 5000) == pytest.approx(
        (2000 * 10_000 * 1000 * 10_000 * 10_000 * 2000) ** (1 / 6)
    )
    fewer = row(1e-3, [100, 101], 2, [[-9, -9]] * 2)  # of another number of seeds: what was there before counts
    assert returns_tables.gathered([first, second, fewer], setting, method, 1e-3, 100) == found
    few = dataclasses.replace(setting, tuning=2)
    assert returns_tables.gathered([slow, fewer], few, method, 5e-4, 100)["returns"] == slow["returns"][:2]
    best, tried = returns_tables.best_rate([slow, first, second], setting, method)
    assert best == 1e-3 and tried == [5e-4, 1e-3]
    between, far = (row(rate, [100, 101, 102], 2, [[250, 250]] * 3) for rate in (1.5e-3, 1.0))
    kept = [slow, first, second, between, far]  # of a command with other --rates, in the same file
    assert returns_tables.best_rate(kept, setting, method) == (best, tried)
    beyond = row(4e-3, [100, 101, 102], 2, [[250, 250]] * 3)
    assert returns_tables.best_rate([*kept, beyond], setting, method) == (4e-3, [*tried, 4e-3])
    alone = dataclasses.replace(setting, rates=(5e-4, 1e-3), wider=0)
    assert returns_tables.best_rate([*kept, beyond], alone, method) == (best, tried)
    assert (
        returns_tables.beyond(best, tried, setting) == 2e-3
        and returns_tables.beyond(8e-3, [1e-3, 8e-3], setting) is None
    )
    assert returns_tables.beyond(2e-3, [1e-3, 2e-3], setting) == 4e-3
    assert returns_tables.beyond(2e-3, [1e-3, 2e-3], dataclasses.replace(setting, wider=0)) is None
    assert returns_tables.beyond(1e-3, [5e-4, 1e-3, 2e-3], setting) is None
    assert returns_tables.ratio([1.0, 1.0], [2.0, 2.0]) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_of_a_ratio_is_that_of_the_means():
    theirs = 2 + 0.5 * np.random.default_rng(1).standard_normal(50)
    for ours in (1.0, 4.0):
        value, low, high = returns_tables.ratio([ours] * 50, theirs.tolist())
        error = theirs.std() / 50**0.5 / ours
        assert value == pytest.approx(theirs.mean() / ours)
        assert [(value - low) / error, (high - value) / error] == pytest.approx([1.96, 1.96], rel=0.06)  # normal


def test_each_method_is_reported_at_the_rate_that_was_best_in_tuning(capsys):
    setting = dataclasses.replace(returns_tables.ENVS["rl_cliff"], rates=(1e-3, 2e-3, 4e-3), seeds=1, tuning=1)
    row = {"env": "rl_cliff", "seconds": 1.0, "env_steps": [500, 1000, 1500], "trained": (20_000, 500)}
    reached = {1e-3: [-200.0, -9, -9], 2e-3: [-9.0, -9, -9], 4e-3: [-200.0, -9, -9]}
    rows = [
        {**row, "method": method, "rate": rate, "seeds": [seed], "returns": [run]}
        for method in ("returns", "c51")
        for rate, run in reached.items()
        for seed in (0, 100)
    ]
    ((found, rates, these),) = returns_tables.control_table(rows, [setting])
    assert found == setting and rates == dict.fromkeys(("returns", "c51"), 2e-3) and these.keys() == rates.keys()
    assert "| rl_cliff | -100 | 0.002, 0.002 | 500, 1/1 | – | 500, 1/1 | – |" in capsys.readouterr().out
    some = [row for row in rows if (row["method"], row["rate"], row["seeds"]) != ("c51", 1e-3, [100])]
    assert not returns_tables.control_table(some, [setting])  # not by the better of those that there are
    assert "rl_cliff, C51 is not tuned: 2 of 3 rates are there (see --rates)" in capsys.readouterr().err


def test_where_no_run_gets_there_returns_at_the_end_choose_and_are_told(capsys):
    few = {"rates": (1e-3, 2e-3), "seeds": 2, "tuning": 2, "wider": 0, "steps": 20_000}
    setting = dataclasses.replace(returns_tables.ENVS["rl_asterix"], **few)
    ends = {
        ("c51", 1e-3): (1.0, 2.0),
        ("c51", 2e-3): (2.5, 3.5),
        ("returns", 1e-3): (1.5, 2.5),
        ("returns", 2e-3): (0, 1),
    }
    rows = [
        {"env": "rl_asterix", "method": method, "rate": rate, "seconds": 1.0, "seeds": [first, first + 1],
         "env_steps": list(range(8)), "trained": (20_000, 2500),
         "returns": [[0.0, 9.0, 0.0, 9.0, 0.0, 0.0, x - 0.5, x + 0.5] for x in found]}
        for (method, rate), found in ends.items()
        for first in (0, 100)
    ]  # fmt: skip
    assert returns_tables.late(rows[0]) == list(ends["c51", 1e-3])
    ((_, rates, _),) = returns_tables.control_table(rows, [setting])
    assert rates == {"c51": 2e-3, "returns": 1e-3}  # not the smallest, by whose steps nothing is told apart
    said = capsys.readouterr().out
    cells = "| 2.00 ± 0.50 | – | 3.00 ± 0.50 | – | C51 − fields 1.00 (0.00 to 2.00) |"
    assert f"| rl_asterix | return, last quarter | 0.001, 0.002 {cells}" in said
    assert "| rl_asterix | 5 | 0.001, 0.002 | 7, 0/2 | – | 7, 0/2 | – | – |" in said
    for row in rows[4:6]:  # fields at 1e-3 have ended early: what is last is not alike
        row["env_steps"], row["returns"] = row["env_steps"][:7], [run[:7] for run in row["returns"]]
    ((_, rates, _),) = returns_tables.control_table(rows, [setting])
    said = capsys.readouterr().out
    assert rates["returns"] == 1e-3 and "| rl_asterix | 5 |" in said and "last quarter" not in said


def test_tables_count_a_seed_once_and_say_the_spread_of_all(capsys):
    seeds = ((0, 1.0), (1, 3.0), (0, 99.0))  # the first run of a seed counts
    row = {
        "rewards": "discrete",
        "gamma": 0.9,
        "learner": "c51",
        "rate": 1e-3,
        "parameters": 1000,
        "trained": (20, 500),
    }
    returns_tables.evaluation_table([{**row, "seed": s, "w1": x, "mean_error": 1.0, "sd_ratio": x} for s, x in seeds])
    said = capsys.readouterr().out
    assert "| discrete | 0.9 | c51 | 0.001 | 20 | 2.000 ± 1.414 | 1.000 ± 0.000 | 2.000 ± 1.414 | 1,000 |" in said  # sd
    returns_tables.peer_table([{"name": "a", "seed": s, "windows": [10 * x, 20.0]} for s, x in seeds])
    assert "CartPole, a: 20 ± 10, 20 ± 0\n" in capsys.readouterr().out  # standard error
    rows = [{"example": "e", "way": "b", "seed": s, "numbers": {"x": x}, "trained": (40,)} for s, x in seeds]
    rows += [{**row, "trained": (20,), "numbers": {"y": 7.0}} for row in rows]  # a rehearsal of another length
    returns_tables.linear_table(rows)
    said = capsys.readouterr().out
    assert "| e, 40 steps | x | seeds |\n|---|---|---|\n| b | 2 ± 1 | 2 |" in said
    assert "| e, 20 steps | y | seeds |\n|---|---|---|\n| b | 7 ± 0 | 2 |" in said


def test_no_ratio_where_no_run_got_there():
    rows = {
        method: {"env_steps": [10, 20], "returns": [[0.0, 1.0]], "milliseconds": 1.0} for method in ("returns", "c51")
    }
    rates = dict.fromkeys(rows, 1e-3)
    assert "20, 0/1 | – | 20, 0/1 | – | – | 1.00, 1.00 |" in returns_tables.line("e", 2.0, rates, rows, 20)
    assert "| C51 / fields 1.00 (one seed) |" in returns_tables.line("e", 0.0, rates, rows, 20)
    rows = {method: {**row, "returns": row["returns"] * 2} for method, row in rows.items()}
    assert "| C51 / fields 1.00 (1.00 to 1.00) |" in returns_tables.line("e", 0.0, rates, rows, 20)


def test_every_baseline_is_compared_with_either_kind_of_fields():
    rows = {
        method: {
            "env_steps": list(range(1, 11)),
            "returns": [[0.0] * (at - 1) + [1.0] * (11 - at)],
            "milliseconds": 1.0,
        }
        for method, at in {"returns": 4, "returns_positive": 2, "c51": 6, "qr_dqn": 3}.items()
    }
    said = returns_tables.line("e", 1.0, dict.fromkeys(rows, 1e-3), rows, 10)
    ratios = {"fields": (1.5, 0.75), "positive fields": (3.0, 1.5)}
    pairs = [
        f"{name} / {ours} {a:.2f} (one seed)" for ours, its in ratios.items() for name, a in zip(("C51", "QR-DQN"), its)
    ]
    assert f"| 4, 1/1 | 2, 1/1 | 6, 1/1 | 3, 1/1 | {'; '.join(pairs)} |" in said
    ours = {method: row for method, row in rows.items() if method in returns_tables.OURS}
    assert "| – | – | – |" in returns_tables.line("e", 1.0, dict.fromkeys(ours, 1e-3), ours, 10)


def test_the_chance_of_ever_falling_is_not_discounted():
    """Every step falls with one chance in a hundred, and else stays: it falls surely."""
    outcomes = Outcomes(
        1, 1, torch.zeros(2, dtype=torch.long), torch.tensor([0.99, 0.01]), torch.tensor([0.0, -1.0]),
        torch.tensor([0.9, 0.0]), torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    assert linearity.chance(outcomes, torch.zeros(1, dtype=torch.long), -1.0, 0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("returns", "evaluate --figure a.png", "evaluate does not read --figure (night, table would): leave it out"),
        ("returns", "evaluate --smoke --only c51 --envs rl_cliff", "evaluate does not read --envs, --only (night,"),
        ("returns", "examples --jobs 3", "examples does not read --jobs"),
        ("mode_weights", "--checkpoint a --figure a.png", "leave --checkpoint out"),
        ("kernels", "--mobility 9 --seeds 2 --samples 5", "trains nothing: leave --seeds, --samples out"),
    ],
)
def test_arguments_that_are_not_read_are_refused(name, words, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


def test_a_process_that_is_killed_is_one_sentence():
    """Not a wait without an end."""
    with pytest.raises(UserError, match="a process of this benchmark was killed"), common.workers(2) as do:
        list(do(os._exit, [9, 9]))
    with common.workers(2) as do:
        assert sorted(do(abs, [-1, -2])) == [1, 2]
