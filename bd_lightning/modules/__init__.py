"""LightningModules: they wire fields, losses and samplers to optimisers and logging."""

from bd_lightning.modules.autoencoder import Autoencoder
from bd_lightning.modules.bellman import BellmanDiffusion
from bd_lightning.modules.consistency import ConsistencyModel, Gaps
from bd_lightning.modules.distillation import DistilledModel
from bd_lightning.modules.generator import Generator
from bd_lightning.modules.relative import RelativeDensities
from bd_lightning.modules.returns import FreeReturnLearner, LambdaReturnLearner, ReturnLearner

__all__ = [
    "Autoencoder",
    "BellmanDiffusion",
    "ConsistencyModel",
    "DistilledModel",
    "FreeReturnLearner",
    "Gaps",
    "Generator",
    "LambdaReturnLearner",
    "RelativeDensities",
    "ReturnLearner",
]
