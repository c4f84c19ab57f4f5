"""Networks of other people as trunks: any module that maps (x, noise) to x, with a small scalar head beside it."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from bd_lightning.checks import positive
from bd_lightning.networks.base import Network
from bd_lightning.networks.dual import Linear, modulate
from bd_lightning.networks.embedding import ConditionEmbedding, zero_init


class Gain(nn.Module):
    """One learned factor, which begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The factor times x, the same shape."""
        return self.weight * x


class Adapted(Network):
    """A module that maps (x, noise), or (x, noise, label), to the shape of x, as a trunk.

    F is the module's output times one learned factor; a comes from a layer that sees x and that output.

    Args:
        shape: shape of one sample, from the data module.
        module: the module. Its x (B, *shape) has standard deviation 1, its noise is noise_scale · ¼ ln σ, (B,).
        num_classes: number of classes of the data.
        conditional: hand the class on: labels 0 to num_classes, of which the last stands for no class in particular.
        noise_scale: what ¼ ln σ is multiplied by, for embeddings that expect time steps in the hundreds.
        width: width of the scalar head.

    Raises:
        ValueError: if the module does not give the shape of x back, or a class is to be handed on and there is none.
    """

    outer = (*Network.outer, "look")

    def __init__(
        self,
        shape: tuple[int, ...],
        module: nn.Module,
        num_classes: int = 0,
        conditional: bool = False,
        noise_scale: float = 1.0,
        width: int = 64,
    ) -> None:
        super().__init__()
        positive(noise_scale=noise_scale, width=width)
        self.module, self.noise_scale, self.conditional = module, noise_scale, conditional
        self.embed = ConditionEmbedding(width, num_classes, conditional)
        self.condition = nn.Linear(width, 2 * width)
        self.look = Linear(2 * math.prod(shape), width)
        self.gradient_head, self.scalar_head = Gain(), zero_init(Linear(width, 1))
        refuse_shape(self, tuple(shape))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, *shape), c_noise (B,) and label (B,) or None to F (B, *shape) and a (B,)."""
        told, c_noise = (label,) if self.conditional else (), c_noise.expand(len(x))
        out = self.module(x, self.noise_scale * c_noise, *told)
        scale, shift = self.condition(nn.functional.silu(self.embed(c_noise, label))).chunk(2, dim=1)
        seen = torch.cat([x.flatten(1), out.flatten(1)], 1) / math.sqrt(x[0].numel())
        hidden = nn.functional.silu(modulate(self.look(seen), 1 + scale, shift))
        return self.gradient_head(out), self.scalar_head(hidden)[:, 0]


def refuse_shape(network: Adapted, shape: tuple[int, ...]) -> None:
    """Call a network once, on zeros.

    Raises:
        ValueError: if its module cannot take x, or does not give its shape back.
    """
    x, label = torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long) if network.conditional else None
    told = () if label is None else (label,)
    name, training = type(network.module).__name__, network.training
    try:
        with torch.no_grad():
            found = network.eval().module(x, torch.zeros(2), *told)
    except Exception as error:  # of somebody else's module
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name} cannot be called with x {tuple(x.shape)} and noise (2,): {reason}") from error
    finally:
        network.train(training)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name} must give x of shape {tuple(x.shape)} back, and gives {given}")


class DiffusersModel(nn.Module):
    """A model of `diffusers`, called with (x, noise) or (x, noise, label): UNet2DModel, DiTTransformer2DModel, ….

    Args:
        name: name of the class.
        options: its arguments, as it names them.

    Raises:
        ValueError: if diffusers is not installed, has no such model, or that refuses its arguments.
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = diffusers_class(name)(**(options or {}))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Map x (B, C, H, W), noise (B,) and label (B,) or None to (B, C, H, W); an output twice as deep is halved."""
        told = {} if label is None else {"class_labels": label}
        out = self.model(x, noise, **told).sample
        return out[:, : x.shape[1]]  # a DiT that learns variances has them behind


def diffusers_class(name: str) -> Any:
    """A model class of diffusers.

    Raises:
        ValueError: if diffusers is not installed, or has no such model.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("diffusers is not installed: uv sync --group diffusers") from error
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if not inspect.isclass(found) or not issubclass(found, diffusers.ModelMixin):
        raise ValueError(f"diffusers has no model {name!r}: take UNet2DModel or DiTTransformer2DModel, say")
    return found
