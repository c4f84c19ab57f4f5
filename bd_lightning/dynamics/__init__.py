r"""Samplers: they know fields as functions, and nothing of networks or training.

Bellman Diffusion dynamics (arXiv 2410.01796, §4), whose stationary density is p for every kernel:

    dx = g(x) dt + √s(x) dW,        Euler–Maruyama: x ← x + η g + √(η s) z.

| sampler | fields | what it does |
|---|---|---|
| `BellmanDynamics` | single-scale | the paper's dynamics |
| `AnnealedDynamics` | multi-scale | the same steps down a ladder of noise levels |
| `MultistepDynamics` | multi-scale | the same SDE while σ falls, by a multistep rule that needs few network calls |
| `ProbabilityFlow` | multi-scale | the deterministic flow dx/dσ = −σ ∇log p_σ |
| `FeynmanKac` | multi-scale, guided | the reversed diffusion, chains resampled by the weights of guidance |
| `TrackedPosterior` | multi-scale, a mixture | the same SDE, the mixture's weights carried along the chains |
| `ConsistencySteps` | a consistency function | one or a few calls of it |

They take any `fields.FieldPair`: `fields(x, sigma)` returns (s, g) of shapes (B,) and (B, *) for sigma of shape (B,),
and `fields.reference(sigma)`, the typical mobility m_ref, turns a dimensionless step into a time step.
"""

from bd_lightning.dynamics.consistency import ConsistencySteps
from bd_lightning.dynamics.descent import MultistepDynamics, ProbabilityFlow, edm_grid
from bd_lightning.dynamics.langevin import AnnealedDynamics, BellmanDynamics, bellman_step, geometric_ladder
from bd_lightning.dynamics.resampling import FeynmanKac
from bd_lightning.dynamics.sampler import (
    MultiScaleSampler,
    SampleNoise,
    Sampler,
    SamplingDiverged,
)
from bd_lightning.dynamics.tracking import TrackedPosterior

__all__ = [
    "AnnealedDynamics",
    "BellmanDynamics",
    "ConsistencySteps",
    "FeynmanKac",
    "MultiScaleSampler",
    "MultistepDynamics",
    "ProbabilityFlow",
    "SampleNoise",
    "Sampler",
    "SamplingDiverged",
    "TrackedPosterior",
    "bellman_step",
    "edm_grid",
    "geometric_ladder",
]
