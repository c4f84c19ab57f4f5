"""Trunks with two heads, network(x, c_noise, label) → (F, a).

x has shape (B, *shape), c_noise (B,) encodes the noise level, label (B,) is a class index or None. F has the shape of
x and feeds the gradient field, a has shape (B,) and feeds the scalar field. Both heads start at zero. Arguments named
`shape` and `num_classes` are filled in from the data module. Networks derive from `Network`.

With `per_class` a network has heads for every class on one trunk that does not see the class: F has shape
(B, C, *shape) and a (B, C). Fields relative to a base Gaussian (see `fields.RelativeFields`) are learned that
way, so that one call gives those of every mixture of classes.
"""

from bd_lightning.networks.base import Network
from bd_lightning.networks.denoisers import AzulaDenoiser, DiffusersDenoiser, PretrainedDenoiser
from bd_lightning.networks.foreign import Adapted, DiffusersModel
from bd_lightning.networks.mlp import MLP
from bd_lightning.networks.unet import UNet

__all__ = [
    "MLP",
    "Adapted",
    "AzulaDenoiser",
    "DiffusersDenoiser",
    "DiffusersModel",
    "Network",
    "PretrainedDenoiser",
    "UNet",
]
