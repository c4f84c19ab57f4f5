"""Learners of returns: their networks, policies and values."""

import numpy as np
import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.modules import FreeReturnLearner, ReturnLearner
from bd_lightning.modules.base import told
from bd_lightning.returns import (
    Categorical,
    FieldNetworks,
    Flat,
    GaussianFields,
    MeanReturn,
    UpperQuantile,
    normal_cdf,
)

pytest.importorskip("gymnasium", reason="gymnasium is not installed: uv sync --group rl")

from datamodules.experience import Experience
from tests.corridor import Corridor


def test_experience_is_collected_by_exploration_and_evaluation_is_by_preference():
    """Two actions of one state: the mean prefers the second, a high quantile the first."""
    rep = GaussianFields(-4, 6, nodes=80)
    model = ReturnLearner((1,), 2, rep, exploration=UpperQuantile(0.9))
    y = torch.stack([normal_cdf((rep.points - m) / sd) - rep.start for m, sd in ((0.8, 2.0), (1.2, 0.5))])[None]
    model.outputs = lambda network, observation: y
    seen = np.ones((1, 1), dtype=np.float32)
    assert model.greedy(seen).tolist() == [1] and model.explore(seen).tolist() == [0]


@pytest.mark.parametrize(
    ("cls", "representation"),
    [(ReturnLearner, Categorical(0, 2)), (FreeReturnLearner, GaussianFields(0, 2, learn="density"))],
)
def test_networks_are_built_once(cls, representation, monkeypatch):
    """The target network is a copy, and nothing else draws initial weights."""
    drawn, draw = [], torch.nn.Linear.reset_parameters
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: drawn.append(draw(layer)))
    model = cls((4,), 2, representation, hidden=[8])
    assert len(drawn) == sum(isinstance(layer, torch.nn.Linear) for layer in model.network.modules())


def test_names_of_parameters_stay():
    """A state of the first version, given by the names and shapes that it had, is loaded."""
    names = [f"network.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")]
    model = ReturnLearner((16,), 4, GaussianFields(0, 1), hidden=[8])
    assert list(model.state_dict()) == ["probes", *names, *(f"target_{name}" for name in names)]
    shapes = {
        "network.0.weight": (8, 16),
        "network.0.bias": (8,),
        "network.2.weight": (204, 8),
        "network.2.bias": (204,),
    }
    stored = {f"{which}{name}": torch.full(shape, 0.5) for which in ("", "target_") for name, shape in shapes.items()}
    checkpoint = {"global_step": 20, "state_dict": {"probes": torch.eye(16)[:4], **stored}}
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    assert model.probes.shape == (4, 16) and bool((model.network[2].weight == 0.5).all()) and model.loaded_step == 20
    parts = [f"state.{k}.0" for k in (0, 1)] + [f"{part}.{k}" for part in ("place", "out") for k in (0, 1)]
    names = [f"network.{part}.{what}" for part in parts for what in ("weight", "bias")]
    free = FreeReturnLearner((16,), 4, GaussianFields(0, 1, learn="density"), hidden=[8])
    assert list(free.state_dict()) == ["probes", *names, *(f"target_{name}" for name in names)]


