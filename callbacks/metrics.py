"""FID, KID, precision and recall of samples, with the protocol written beside every number."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from bd_lightning.checks import in_range, positive
from bd_lightning.progress import bar
from callbacks.drawing import SampleModule, all_or_none, data_of, draw
from callbacks.evaluation import Evaluation, Findings, Metric
from callbacks.features import ImageFeatures
from datamodules.cache import cache_path, load_cached, save_cached
from datamodules.images import ImageDataModule, to_uint8
from datamodules.subsets import random_subset

KEPT = 10_000
"""Features of so many samples are kept, for KID's subsets and for precision and recall. FID keeps sums alone."""

NEIGHBOURS = 3
"""Precision and recall are of balls around features to the neighbour of this number."""


class Given(nn.Module):
    """Stands where torchmetrics expects a feature extractor, so that features are computed once for all metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features, (B, num_features)."""
        return features


@contextmanager
def rank_zero_first(trainer: L.Trainer) -> Iterator[None]:
    """Let the other ranks wait until rank 0 is through, so that they find what it keeps."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier("rank 0 first")
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier("rank 0 first")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FID between two sets of features, (N, F) and (M, F), by torchmetrics in double precision."""
    fid = FrechetInceptionDistance(feature=Given(a.shape[1]), sync_on_compute=False)  # one rank may call it alone
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return float(fid.compute())


def kernel_distance(samples: Tensor, real: Tensor, subset: int, scale: float = 1.0) -> float:
    """KID by torchmetrics: the mean over 50 random subsets, which are the same at every call.

    Args:
        samples: features, shape (N, F).
        real: features, shape (M, F).
        subset: size of the subsets.
        scale: features are divided by it.
    """
    kid = KernelInceptionDistance(
        feature=Given(samples.shape[1]), subsets=50, subset_size=subset, sync_on_compute=False
    ).to(samples.device)
    kid.update(real / scale, real=True)
    kid.update(samples / scale, real=False)
    with isolate_rng():
        torch.manual_seed(0)
        return float(kid.compute()[0].float())


