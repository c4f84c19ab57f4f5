"""Mixtures of four Gaussians in closed form, and networks whose weights are drawn at random."""

import torch

from bd_lightning.fields import AnalyticSource, Mixture, RelativeFields
from bd_lightning.networks import MLP
from bd_lightning.targets import GaussianMixture

MEANS, WEIGHTS = [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], [0.4, 0.3, 0.2, 0.1]
PARTS = [GaussianMixture([mean], sd=0.3) for mean in MEANS]
SOURCE = AnalyticSource(PARTS, WEIGHTS, sigma_data=1.1)


def mixture(*weights, **options):
    return Mixture([(SOURCE, torch.tensor(weights, dtype=torch.float64))], **options)


def truth(*weights):
    return GaussianMixture(MEANS, [w * share for w, share in zip(weights, WEIGHTS)], sd=0.3)


def noised_points():
    sigma = torch.tensor([0.01, 0.1, 0.3, 1.0, 5.0, 20.0], dtype=torch.float64).repeat_interleave(50)
    return truth(1, 1, 1, 1).sample(300, torch.Generator().manual_seed(0)) * (1 + sigma[:, None]), sigma


def same(a: Mixture, b: Mixture, points) -> bool:
    return all(torch.allclose(p, q, atol=1e-9) for p, q in zip(a.log_ratio(*points), b.log_ratio(*points)))


def learned(count, classes=2, width=16):
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        fields = RelativeFields(MLP((3,), classes, per_class=True, width=width, depth=2), 1.1, classes)
        for parameter in fields.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        fields.count(torch.randint(classes, (50,)))
        found.append(fields.requires_grad_(False).eval())
    return found
