"""Fields as a denoiser of azula, whose samplers and methods of posterior sampling then take them; needs azula.

Noise level and time are matched by the variance exploding schedule, α = 1 and σ_t = σ_min^(1 − t) σ_max^t, of t from 0
to 1, so that x_t is our x̃ itself.
"""

from azula.denoise import Denoiser, DiracPosterior
from azula.noise import VESchedule
from torch import Tensor, nn

from bd_lightning.checks import in_range, positive
from bd_lightning.divergences import bcast
from bd_lightning.fields.base import FieldPair, log_gradient


class FieldsDenoiser(Denoiser):
    """E[x | x̃] = x̃ + σ² S, where S = 2g/s stands for the score: exact where the mobility is constant.

    Of a mobility that is a mean over many dimensions ∇log s, about 1/(2d) of S, is left out.

    Args:
        fields: any pair of fields, such as `model.fields.conditioned(label)` of a checkpoint; those that are no
            module, as these, stay on the device that their model is on.
        sigma_min: noise level at t = 0, in data units.
        sigma_max: noise level at t = 1, in data units.

    Raises:
        ValueError: for levels out of order.
    """

    def __init__(self, fields: FieldPair, sigma_min: float = 0.02, sigma_max: float = 20.0) -> None:
        super().__init__()
        positive(sigma_min=sigma_min, sigma_max=sigma_max)
        in_range(0, sigma_max, sigma_min=sigma_min)
        self.schedule = VESchedule(sigma_min, sigma_max)
        self.fields = fields
        self.weights = nn.ModuleList([fields] if isinstance(fields, nn.Module) else [])

    def forward(self, x_t: Tensor, t: Tensor, **kwargs) -> DiracPosterior:
        """The posterior's mean (B, *) at x_t (B, *) and times t, () or (B,)."""
        sigma = self.schedule(t)[1].to(x_t).expand(len(x_t))
        s, g = self.fields(x_t, sigma)
        return DiracPosterior(x_t + bcast(sigma.square(), x_t) * log_gradient(s, g))
