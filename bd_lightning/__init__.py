"""Bellman Diffusion (Li, Lai, Schönlieb, Mitsufuji, Ermon, arXiv 2410.01796) as a PyTorch Lightning suite.

Read in this order: `kernels` (what the networks estimate), `divergences` (the losses as mathematics), `fields` (pairs
of fields), `objectives` (how they are trained), `dynamics` (how they are sampled), `modules` (the wiring).
`bd_lightning.load(place)` gives the fields and samplers of a trained model (see `pretrained`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bd_lightning.pretrained import Pretrained


def load(place: "str | Path", trust: bool = False) -> "Pretrained":
    """Load a trained model; with `trust` one of classes that are not the suite's (see `pretrained.load`)."""
    from bd_lightning import pretrained  # here, so that the package is imported without torch

    return pretrained.load(place, trust)
