"""Optimisers as choices of a config: `model.optimizer: {_target_: bd_lightning.optimizers.Muon}`.

A choice is a small frozen class that makes the optimiser of a module's parameters, `optimizer(module, lr)`. The rate,
its warm-up and decay, and clipping stay with the module and the trainer, the same for all.

References:
    | Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101
    | Jordan et al., Muon, 2024; Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982 (rates as AdamW's)
    | Defazio et al., The Road Less Scheduled, arXiv 2405.15682
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bd_lightning.checks import in_range, positive
from bd_lightning.networks.base import Network

FUSED = ("cuda",)
"""Kinds of devices on which AdamW is one kernel."""


def _rates(**values: float) -> None:
    """Refuse decay rates outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, and below 1, got {value}")


@dataclass(frozen=True)
class Optimizer(ABC):
    """Base of the choices.

    Args:
        betas: decay rates of the moments of the gradient, as in Adam.
        weight_decay: decoupled weight decay, per unit of the rate.

    Attributes:
        decays: whether the rate is meant to decay over the run.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    decays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _rates(**{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        in_range(0, 1e6, weight_decay=self.weight_decay)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))  # torch refuses integers

    def unless(self, optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
        """Have the optimiser leave its next step out, weights and moments alike, if `bad`, a truth value, is true.

        Without a way to say so on the device, as here, this waits for it.
        """
        if bad:
            optimizer.zero_grad()  # it passes over parameters without a gradient

    @abstractmethod
    def __call__(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimiser of a module's parameters at a rate.

        Raises:
            ValueError: if it cannot train this module, or a package that it needs is missing.
        """

    def averaged(self, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor] | None:
        """The average of each parameter that the optimiser itself asks to be judged by; None if it has none."""
        return None


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay, torch's; in one kernel on CUDA."""

    def __call__(self, module, lr):
        fused = any(p.device.type in FUSED for p in module.parameters()) or None
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=lr, betas=self.betas, weight_decay=self.weight_decay, fused=fused
        )
        _guard(optimizer)
        if fused:  # it offers to unscale float16's gradients by itself, and Lightning would refuse to clip them before
            optimizer._step_supports_amp_scaling = False
        return optimizer

    def unless(self, optimizer, bad):
        if optimizer.param_groups[0]["fused"]:
            optimizer.found_inf = bad.float()  # read by the kernel itself
        else:
            super().unless(optimizer, bad)


COUNTED = ("lr", "initial_lr", "params", "k", "lr_max", "weight_sum", "scheduled_lr", "train_mode")
"""What a group of an optimiser's state says of how far it has come; all else is what the config says."""


