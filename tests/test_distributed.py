"""Two processes do what one does with the batches of both."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from joined_step import gradient

ONE = "model=mlp model.network.width=16 model.network.depth=1 model.network.dropout=0"
SETTINGS = {
    "denoising": ONE,
    "divergence": f"{ONE} model.estimator=divergence model.kernel.epsilon=0.5",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_of_two_ranks_is_the_step_of_the_joined_batch(setting, tmp_path):
    words = SETTINGS[setting].split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/joined_step.py"]
    files = [str(tmp_path / name) for name in ("store", "gradients")]
    workers = [
        subprocess.Popen([*command, str(rank), *files, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, text = worker.communicate(timeout=200)
        assert worker.returncode == 0, text.decode()
    two = torch.load(files[1], weights_only=True)
    joined = gradient(words, 0, 1)
    scale = joined.norm()
    assert scale > 0 and (two[True] - joined).norm() / scale < 1e-5
    assert (two[False] - joined).norm() / scale > 1e-3  # without gathering the ranks' estimates are their own
