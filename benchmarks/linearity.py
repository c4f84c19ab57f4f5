"""Mixtures of MNIST classes without retraining: what was asked for against what a classifier counts in the samples.

    uv run benchmarks/linearity.py [--data data] [--out runs/linearity] [--n 10000] [--figure FILE]

Trains, where OUT does not have them yet, an autoencoder and four `model=relative` models in its codes: of all digits,
of 0–4, of 5–9 and of thinned classes (half the steps). Then draws n samples for each request, and n-averaged
samples from averaged scores, Σ w_c ∇log p_c with Σ w_c = 1, which is all that a score model could do:

- ten random weightings of the classes (Dirichlet, seed 0), also with weights corrected by 3 × 2,000 pilot samples of
  seed 2 (`fields.calibrated`);
- the removal of one class, for three classes; and unlearning: the model of all digits minus the model of 5–9, by a
  negative weight, which leaves what was never told apart by classes;
- the merge of the two half models, against the model of the union: histogram, and FID to the test split;
- a model of a thinned training set, 100 % of the 0s down to 1 % of the 9s: as it was trained, and asked for all
  classes alike.

L1 is the sum over classes of |share counted − share asked|. A finished row is kept in OUT/rows.jsonl and not computed
again. The classifier is the one that FID takes its features from; its accuracy is printed, and so is the L1 that it
finds between real test images and their labels. With --figure it draws samples of some requests, and beside FILE, as
FILE with the suffix .gif, the way from one class to another by their weights, always from the same seeds.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import train
from bd_lightning import checkpoints
from bd_lightning.fields import FieldPair, Mixture, calibrated, combine
from bd_lightning.latents import TrainedLatents
from bd_lightning.modules import RelativeDensities
from benchmarks import common
from benchmarks.common import Rows, mean_sd, table
from callbacks import ClassifierFeatures
from callbacks.metrics import frechet_distance
from callbacks.pictures import grid_image
from datamodules import MNIST, to_uint8

DIGITS = [str(c) for c in range(10)]
HALVES = {"low": DIGITS[:5], "high": DIGITS[5:]}
THINNED = {digit: round(0.01 ** (c / 9), 4) for c, digit in enumerate(DIGITS)}  # shares kept, from 1 to 0.01
QUIET = ["logger=none", "callbacks.progress=null", "trainer.enable_progress_bar=false", "callbacks.trajectory=null"]


class AveragedScores(FieldPair):
    """Σ w_c ∇log p_c with Σ w_c = 1, as fields with the mobility one.

    Args:
        mixture: the weights and the classes.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The fields (s, g) at x (B, d) and noise levels sigma (B,)."""
        slope, total = torch.zeros_like(x), x.new_zeros(())
        for source, weights in self.mixture.terms:
            w = (weights * source.shares).clamp_min(0)
            slope = slope + torch.einsum("c,bc...->b...", w, source.components(x, sigma)[1])
            total = total + w.sum()
        score = slope / total - x / (sigma.square() + self.mixture.sigma_data**2)[:, None]
        return torch.ones_like(sigma), score / 2


def checkpoint(options: argparse.Namespace, name: str, *words: str) -> str:
    """The last checkpoint of a run, which is trained if it is not there."""
    folder = options.out / "bellman-diffusion" / name / "checkpoints"
    path = folder / "best.ckpt" if name == "autoencoder" else folder / "last.ckpt"
    if not path.is_file():
        command = [
            *words,
            *QUIET,
            f"run_id={name}",
            "ckpt_path=last",
            f"root={options.out}",
            f"data.root={options.data}",
        ]
        if train.main(command) != 0:
            sys.exit(f"training of {name} failed")
    return str(path)


def models(options: argparse.Namespace) -> tuple[TrainedLatents, dict[str, RelativeDensities]]:
    """The latent space, and the models of all digits and of the two halves."""
    code = checkpoint(options, "autoencoder", "experiment=autoencoder")
    common = ["experiment=mnist_latent", "model=relative", f"data.autoencoder.ckpt_path={code}", "model.lr=2e-3"]
    common += ["callbacks.metrics=null", "callbacks.best=null"]
    found = {}
    thinned = "{" + ", ".join(f"{digit}: {share}" for digit, share in THINNED.items()) + "}"
    kept = {name: f"[{','.join(digits)}]" for name, digits in {"all": DIGITS, **HALVES}.items()} | {"thin": thinned}
    for name, keep in kept.items():
        steps = options.steps // 2 if name == "thin" else options.steps
        length = [f"steps={steps}", f"eval_every={steps}"]
        path = checkpoint(options, name, *common, *length, f"data.images.keep={keep}")
        found[name] = checkpoints.load(path, RelativeDensities)[0]
    return TrainedLatents(code), found


def requests(found: dict[str, RelativeDensities]) -> dict[str, tuple[Mixture, Tensor]]:
    """What is asked for: a mixture and the histogram that it should have."""
    full, low, high = (found[name] for name in ("all", "low", "high"))
    one, asked = [(full.fields, DIGITS, 1.0)], {}
    generator = torch.distributions.Dirichlet(torch.full((10,), 0.5))
    torch.manual_seed(0)
    for i in range(10):
        weights = generator.sample()
        asked[f"weighting {i}"] = combine(one, dict(zip(DIGITS, weights.tolist()))), weights
    shares = full.fields.shares
    for digit in ("1", "4", "7"):
        left = shares * torch.tensor([name != digit for name in DIGITS])
        asked[f"without {digit}"] = combine(one, remove=[digit]), left / left.sum()
    taken = float(shares[5:].sum())
    left = shares * (torch.arange(10) < 5)
    asked["all minus 5–9"] = combine(one) - taken * combine([(high.fields, HALVES["high"], 1.0)]), left / left.sum()
    both = [(low.fields, HALVES["low"], 1.0), (high.fields, HALVES["high"], 1.0)]
    counts = torch.cat([low.fields.shares, high.fields.shares]) / 2
    asked["merge"] = combine(both), counts
    asked["merge, uniform"] = combine(both, dict.fromkeys(DIGITS, 0.1)), torch.full((10,), 0.1)
    asked["union"] = combine(one), shares
    thin = [(found["thin"].fields, DIGITS, 1.0)]
    asked["thinned, as trained"] = combine(thin), found["thin"].fields.shares
    asked["thinned, asked for uniform"] = combine(thin, dict.fromkeys(DIGITS, 0.1)), torch.full((10,), 0.1)
    return asked


class Judge:
    """What draws images, and counts their classes.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.space, self.models = models(options)
        data = MNIST(root=options.data)
        self.features = ClassifierFeatures()
        self.features.prepare(data)
        test = data.load_split("test")
        self.real, labels = self.judge(test.x)
        own = float((_shares(labels) - _shares(test.labels)).abs().sum())
        seen, _ = self.judge(data.load_split("train").x[:10_000])
        floor = frechet_distance(self.real, seen)
        print(f"classifier: accuracy {self.features.accuracy:.1%} on validation, L1 {own:.4f} on the test split;")
        print(f"FID of 10,000 training images to the test split {floor:.2f}")

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, f) and classes (N,) of images, bytes (N, C, H, W)."""
        parts = images.split(1000)
        return torch.cat([self.features(x) for x in parts]), torch.cat([self.features.classify(x) for x in parts])

    def draw(self, fields: FieldPair, n: int) -> Tensor:
        """n images, bytes."""
        model = self.models["all"]
        codes = [model.sample(rows.tolist(), "sde", seed=1, fields=fields) for rows in torch.arange(n).split(2000)]
        return torch.cat([to_uint8(self.space.decode(code)) for code in codes])

    def pilot(self, mixture: Mixture) -> Tensor:
        """2,000 codes of another seed."""
        return self.models["all"].sample(range(2000), "sde", seed=2, fields=mixture)


def _shares(labels: Tensor) -> Tensor:
    return torch.bincount(labels, minlength=10) / len(labels)


WAYS = ("", ", averaged scores", ", calibrated")


def ways(name: str) -> list[str]:
    """How a request is carried out: by the fields, by averaged scores, by the fields with calibrated weights."""
    possible = {
        "": True,
        ", averaged scores": "minus" not in name,
        ", calibrated": name.startswith(("weighting", "thinned, asked")),
    }
    return [way for way in WAYS if possible[way]]


@torch.no_grad()
def carry_out(judge: Judge, mixture: Mixture, way: str, options: argparse.Namespace) -> Tensor:
    """Images of a request."""
    if way == ", averaged scores":
        return judge.draw(AveragedScores(mixture), options.n_averaged)
    return judge.draw(calibrated(mixture, judge.pilot) if way else mixture, options.n)


def main() -> None:
    """Train what is missing, run what is not in rows.jsonl, print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/linearity"))
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--n-averaged", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    judge, rows = Judge(options), Rows(options.out / "rows.jsonl")
    asked = requests(judge.models)
    for name, (mixture, wanted) in asked.items():
        for way in ways(name):
            if rows.where(request=name + way):
                continue
            images = carry_out(judge, mixture, way, options)
            features, labels = judge.judge(images)
            counted = _shares(labels)
            row = rows.add(
                request=name + way,
                asked=[round(w, 4) for w in wanted.tolist()],
                counted=[round(w, 4) for w in counted.tolist()],
                l1=float((counted - wanted).abs().sum()),
                fid=frechet_distance(judge.real, features),
                n=len(images),
            )
            print(f"{name + way}: L1 {row['l1']:.3f}", file=sys.stderr)
    report({row["request"]: row for row in rows}, list(asked))
    if options.figure:
        draw(judge, asked, options.figure)