def _guard(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser take over from a state what it counts and its moments alone, and only if they are sound."""
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    optimizer.register_load_state_dict_post_hook(_refuse_damaged)


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state with the optimiser's own settings: its config's, and the kernel of the device that it is on."""
    groups = [
        group | {name: value for name, value in own.items() if name not in COUNTED}
        for group, own in zip(state["param_groups"], optimizer.param_groups)
    ]
    return state | {"param_groups": groups}


def _refuse_damaged(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that counts what cannot be, or whose moments are not finite or not of the shapes of the weights.

    Raises:
        ValueError: naming the first.
    """
    for group in optimizer.param_groups:
        for name, value in group.items():
            sound = value is True if name == "train_mode" else name not in COUNTED or name == "params" or _counts(value)
            if not sound:
                raise ValueError(f"{name} of the optimiser is {value!r}")
    states = {p: state for p, state in optimizer.state.items() if state}  # schedulefree's is empty without a gradient
    kinds = [sorted(map(str, state)) for state in states.values()]
    for (p, state), kind in zip(states.items(), kinds):
        if kind != kinds[0]:
            raise ValueError(f"some weights have {', '.join(kinds[0])} and some {', '.join(kind)}")
        for name, value in state.items():
            if name == "step":
                if not _counts(value):
                    raise ValueError(f"weights of the shape {list(p.shape)} have had {value} steps")
            elif not isinstance(value, Tensor) or value.shape != p.shape:
                shape = f"the shape {list(value.shape)}" if isinstance(value, Tensor) else f"the value {value!r}"
                raise ValueError(f"{name} of weights of the shape {list(p.shape)} has {shape}")
            elif not value.isfinite().all() or name == "exp_avg_sq" and (value < 0).any():
                raise ValueError(f"{name} of weights of the shape {list(p.shape)} is not finite, or below zero")


def _counts(value: Any) -> bool:
    """Whether a value is one number, finite and not below zero."""
    if isinstance(value, Tensor):
        number = value.numel() == 1 and value.dtype in (torch.float32, torch.float64, torch.int32, torch.int64)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= float(value) < math.inf


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the matrices between a network's first layer and its heads, AdamW for all else.

    Convolutions are flattened to (out, in · height · width). Steps of matrices are scaled to the size of AdamW's
    (arXiv 2502.16982), so that one rate serves both.

    Args:
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay of all parameters.
        momentum: decay rate of Muon's momentum.
    """

    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        _rates(momentum=self.momentum)

    def __call__(self, module, lr):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon needs torch 2.9 or later, this is {torch.__version__}: take optimizers.AdamW")
        matrices = [p for part in module.modules() if isinstance(part, Network) for p in part.matrices()]
        if not matrices:
            raise ValueError(
                "Muon trains the matrices between a network's first layer and its heads, and this model has none: take "
                "bd_lightning.optimizers.AdamW"
            )
        chosen = set(matrices)
        others = [p for p in module.parameters() if p not in chosen]
        return _MuonAndAdamW(matrices, others, lr, self)

    def unless(self, optimizer, bad):
        if not optimizer.leave_out(bad):
            super().unless(optimizer, bad)


class _MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon on flattened views of some parameters and torch's AdamW on others, as one optimiser."""

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float, of: Muon) -> None:
        self.views = [nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                self.views, lr, of.weight_decay, of.momentum, adjust_lr_fn="match_rms_adamw"
            ),
            AdamW(of.betas, of.weight_decay)(nn.ParameterList(others), lr),
        ]  # fmt: skip
        _guard(self.parts[0])
        self.bad: Tensor | None = None
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], {"lr": lr})

    def leave_out(self, bad: Tensor) -> bool:
        """Leave the next step out if `bad` is true, without waiting for it; False where AdamW's kernel cannot."""
        if not self.parts[1].param_groups[0]["fused"]:
            return False
        self.bad = self.parts[1].found_inf = bad.float()  # type: ignore[attr-defined]
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self.parts, self.param_groups):
            part.param_groups[0]["lr"] = group["lr"]
        matrices = self.param_groups[0]["params"]
        for view, p in zip(self.views, matrices):
            view.data = p.detach().flatten(1)
            view.grad = None if p.grad is None else p.grad.flatten(1)
        muon, adamw = self.parts
        with self._kept():
            muon.step()
        adamw.step()
        for view, p in zip(self.views, matrices):
            if view.data_ptr() != p.data_ptr():  # channels-last weights were copied
                p.copy_(view.view(p.shape))
        return loss

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Take back on the device what Muon does to its weights and moments, if this step is one to leave out."""
        if self.bad is None:
            yield
            return
        bad = self.bad > 0
        for view in self.views:
            if view.grad is not None:
                view.grad = view.grad.masked_fill(bad, 0.0)  # a buffer that is not there yet begins with zeros
        tensors = [view.data for view in self.views]
        tensors += [state["momentum_buffer"] for state in self.parts[0].state.values()]
        before = [tensor.clone() for tensor in tensors]
        yield
        for tensor, old in zip(tensors, before):
            tensor.copy_(torch.where(bad, old, tensor))

    def state_dict(self) -> dict[str, Any]:
        rates = [{"lr": group["lr"], "initial_lr": group.get("initial_lr", group["lr"])} for group in self.param_groups]
        return {"state": {}, "param_groups": rates, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Any) -> None:
        for group, rates in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: rates[name] for name in ("lr", "initial_lr")})
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        _refuse_damaged(self)


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """AdamW with averaging in place of a decaying rate, of the package schedulefree.

    What is judged, shown and sampled is its own average, in place of the exponential one of `callbacks.ema`.

    Args:
        betas: weight of the average in the point where gradients are taken, and decay rate of the second moment.
        weight_decay: decoupled weight decay.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    decays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(**{"betas[0]": self.betas[0]})

    def __call__(self, module, lr):
        try:
            import schedulefree
        except ImportError as error:
            raise ValueError("ScheduleFree needs the package schedulefree: uv sync --group optimizers") from error
        optimizer = schedulefree.AdamWScheduleFree(
            module.parameters(), lr=lr, betas=self.betas, weight_decay=self.weight_decay
        )
        optimizer.train()
        _guard(optimizer)
        return optimizer

    def unless(self, optimizer, bad):
        super().unless(optimizer, bad)
        if not bad:
            return
        counted = [{key: group[key] for key in ("k", "lr_max", "weight_sum")} for group in optimizer.param_groups]

        def uncount(*_: Any) -> None:
            handle.remove()
            for group, before in zip(optimizer.param_groups, counted):
                group.update(before)

        handle = optimizer.register_step_post_hook(uncount)  # its average counts steps, with gradients or without

    def averaged(self, optimizer):
        end = 1 - 1 / optimizer.param_groups[0]["betas"][0]
        return {p: p.detach().lerp(state["z"], end) for p, state in optimizer.state.items() if "z" in state}
