"""Pairs of fields, all with the base `FieldPair`: samplers, metrics and other fields take any of them.

| fields | what they are |
|---|---|
| `LearnedFields` | two heads of a network, or two networks |
| `AnalyticFields`, `AnalyticRelative` | closed forms, which the losses are minimised by |
| `ConditionedFields` | learned fields of one class |
| `GuidedFields` | classifier-free guidance between two pairs |
| `LateGuidedFields`, `DynamicGuidedFields` | the same with another scale until a transition |
| `RelativeFields` | learned fields of every class, relative to a base Gaussian |
| `Mixture` | weighted sums of those |
| `Experts` | many of those trained apart, asked in one batched call |
"""

from bd_lightning.fields.analytic import AnalyticFields, AnalyticRelative, log_ratio
from bd_lightning.fields.base import ConditionedFields, FieldPair, log_gradient
from bd_lightning.fields.experts import Experts, batched
from bd_lightning.fields.guided import DynamicGuidedFields, Guidance, GuidedFields, LateGuidedFields
from bd_lightning.fields.learned import LearnedFields
from bd_lightning.fields.mixture import Mixture, Source
from bd_lightning.fields.relative import AnalyticSource, RelativeFields
from bd_lightning.fields.shares import calibrated, combine

__all__ = [
    "AnalyticFields",
    "AnalyticRelative",
    "AnalyticSource",
    "ConditionedFields",
    "DynamicGuidedFields",
    "Experts",
    "FieldPair",
    "Guidance",
    "GuidedFields",
    "LateGuidedFields",
    "LearnedFields",
    "Mixture",
    "RelativeFields",
    "Source",
    "batched",
    "calibrated",
    "combine",
    "log_gradient",
    "log_ratio",
]
