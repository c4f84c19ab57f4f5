"""Mixtures of MNIST classes without retraining: what was asked for against what a classifier counts in the samples.

    uv run benchmarks/linearity.py [--data data] [--out runs/linearity] [--n 10000] [--figure FILE]

Trains, where OUT does not have them yet, an autoencoder and four `model=relative` models in its codes: of all digits,
of 0–4, of 5–9 and of thinned classes (half the steps). Then draws n samples for each request, and n-averaged
samples from averaged scores, Σ w_c ∇log p_c with Σ w_c = 1, which is all that a score model could do:

- ten random weightings of the classes (Dirichlet, seed 0), also with weights corrected by 3 × 2,000 pilot samples of
  seed 2 (`relative.calibrated`);
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
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bd_lightning.relative import Mixture, calibrated, combine
from torch import Tensor

import train
from bd_lightning import checkpoints
from bd_lightning.dynamics import SampleNoise
from bd_lightning.latents import TrainedLatents
from bd_lightning.modules import BellmanDiffusion
from callbacks import ClassifierFeatures
from callbacks.drawing import grid_image
from callbacks.metrics import frechet_distance
from datamodules import MNIST, to_uint8

DIGITS = [str(c) for c in range(10)]
HALVES = {"low": DIGITS[:5], "high": DIGITS[5:]}
THINNED = {digit: round(0.01 ** (c / 9), 4) for c, digit in enumerate(DIGITS)}  # shares kept, from 1 to 0.01
QUIET = ["logger=none", "callbacks.progress=null", "trainer.enable_progress_bar=false", "callbacks.trajectory=null"]


class AveragedScores:
    """Σ w_c ∇log p_c with Σ w_c = 1, as fields with the mobility one."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def reference(self, sigma: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(sigma)

    def log_gradients(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s, S and ∇log s."""
        slope, total = torch.zeros_like(x), 0.0
        for source, weights in self.mixture.terms:
            w = (weights * source.shares).clamp_min(0)
            slope = slope + torch.einsum("c,bc...->b...", w, source.components(x, sigma)[1])
            total = total + w.sum()
        score = slope / total - x / (sigma.square() + self.mixture.sigma_data**2)[:, None]
        return torch.ones_like(sigma), score, torch.zeros_like(x)


def checkpoint(options: argparse.Namespace, name: str, *words: str) -> str:
    """The last checkpoint of a run, which is trained if it is not there."""
    folder = options.out / "bellman-diffusion" / name / "checkpoints"
    path = folder / "best.ckpt" if name == "autoencoder" else folder / "last.ckpt"
    if not path.is_file():
        command = [*words, *QUIET, f"run_id={name}", f"root={options.out}", f"data.root={options.data}"]
        if train.main(command) != 0:
            sys.exit(f"training of {name} failed")
    return str(path)


def models(options: argparse.Namespace) -> tuple[TrainedLatents, dict[str, BellmanDiffusion]]:
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
        found[name] = checkpoints.load(path, BellmanDiffusion)[0]
    return TrainedLatents(code), found


def requests(found: dict[str, BellmanDiffusion]) -> dict[str, tuple[Mixture, Tensor]]:
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


def main() -> None:
    """Train what is missing, run what is not in rows.jsonl, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/linearity"))
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--n-averaged", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    space, found = models(options)
    data = MNIST(root=options.data)
    features = ClassifierFeatures()
    features.prepare(data)
    test = data.load_split("test")
    real = torch.cat([features(rows) for rows in test.x.split(1000)])
    counted = torch.bincount(torch.cat([features.classify(rows) for rows in test.x.split(1000)]), minlength=10) / 1e4
    own = float((counted - torch.bincount(test.labels) / 1e4).abs().sum())
    train_features = torch.cat([features(rows) for rows in data.load_split("train").x[:10_000].split(1000)])
    print(f"classifier: accuracy {features.accuracy:.1%} on validation, L1 {own:.4f} on the test split; ", end="")
    print(f"FID of 10,000 training images to the test split {frechet_distance(real, train_features):.2f}\n")

    path = options.out / "rows.jsonl"
    rows = {row["request"]: row for row in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}
    sampler = found["all"].samplers["sde"]

    def draw(fields: Callable, n: int) -> Tensor:
        batches = torch.arange(n).split(2000)
        codes = [sampler(fields, SampleNoise(rows.tolist(), found["all"].shape, seed=1)) for rows in batches]
        return torch.cat([to_uint8(space.decode(code)) for code in codes])

    def pilot(mixture: Mixture) -> Tensor:
        return sampler(mixture, SampleNoise(range(2000), found["all"].shape, seed=2))

    asked = requests(found)
    for name, (mixture, wanted) in asked.items():
        for way in ("", ", averaged scores", ", calibrated"):
            if name + way in rows or (way == ", calibrated" and not name.startswith(("weighting", "thinned, asked"))):
                continue
            if way == ", averaged scores" and "minus" in name:
                continue
            with torch.no_grad():
                fields: Any = mixture
                if way == ", averaged scores":
                    fields = AveragedScores(mixture)
                elif way:
                    fields = calibrated(mixture, pilot)
                images = draw(fields, options.n_averaged if isinstance(fields, AveragedScores) else options.n)
                parts = images.split(1000)
                labels = torch.cat([features.classify(part) for part in parts])
                fid = frechet_distance(real, torch.cat([features(part) for part in parts]))
            counted = torch.bincount(labels, minlength=10) / len(labels)
            row = {
                "request": name + way,
                "asked": [round(w, 4) for w in wanted.tolist()],
                "counted": [round(w, 4) for w in counted.tolist()],
                "l1": float((counted - wanted).abs().sum()),
                "fid": fid,
                "n": len(images),
            }
            rows[name + way] = row
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name + way}: L1 {row['l1']:.3f}", file=sys.stderr)
    report(rows, asked)
    if options.figure:
        pictures = [
            draw(asked[name][0], 16) for name in ("weighting 0", "without 1", "without 7", "all minus 5–9", "merge")
        ]
        grid_image(torch.cat(pictures), columns=16).save(options.figure)
        frames = []
        for t in torch.linspace(0, 1, 21).tolist():
            mixture = combine([(found["all"].fields, DIGITS, 1.0)], {"1": 1 - t, "7": t})
            frames.append(grid_image(draw(mixture, 32)))
        path = options.figure.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:] + frames[-2:0:-1], duration=150, loop=0)