def test_policy_evaluation_of_the_uniform_policy():
    """uniform_policy=1: values of a learner are those of the uniform policy in a corridor, solved by hand."""
    torch.manual_seed(0)
    stream = Experience(Corridor(), (4,), gamma=0.5, size=100, warmup=90, batch_size=32)
    stream.fill()
    free = GaussianFields(0, 2, learn="density", positive=True)
    for cls, representation in (
        (ReturnLearner, GaussianFields(0, 2)),
        (ReturnLearner, Categorical(0, 2)),
        (FreeReturnLearner, free),
    ):
        model = cls((4,), 2, representation, hidden=[32, 32], uniform_policy=1.0)
        optimizer = torch.optim.Adam(model.network.parameters(), 5e-3)
        for k in range(300):
            loss = model.compute(stream.draw(), None)[0]["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if k % 10 == 0:
                model.target_network.load_state_dict(model.network.state_dict())
        with torch.no_grad():
            values = model.values(torch.eye(4)[:3])
        assert values.flatten().tolist() == pytest.approx([1.75, 1.75, 1.5, 1.5, 1.0, 1.0], abs=0.08)


def free_learner(positive=False, **options):
    """Networks in x with weights of their own, and a batch of transitions that do not end."""
    torch.manual_seed(0)
    model = FreeReturnLearner((4,), 2, GaussianFields(0, 2, learn="density", positive=positive), hidden=[8], **options)
    for p in model.network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.target_network.load_state_dict(model.network.state_dict())
    batch = (torch.eye(4)[:2], torch.tensor([0, 1]), torch.ones(2), torch.full((2,), 0.5), torch.eye(4)[1:3])
    return model, batch


def test_networks_in_x_are_zero_outside_their_range():
    network = FieldNetworks(4, 2, [8], low=-1.0, high=3.0)
    s, g = network(torch.randn(5, 4), torch.tensor([-1.1, -0.9, 2.9, 3.1]))
    for field in (s, g):
        assert field.shape == (5, 4, 2) and not field[:, [0, 3]].any() and field[:, 1:3].all()


def test_the_error_of_g_has_its_weight():
    for weight in (0.0, 0.7):
        model, batch = free_learner(gradient_weight=weight)
        losses, _ = model.compute(batch, torch.Generator().manual_seed(1))
        assert losses["loss_gradient"] > 0
        torch.testing.assert_close(losses["loss"], losses["loss_scalar"] + weight * losses["loss_gradient"])


@pytest.mark.parametrize("positive", [False, True])
def test_targets_of_positive_densities_have_mass_one(positive):
    """A target network whose densities all have three times the mass teaches the same."""
    model, batch = free_learner(positive)
    fields, losses = model.target_network.forward, []

    def scaled(mass):
        def forward(*inputs):
            s, g = fields(*inputs)
            return mass * s.abs(), mass * g

        return forward

    for mass in (1.0, 3.0):
        model.target_network.forward = scaled(mass)
        losses.append(model.compute(batch, torch.Generator().manual_seed(1))[0]["loss"])
    assert torch.allclose(*losses, rtol=1e-4) == positive


def test_sde_of_categorical_returns_is_refused():
    model = ReturnLearner((4,), 2, Categorical(0, 1), sampler="sde")
    with pytest.raises(UserError, match="the sde needs fields"):
        model.sample(model.weights(torch.zeros(1, 4))[0], range(3))


def test_mistakes_in_preferences_and_features_of_ones_own_are_one_sentence():
    class Whole(MeanReturn):
        def __call__(self, representation, w):
            return w

    class Lost(MeanReturn):
        def __call__(self, representation, w):
            return representation.mean(w) * torch.nan

    class Endless(MeanReturn):
        def __call__(self, representation, w):
            return representation.mean(w) / 0

    class Masked(MeanReturn):
        def __call__(self, representation, w):
            return representation.mean(w).index_fill(1, torch.tensor([0, 2]), -torch.inf)

    seen = np.zeros((3, 16), np.float32)
    for preference, sentence in ((Whole(), r"scores of the shape \[3, 4, 52\], not one of each action, \[3, 4\]"),
                                 (Lost(), "Lost gives scores that are no numbers"),
                                 (Endless(), "Endless gives scores that are no numbers")):  # fmt: skip
        model = ReturnLearner((16,), 4, GaussianFields(0, 1), preference=preference)
        with pytest.raises(UserError, match=sentence):
            model.greedy(seen)
    chosen = ReturnLearner((16,), 4, GaussianFields(0, 1), preference=Masked()).greedy(seen)
    assert set(chosen.tolist()) <= {1, 3}  # actions may be left out

    class Short(Flat):
        def __call__(self, shape):
            return [torch.nn.Linear(16, 7)], 9

    with pytest.raises(ValueError, match=r"Short says 9 features, and its layers give \[7\]"):
        ReturnLearner((16,), 4, GaussianFields(0, 1), features=Short())


class Own(Categorical):
    """With a part that is left out, cut, or not summed."""

    def __init__(self, v_min=0.0, v_max=1.0, wrong="", gives=None):
        super().__init__(v_min, v_max, 5)
        if wrong == "outputs":
            del self.outputs
        elif wrong:
            part = getattr(super(), wrong)
            setattr(self, wrong, lambda *arguments: gives(part(*arguments)))


def test_representations_of_ones_own_are_tried_before_training():
    ReturnLearner((3,), 2, Own())
    cut, whole = (lambda found: found[..., 1:]), (lambda found: found.mean())
    for wrong, gives, sentence in (
        ("outputs", None, "Own has no 'outputs': its __init__ has to set outputs, x and spacing"),
        ("read", cut, r"Own.read gives the shape \[2, 4\] where \[2, 5\] is needed"),
        ("loss", whole, r"Own.loss gives the shape \[\] where \[2\] is needed"),
        ("loss", lambda found: found[:, None], r"Own.loss gives the shape \[2, 1\] where \[2\]"),
        ("mean", whole, r"Own.mean gives the shape \[\]"),
        ("mixture", cut, r"Own.mixture gives the shape \[2, 4\]"),
        ("target", cut, r"Own.target gives the shape \[2, 4\]"),
        ("cdf", cut, r"Own.cdf gives the shape"),
        ("outside", whole, r"Own.outside gives the shape"),
    ):
        with pytest.raises(UserError, match=sentence):
            ReturnLearner((3,), 2, Own(wrong=wrong, gives=gives))


def test_what_is_told_of_an_object_is_not_its_address():
    class Mine:
        pass

    assert told(Mine()) == "Mine" and told(MeanReturn()) == "MeanReturn()"