def precision_recall(samples: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of samples inside the real manifold, and of real images inside the samples'.

    The manifold of a set is the union of balls around its points, each to its k-th nearest neighbour.

    Args:
        samples: features, shape (N, F).
        real: features, shape (M, F).
        neighbours: k.

    References:
        | Kynkäänniemi et al., Improved Precision and Recall Metric, arXiv 1904.06991
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(
        samples.float(),
        real.float(),
        prc_neighborhood=neighbours,
        prc_batch_size=2000,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


class ImageMetrics(Evaluation):
    """FID, KID, precision and recall at every validation and test, logged as <stage>/fid and so on.

    The reference features are computed once and cached under <data.root>/.cache, keyed by data set, split and
    features. The reference split is the running stage's own, unless the data module says otherwise (`Digits` compares
    with its training images). With them are kept two numbers that FID should be read against: its value between real
    images (the reference and a disjoint split) and for uniform noise. FID takes the whole reference; where other
    numbers take fewer images, these are a random subset with a fixed seed. Every row goes to <run folder>/fid.json
    with its protocol.

    Args:
        features: what FID and KID are computed in.
        n: samples at each validation.
        n_test: samples at a test; None takes n.
        sampler: name of the module's sampler; None takes its default.
        batch_size: samples drawn at a time on each rank. It does not change the result.
        kid_subset: size of KID's subsets; KID is left out if there are fewer samples or reference images.
        manifold: precision and recall are those of at most so many samples and as many real images; 0 leaves them out.
        seed: seed of the samples.
    """

    metrics = (Metric("fid", 1), Metric("kid", 4), Metric("precision", 3, "max"), Metric("recall", 3, "max"))
    record = "fid.json"
    subject = "FID"

    def __init__(
        self,
        features: ImageFeatures,
        n: int = 1000,
        n_test: int | None = None,
        sampler: str | None = None,
        batch_size: int = 500,
        kid_subset: int = 500,
        manifold: int = 10_000,
        seed: int = 1,
    ) -> None:
        positive(n=n, batch_size=batch_size, kid_subset=kid_subset)
        in_range(2, math.inf, n=n, n_test=n if n_test is None else n_test)  # a covariance is of two at least
        in_range(0, math.inf, manifold=manifold)
        self.features, self.n, self.n_test = features, n, n if n_test is None else n_test
        self.sampler, self.batch_size, self.kid_subset, self.seed = sampler, batch_size, kid_subset, seed
        self.manifold = manifold
        self.references: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the features; a run that trains does not wait for them before its first validation."""
        if stage not in ("fit", "validate", "test"):
            return
        super().setup(trainer, pl_module, stage)
        with rank_zero_first(trainer):
            self.features.check(cast(ImageDataModule, data_of(trainer).observed))
        if stage != "fit":
            self.prepare(trainer, pl_module, "test" if stage == "test" else "val")
        if self.n < self.features.num_features:
            rank_zero_info(
                f"FID of {self.n} samples in {self.features.num_features} dimensions: the covariance is singular and "
                "the number biased upward; raise callbacks.metrics.n"
            )

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, held_out: str) -> None:
        """Train or load the features and the reference statistics, on rank 0 first, unless they are there already."""
        if held_out in self.references:
            return
        data = cast(ImageDataModule, data_of(trainer).observed)
        with rank_zero_first(trainer), isolate_rng(), torch.inference_mode(False), torch.no_grad():
            self.features.prepare(data)
            self.features.to(pl_module.device)
            self.references[held_out] = self._reference(data, held_out, pl_module.device)

    def evaluate(self, trainer: L.Trainer, pl_module: SampleModule, stage: str) -> None:
        """Evaluate, with features and references ready."""
        if stage in self.stages and not trainer.sanity_checking:
            self.prepare(trainer, cast(L.LightningModule, pl_module), stage)
        super().evaluate(trainer, pl_module, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Free the features."""
        self.features.to("cpu")
        self.references.clear()

    def _embed(self, data: ImageDataModule, split: str, device: torch.device, limit: int | None = None) -> Tensor:
        """Features of a split, or of a random subset of it, in random order: any first rows are a random subset."""
        images = data.load_split(split)
        chosen = Subset(images, random_subset(len(images), len(images) if limit is None else limit))
        loader = DataLoader(chosen, data.eval_batch_size, collate_fn=data.collate)
        with bar(f"{split} images of {data.name} for FID", len(chosen)) as progress:
            parts = []
            for x, _ in loader:
                parts.append(self.features(to_uint8(x).to(device)).cpu())
                progress.update(len(x))
        rows = torch.cat(parts)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def _reference(self, data: ImageDataModule, held_out: str, device: torch.device) -> dict[str, Any]:
        split = held_out if data.reference_split == "stage" else data.reference_split
        path = cache_path(data, f"reference-{split}", "random subsets", self.features.key)
        cached = load_cached(path, "features", "split", "floor", "floor_split", "noise")
        if cached is None:
            features = self._embed(data, split, device)
            other = "train" if split != "train" else "test"
            with isolate_rng():
                torch.manual_seed(0)
                noise = [
                    self.features(torch.randint(0, 256, (k, *data.shape), dtype=torch.uint8).to(device)).cpu()
                    for k in [500] * (len(features) // 500 + 1)
                ]
            real = self._embed(data, other, device, limit=len(features))
            cached = {
                "features": features,
                "split": split,
                "floor": frechet_distance(features, real),
                "floor_split": f"{len(real)} {other} images{', at random' if len(real) == len(features) else ''}",
                "noise": frechet_distance(features, torch.cat(noise)[: len(features)]),
            }
            save_cached(cached, path)
        return cached

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> dict[str, float]:
        """FID, KID, precision and recall of the samples of all ranks, the same on each."""
        n = self.n if stage == "val" else self.n_test
        real = self.references[stage]["features"]
        fid = FrechetInceptionDistance(feature=Given(real.shape[1])).to(pl_module.device)
        for rows in real[trainer.global_rank :: trainer.world_size].split(5000):  # states of all ranks are added up
            fid.update(rows.to(pl_module.device).double(), real=True)
        share = -(-min(KEPT, n) // trainer.world_size)  # features that a rank keeps
        kept = torch.zeros(0, real.shape[1], device=pl_module.device)
        with all_or_none(trainer):
            for x in draw(trainer, pl_module, n, self.batch_size, self.seed, sampler):
                rows = self.features(to_uint8(x))
                fid.update(rows.double(), real=False)
                kept = torch.cat([kept, rows[: share - len(kept)]])
        values = {"fid": float(fid.compute().float())}
        kept = nn.functional.pad(kept, (0, 0, 0, share - len(kept)))  # of one size on every rank
        shares: Tensor = pl_module.all_gather(kept)
        ours = shares.view(trainer.world_size, share, -1).transpose(0, 1).flatten(0, 1)[: min(KEPT, n)]
        theirs = real[:KEPT].to(ours.device)
        if self.kid_subset <= min(len(ours), len(theirs)):
            values["kid"] = kernel_distance(ours, theirs, self.kid_subset, self.features.kid_scale)
        few = self._manifold(n, len(real))
        if few > NEIGHBOURS:
            values["precision"], values["recall"] = precision_recall(ours[:few], theirs[:few])
        return values

    def _manifold(self, n: int, references: int) -> int:
        """Number of samples, and of real images, that precision and recall are of."""
        return min(self.manifold, KEPT, n, references)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: dict[str, float] | None
    ) -> Findings:
        """The numbers with their protocol; FID is infinite if chains were lost."""
        reference = self.references[stage]
        values = {f"{stage}/{name}": value for name, value in (drawn or {"fid": math.inf}).items()}
        n = self.n if stage == "val" else self.n_test
        manifold = self._manifold(n, len(reference["features"]))
        row = {
            **values,
            "floor": round(reference["floor"], 2),
            "noise": round(reference["noise"], 2),
            "protocol": (
                f"{n} samples ({sampler}, {pl_module.samplers[sampler].calls} network calls, seed {self.seed}) against "
                f"{len(reference['features'])} {reference['split']} images of {data_of(trainer).observed.name}; "
                f"{self.features.description}; "
                f"floor: {reference['floor_split']}; noise: uniform bytes"
                + (f"; precision, recall: {manifold} of each, {NEIGHBOURS} neighbours" if manifold else "")
            ),
        }
        more = f", KID {values[f'{stage}/kid']:.4f}" if f"{stage}/kid" in values else ""
        if f"{stage}/precision" in values:
            more += f", precision {values[f'{stage}/precision']:.3f}, recall {values[f'{stage}/recall']:.3f}"
        row["summary"] = (
            f"FID {values[f'{stage}/fid']:.2f}{more} (real images {row['floor']:.2f}, noise {row['noise']:.1f}): "
            f"{row['protocol']}"
        )
        facts = {"fid/floor": reference["floor"], "fid/noise": reference["noise"], **self.features.facts}
        return Findings(values | facts, row)
