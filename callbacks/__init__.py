"""Callbacks: periodic side effects around training. None of them touches the training random numbers, and none is
part of the checkpointed module. Those that evaluate run between the two swaps of `AveragedWeights` at validation, so
 they see averaged weights; `train.py` puts the averaging callback behind them to make it so."""

from callbacks.averages import PowerAverages
from callbacks.checkpoints import AveragedWeights, LastCheckpoint
from callbacks.curve import CallsCurve
from callbacks.diagnostics import FieldDiagnostics, NonFiniteLoss, TrainingDiagnostics
from callbacks.evaluation import Evaluation, Findings, Metric
from callbacks.features import ClassifierFeatures, DINOv2Features, InceptionFeatures
from callbacks.figures import FieldFigures, PointTrajectory
from callbacks.likelihood import FieldLikelihood, FlowLikelihood
from callbacks.memorisation import Memorisation
from callbacks.metrics import ImageMetrics
from callbacks.points import PointMetrics
from callbacks.progress import StepProgress
from callbacks.report import Report
from callbacks.returns import EpisodeReturns, ReturnFigures
from callbacks.samples import SampleGrid, Trajectory
from callbacks.writers import ImageWriter, TableWriter

__all__ = [
    "AveragedWeights",
    "CallsCurve",
    "ClassifierFeatures",
    "DINOv2Features",
    "EpisodeReturns",
    "Evaluation",
    "FieldDiagnostics",
    "FieldFigures",
    "FieldLikelihood",
    "Findings",
    "FlowLikelihood",
    "ImageMetrics",
    "ImageWriter",
    "InceptionFeatures",
    "LastCheckpoint",
    "Memorisation",
    "Metric",
    "NonFiniteLoss",
    "PointMetrics",
    "PointTrajectory",
    "PowerAverages",
    "Report",
    "ReturnFigures",
    "SampleGrid",
    "StepProgress",
    "TableWriter",
    "TrainingDiagnostics",
    "Trajectory",
]
