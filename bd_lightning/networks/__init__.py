"""Trunks with two heads, network(x, c_noise, label) → (F, a).

x has shape (B, *shape), c_noise (B,) encodes the noise level, label (B,) is a class index or None. F has the shape of
x and feeds the gradient field, a has shape (B,) and feeds the scalar field. Both heads start at zero. Arguments named
`shape` and `num_classes` are filled in from the data module.
"""

from bd_lightning.networks.mlp import MLP
from bd_lightning.networks.unet import UNet

__all__ = ["MLP", "UNet"]
