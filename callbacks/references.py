"""What samples are compared with: statistics of a split's features, or published ones."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bd_lightning.checks import UserError
from bd_lightning.progress import bar
from callbacks.features import ImageFeatures, features_of
from callbacks.moments import Gaussian, Moments, frechet, load_statistics
from datamodules.cache import cache_path, load_cached, sampled, save_cached
from datamodules.images import ImageDataModule, to_uint8
from datamodules.subsets import random_subset

KEPT = 10_000
"""Features of so many samples are kept, for KID's subsets and for precision and recall. FID keeps sums alone."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, and what their FID should be read against.

    Args:
        gaussian: mean and covariance of the features.
        rows: features of at most `KEPT` of the images, at random, shape (N, F); none of them for a file of statistics.
        what: which images they are.
        floor: FID of other real images; None if there are none.
        floor_of: which images those are.
        noise: FID of uniform noise.
    """

    gaussian: Gaussian
    rows: Tensor
    what: str
    floor: float | None
    floor_of: str
    noise: float


def embed(
    features: ImageFeatures, data: ImageDataModule, split: str, device: torch.device, limit: int | None = None
) -> tuple[Moments, Tensor]:
    """Sums of the features of a split, or of a random subset of it, and at most `KEPT` of them in random order."""
    images = data.load_split(split)
    chosen = Subset(images, random_subset(len(images), len(images) if limit is None else limit))
    sums, seen, parts = Moments(features.num_features), 0, []
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:KEPT]
    kept = torch.zeros(len(chosen), dtype=torch.bool).index_fill(0, order, True)
    loader = DataLoader(chosen, data.eval_batch_size, collate_fn=data.collate)
    with bar(f"{split} images of {data.name} for FID", len(chosen)) as progress:
        for x, _ in loader:
            rows = features_of(features, to_uint8(x).to(device)).cpu()
            sums.update(rows)
            parts.append(rows[kept[seen : seen + len(x)]])
            seen += len(x)
            progress.update(len(x))
    return sums, torch.cat(parts)[order.argsort().argsort()]


def of_noise(features: ImageFeatures, data: ImageDataModule, n: int, device: torch.device) -> Gaussian:
    """Statistics of n images of uniform bytes."""
    sums = Moments(features.num_features)
    with isolate_rng():
        torch.manual_seed(0)
        for start in range(0, n, 500):
            images = torch.randint(0, 256, (500, *data.shape), dtype=torch.uint8)[: n - start]
            sums.update(features_of(features, images.to(device)))
    return sums.gaussian()


def of_split(features: ImageFeatures, data: ImageDataModule, split: str, device: torch.device) -> Reference:
    """The images of a split, cached under <data.root>/.cache.

    Raises:
        UserError: for a split of one image, which has no covariance.
    """
    if len(data.load_split(split)) < 2:
        raise UserError(
            f"the {data.called(split)} images of {data.name} are one, and FID is of two at least: enlarge that split, "
            "or compare with another by callbacks.metrics.reference=train"
        )
    other = "train" if data.called(split) != "train" else "test"
    if data.called(other) == data.called(split):
        other = split  # all is trained on: there are no other images
    digests = [sampled(data, name) for name in (split, other)]
    path = cache_path(data, f"reference-{split}", "moments", KEPT, features.protocol, *digests)
    keys = ("mean", "covariance", "rows", "n", "floor", "floor_of", "noise")
    cached = load_cached(path, *keys)
    if cached is None:
        sums, rows = embed(features, data, split, device)
        here, noise = sums.gaussian(), of_noise(features, data, sums.n, device)
        floor, floor_of = None, "none, all images are trained on"
        if other != split:
            real, _ = embed(features, data, other, device, limit=sums.n)
            others = f"{real.n} {data.called(other)} images"
            floor, floor_of = frechet(here, real.gaussian()), f"{others}, at random" if real.n == sums.n else others
        values = *here, rows, sums.n, floor, floor_of, frechet(here, noise)
        cached = dict(zip(keys, values))
        save_cached(cached, path)
    gaussian, what = (
        Gaussian(cached["mean"], cached["covariance"]),
        f"{cached['n']} {data.called(split)} images of {data.name}",
    )
    return Reference(gaussian, cached["rows"], what, cached["floor"], cached["floor_of"], cached["noise"])


def of_file(features: ImageFeatures, data: ImageDataModule, file: str, device: torch.device) -> Reference:
    """Published statistics. Training images tell whether they fit the data and the resize: if not, one line says so."""
    here = load_statistics(file, features.num_features, features.protocol)
    digest = sha256(Path(file).read_bytes()).hexdigest()
    path = cache_path(data, "reference-file", digest, KEPT, features.protocol, sampled(data, "train"))
    cached = load_cached(path, "n", "floor", "noise", "shift")
    if cached is None:
        sums, _ = embed(features, data, "train", device, limit=KEPT)
        real = sums.gaussian()
        shift = float((real.mean - here.mean).square().sum() * sums.n / here.covariance.trace())
        noise = frechet(here, of_noise(features, data, sums.n, device))
        cached = {"n": sums.n, "floor": frechet(here, real), "noise": noise, "shift": shift}
        save_cached(cached, path)
    if not cached["shift"] < 4:  # at most about 1 if the training images are of the distribution of the file's
        rank_zero_info(
            f"{file} is of other images than {data.name}, or of another resize: {cached['n']} training images are "
            f"at FID {cached['floor']:.2f} from it"
        )
    none, floor_of = torch.zeros(0, features.num_features), f"{cached['n']} train images, at random"
    return Reference(here, none, Path(file).name, cached["floor"], floor_of, cached["noise"])
