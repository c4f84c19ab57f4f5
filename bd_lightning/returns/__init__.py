r"""Return distributions on the line: how they are represented, backed up by the Bellman equation, and read.

The return G of a state-action pair has a density p on R. After a transition with reward r and discount γ (γⁿ after n
steps, 0 at the end of an episode) the distributional Bellman equation makes of the density p' of what follows the
density of r + γG', and in the fields of Bellman Diffusion, s = p and g = ∂p, it is linear:

    s(x) ← (1/γ) s'((x − r)/γ),        g(x) ← (1/γ²) g'((x − r)/γ).

`GaussianFields` writes s as Σ_j w_j N(x; x_j, h²) over fixed nodes x_j, with weights w of any sign and Σ_j w_j = 1.
Pushed forward, component j is N(γx_j + r, γ²h²); noise of variance h²(1 − γ²) restores its width (it is linear too), so
that the target is Σ_j w_j N(x; γx_j + r, h²) for all x, without projection. Its fixed point is the density of G + hn,
n ~ N(0, 1). What is learned, by squared error, is a linear functional of it at collocation points:

- "cumulative": F = ∫ s at the midpoints between nodes. The squared error is Cramér's distance, in which the operator
  contracts by √γ, and the mass is one by construction.
- "density": s at the nodes. In ∫(s − t)² the operator expands by 1/√γ; errors of mass are not contracted at all, unless
  the weights are shifted back to mass one (`mass`, linear) or their positive part is rescaled (`positive`, not linear).

`PositiveFields` has weights w > 0 by softmax, so that s and g are fields of a density whatever a network says. Learned
is s itself, by maximum likelihood: −∫ t log s for the target t above, which is positive where w is; over all densities
it is least at s = t (Gibbs). Of nodes far from all returns the weights, and their errors, vanish. Those of weights of
any sign add up in the values Σ_j w_j x_j over the whole range, and a wide one drowns small differences of actions.

`Categorical` is C51: probabilities of fixed atoms, whose target is projected onto the atoms, learned by cross entropy.
`Quantiles` is QR-DQN: quantiles at fixed levels, which move without projection; their mixtures are not linear.

References:
    | Li et al., Bellman Diffusion, arXiv 2410.01796, §2 and §6 (the Bellman equation of fields)
    | Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning, arXiv 1707.06887 (C51)
    | Rowland et al., An Analysis of Categorical Distributional RL, arXiv 1802.08163 (Cramér's distance, √γ)
    | Bellemare et al., Distributional RL with Linear Function Approximation, arXiv 1902.03149 (signed masses)
"""

from bd_lightning.returns.fields import ReturnFields, normal, normal_cdf
from bd_lightning.returns.networks import Convolutions, Features, FieldNetworks, Flat, trunk
from bd_lightning.returns.policies import CVaR, MeanReturn, Policy, Preference, Spread, UpperQuantile, mixed_policy
from bd_lightning.returns.quantiles import Quantiles
from bd_lightning.returns.representation import (
    Categorical,
    GaussianFields,
    LinearRepresentation,
    PositiveFields,
    Representation,
)
from bd_lightning.returns.risk import conditional_value_at_risk, monotone, quantile, ruin, wasserstein1
from bd_lightning.returns.sampling import SAMPLERS, sample_by_inverse_cdf, sample_by_sde
from bd_lightning.returns.target import bellman_target, lambda_shares, td_loss

__all__ = [
    "SAMPLERS",
    "CVaR",
    "Categorical",
    "Convolutions",
    "Features",
    "FieldNetworks",
    "Flat",
    "GaussianFields",
    "LinearRepresentation",
    "MeanReturn",
    "Policy",
    "PositiveFields",
    "Preference",
    "Quantiles",
    "Representation",
    "ReturnFields",
    "Spread",
    "UpperQuantile",
    "bellman_target",
    "conditional_value_at_risk",
    "lambda_shares",
    "mixed_policy",
    "monotone",
    "normal",
    "normal_cdf",
    "quantile",
    "ruin",
    "sample_by_inverse_cdf",
    "sample_by_sde",
    "td_loss",
    "trunk",
    "wasserstein1",
]
