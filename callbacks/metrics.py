"""FID, KID, precision and recall of samples, with the protocol written beside every number."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from bd_lightning.checks import UserError, in_range, positive
from bd_lightning.kernels import whole_products
from callbacks import references
from callbacks.drawing import SampleModule, all_or_none, data_of, draw, heed, manner
from callbacks.evaluation import Evaluation, Findings, Metric
from callbacks.export import Export
from callbacks.features import ImageFeatures, features_of, refuse_untold
from callbacks.moments import Moments, frechet, frechet_distance, load_statistics
from callbacks.references import Reference
from datamodules.images import ImageDataModule, to_uint8

__all__ = ["Given", "ImageMetrics", "frechet_distance", "kernel_distance", "precision_recall"]

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
    try:
        yield
    finally:  # if rank 0 fails the others do so by themselves
        if trainer.is_global_zero:
            trainer.strategy.barrier("rank 0 first")


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
    with isolate_rng(), whole_products():
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

    The reference statistics are computed once and cached under <data.root>/.cache, keyed by data set, split and
    features. With them are kept two numbers that FID should be read against: its value between real images (the
    reference and a disjoint split) and for uniform noise. FID takes the whole reference; where other numbers take
    fewer images, these are a random subset with a fixed seed. Every row goes to <run folder>/fid.json with its
    protocol.

    Args:
        features: what FID and KID are computed in.
        n: samples at each validation.
        n_test: samples at a test; None takes n.
        sampler: name of the module's sampler; None takes its default.
        batch_size: samples drawn at a time on each rank. Only samplers whose chains interact give others by it.
        kid_subset: size of KID's subsets; KID is left out if there are fewer samples or reference images.
        manifold: precision and recall are those of at most so many samples and as many real images; 0 leaves them out.
        reference: "train", "val" or "test", or an .npz file with mu and sigma in the same features, of which FID alone
            can be computed. None takes the running stage's own split, unless the data module says otherwise (`Digits`,
            and CIFAR-10 without a validation split, compare with their training images).
        seed: seed of the samples.
        export: file that the samples of a test are written to (see `Export`); `train.py test export=` sets it.
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
        reference: str | None = None,
        seed: int = 1,
        export: str | None = None,
    ) -> None:
        positive(n=n, batch_size=batch_size, kid_subset=kid_subset)
        in_range(2, math.inf, n=n, n_test=n if n_test is None else n_test)  # a covariance is of two at least
        in_range(0, math.inf, manifold=manifold)
        if reference not in (None, "train", "val", "test") and not str(reference).endswith(".npz"):
            raise ValueError(f"reference must be train, val, test or an .npz file, got {reference!r}")
        refuse_untold(features)
        self.features, self.n, self.n_test = features, n, n if n_test is None else n_test
        self.sampler, self.batch_size, self.kid_subset, self.seed = sampler, batch_size, kid_subset, seed
        self.manifold, self.reference = manifold, reference
        self.export = None if export is None else Export(export)
        self.references: dict[str, Reference] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the features and files; a run that trains does not wait for them before its first validation, unless it
        compares with a file, whose features are known by the classifier that they are of.
        """
        if stage not in ("fit", "validate", "test"):
            return
        super().setup(trainer, pl_module, stage)
        self.features.heed = partial(heed, trainer)
        data = cast(ImageDataModule, data_of(trainer).observed)
        if self._from_file:
            load_statistics(str(self.reference), self.features.num_features, self.features.protocol)
        if self.export is not None:
            self.export.expect(self._count(cast(SampleModule, pl_module), "test"), data.shape)
            if trainer.is_global_zero:
                self.export.check(self.features.num_features)
        early = self._from_file and stage == "fit"  # else they are prepared below
        with rank_zero_first(trainer):
            self.features.check(data)
            if early:
                self.features.prepare(data)
        if early:
            load_statistics(str(self.reference), self.features.num_features, self.features.protocol)
        if stage != "fit":
            self.prepare(trainer, pl_module, "test" if stage == "test" else "val")
        if self.n < self.features.num_features:
            rank_zero_info(
                f"FID of {self.n} samples in {self.features.num_features} dimensions: the covariance is singular and "
                "the number biased upward; raise callbacks.metrics.n"
            )

    @property
    def _from_file(self) -> bool:
        return str(self.reference).endswith(".npz")

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, held_out: str) -> None:
        """Train or load the features and the reference statistics, on rank 0 first, unless they are there already."""
        if held_out in self.references:
            return
        data = cast(ImageDataModule, data_of(trainer).observed)
        split = self.reference or (held_out if data.reference_split == "stage" else data.reference_split)
        find = references.of_file if self._from_file else references.of_split
        with rank_zero_first(trainer), isolate_rng(), torch.inference_mode(False), torch.no_grad():
            self.features.prepare(data)
            self.features.to(pl_module.device)
            self.references[held_out] = find(self.features, data, split, pl_module.device)

    def evaluate(self, trainer: L.Trainer, pl_module: SampleModule, stage: str) -> None:
        """Evaluate, with features and references ready."""
        if stage in self.stages and not trainer.sanity_checking:
            self.prepare(trainer, cast(L.LightningModule, pl_module), stage)
        super().evaluate(trainer, pl_module, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Free the features."""
        self.features.to("cpu")
        self.features.heed = type(self.features).heed
        self.references.clear()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate.

        Raises:
            UserError: after all has been recorded, if the samples could not be exported.
        """
        super().on_test_epoch_end(trainer, pl_module)
        lost = trainer.strategy.broadcast("" if self.export is None else self.export.lost)  # that of rank 0
        if lost:
            raise UserError(lost)

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> dict[str, float]:
        """FID, KID, precision and recall of the samples of all ranks, the same on each."""
        n = self._count(pl_module, stage)
        reference = self.references[stage]
        export = self.export if stage == "test" and sampler in self.chosen(pl_module) else None
        sums = Moments(self.features.num_features)
        share = -(-min(references.KEPT, n) // trainer.world_size)  # features that a rank keeps
        kept = torch.zeros(0, sums.total.numel(), device=pl_module.device)
        try:
            if export is not None:
                export.begin(trainer)
            with all_or_none(trainer):
                for x in draw(trainer, pl_module, n, self.batch_size, self.seed, sampler):
                    images = to_uint8(x)
                    rows = features_of(self.features, images)
                    sums.update(rows)
                    kept = torch.cat([kept, rows[: share - len(kept)]])
                    if export is not None:
                        export.add(images)
            sums.add_ranks(trainer)
            if export is not None:
                export.finish(trainer, sums.gaussian(), self.features.protocol)
        finally:
            if export is not None:
                export.abandon()
        values = {"fid": frechet(reference.gaussian, sums.gaussian())}
        kept = nn.functional.pad(kept, (0, 0, 0, share - len(kept)))  # of one size on every rank
        shares: Tensor = pl_module.all_gather(kept)
        ours = shares.view(trainer.world_size, share, -1).transpose(0, 1).flatten(0, 1)[: min(references.KEPT, n)]
        theirs = reference.rows.to(ours.device)
        if self.kid_subset <= min(len(ours), len(theirs)):
            values["kid"] = kernel_distance(ours, theirs, self.kid_subset, self.features.kid_scale)
        few = self._manifold(n, len(theirs))
        if few > NEIGHBOURS:
            values["precision"], values["recall"] = precision_recall(ours[:few], theirs[:few])
        return values

    def _count(self, pl_module: SampleModule, stage: str) -> int:
        """Number of samples that are judged."""
        return cast(int, pl_module.available(self.n if stage == "val" else self.n_test, stage))

    def _manifold(self, n: int, real: int) -> int:
        """Number of samples, and of real images, that precision and recall are of."""
        return min(self.manifold, references.KEPT, n, real)

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: dict[str, float] | None
    ) -> Findings:
        """The numbers with their protocol; FID is infinite if chains were lost."""
        reference = self.references[stage]
        values = {f"{stage}/{name}": value for name, value in (drawn or {"fid": math.inf}).items()}
        n = self._count(pl_module, stage)
        manifold = self._manifold(n, len(reference.rows))
        row = {
            **values,
            **({} if reference.floor is None else {"floor": round(reference.floor, 2)}),
            "noise": round(reference.noise, 2),
            "protocol": (
                f"{n} samples ({manner(pl_module, sampler, self.batch_size)}, seed {self.seed}) against "
                f"{reference.what}; {self.features.description}; "
                f"floor: {reference.floor_of}; noise: uniform bytes"
                + (f"; precision, recall: {manifold} of each, {NEIGHBOURS} neighbours" if manifold else "")
            ),
        }
        more = f", KID {values[f'{stage}/kid']:.4f}" if f"{stage}/kid" in values else ""
        if f"{stage}/precision" in values:
            more += f", precision {values[f'{stage}/precision']:.3f}, recall {values[f'{stage}/recall']:.3f}"
        real = "" if reference.floor is None else f"real images {row['floor']:.2f}, "
        row["summary"] = f"FID {values[f'{stage}/fid']:.2f}{more} ({real}noise {row['noise']:.1f}): {row['protocol']}"
        facts = {"fid/noise": reference.noise, **self.features.facts}
        if reference.floor is not None:
            facts["fid/floor"] = reference.floor
        return Findings(values | facts, row)
