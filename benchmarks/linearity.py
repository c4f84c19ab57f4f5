"""Mixtures of MNIST classes without retraining: what was asked for against what a classifier counts in the samples.

    uv run benchmarks/linearity.py [--data data] [--out runs/linearity] [--n 10000] [--figure FILE]

Trains, where OUT does not have them yet, an autoencoder (or takes --autoencoder) and models in its codes by
`experiment=mnist_latent_relative`: of all digits, of 0–4, of 5–9, of thinned classes (half the steps), and ten experts,
one of each class (a quarter of the width, so that all ten together take fewer operations than one of the others). Then
draws n samples for each request by the fields, also with the weights carried along the chains
(`dynamics.TrackedPosterior`), and n-averaged samples in other ways (see `superposition`): from averaged scores, and
with the class of each sample drawn first:

- ten random weightings of the classes (Dirichlet, seed 0), also with weights corrected by 3 × 2,000 pilot samples of
  seed 2 (`fields.calibrated`);
- each class alone, which says what the classifier takes samples of it for;
- the removal of one class, for three classes; and unlearning of 5–9: the model of all digits minus the model of 5–9,
  trained apart, as two densities that know no names, and by the names of their classes, which cancel
  (`fields.combine`); beside the model that saw 0–4 alone, and one without classes (`experiment=mnist_latent`), trained
  on all and then on 0–4 for an eighth of the steps;
- the merge of the two half models, and of the ten experts, against the model of the union: histogram, and FID to the
  test split; and the first three weightings of the experts;
- a model of a thinned training set, 100 % of the 0s down to 1 % of the 9s: as it was trained, and asked for all
  classes alike.

L1 is the sum over classes of |share counted − share asked|; FID is to the test images of the classes asked for. Where
all classes were drawn alone, weightings have two more, which leave the classifier's mistakes out (`apart`), and beside
each what counting the samples alone would make of it. "Nearer" is, for unlearning, the share of samples that are nearer
to a removed training image than to any of as many test images of those classes, 0.5 where nothing of the images is
remembered; "of real images" the same of test images of the classes that stay. Models are trained by --seeds seeds; the
table has means ± sd over them. A finished row is kept in OUT/rows.jsonl with its settings and not computed again; with
--only PATTERN requests whose names the pattern is not found in are left out, with the models that they alone need (that
of all digits is always), and with --model all that need more than one model, which is then this one, of whatever
images; several are added up, experts of a class each, say. --cost prints the processor time of ten experts, and the
memory of more, instead (set OMP_NUM_THREADS=1). The classifier is the one that FID takes its features from; its
accuracy is printed, and so is the L1 that it finds between real test images and their labels. With --figure it draws
samples of some requests, of those that --only does not leave out, and beside FILE, as FILE with the suffix .gif, the
way from one class to another by their weights, always from the same seeds.
"""

import hashlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from bd_lightning.checks import UserError
from bd_lightning.dynamics import TrackedPosterior
from bd_lightning.fields import FieldPair, Mixture, RelativeFields, batched, calibrated, combine
from bd_lightning.networks import MLP
from benchmarks import arguments, common
from benchmarks.linearity_requests import Models, requests
from benchmarks.rows import Rows, mean_sd, sound, table
from benchmarks.superposition import AveragedScores, ClassFirst
from callbacks import ClassifierFeatures
from callbacks.metrics import frechet_distance
from callbacks.pictures import grid_image
from datamodules import to_uint8
from datamodules.subsets import random_subset

FULL, FIDS = ("", ", tracked"), ("merge", "union", "ten experts", "without", "all minus", "trained on")
UNLEARNED = ("all minus", "trained on")
SHOWN = ("weighting 0", "without 1", "without 7", "all minus 5–9", "merge")
Way = Callable[[Any, Tensor], FieldPair]
"""The fields that chains of some numbers (B,) are drawn by, for a mixture."""


def images_of(data: Any, split: str) -> tuple[Tensor, Tensor]:
    """The images of a split, bytes (N, C, H, W), and their classes (N,)."""
    batches = torch.utils.data.DataLoader(data.load_split(split), 1000, collate_fn=data.collate)
    images, labels = zip(*((to_uint8(x), label) for x, label in batches))
    return torch.cat(images), torch.cat(labels)


