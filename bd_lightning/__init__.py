"""Bellman Diffusion (Li, Lai, Schönlieb, Mitsufuji, Ermon, arXiv 2410.01796) as a PyTorch Lightning suite.

Read in this order: `kernels` (what the networks estimate), `divergences` (how they are trained),
`fields` (the networks), `dynamics` (how they are sampled), `modules` (the wiring).
"""
