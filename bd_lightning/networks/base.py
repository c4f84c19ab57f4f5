"""What a trunk tells the fields around it."""

from abc import abstractmethod

from torch import Tensor, nn


class Network(nn.Module):
    """Base of the trunks with two heads.

    Attributes:
        conditional: whether the network is told the class; its label `num_classes` stands for no class in particular.
        head_shape: leading shape of the outputs after the batch: () for one pair of heads, (C,) for one of every class.
        gradient_head: the layer that F comes from.
        scalar_head: the layer that a comes from.
    """

    conditional: bool = False
    head_shape: tuple[int, ...] = ()
    gradient_head: nn.Module
    scalar_head: nn.Module

    @abstractmethod
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x (B, *shape), c_noise (B,) and label (B,) or None to F (B, *head_shape, *shape), a (B, *head_shape)."""