def _left(row: dict) -> float:
    """Share of the classes that were not asked for."""
    return sum(share for share, asked in zip(row["counted"], row["asked"]) if asked == 0)


def report(rows: dict[str, dict], asked: dict) -> None:
    """Print the table."""
    print("| request | L1, fields | calibrated | averaged scores | removed class, fields | averaged scores | FID |")
    print("|---|---|---|---|---|---|---|")
    for name in asked:
        mine, theirs = rows[name], rows.get(name + ", averaged scores")
        gone = ["–", "–"]
        if name.startswith(("without", "all minus")):
            gone = [f"{_left(row):.2%}" if row else "–" for row in (mine, theirs)]
        averaged = f"{theirs['l1']:.3f}" if theirs else "–"
        fid = f"{mine['fid']:.2f}" if name in ("merge", "union") else "–"
        third = rows.get(f"{name}, calibrated")
        corrected = f"{third['l1']:.3f}" if third else "–"
        print(f"| {name} | {mine['l1']:.3f} | {corrected} | {averaged} | {gone[0]} | {gone[1]} | {fid} |")
    for way in ("", ", calibrated", ", averaged scores"):
        errors = torch.tensor([rows[f"weighting {i}{way}"]["l1"] for i in range(10)])
        print(f"\nten weightings{way or ', fields'}: L1 {errors.mean():.3f} ± {errors.std():.3f}", end="")
    print()


if __name__ == "__main__":
    main()
