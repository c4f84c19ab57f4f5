"""Shared fixtures: real data where it lies beside the checkout, runs that are trained once and used by many tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import train
from small_run import WORDS

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is set, each process that a test starts compiled torch anew
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No W&B key, login or run of the machine may reach a test, and no test may leak into the next."""
    os.environ.pop("WANDB_SERVICE", None)  # for good: put back, it may name a process that the test has ended
    for name in list(os.environ):
        if name.startswith(("WANDB_", "BD_", "TORCHELASTIC_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    torch.manual_seed(0)
    yield
    os.environ.pop("BD_RUN_ID", None)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory) -> Path:
    """A folder with the real MNIST and CIFAR-10."""
    unpack = SHARED / "unpack"
    if not unpack.is_file():
        pytest.skip("the real MNIST and CIFAR-10 files are not beside this checkout")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([unpack, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of 4 steps."""
    root = tmp_path_factory.mktemp("runs")
    assert train.main([*WORDS, f"root={root}", f"data.root={root / 'data'}", "run_id=one"]) == 0
    return root / "bellman-diffusion" / "one"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, in a root of its own."""
    return Path(shutil.copytree(trained, tmp_path / "root" / "bellman-diffusion" / "one"))
