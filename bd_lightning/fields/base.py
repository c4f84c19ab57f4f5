r"""What every pair of fields is: a function of points and noise levels, and what follows from it.

The scalar field s stands for a mobility m and the gradient field g for ½(m ∇log p_σ + ∇m), so that

    S = 2g/s = ∇log p_σ + ∇log s,        ∇log p_σ = S − ∇log s.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §3
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bd_lightning.divergences import bcast


def log_gradient(s: Tensor, g: Tensor) -> Tensor:
    """S = 2g/s, which stands for ∇log p_σ + ∇log m; shape of g. s is kept above the smallest normal number."""
    return 2 * g / bcast(s.clamp_min(torch.finfo(s.dtype).tiny), g)


class FieldPair(ABC):
    """Base of the pairs of fields: what samplers, metrics and other fields ask of them.

    Attributes:
        mobility_is_density: whether s stands for the (smoothed) density itself, as in the paper.
    """

    mobility_is_density: bool = False

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, *) and noise levels sigma (B,); shapes (B,) and (B, *)."""

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility m_ref, by which time steps are scaled; shape of sigma. One, unless fields know better."""
        return torch.ones_like(sigma)

    def conditioned(self, label: Tensor | None) -> "FieldPair":
        """The fields of one class for each point, label (B,), or of all the data for None.

        Raises:
            ValueError: for a label, where the fields know no classes.
        """
        if label is not None:
            raise ValueError("classes were asked for, and these fields know none")
        return self

    def remark(self) -> str:
        """What is to be said of the chains that were just sampled; empty for nothing."""
        return ""

    def at(self, level: float) -> "FieldPair":
        """The same fields for points that are all at one noise level, in data units, which need not be looked at."""
        return self

    def log_gradients(self, x: Tensor, sigma: Tensor, exact: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The scalar field, S = 2g/s and ∇log s, from one call of the fields.

        Args:
            x: points, shape (B, *).
            sigma: noise levels, shape (B,).
            exact: differentiate through the scalar field. Where the mobility is a mean over many dimensions ∇log s is
                about 1/(2d) of S; False takes it to be zero, at a third of the cost.

        Returns:
            s (B,), S (B, *) and ∇log s (B, *).
        """
        if not exact:
            s, g = self(x, sigma)
            return s, log_gradient(s, g), torch.zeros_like(x)
        with torch.inference_mode(False), torch.enable_grad():
            point = x.clone().requires_grad_(True)
            s, g = self(point, sigma.clone())
            slope = torch.zeros_like(x)
            if s.requires_grad:  # a constant mobility has no gradient
                (slope,) = torch.autograd.grad(s.clamp_min(torch.finfo(s.dtype).tiny).log().sum(), point)
            return s.detach(), log_gradient(s, g).detach(), slope

    def score(self, x: Tensor, sigma: Tensor, exact: bool = False) -> Tensor:
        """∇log p_σ = S − ∇log s at x (B, *) for sigma (B,), shape (B, *); see `log_gradients` for `exact`."""
        _, S, slope = self.log_gradients(x, sigma, exact)
        return S - slope

    def densities(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The densities that these fields are a weighted sum of, one unless they know better.

        Args:
            x: points, shape (B, *).
            sigma: noise levels, shape (B,).
            exact: as in `log_gradients`.

        Returns:
            log w_c (B, C), up to a number for each point, and ∇log p_c (B, C, *).

        Raises:
            UserError: for a sum with negative weights.
        """
        score = self.score(x, sigma, exact)
        return score.new_zeros(len(x), 1), score[:, None]

    def weighted_score(self, x: Tensor, sigma: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The score (B, *), and the rate d log W/dt (B,), t = −ln σ, at which chains that follow it are to be weighted.

        The rate is zero where the fields are those of noised versions of one density (see `dynamics.FeynmanKac`).
        """
        return self.score(x, sigma, exact), torch.zeros_like(sigma)


class ConditionedFields(FieldPair):
    """Learned fields with the class filled in.

    Args:
        fields: fields that take a label as their third argument, such as `LearnedFields`.
        label: class of each point, shape (B,); None where the network is told none.
        no_class: the index that stands for no class in particular, used where label is None; None if there is none.
    """

    def __init__(self, fields: Any, label: Tensor | None, no_class: int | None = None) -> None:
        self.fields, self.label, self.no_class = fields, label, no_class
        self.mobility_is_density = fields.mobility_is_density

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) of the class at x (B, *) and noise levels sigma (B,); shapes (B,) and (B, *)."""
        label = self.label
        if label is None and self.no_class is not None:
            label = torch.full((len(x),), self.no_class, device=x.device)
        if label is not None and label.is_inference() and not torch.is_inference_mode_enabled():
            label = label.clone()  # `log_gradients` differentiates, and autograd keeps no tensors of inference
        return self.fields(x, sigma, label)

    def reference(self, sigma: Tensor) -> Tensor:
        """Typical mobility of the fields; shape of sigma."""
        return self.fields.reference(sigma)
