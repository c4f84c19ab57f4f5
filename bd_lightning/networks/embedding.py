"""Conditioning: embedding of the noise level and of the class."""

import math

import torch
from torch import Tensor, nn

from bd_lightning.checks import positive


class ConditionEmbedding(nn.Module):
    """Sinusoidal features of c_noise and a learned class vector, through a small MLP.

    Args:
        width: size of the embedding.
        num_classes: number of classes of the data.
        conditional: embed the class as well.
        told: length of the vector that says how an image was augmented; 0 for none.
        frequencies: number of sine–cosine pairs, spread geometrically from 1 to 100 radians per unit of c_noise.

    Raises:
        ValueError: if the network is to be conditional and the data has no classes.
    """

    def __init__(
        self, width: int, num_classes: int = 0, conditional: bool = False, told: int = 0, frequencies: int = 32
    ) -> None:
        super().__init__()
        positive(width=width, frequencies=frequencies)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(0, 2, frequencies), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        if conditional and num_classes < 1:
            raise ValueError("conditional needs a data set with classes, and this one has none")
        self.classes = nn.Embedding(num_classes + 1, width) if conditional else None  # the last one: no class
        self.told = nn.Linear(told, width, bias=False) if told else None

    def forward(self, c_noise: Tensor, label: Tensor | None = None, told: Tensor | None = None) -> Tensor:
        """Embed c_noise (B,), for a conditional network label (B,), and the augmentation (B, told); shape (B, width).

        The label num_classes stands for no class in particular, and no augmentation is one of zeros.

        Raises:
            ValueError: if a label is given to an unconditional network, or none to a conditional one.
        """
        angles = c_noise[:, None] * self.frequencies
        h = self.mlp(math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1))
        if (self.classes is None) != (label is None):
            raise ValueError(
                "labels were given, but the network is unconditional"
                if self.classes is None
                else "the network is class-conditional and needs labels"
            )
        h = h if self.classes is None else h + self.classes(label)
        if self.told is None:
            return h
        return h + self.told(h.new_zeros(len(h), self.told.in_features) if told is None else told)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the network starts from its preconditioning."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def head_shape(num_classes: int, per_class: bool) -> tuple[int, ...]:
    """Leading shape of a network's outputs: () for one pair of heads, (num_classes,) for a pair for every class.

    Raises:
        ValueError: if there are to be heads for classes and the data has none.
    """
    if per_class and num_classes < 1:
        raise ValueError("per_class needs a data set with classes, and this one has none: set network.per_class=false")
    return (num_classes,) if per_class else ()
