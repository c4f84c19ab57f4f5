"""The pair of field networks."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from bd_lightning.checks import one_of, positive
from bd_lightning.fields import preconditioning
from bd_lightning.fields.base import ConditionedFields, FieldPair
from bd_lightning.fields.preconditioning import PARAMETRISATIONS, Parametrisation
from bd_lightning.kernels import Kernel
from bd_lightning.networks.base import Network

_SOFTPLUS_SHIFT = math.log(math.e - 1)  # softplus of it is one


class LearnedFields(nn.Module, FieldPair):
    r"""Gradient and scalar field from one network with two heads, or from two networks.

    Of the outputs (F, a), F becomes the gradient field as `preconditioning` says, and

        s = m_ref(σ) softplus(a + c),   c such that s = m_ref at a = 0; s ≥ 0 keeps √s defined.

    Args:
        network: maps (x, c_noise, label) to (F, a), see `networks`.
        kernel: the pair kernel that the fields are trained with; it fixes their scale.
        sigma_data: standard deviation σ_d of the data.
        dim: number of data dimensions.
        parametrisation: "factored", "velocity" or "direct". A single-scale model (σ = 0) has to be "direct".
        scalar_network: a network of its own for the scalar field; None shares the trunk. Of two networks the heads
            `scalar_head` and `gradient_head` that go unused are frozen.
        no_class: the label that stands for no class in particular, if a conditional network has learned one.

    Attributes:
        learned: what the networks stand for, in words.

    References:
        | Li et al., Bellman Diffusion, arXiv 2410.01796, §3
    """

    def __init__(
        self,
        network: Network,
        kernel: Kernel,
        sigma_data: float,
        dim: int,
        parametrisation: str = "factored",
        scalar_network: Network | None = None,
        no_class: int | None = None,
    ) -> None:
        super().__init__()
        one_of(tuple(PARAMETRISATIONS), parametrisation=parametrisation)
        if network.parametrisations is not None and parametrisation not in network.parametrisations:
            raise ValueError(
                f"{type(network).__name__} is read by parametrisation={' or '.join(network.parametrisations)}, not "
                f"{parametrisation}"
            )
        positive(sigma_data=sigma_data, dim=dim)
        self.network, self.scalar_network = network, scalar_network
        self.kernel, self.sigma_data, self.dim, self.no_class = kernel, sigma_data, dim, no_class
        self.parametrisation: Parametrisation = PARAMETRISATIONS[parametrisation]
        self.learned = f"{parametrisation} fields"
        self.mobility_is_density = kernel.mobility_is_density
        if scalar_network is not None:  # heads that no loss reaches would make DDP wait for their gradients
            network.scalar_head.requires_grad_(False)
            scalar_network.gradient_head.requires_grad_(False)

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref at noise levels sigma; shape of sigma."""
        return self.kernel.reference(sigma, self.sigma_data, self.dim)

    def outputs(
        self, x: Tensor, sigma: Tensor, label: Tensor | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the losses are written in: (S, s) of factored fields, (g, s) of direct ones.

        Args:
            x: points, shape (B, *).
            sigma: noise levels, shape (B,).
            label: class indices, shape (B,), for class-conditional networks.
            told: how each image was augmented, shape (B, n), for networks that are told.

        Returns:
            S or g, shape (B, *), and s, shape (B,).
        """
        scale = self.parametrisation.scale(sigma, self.sigma_data)
        out, a = preconditioning.call(self.network, x, sigma, scale, label, told)
        if self.scalar_network is not None:
            _, a = preconditioning.call(self.scalar_network, x, sigma, scale, label, told)
        m_ref = self.reference(sigma)
        s = m_ref * F.softplus(a + _SOFTPLUS_SHIFT)
        return self.parametrisation.output(out, x, sigma, self.sigma_data, self.kernel, m_ref), s

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, *) and noise levels sigma (B,); shapes (B,) and (B, *)."""
        h, s = self.outputs(x, sigma, label)
        return s, self.parametrisation.gradient(h, s)

    def conditioned(self, label: Tensor | None) -> FieldPair:
        """The fields of one class for each point, label (B,), or of all the data for None."""
        return ConditionedFields(self, label, self.no_class)