def draw(judge: Judge, asked: dict[str, tuple[Mixture, Tensor]], path: Path) -> None:
    """Samples of some requests, and the way from one class to another."""
    names = ("weighting 0", "without 1", "without 7", "all minus 5–9", "merge")
    grid_image(torch.cat([judge.draw(asked[name][0], 16) for name in names]), columns=16).save(path)
    frames = []
    for t in torch.linspace(0, 1, 21).tolist():
        mixture = combine([(judge.models["all"].fields, DIGITS, 1.0)], {"1": 1 - t, "7": t})
        frames.append(grid_image(judge.draw(mixture, 32)))
    there_and_back = frames[1:] + frames[-2:0:-1]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=there_and_back, duration=150, loop=0)


def _left(row: dict) -> float:
    """Share of the classes that were not asked for."""
    return sum(share for share, asked in zip(row["counted"], row["asked"]) if asked == 0)


def report(rows: dict[str, dict], names: list[str]) -> None:
    """Print the table."""
    lines = []
    for name in names:
        mine, theirs, third = rows[name], rows.get(f"{name}, averaged scores"), rows.get(f"{name}, calibrated")
        gone = ["–", "–"]
        if name.startswith(("without", "all minus")):
            gone = [f"{_left(row):.2%}" if row else "–" for row in (mine, theirs)]
        found = [f"{row['l1']:.3f}" if row else "–" for row in (mine, third, theirs)]
        lines.append([name, *found, *gone, f"{mine['fid']:.2f}" if name in ("merge", "union") else "–"])
    header = ["request", "L1, fields", "calibrated", "averaged scores", "removed class, fields", "averaged scores"]
    print(table([*header, "FID"], lines))
    for way in ("", ", calibrated", ", averaged scores"):
        errors = mean_sd((rows[f"weighting {i}{way}"]["l1"] for i in range(10)), 3)
        print(f"\nten weightings{way or ', fields'}: L1 {errors}", end="")
    print()


if __name__ == "__main__":
    common.run(main)
