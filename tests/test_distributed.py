"""Two processes do what one does with the batches of both."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from bd_lightning.cli import objects
from bd_lightning.cli.build import instantiate
from bd_lightning.cli.config import compose, parse
from conftest import ROOT
from datamodules import Digits
from datamodules.splits import DataError, ShuffledShare
from joined_step import FACTS, gradient

ONE = "model=mlp model.network.width=16 model.network.depth=1 model.network.dropout=0"
SETTINGS = [ONE, f"{ONE} model.objective.trace=hutchinson model.kernel.epsilon=0.5"]


def test_a_step_of_two_ranks_is_the_step_of_the_joined_batch(tmp_path):
    """With the trace by Stein and probed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    files = [str(tmp_path / name) for name in ("store", "gradients")]
    workers = [
        subprocess.Popen(
            [sys.executable, "tests/joined_step.py", str(rank), *files, *SETTINGS],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, text = worker.communicate(timeout=300)
        assert worker.returncode == 0, text.decode()
    for words, (shared, own) in zip(SETTINGS, torch.load(files[1], weights_only=True)):
        joined = gradient(words.split(), 0, 1)
        scale = joined.norm()
        assert scale > 0 and (shared - joined).norm() / scale < 1e-5
        assert (own - joined).norm() / scale > 1e-3  # without gathering the ranks' estimates are their own


def test_a_rate_does_not_follow_a_batch_that_stays(tmp_path, capsys):
    words = [*ONE.split(), "logger=none", "data.total_batch_size=64", "model.lr_scaling=sqrt", f"root={tmp_path}"]
    assert train.main([*words, f"data.root={tmp_path}"]) == 2
    assert "'model.lr_scaling' sqrt follows the number of batches" in capsys.readouterr().err


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 6**0.5), ("linear", 6)])
def test_the_learning_rate_follows_the_effective_batch(scaling, factor):
    words = [
        *ONE.split(),
        "model.lr=0.01",
        "model.lr_decay=none",
        "model.warmup_steps=0",
        f"model.lr_scaling={scaling}",
    ]
    module = instantiate(compose(parse(words))["model"], "model", FACTS)
    module._trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3)  # Lightning's setter wants its own kind
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    assert group["lr"] == pytest.approx(0.01 * factor)


def test_ranks_share_the_batches_of_one_process():
    """Batch k of two ranks together is batch k of one process with the joined batch, from any place in the epoch."""
    data = list(range(103))

    def batches(world, rank, size, seen=0):
        sampler = ShuffledShare(data, world, rank, lambda: seen, 1)
        sampler.set_epoch(3)
        order = list(sampler)
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]

    joined, shares = batches(1, 0, 10), [batches(2, rank, 5) for rank in range(2)]
    assert len(joined) == len(shares[0]) == 10
    assert [set(batch) for batch in joined] == [set(a) | set(b) for a, b in zip(*shares)]
    assert batches(2, 1, 5, seen=35) == shares[1][7:]


def test_the_effective_batch_is_shared_out(tmp_path, capsys):
    data = Digits(root=str(tmp_path), batch_size=16, total_batch_size=96)
    data.share(6)
    assert data.batch_size == 16 and data.total_batch_size == 96
    data.share(2)
    assert data.batch_size == 48
    for parts in (5, 96):
        with pytest.raises(DataError, match=f"total_batch_size 96 cannot be cut into {parts} equal batches"):
            data.share(parts)
    words = [
        *ONE.split(),
        "trainer=cpu",
        "trainer.accumulate_grad_batches=7",
        "data.total_batch_size=100",
        "logger=none",
    ]
    words += ["callbacks.metrics=null", "callbacks.best=null", f"root={tmp_path}", f"data.root={tmp_path}"]
    assert train.main(words) == 2
    assert "data.total_batch_size 100 cannot be cut into 7 equal batches" in capsys.readouterr().err


def test_no_more_processes_than_cores(capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4))
    for words in (["trainer.accelerator=cpu", "trainer.devices=100"], ["trainer=cpu", "trainer.devices='5'"]):
        assert train.main([*words, "logger=none"]) == 2
        said = capsys.readouterr().err
        assert "a process each, and this machine has 4 cores: set trainer.devices to 4 or less" in said
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1))
    objects._refuse_processes({"devices": 2}, True)  # trainer=ddp_cpu, on the smallest machine
    objects._refuse_processes({"devices": 8}, False)
