"""What a trunk tells the fields around it."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Network(nn.Module):
    """Base of the trunks with two heads.

    Attributes:
        conditional: whether the network is told the class; its label `num_classes` stands for no class in particular.
        head_shape: leading shape of the outputs after the batch: () for one pair of heads, (C,) for one of every class.
        told: length of the vector that a network takes after the label, how an image was augmented; 0 for none.
        gradient_head: the layer that F comes from.
        scalar_head: the layer that a comes from.
        parametrisations: those of `fields.preconditioning` that it can be read by; None for all.
        outer: names of the layers at either end and of those that condition, whose weights are no `matrices`.
    """

    outer: ClassVar[tuple[str, ...]] = ("enter", "embed", "condition", "gradient_head", "scalar_head")

    parametrisations: ClassVar[tuple[str, ...] | None] = None

    conditional: bool = False
    head_shape: tuple[int, ...] = ()
    told: int = 0
    gradient_head: nn.Module
    scalar_head: nn.Module

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, *shape), c_noise (B,) and label (B,) or None to F (B, *head_shape, *shape), a (B, *head_shape)."""

    def matrices(self) -> list[nn.Parameter]:
        """Weights of the linear layers and convolutions that carry the data from the first layer to the heads."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        layers = (layer for name, layer in self.named_modules() if not set(name.split(".")) & set(self.outer))
        weights = (layer.weight for layer in layers if isinstance(layer, kinds))
        return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]