class Judge:
    """What draws images, and counts their classes.

    Args:
        models: what is asked.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        data = self.models.data.observed
        data.prepare_data()
        self.features = ClassifierFeatures()
        self.features.prepare(data)
        self.test, self.truth = images_of(data, "test")
        self.places = [data.class_names.index(name) for name in models.names]  # of the models' classes in the data's
        self.real, labels = self.judge(self.test)
        classes = len(data.class_names)
        own = float((_shares(labels, classes) - _shares(self.truth, classes)).abs().sum())
        self.train, self.classes = train, _ = images_of(data, "train")
        seen, _ = self.judge(train[random_subset(len(train), min(10_000, len(train)))])
        floor = frechet_distance(self.real, seen)
        print(f"classifier: accuracy {self.features.accuracy:.1%} on validation, L1 {own:.4f} on the test split;")
        print(f"FID of {len(seen)} training images to the test split {floor:.2f}")

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, f) and classes (N,) of images, bytes (N, C, H, W)."""
        parts = images.split(1000)
        return torch.cat([self.features(x) for x in parts]), torch.cat([self.features.classify(x) for x in parts])

    def placed(self, asked: Tensor) -> Tensor:
        """Shares of the models' classes as shares of the data's, which labels count; zero where no model has one."""
        return asked.new_zeros(len(self.models.data.observed.class_names)).index_copy(
            0, torch.tensor(self.places), asked
        )

    def distance(self, features: Tensor, asked: Tensor) -> float:
        """FID of features (N, f) to those of the test images of the classes asked for, shares (C,)."""
        return frechet_distance(self.real[asked[self.truth] > 0], features)

    def remembered(self, images: Tensor, asked: Tensor) -> dict[str, float]:
        """Shares of images, and of real ones, that are `nearer` to training images of classes not asked for (C,)."""
        removed = [found[asked[its] == 0] for found, its in ((self.train, self.classes), (self.test, self.truth))]
        real = self.test[asked[self.truth] > 0]
        return {"nearer": nearer(images, *removed), "nearer_real": nearer(real, *removed)}

    def draw(
        self, mixture: FieldPair, n: int, sampler: str = "sde", way: Way = lambda mixture, rows: mixture
    ) -> Tensor:
        """n images, bytes, of fields, by a sampler, in some way."""
        model = self.models["all"]
        model.samplers.setdefault("tracked", TrackedPosterior())  # checkpoints of before have none
        parts = torch.arange(n).split(2000)
        codes = [model.sample(rows.tolist(), sampler, seed=1, fields=way(mixture, rows)) for rows in parts]
        return torch.cat([to_uint8(self.models.data.decode(code)) for code in codes])

    def pilot(self, mixture: Mixture) -> Tensor:
        """2,000 codes of another seed."""
        return self.models["all"].sample(range(2000), "sde", seed=2, fields=mixture)


def nearer(images: Tensor, train: Tensor, test: Tensor) -> float:
    """Share of images, bytes (n, C, H, W), that are nearer to a training image than to any of as many test images."""
    n = min(len(train), len(test))
    known = [found[random_subset(len(found), n)].flatten(1).float() for found in (train, test)]
    parts = images.flatten(1).float().split(1000)
    train_distance, test_distance = (torch.cat([torch.cdist(part, x).amin(1) for part in parts]) for x in known)
    return float((train_distance < test_distance).double().mean())


def _shares(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels, minlength=classes) / len(labels)


def explained(counted: Tensor, alone: Tensor) -> Tensor:
    """The shares (K,) of classes that explain best what was counted, none negative, by least squares.

    Args:
        counted: what a classifier took samples of a mixture for, shares (C,).
        alone: what it took samples of each of K classes alone for, shares (K, C).

    References:
        | Lipton et al., arXiv 1802.03916 (black-box shift estimation: the matrix of mistakes, inverted)
    """
    shares = torch.from_numpy(nnls(alone.double().T.numpy(), counted.double().numpy())[0])
    return shares / shares.sum()


def apart(counted: Tensor, asked: Tensor, alone: Tensor) -> tuple[float, float]:
    """How far what was counted is from what was asked for, by what each class alone is counted as.

    Args:
        counted: what a classifier took samples of a mixture for, shares (C,).
        asked: shares (K,) of the classes.
        alone: what it took samples of each of the K classes alone for, shares (K, C).

    Returns:
        The L1 of the shares that explain what was counted, and that of the histogram that classes as they are drawn
        alone have, weighted as asked; the second needs no inverse, but does not see what is confused.
    """
    explaining = explained(counted, alone)
    return float((explaining - asked).abs().sum()), float((counted - asked @ alone).abs().sum())


