"""Bellman Diffusion (Li, Lai, Schönlieb, Mitsufuji, Ermon, arXiv 2410.01796) as a PyTorch Lightning suite.

Read in this order: `kernels` (what the networks estimate), `divergences` (the losses as mathematics), `fields` (pairs
of fields), `objectives` (how they are trained), `dynamics` (how they are sampled), `modules` (the wiring).
"""
