"""How likely held-out data is, by the probability flow and in one call; classes and strangers told by it."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from bd_lightning.checks import UserError, in_range, positive
from bd_lightning.dynamics import SampleNoise
from bd_lightning.likelihood import (
    auroc,
    bits_per_dimension,
    class_log_densities,
    flow_log_densities,
    spearman,
    spearman_error,
)
from bd_lightning.progress import bar
from callbacks.drawing import SampleModule, data_of, heed
from callbacks.evaluation import Evaluation, Findings, Metric
from datamodules.base import DataModule
from datamodules.subsets import random_subset

CELL_SPREAD = 12**0.5
"""Width of a uniform distribution over its standard deviation."""


class Likelihood(Evaluation):
    """Base of both: rows of the test split, computed on all ranks together."""

    stages = ("test",)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a model that has no density."""
        pl_module.check_likelihood()  # type: ignore[operator]

    def log_values(self, trainer: L.Trainer, pl_module: SampleModule, values: dict[str, float]) -> None:
        """Log the numbers, which are the same on every rank."""
        pl_module.log_dict(values)


def rows_of(split: Any, n: int, collate: Callable[[Any], Any]) -> tuple[Tensor, Tensor, Tensor]:
    """At most n rows of a split, a random subset with a fixed seed: x (N, *), labels (N,) and their indices (N,)."""
    chosen = random_subset(len(split), n)
    x, labels = zip(*DataLoader(Subset(split, chosen), 500, collate_fn=collate))
    return torch.cat(x).cpu(), torch.cat(labels).cpu(), torch.tensor(chosen)