def chance(asked: Tensor, alone: Tensor, sizes: Sequence[int], draws: int = 100) -> tuple[float, float]:
    """What `apart` is on average where the weights are as asked for, and samples are counted.

    Args:
        asked: shares (K,).
        alone: what each class alone is taken for, shares (K, C).
        sizes: how many samples are counted of each of the K classes, and of the mixture.
        draws: how often.
    """
    drawn, each = np.random.default_rng(0), np.array(sizes)
    shares = torch.cat([alone, (asked @ alone)[None]]).double()
    shares = (shares / shares.sum(1, keepdim=True)).numpy()
    found = [torch.from_numpy(drawn.multinomial(each, shares) / each[:, None]).float() for _ in range(draws)]
    told, near = zip(*(apart(counted[-1], asked, counted[:-1]) for counted in found))
    return statistics.mean(told), statistics.mean(near)


OTHERS: dict[str, Way] = {
    ", class first": ClassFirst,
    ", averaged scores": lambda mixture, rows: AveragedScores(mixture),
}
WAYS = ("", ", calibrated", ", tracked", *OTHERS)
"""How a request is carried out: by the fields, with calibrated or carried weights, and in those of `superposition`."""


def ways(name: str) -> list[str]:
    """The ways in which a request is carried out."""
    possible = dict.fromkeys(WAYS, not name.startswith((*UNLEARNED, "only"))) | {"": True}
    possible[", class first"] = name.startswith(("weighting", "thinned, asked"))
    possible[", calibrated"] = "weighting" in name or "asked for" in name
    return [way for way in WAYS if possible[way]]


@torch.no_grad()
def measure(judge: Judge, name: str, mixture: Any, wanted: Tensor, way: str, n: int) -> dict[str, Any]:
    """What n images of a request of some name, carried out in some way, are."""
    if way == ", calibrated":
        mixture = calibrated(mixture, judge.pilot)
    sampler = "tracked" if way == ", tracked" else "sde"
    images = judge.draw(mixture, n, sampler, OTHERS.get(way, lambda mixture, rows: mixture))
    features, labels = judge.judge(images)
    wanted = judge.placed(wanted)
    counted = _shares(labels, len(wanted))
    unlearned = judge.remembered(images, wanted) if name.startswith(UNLEARNED) else {}
    return {
        "asked": [round(w, 4) for w in wanted.tolist()],
        "counted": [round(w, 4) for w in counted.tolist()],
        "l1": float((counted - wanted).abs().sum()),
        "fid": judge.distance(features, wanted),
        **unlearned,
    }


@torch.no_grad()
def cost(rounds: int = 31) -> None:
    """Print what a call of ten experts costs in a sampler, in calls of one network of width 256 with ten classes.

    And what more experts cost: time of one call for all, and memory of their weights, which are there twice once they
    are stacked.
    """
    union, lines = Mixture([(fresh_fields(256, 10), torch.ones(10))]), []
    for width in (64, 256):
        apart = apart_experts(width, 10)
        asked = {"union": union, "apart": apart, "batched": batched(apart)}
        for n in (1, 16, 64, 128, 500, 2000):
            middle = seconds_of(asked, n, rounds)
            ratios = [f"{middle[name] / middle['union']:.2f}" for name in ("apart", "batched")]
            lines.append([width, n, f"{1000 * middle['union']:.1f}", *ratios])
    print(table(["width of an expert", "chains", "one network, ms", "ten calls", "one batched call"], lines))
    of_all = {count: batched(apart_experts(64, count)) for count in (1, 2, 5, 10, 20, 40)}
    few, many = ([f"{1000 * middle:.1f}" for middle in seconds_of(of_all, n, rounds).values()] for n in (64, 500))
    weights = [f"{mebibytes(mixture):.2f}" for mixture in of_all.values()]
    heads = ["experts of width 64", "64 chains, ms", "500 chains, ms", "weights, MiB"]
    print(table(heads, [[*row] for row in zip(of_all, few, many, weights)]))


def fresh_fields(width: int, classes: int) -> RelativeFields:
    """Fields in 32 numbers whose network has learned nothing."""
    made = RelativeFields(MLP((32,), classes, per_class=True, width=width), 1.0, classes)
    made.count(torch.arange(classes))
    return made.eval()


