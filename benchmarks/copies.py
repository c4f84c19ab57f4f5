"""Copies of training images against guidance: its scale, where it begins, and what acts before.

    uv run benchmarks/copies.py --autoencoder CKPT [--data data] [--out runs/copies] [--n 1000] [--steps 10000]
        [--seeds 3]

Trains, where OUT does not have it yet, a class-conditional model in codes of MNIST whose training set has 200 images a
hundredfold. These, with 5,000 other images that come once, are a class of their own, `prints`; the rest of the training
split, once each, has its digits as classes. So 80 % of `prints` and 28 % of all are duplicates, and to ask for `prints`
is to ask for digits of any kind, with a word that copies come with. Recipe: `experiment=mnist_latent_cond` with 256
units, the constant kernel, Muon at 5e-3, and as many steps as are given.

For each way of guidance and each seed from 1 on, n samples of `prints` (the flow by second-order multistep, 40 levels):

- drawn to a duplicate: the nearest image of the training set, in codes, is one of the 200;
- copies: nearer to one image of the training set (each once) than a third of the distance to the next, the ratio test
  of `callbacks.memorisation`. Both are printed of test images too;
- FID to the test split, in features of the classifier that metrics use.

A finished row is kept in OUT/rows.jsonl and not computed again. Prints a Markdown table, means over the seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bd_lightning.addresses import digest
from bd_lightning.dynamics import MultistepDynamics, SampleNoise
from bd_lightning.fields import Guidance
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training
from benchmarks.rows import Rows, mean_sd, table
from callbacks import ClassifierFeatures
from callbacks.memorisation import memorisation
from callbacks.metrics import frechet_distance
from datamodules import to_uint8
from datamodules.subsets import random_subset

DUPLICATED, TIMES, ORDINARY, PRINTS = 200, 100, 5000, 10
SAMPLER = MultistepDynamics(levels=40, relaxation=0.0)
BATCH = 256


def shuffled(n: int) -> Tensor:
    """Indices of n images, those that come many times first, (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def duplicated(codes: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The training set, codes (N, *) and classes (N,), with some of it many times in a class of its own."""
    order = shuffled(len(codes))
    few, own = order[:DUPLICATED], order[: DUPLICATED + ORDINARY]
    label = label.clone().index_fill_(0, own, PRINTS)
    rows = torch.cat([torch.arange(len(codes)), few.repeat(TIMES - 1)])
    return codes[rows], label[rows]


def ways() -> Iterator[Guidance]:
    """Kinds of guidance."""
    yield Guidance(1.0)
    for scale in (2.0, 4.0, 8.0):
        yield Guidance(scale)
        for before in (0.0, -0.5):
            yield Guidance(scale, before=before, transition="dynamic")
    yield Guidance(4.0, before=-2.0, transition="dynamic")
    for transition in (0.5, 1.6):
        yield Guidance(4.0, before=-0.5, transition=transition)


def two_nearest(x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of x (N, d) to the two nearest of known (M, d), (N, 2), and which the nearest is (N,)."""
    parts = [torch.cdist(part, known).topk(2, largest=False) for part in x.split(250)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices[:, 0] for part in parts])


def trained(path: Path, config: Any, data: Any, steps: int) -> Any:
    """The model in evaluation mode, trained or read."""
    facts = {**data.facts.arguments, "num_classes": PRINTS + 1}
    model = common.make_model(config, facts)
    if path.is_file():
        common.restore(model, path)
        return model.eval()
    rows = data.load_split("train")
    codes, label = duplicated(rows.x, rows.labels)
    training = Training(model, Recipe.of(model, config, steps))
    torch.manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(codes), (BATCH,))
        training.step(lambda chosen=chosen: model.losses(codes[chosen], label[chosen]).total)
        if step % 500 == 499:
            print(f"step {step + 1} of {steps}", flush=True)
    common.save(training.averaged.state_dict(), path)
    return training.averaged


def draw(model: Any, guidance: Guidance, n: int, seed: int) -> Tensor:
    """n codes of the class `prints`."""
    drawn = []
    for part in torch.arange(n).split(500):
        label = torch.full_like(part, PRINTS)
        fields = guidance.guided(model.fields.conditioned(label), model.fields.conditioned(None))
        with torch.no_grad():
            drawn.append(SAMPLER(fields, SampleNoise(part.tolist(), model.shape, seed)))
    return torch.cat(drawn)


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--autoencoder", required=True)
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/copies"))
    parser.add_argument("--n", type=common.count, default=1000)
    parser.add_argument("--steps", type=common.count, default=10000)
    parser.add_argument("--seeds", type=common.count, default=3)
    options = parser.parse_args()
    words = [f"data.autoencoder.ckpt_path={options.autoencoder}", f"data.root={options.data}"]
    words += ["model.network.width=256", "model.kernel={_target_: bd_lightning.kernels.Constant}"]
    words += ["model.optimizer={_target_: bd_lightning.optimizers.Muon}", "model.lr=5e-3"]
    config = common.compose("experiment=mnist_latent_cond", *words)
    data = common.make_data(config)
    code = digest(options.autoencoder)[:8]
    model = trained(options.out / f"model-{options.steps}-{code}.pt", config, data, options.steps)
    known, held_out = data.load_split("train").x, data.load_split("test")
    features = ClassifierFeatures()
    features.prepare(data.images)
    real = DataLoader(data.images.load_split("test"), 1000, collate_fn=data.images.collate)
    embedded = torch.cat([features(to_uint8(x)) for x, _ in real])
    often = torch.zeros(len(known)).index_fill_(0, shuffled(len(known))[:DUPLICATED], 1.0)
    some = random_subset(len(held_out), 1000)
    theirs, nearest = two_nearest(held_out.x[some].flatten(1), known.flatten(1))
    chance = float(often[nearest].mean())
    rows, lines = Rows(options.out / "rows.jsonl"), []
    for guidance in ways():
        key = {"scale": guidance.scale, "before": guidance.before, "transition": guidance.transition}
        key |= {"n": options.n, "steps": options.steps, "codes": code}
        for seed in range(1, options.seeds + 1):
            if rows.where(**key, seed=seed):
                continue
            x = draw(model, guidance, options.n, seed)
            ours, nearest = two_nearest(x.flatten(1), known.flatten(1))
            values = {**memorisation(ours, theirs), "duplicates": float(often[nearest].mean())}
            images = torch.cat([features(to_uint8(data.decode(part))) for part in x.split(500)])
            values["fid"] = frechet_distance(images, embedded)
            print(rows.add(**key, seed=seed, **values), flush=True)
        found = rows.of_seeds(range(1, options.seeds + 1), **key)
        late = (f"{guidance.before:g}", guidance.transition) if guidance.transition else ("–", "–")
        shares = [mean_sd((100 * row[name] for row in found), 1) for name in ("duplicates", "copies")]
        lines.append([f"{guidance.scale:g}", *late, *shares, mean_sd((row["fid"] for row in found), 1)])
    print(table(["scale", "before", "transition", "drawn to a duplicate, %", "copies, %", "FID"], lines))
    print(
        f"\nof test images {chance:.1%} are nearest to a duplicate, and the ratio test finds "
        f"{found[0]['copies_held_out']:.1%}"
    )


if __name__ == "__main__":
    common.run(main)
