"""Augmented images, and what the network is told of them."""

import math

import pytest
import torch

import train
from bd_lightning.augmentation import Geometric
from bd_lightning.dynamics import ProbabilityFlow
from bd_lightning.kernels import ClosedFormSlices
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP, UNet
from bd_lightning.objectives import FieldDivergence, NoiseLevels
from small_run import WORDS


def rotation(angle):
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def forward_map(told, of):
    """What was done, of what was told alone: x ↦ A x + b, in half widths, step by step."""
    flip_x, flip_y, scaled, cos, sin, stretch_x, stretch_y, *shift = told.tolist()
    flips = torch.diag(torch.tensor([1 - 2 * flip_x, 1 - 2 * flip_y]))
    scale = torch.eye(2) * 2 ** (of.scale * scaled)
    turn = rotation(math.atan2(sin, cos + 1))
    axis = rotation(math.atan2(stretch_y, stretch_x) / 2)
    wide = 2 ** (of.scale * math.hypot(stretch_x, stretch_y))
    stretch = axis @ torch.diag(torch.tensor([wide, 1 / wide])) @ axis.T
    return stretch @ turn @ scale @ flips, 2 * of.shift * torch.tensor(shift)


def test_what_is_told_decides_what_was_done():
    """Otherwise the fields are those of a mixture of two augmentations, and samples leak them."""
    of = Geometric(p=0.7)
    matrices, told = of.transforms(200, generator=torch.Generator().manual_seed(0))
    for matrix, vector in zip(matrices, told):
        a, b = forward_map(vector, of)
        torch.testing.assert_close(matrix[:, :2] @ a, torch.eye(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(matrix[:, :2] @ b + matrix[:, 2], torch.zeros(2), atol=1e-5, rtol=0)
    assert ((told[:, 5:7] != 0).any(1)).float().mean() == pytest.approx(0.7, abs=0.1)
    assert (told[:, 0] != 0).float().mean() == pytest.approx(0.35, abs=0.1)


def test_images_that_nothing_was_done_to_are_left_bit_for_bit():
    x = torch.rand(64, 3, 9, 12) * 2 - 1
    same, told = Geometric(p=0.0)(x)
    assert torch.equal(same, x) and not told.any() and told.shape == (64, 9)
    changed, told = Geometric(p=0.2)(x, torch.Generator().manual_seed(0))
    left = (told == 0).all(1)
    assert 5 < left.sum() < 35 and torch.equal(changed[left], x[left])
    assert (changed[~left] != x[~left]).flatten(1).any(1).all() and changed.abs().max() <= 1
    again, _ = Geometric(p=0.2)(x, torch.Generator().manual_seed(0))
    assert torch.equal(again, changed)


def test_places_are_not_rounded_in_half_precision():
    x = torch.rand(32, 3, 64, 64) * 2 - 1
    plain, _ = Geometric(p=0.9)(x, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = Geometric(p=0.9)(x, torch.Generator().manual_seed(0))
    assert torch.equal(half, plain)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_a_flip_and_a_shift_are_those_of_the_pixels(size, monkeypatch):
    x, of = torch.rand(1, 1, *size) * 2 - 1, Geometric(shift=1.0)
    pixel = 2 / size[1]  # in half widths
    for matrix, expected in (
        ([[-1.0, 0, 0], [0, 1, 0]], x.flip(-1)),
        ([[1.0, 0, -pixel], [0, 1, 0]], torch.cat([x[..., :1], x[..., :-1]], -1)),
        ([[1.0, 0, 0], [0, 1, -pixel]], torch.cat([x[..., :1, :], x[..., :-1, :]], -2)),
    ):
        monkeypatch.setattr(Geometric, "transforms", lambda *_, m=matrix: (torch.tensor([m]), torch.ones(1, 9)))
        torch.testing.assert_close(of(x)[0][..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


def model(network, **options):
    return BellmanDiffusion(
        network, ClosedFormSlices(), (1, 8, 8), 10, 0.75, {"ode": ProbabilityFlow(steps=3)}, **options
    )


@pytest.mark.parametrize("trace", ["stein", "combined", "hutchinson"])
def test_the_network_is_told_in_training_and_draws_at_zeros(trace):
    torch.manual_seed(0)
    network = UNet((1, 8, 8), channels=[16], told=9)
    noise = NoiseLevels(antithetic=0.5, stratified=True)
    module = model(network, augment=Geometric(p=0.9), objective=FieldDivergence(trace=trace), noise=noise)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, level = torch.rand(24, 1, 8, 8) * 2 - 1, torch.ones(24)
    seen = []
    hook = network.embed.told.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    losses = module.losses(x, generator=torch.Generator().manual_seed(0))
    told = torch.cat(seen)
    assert len(told) == 24 and (told != 0).any(1).float().mean() > 0.9
    losses.total.backward()
    assert network.embed.told.weight.grad.abs().sum() > 0
    seen.clear()
    module.eval()
    module.losses(x, generator=torch.Generator().manual_seed(0))
    module.sample(range(3), "ode", seed=0)
    assert seen and not any(one.any() for one in seen)
    hook.remove()
    fields = module.fields
    assert torch.equal(fields.outputs(x, level)[0], fields.outputs(x, level, None, torch.zeros(24, 9))[0])
    assert not torch.equal(fields.outputs(x, level)[0], fields.outputs(x, level, None, torch.ones(24, 9))[0])


def test_antithetic_pairs_are_told_the_same():
    network = UNet((1, 8, 8), channels=[8], told=9)
    module = model(network, augment=Geometric(p=0.9), noise=NoiseLevels(antithetic=10.0, stratified=True))
    seen = []
    network.embed.told.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.losses(torch.rand(16, 1, 8, 8) * 2 - 1)
    assert torch.equal(seen[0][0:14:2], seen[0][1:14:2]) and not torch.equal(seen[0][0], seen[0][2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model(UNet((1, 8, 8), channels=[8]), augment=Geometric()), r"augment tells the networks 9 numbers"),
        (lambda: model(MLP((1, 8, 8)), augment=Geometric()), r"set network.told \(of networks.UNet"),
        (
            lambda: model(UNet((1, 8, 8), channels=[8], told=9)),
            "augment tells the networks 0 numbers, and one",
        ),
        (lambda: UNet((1, 8, 8), told=-1), "told must"),
        (lambda: Geometric(p=1.5), "p must lie between 0 and 1"),
        (lambda: Geometric(scale=0.0), "scale must be positive"),
        (lambda: Geometric(scale=1e30), "scale must lie between 0 and 10"),
        (lambda: Geometric(shift=1e30), "shift must lie between 0 and 10"),
        (lambda: Geometric()(torch.zeros(4, 32)), "an augmentation of images was given data of shape"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_takes_it_from_the_command_line(tmp_path):
    words = [word for word in WORDS if not word.startswith(("model=", "model.network"))]
    words += ["model=unet", "model.network.channels=[8]", "model.network.told=9"]
    words += ["model.augment._target_=bd_lightning.augmentation.Geometric", "model.augment.p=0.5"]
    assert train.main([*words, f"root={tmp_path}", f"data.root={tmp_path}", "run_id=one"]) == 0
    checkpoint = tmp_path / "bellman-diffusion" / "one" / "checkpoints" / "last.ckpt"
    assert train.main(["predict", f"ckpt_path={checkpoint}", "n=2", "callbacks.progress=null"]) == 0