def apart_experts(width: int, count: int) -> Mixture:
    """The sum of so many of one class each."""
    return Mixture([(fresh_fields(width, 1), torch.ones(1)) for _ in range(count)])


def seconds_of(asked: dict[Any, Mixture], n: int, rounds: int) -> dict[Any, float]:
    """The median processor time of a call of each mixture with n chains; the mixtures take turns."""
    x, seconds = torch.randn(n, 32), {name: [] for name in asked}
    for _ in range(rounds):
        for name, mixture in asked.items():
            start = time.process_time()
            mixture.at(1.0).log_gradients(x, x.new_ones(n))
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def mebibytes(mixture: Mixture) -> float:
    """Memory of the weights of batched experts, and of their stack."""
    ((experts, _),) = mixture.terms
    states = [one.network.state_dict() for one in experts.members] + [experts.stacked or {}]
    return sum(value.nbytes for state in states for value in state.values()) / 2**20


def main() -> None:
    """Train what is missing, run what is not in rows.jsonl, print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", default="data")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/linearity"))
    parser.add_argument("--n", type=common.count, default=10_000)
    parser.add_argument("--n-averaged", type=common.count, default=2500)
    parser.add_argument("--steps", type=common.at_least(8), help="of a training; 8000 if left out")
    parser.add_argument("--seeds", type=common.count, help="trainings of each model, 1; samples have seed 1")
    parser.add_argument("--autoencoder")
    parser.add_argument("--model", nargs="+", help="trained by model=relative")
    parser.add_argument("--only", type=arguments.pattern, default=re.compile(""))
    parser.add_argument("--figure", type=arguments.picture(".png", ".jpg"))
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        return cost()
    trained = {name: getattr(options, name) for name in ("steps", "seeds", "autoencoder")}
    if options.model and (unread := [f"--{name}" for name, value in trained.items() if value is not None]):
        parser.error(f"--model is trained already: leave {', '.join(unread)} out")
    options.steps, options.seeds = options.steps or 8000, options.seeds or 1
    rows, models = checked(Rows(options.out / "rows.jsonl")), [Models(options, seed) for seed in range(options.seeds)]
    names = list(requests(models[0]))
    wanted = [name for name in names if any(options.only.search(name + way) for way in ways(name))]
    if not wanted:
        parser.error(f"--only finds none of {', '.join(names)}, alone or followed by one of {'; '.join(WAYS[1:])}")
    if options.figure and not set(wanted) & set(SHOWN):
        parser.error(f"--figure shows {', '.join(SHOWN)}, and --only leaves all of them out")
    codes = models[0].data.facts.space
    settings = {"steps": options.steps, "codes": codes, "model": models[0].known}
    judge, done = Judge(models[0]), {}
    images = hashlib.sha256(judge.test.numpy()).hexdigest()[:8]  # of other ones nothing is known
    for seed, judge.models in enumerate(models):
        for name, make in requests(judge.models).items():
            for way in ways(name):
                kept = {"request": name + way, "n": options.n_averaged if way in OTHERS else options.n}
                kept |= {"seed": seed, **settings}
                kept |= {"drawn": "class by class"} if way == ", tracked" else {}  # rows of before are by their mean
                found = [row for row in rows.where(**kept) if row.get("images", images) == images]
                if options.only.search(name + way) and not found:
                    found = [rows.add(**kept, images=images, **measure(judge, name, *make(), way, kept["n"]))]
                    print(f"seed {seed}, {name + way}: L1 {found[0]['l1']:.3f}", file=sys.stderr)
                for row in found[:1]:
                    done.setdefault(name + way, []).append(row)
    with sound(rows.path):
        report(done, names)
    if options.figure:
        judge.models = models[0]
        draw(judge, {name: make for name, make in requests(models[0]).items() if name in wanted}, options.figure)


def checked(rows: Rows) -> Rows:
    """Rows, each of which is what was counted of one request.

    Raises:
        UserError: naming the first that is not.
    """
    for row in rows:
        shares = [row["asked"], row["counted"]]
        whole = all(isinstance(part, list) and len(part) == len(shares[0]) for part in shares)
        numbers = [row["l1"], row["fid"], *(one for part in shares if whole for one in part)]
        if not whole or not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            raise UserError(
                f"{row.place} is damaged, asked, counted, l1 and fid are no numbers, or not of as many classes: delete "
                "that line, or mend it"
            )
    return rows


def draw(judge: Judge, asked: dict[str, Callable[[], tuple[FieldPair, Tensor]]], path: Path) -> None:
    """Samples of some requests, and the way from one class to another, if there are two."""
    classes = judge.models.names
    shown = [judge.draw(asked[name]()[0], 16) for name in SHOWN if name in asked]
    grid_image(torch.cat(shown), columns=16).save(path)
    if len(classes) < 2:
        return
    frames, there = [], classes[(1 + 3 * len(classes) // 5) % len(classes)]
    for t in torch.linspace(0, 1, 21).tolist():
        mixture = combine(judge.models.sources, {classes[1]: 1 - t, there: t})
        frames.append(grid_image(judge.draw(mixture, 32)))
    there_and_back = frames[1:] + frames[-2:0:-1]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=there_and_back, duration=150, loop=0)


def _left(row: dict) -> float:
    """Share of the classes that were not asked for, in percent."""
    return 100 * sum(share for share, asked in zip(row["counted"], row["asked"]) if asked == 0)


def as_drawn_alone(row: dict, alone: list[dict]) -> list[float]:
    """By `apart` and `chance` in turn, of a weighting, whose classes were also drawn alone."""
    asked = torch.tensor([row["asked"][one["asked"].index(1.0)] for one in alone])
    counted = torch.tensor([one["counted"] for one in alone])
    found = apart(torch.tensor(row["counted"]), asked, counted)
    by_counting = chance(asked, counted, [*(one["n"] for one in alone), row["n"]])
    return [number for pair in zip(found, by_counting) for number in pair]


def report(rows: dict[str, list[dict]], names: list[str]) -> None:
    """Print the table of the rows that there are, mean ± sd over seeds."""
    singles = [name for name in names if name.startswith("only")]

    def unmistaken(row: dict) -> list[list[float]]:
        """`as_drawn_alone`, if all classes were, by the same seed."""
        alone = [one for name in singles for one in rows.get(name, []) if one["seed"] == row["seed"]]
        return [as_drawn_alone(row, alone)] if singles and len(alone) == len(singles) else []

    names, lines = [name for name in names if any(name + way in rows for way in WAYS)], []
    for name in names:
        found = {way: rows.get(name + way, []) for way in WAYS}
        cells = [mean_sd((row["l1"] for row in part), 3) for part in found.values()]
        for way in FULL:
            gone = found[way] if name.startswith(("without", *UNLEARNED)) else []
            judged = found[way] if name.startswith(FIDS) else []
            cells += [mean_sd(map(_left, gone)), mean_sd(row["fid"] for row in judged)]
        lines.append([name, *cells])
    heads = [f"{what}{way or ', fields'}" for way in FULL for what in ("removed class, %", "FID")]
    print(table(["request", *(f"L1{way or ', fields'}" for way in WAYS), *heads], lines))
    lines = []
    for start in ("weighting", "experts, weighting"):
        for way in WAYS:
            found = {name + way: rows.get(name + way, []) for name in names if name.startswith(start)}
            errors = [row["l1"] for part in found.values() for row in part]
            if errors:
                print(f"\n{len(errors)} of {start}{way or ', fields'}: L1 {mean_sd(errors, 3)}", end="")
            judged = {name: [four for row in part for four in unmistaken(row)] for name, part in found.items()}
            lines += [[name, *(mean_sd(column, 3) for column in zip(*part))] for name, part in judged.items() if part]
            if told := [four for part in judged.values() for four in part]:
                explaining, _, near, _ = (mean_sd(column, 3) for column in zip(*told))
                print(f", {explaining} of the shares that explain what was counted, {near} against the ", end="")
                print("classes as drawn alone", end="")
    if lines:
        heads = ["L1 of the shares that explain it", "L1 against the classes as drawn alone"]
        print(f"\n\n{table(['request', *(cell for head in heads for cell in (head, 'by counting'))], lines)}", end="")
    for name, part in rows.items():
        if seen := [row for row in part if "nearer" in row]:
            ours, real = (mean_sd((row[key] for row in seen), 3) for key in ("nearer", "nearer_real"))
            print(f"\n{name}: nearer {ours}, of real images {real}", end="")
    print()


if __name__ == "__main__":
    common.run(main)
