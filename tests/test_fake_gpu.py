"""Training losses and samplers of the GPU configs on fake CUDA tensors: a wrong device fails without a card.

Fake tensors have shapes and devices and no numbers, so that reading a number of the device back, which would make the
host wait for it, fails too.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from bd_lightning import dynamics
from bd_lightning.kernels import ClosedFormSlices, leave_one_out
from bd_lightning.networks import dual
from datamodules import Digits, splits
from datamodules.images import ByteImages
from gpu_steps import CASES, built, step_and_sample


def on_a_fake_gpu(module: nn.Module) -> nn.Module:
    """The module with fake parameters and buffers in place of its own; called inside a `FakeTensorMode`."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    own[name] = nn.Parameter(fake, tensor.requires_grad) if own is part._parameters else fake
    return module


def real(function, *args):
    """Real numbers, of what is computed on the CPU by design."""
    with unset_fake_temporarily():
        return function(*args)


@pytest.mark.parametrize("words", CASES, ids=lambda words: " ".join(words.split(" ")[:2]))
def test_a_step_and_the_samplers_stay_on_the_device(words, monkeypatch):
    for name in ("descent.geometric_ladder", "langevin.geometric_ladder", "descent.edm_grid"):
        module, function = name.split(".")
        whole = getattr(getattr(dynamics, module), function)
        monkeypatch.setattr(f"bd_lightning.dynamics.{name}", lambda *args, whole=whole: real(whole, *args))
    module, shape, config = built([word.replace("~", " ") for word in words.split(" ")])
    with FakeTensorMode():
        on_a_fake_gpu(module)
        step_and_sample(module, shape, config, "cuda")


def test_a_step_of_relative_densities_reads_nothing_back():
    module, shape, _ = built(["model=relative", "model.network.width=16"])
    with FakeTensorMode():
        on_a_fake_gpu(module)
        x, label = torch.empty(8, *shape, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
        values, _ = module.train().compute((x, label), None)
        assert values["loss"].device.type == "cuda"


def test_a_tensor_that_stayed_behind_is_noticed():
    module, shape, _ = built(["model=mlp"])
    with FakeTensorMode():
        on_a_fake_gpu(module)
        module.fields.network.embed.frequencies = torch.empty(32)
        with pytest.raises(RuntimeError, match="found two different devices|on different devices|same device"):
            module.compute((torch.empty(8, *shape, device="cuda"), torch.zeros(8, device="cuda").long()), None)


def test_attention_is_one_kernel_on_a_gpu_and_differentiable_in_forward_mode(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 25, 8).unbind(0)
    theirs = nn.functional.scaled_dot_product_attention(*(one.transpose(-1, -2) for one in (q, k, v)))
    torch.testing.assert_close(dual.attention(q, k, v), theirs.transpose(-1, -2))
    fused = mock.Mock(wraps=nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused)
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 4, 25, 8, device="cuda").unbind(0)
        with forward_ad.dual_level():
            dual.attention(forward_ad.make_dual(q, torch.empty_like(q)), k, v)
        assert not fused.called
        assert dual.attention(q, k, v).shape == q.shape and fused.called


def test_distances_are_in_single_precision_under_tf32():
    seen = []

    class Watched(ClosedFormSlices):
        def log(self, r2, variance, dim):
            seen.append(torch.get_float32_matmul_precision())
            return super().log(r2, variance, dim)

    x, sigma = torch.randn(4, 3), torch.ones(4)
    torch.set_float32_matmul_precision("medium")
    try:
        Watched()(x, x, sigma, leave_one_out(4))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_batches_are_made_on_the_device_from_bytes(tmp_path, monkeypatch):
    """The bytes go there once; of a step, places and the mirrored rows do."""
    monkeypatch.setattr(splits, "free_memory", lambda device: 6 * 192 * 20)  # a fifth is 1.2 splits
    data = Digits(root=str(tmp_path), batch_size=64, num_workers=2, pin_memory=True, flip=True)
    data.splits["train"] = ByteImages(data.load_split("train").x[:20, :1].expand(-1, 3, -1, -1).clone())
    data.batch_size = 4
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("meta")), world_size=1, global_rank=0, training=True,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)),
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0))),
        ),
    )  # fmt: skip
    loader = data.train_dataloader()
    assert loader.num_workers == 0 and not loader.pin_memory
    assert data.split("train").x.device.type == "meta" and data.split("train").x.dtype == torch.uint8
    for batch in (next(iter(loader)), data.on_before_batch_transfer(next(iter(loader)), 0)):
        assert [one.device.type for one in batch] == ["meta", "meta"] and batch[0].dtype == torch.float32
    monkeypatch.setattr(splits, "free_memory", lambda device: 4 * 192 * 20)  # too little
    data.splits["train"] = ByteImages(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    loader = data.train_dataloader()
    assert loader.num_workers == 2 and loader.pin_memory and data.split("train").x.device.type == "cpu"