def together(
    trainer: L.Trainer, pl_module: SampleModule, n: int, batch_size: int, words: str, one: Callable[[Tensor], Tensor]
) -> Tensor:
    """Values of rows 0 to n − 1, computed a batch at a time, each rank its share; the same on every rank, on the CPU.

    Args:
        trainer: the trainer.
        pl_module: the module.
        n: number of rows.
        batch_size: rows at a time on each rank.
        words: what is computed, for a progress bar.
        one: values (B, *) of rows (B,).
    """
    world = trainer.world_size
    padded = -(-n // world) * world  # equal shares; the few too many are cut off
    parts = []
    with bar(words, padded // world) as progress:
        for rows in (torch.arange(trainer.global_rank, padded, world) % n).split(batch_size):
            heed(trainer)
            parts.append(one(rows))
            progress.update(len(rows))
    mine = torch.cat(parts)
    if world == 1:
        return mine.cpu()
    shares: Tensor = pl_module.all_gather(mine)
    return shares.transpose(0, 1).flatten(0, 1)[:n].cpu()


class FlowLikelihood(Likelihood):
    """Log density of the test split by the probability flow (see `likelihood.flow_log_densities`), at every test.

    Where the flow ends in a Gaussian is chosen by the validation split: the step after which its log density is
    highest. In few dimensions data are Gaussian long before `sigma_max`, and errors of fields at levels that training
    hardly reached would count for as much as those at the data.

    Images are bytes: each value is spread evenly over its cell, and the number is bits per dimension. Other data is
    in nats per sample, tables in the table's units and codes in theirs. A model that has to be told the class is told
    that of each sample. Logged as test/bits_per_dim, test/nats and their standard errors, test/…_se; written to <run
    folder>/likelihood.json with its protocol.

    Args:
        n: number of samples, a random subset of the split with a fixed seed.
        steps: steps of the flow, four calls and as many derivatives each.
        probes: probes of each sample's trace above `exact` dimensions.
        exact: dimensions up to which the trace and ∇log s are exact, at d derivatives a call.
        sigma_min: noise level of the density, in data units.
        sigma_max: highest noise level at which it may be taken to be a Gaussian, in data units.
        batch_size: samples at a time on each rank.
        seed: seed of the places in cells and of the probes.
        choosing: samples of the validation split, a random subset with a fixed seed, that choose the level; 0 takes
            sigma_max.
    """

    metrics = (Metric("bits_per_dim", 4), Metric("nats", 3))
    more = ("*_se",)
    record = "likelihood.json"
    subject = "likelihood"

    def __init__(
        self,
        n: int = 1000,
        steps: int = 20,
        probes: int = 1,
        exact: int = 16,
        sigma_min: float = 0.02,
        sigma_max: float = 20.0,
        batch_size: int = 250,
        seed: int = 1,
        choosing: int = 200,
    ) -> None:
        in_range(0, math.inf, choosing=choosing)
        positive(n=n, steps=steps, probes=probes, batch_size=batch_size, sigma_min=sigma_min, sigma_max=sigma_max)
        in_range(0, sigma_max, sigma_min=sigma_min)
        in_range(0, math.inf, exact=exact)
        self.n, self.steps, self.probes, self.exact, self.seed = n, steps, probes, exact, seed
        self.sigma_min, self.sigma_max, self.batch_size, self.choosing = sigma_min, sigma_max, batch_size, choosing

    def draw(self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str) -> tuple[Tensor, int]:
        """Log densities (N,), and the steps of the flow."""
        data = data_of(trainer)

        def found(split: str, n: int, steps: int, words: str) -> Tensor:
            x, labels, index = rows_of(data.split(split), n, data.collate)
            told = labels if pl_module.conditional else None

            def one(rows: Tensor) -> Tensor:
                label = None if told is None else told[rows]
                return self.densities(pl_module, x[rows], index[rows], data.cell, label, steps)

            return together(trainer, pl_module, len(x), self.batch_size, words, one)

        steps = self.steps
        if self.choosing:
            mean = found("val", self.choosing, steps, "the last level of the flow").double().mean(0)
            steps = (
                1 + int(mean.nan_to_num(-math.inf, -math.inf, -math.inf).argmax()) if mean.isfinite().any() else steps
            )
        return found(stage, self.n, steps, "log densities by the flow")[:, -1], steps

    def level(self, steps: int) -> float:
        """The noise level after so many steps."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** (steps / self.steps)

    def densities(
        self,
        pl_module: SampleModule,
        x: Tensor,
        index: Tensor,
        cell: float | None,
        label: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Log densities (B, steps), in the model's units, of rows x (B, *) of a split, of flows of 1 to `steps` steps.

        Args:
            pl_module: the module.
            x: the rows.
            index: their indices in the split (B,), which their random numbers depend on.
            cell: width of the cells that they are spread over; None leaves them where they are.
            label: their classes (B,); None for the density of all the data.
            steps: how many of the flow's steps; None takes all.
        """
        steps = steps or self.steps
        device, shape = pl_module.device, x.shape[1:]
        noise = SampleNoise(index.tolist(), shape, self.seed, device)
        place = noise.uniform()
        x = x.to(device) if cell is None else x.to(device) + cell / CELL_SPREAD * place
        low = math.prod(shape) <= self.exact
        with torch.inference_mode(False):  # what an embedding keeps for the derivatives
            told = None if label is None else label.to(device).clone()
        fields = pl_module.fields.conditioned(told)
        return flow_log_densities(
            fields,
            x,
            pl_module.fields.sigma_data,
            self.sigma_min,
            self.level(steps),
            steps,
            None if low else [torch.where(noise() < 0, -1.0, 1.0) for _ in range(self.probes)],
            low,
        ).T

    def method(self, dim: int, steps: int | None = None, chosen: str = "") -> str:
        """How it is computed for a number of dimensions and of steps, in words."""
        steps = steps or self.steps
        trace = (
            "exact trace"
            if dim <= self.exact
            else f"Hutchinson's trace of {self.probes} probe{'s' * (self.probes > 1)}"
        )
        return (
            f"probability flow from noise level {self.sigma_min:g} to {self.level(steps):.3g}{chosen}, {steps} steps "
            f"({4 * steps} network calls), {trace}, seed {self.seed}"
        )

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: tuple[Tensor, int]
    ) -> Findings:
        """Means and standard errors, in the data's units."""
        logs, steps = drawn
        data = data_of(trainer)
        few = f"{min(self.choosing, len(data.split('val')))} samples of the {data.called('val')} split"
        chosen = f" (of {self.steps} levels up to {self.sigma_max:g} the best for {few})" if self.choosing else ""
        dim = math.prod(data.shape)
        bits = () if data.cell is None else (("bits_per_dim", bits_per_dimension(logs, dim, data.cell)),)
        values: dict[str, float] = {}
        for name, found in (*bits, ("nats", data.log_volume - logs)):
            values |= {f"{stage}/{name}": float(found.mean()), f"{stage}/{name}_se": standard_error(found)}
        told = ", given the class" if pl_module.conditional else ""
        lost = int((~logs.isfinite()).sum())
        protocol = (
            f"{len(logs)} samples of the {data.called(stage)} split of {data.name}{told}"
            f"{', dequantised' if bits else ''}; {self.method(dim, steps, chosen)}"
        )
        name, unit = ("bits_per_dim", "bits per dimension") if bits else ("nats", "nats")
        value, error = values[f"{stage}/{name}"], values[f"{stage}/{name}_se"]
        summary = f"{value:.4f} ± {error:.4f} {unit}: {protocol}" + (f"; {lost} are not finite" if lost else "")
        return Findings(values, {**values, "drawn": None, "protocol": protocol, "summary": summary})


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of values (N,); 0 of a single one."""
    return float(values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5)


class FieldLikelihood(Likelihood):
    """Log density of the test split in one network call, from fields relative to a base Gaussian, at every test.

    It is log p_σ(x + σn), n standard normal, once for each sample: p_σ is the density of noised data, and fields are
    trained at noised points. The mean over samples is a cross-entropy, least for the true p_σ. The flow gets the same
    points.

    Logged under test/: `nats` of one call and its standard error; where the density is known `nats_off`, the mean
    distance from the truth; `class_accuracy`, that of the classifier by the posterior of the classes, where there are
    some; for `compared` of the samples also the flow's `nats_flow`, Spearman's correlation `spearman` of the two with
    its standard error, and `speed_ratio`, the flow's seconds over those of one call for as many samples; and
    `auroc_<name>`, `auroc_<name>_flow`, how well each tells the test split from the same images inverted, and from
    others. Written to <run folder>/densities.json with its protocol.

    Args:
        n: number of samples, a random subset of the split with a fixed seed.
        sigma: noise level σ, in data units.
        compared: samples of each set that the flow is asked for too; 0 leaves it out.
        others: other data of the same shape, by name; `test` and `inverted` are the names of the data's own.
        steps: steps of the flow.
        exact: dimensions up to which its trace is exact; the noise of a probe hides that the two agree.
        batch_size: samples at a time.
        seed: seed of the noise and of the flow.
    """

    metrics = (Metric("nats", 3), Metric("class_accuracy", 4, "max"))
    more = ("nats_*", "spearman", "spearman_se", "speed_ratio", "auroc_*")
    record = "densities.json"
    subject = "likelihood"

    def __init__(
        self,
        n: int = 10_000,
        sigma: float = 0.1,
        compared: int = 500,
        others: dict[str, DataModule] | None = None,
        steps: int = 20,
        exact: int = 32,
        batch_size: int = 250,
        seed: int = 1,
    ) -> None:
        positive(n=n)
        in_range(0, math.inf, compared=compared)
        self.n, self.sigma, self.compared, self.others = n, sigma, compared, dict(others or {})
        if taken := {"test", "inverted"} & self.others.keys():
            raise ValueError(f"others.{min(taken)}: 'test' and 'inverted' are the data's own: call it by another name")
        self.flow = FlowLikelihood(compared or 1, steps, exact=exact, sigma_min=sigma, batch_size=batch_size, seed=seed)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse fields that are not relative to a base Gaussian, and other data of another shape."""
        super().setup(trainer, pl_module, stage)
        refuse_absolute(pl_module)
        seen = data_of(trainer).observed
        for name, other in self.others.items():
            if tuple(other.shape) != tuple(seen.shape):
                raise UserError(
                    f"others.{name} has samples of shape {tuple(other.shape)}, {seen.name} of {tuple(seen.shape)}: "
                    "give it the same size and channels"
                )
            other.prepare_data()

    def draw(self, trainer: L.Trainer, pl_module: Any, stage: str, sampler: str) -> dict[str, Any]:
        """For every set of data: log densities by class (N, C), the flow's (M,), and seconds per sample of each."""
        data = data_of(trainer)
        found = {}
        for name, (clean, labels, index) in self.sets(data, stage, pl_module.device).items():
            x = clean + self.sigma * SampleNoise(index.tolist(), clean.shape[1:], self.flow.seed)()

            def one(rows: Tensor, x: Tensor = x) -> Tensor:
                return self.one_call(pl_module, x[rows].to(pl_module.device))

            size, few = self.flow.batch_size, min(self.compared, len(x))
            pick = torch.linspace(0, len(x) - 1, few).long()  # of all of them: a folder has class after class
            logs = together(trainer, pl_module, len(x), size, f"log densities of {name}", one)

            def flow(rows: Tensor, x: Tensor = x[pick], index: Tensor = index[pick]) -> Tensor:
                return self.flow.densities(pl_module, x[rows], index[rows], None)[:, -1]

            times, values = [], torch.zeros(0)
            for words, way in (("one call", one), ("flow", flow)) if few else ():
                start = time.perf_counter()
                values = together(trainer, pl_module, few, size, f"{words}, {name}", way)
                times.append(time.perf_counter() - start)
            found[name] = {"x": x, "logs": logs, "labels": labels, "picked": pick, "flow": values, "times": times}
        return found

    @torch.no_grad()
    def one_call(self, pl_module: Any, x: Tensor) -> Tensor:
        """log(π_c p_c) (B, C) at x (B, *)."""
        return class_log_densities(pl_module.mixture_source(), x, x.new_full((len(x),), self.sigma))

    def sets(self, data: DataModule, stage: str, device: torch.device) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Rows, labels and indices: of the split, under its name, of the same images inverted, and of other data."""
        known = {stage: rows_of(data.split(stage), self.n, data.collate)}
        seen = data.observed
        splits: dict[str, tuple[DataModule, float]] = {} if seen.cell is None else {"inverted": (seen, -1.0)}
        splits |= {name: (other, 1.0) for name, other in self.others.items()}
        for name, (source, sign) in splits.items():
            images, labels, index = rows_of(source.load_split(stage), min(self.n, 2000), source.collate)
            codes = [data.encode((sign * part).to(device)).cpu() for part in images.split(500)]
            known[name] = torch.cat(codes), labels, index
        return known

    def judge(
        self, trainer: L.Trainer, pl_module: SampleModule, stage: str, sampler: str, drawn: Mapping[str, Any]
    ) -> Findings:
        """Means, accuracy, agreement and what is told apart."""
        data, own = data_of(trainer), drawn[stage]
        total = {name: found["logs"].logsumexp(1) for name, found in drawn.items()}
        nats = data.log_volume - total[stage]
        values = {"nats": float(nats.mean()), "nats_se": standard_error(nats)}
        said = [f"{values['nats']:.4f} ± {values['nats_se']:.4f} nats in one call"]
        if data.density is not None:
            truth = data.density.log_density(own["x"].double(), self.sigma)
            values["nats_off"] = float((total[stage] - truth).abs().mean())
            said.append(f"off the truth by {values['nats_off']:.4f} on average")
        if own["logs"].shape[1] > 1:
            values["class_accuracy"] = float((own["logs"].argmax(1) == own["labels"]).double().mean())
            said.append(f"classes by their posterior {values['class_accuracy']:.2%} right")
        few = len(own["flow"])
        if few:
            values["nats_flow"] = float((data.log_volume - own["flow"]).mean())
            values["nats_compared"] = float(nats[own["picked"]].mean())
            values["spearman"] = spearman(total[stage][own["picked"]], own["flow"])
            values["spearman_se"] = spearman_error(values["spearman"], few)
            values["speed_ratio"] = own["times"][1] / own["times"][0]
            said.append(
                f"on {few} of them {values['nats_compared']:.4f} against the flow's {values['nats_flow']:.4f}, "
                f"Spearman's correlation {values['spearman']:.3f} ± {values['spearman_se']:.3f} at "
                f"{values['speed_ratio']:.0f} times its speed"
            )
        for name in drawn:
            if name != stage:
                values[f"auroc_{name}"] = auroc(total[stage], total[name])
                words = f"AUROC against {name} {values[f'auroc_{name}']:.4f}"
                if few:
                    values[f"auroc_{name}_flow"] = auroc(own["flow"], drawn[name]["flow"])
                    words += f" (flow {values[f'auroc_{name}_flow']:.4f})"
                said.append(words)
        sizes = ", ".join(f"{len(found['logs'])} of {name}" for name, found in drawn.items() if name != stage)
        protocol = (
            f"{len(nats)} samples of the {data.called(stage)} split of {data.name}{f' and {sizes}' if sizes else ''}, "
            f"noised at {self.sigma:g}; flow: {self.flow.method(math.prod(data.shape))}"
        )
        logged = {f"{stage}/{name}": value for name, value in values.items()}
        summary = f"{'; '.join(said)}: {protocol}"
        return Findings(logged, {**logged, "drawn": None, "protocol": protocol, "summary": summary})


def refuse_absolute(pl_module: Any) -> None:
    """Refuse a model whose fields give no density in one call.

    Raises:
        UserError: naming what would.
    """
    try:
        pl_module.mixture_source()
    except UserError as error:
        raise UserError(
            "likelihood=fields reads densities off fields relative to a base Gaussian: train with model=relative, or "
            "take likelihood=ode"
        ) from error
