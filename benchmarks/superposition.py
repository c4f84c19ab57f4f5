"""Other ways to draw from several densities with the networks that mixtures are made of (see `linearity`)."""

import torch
from torch import Tensor

from bd_lightning.fields import FieldPair, Mixture


def shares_of(mixture: Mixture) -> Tensor:
    """The shares that a mixture asks of its classes, in order, shape (C,)."""
    asked = torch.cat([(weights * source.shares).nan_to_num(0) for source, weights in mixture.terms])
    return asked / asked.sum()


def components(mixture: Mixture, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """log ρ_c (B, C) and ∇log p_c (B, C, *) of all classes of a mixture at x (B, *) and one noise level, sigma (1,)."""
    logs, slopes = zip(*(source.components(x, sigma) for source, _ in mixture.terms))
    shares = torch.cat([source.shares for source, _ in mixture.terms])
    center = x / (sigma.square() + mixture.sigma_data**2)
    return torch.cat(logs, 1) - shares.log(), torch.cat(slopes, 1) - center[:, None]


class AveragedScores(FieldPair):
    """Σ w_c ∇log p_c with Σ w_c = 1, as fields with the mobility one: all that a score model could do.

    Args:
        mixture: the weights, none of them negative, and the classes.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.weights = mixture, shares_of(mixture)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, *) and noise levels sigma (B,), all of them equal."""
        _, scores = components(self.mixture, x, sigma[:1])
        return torch.ones_like(sigma), torch.einsum("c,bc...->b...", self.weights, scores) / 2


class ClassFirst(FieldPair):
    """The class of every chain drawn beforehand, by its number, and then the fields of that class alone.

    Args:
        mixture: the weights, none of them negative, and the classes.
        rows: numbers of the chains, length B.
    """

    def __init__(self, mixture: Mixture, rows: Tensor) -> None:
        last, weights = int(rows.max()) + 1, shares_of(mixture)
        drawn = torch.multinomial(weights, last, True, generator=torch.Generator().manual_seed(0))
        self.mixture, self.chosen = mixture, drawn[rows]

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, *) and noise levels sigma (B,), all of them equal."""
        _, scores = components(self.mixture, x, sigma[:1])
        return torch.ones_like(sigma), scores[torch.arange(len(x)), self.chosen] / 2
