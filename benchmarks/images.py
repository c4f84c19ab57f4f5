"""Image generation at equal cost: Bellman Diffusion, score matching, DDPM and flow matching.

    uv run --group benchmarks benchmarks/images.py [--experiment mnist_latent] [--seeds 1] [--out runs/images]
        [--habits] [--only NAME] [KEY=VALUE ...]

Everything is trained with the same network, data, batches, optimiser, schedule, clipping and averaging, those of the
experiment's config unless its name says otherwise, and sampled with the same number of network calls (35; the paper's
own dynamics take 300). Two cores: `--experiment mnist_latent data.autoencoder.ckpt_path=…`, or `mnist_small` for
pixels; a GPU: `--experiment mnist` or `cifar10`.

- Bellman Diffusion: the experiment's own; and as the paper writes it (`model=paper`, optimiser and rate as there).
- Score matching: the constant kernel, all else equal.
- Both with AdamW at 3e-3, independent noise, and the former then with its trace by Hutchinson, with a combined trace,
  and with antithetic pairs in strata of noise levels.
- DDPM: linear betas, 1,000 steps, the loss on the noise, sampled by diffusers' own DDIM and DPM-Solver++ (one
  training, the two samplers are separate rows).
- Flow matching: independent coupling, sampled by Heun's method.

A finished row is kept in OUT/rows.jsonl with the settings that it is of, trained weights beside it, and neither is
computed again; other settings may go to the same folder. A training that is kept is not repeated for another curve,
and one that is stopped goes on from where it was five minutes ago at most.
KEY=VALUE are settings of the data, the model, callbacks.metrics.features, callbacks.ema.decay and
trainer.gradient_clip_val. Prints Markdown tables of the settings, methods, habits and seeds that are asked for: FID,
KID, precision and recall of n samples against the test split, mean over seeds; FID of --n-curve samples (0: none) after
each quarter of the training; the time of a training step relative to DDPM's (all take turns, step by step; median over
rounds), memory (on a GPU the peak of a training step; on a CPU what autograd keeps for its backward pass), and sampling
time per 1,000 images. FID without averaging comes beside; --habits also trains the default with each other habit
switched: clipping, warm-up, decay, bf16, and where they apply mirrored images, channels-last and compilation. --only
takes methods or habits, and may be repeated. --figure draws grids and curves of seed 0.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from bd_lightning.checks import UserError
from bd_lightning.cli import build
from bd_lightning.dynamics import SamplingDiverged
from benchmarks import arguments, common
from benchmarks.common import Recipe, Training, optional
from benchmarks.images_costs import speed
from benchmarks.images_report import costs_of, draw, report
from benchmarks.peers import CALLS, DDPM, Bellman, FlowMatching
from benchmarks.rows import Rows, sound
from callbacks.metrics import NEIGHBOURS, Given, frechet_distance, precision_recall
from datamodules import to_uint8
from datamodules.subsets import random_subset

EQUAL = [f"model.samplers.sde.levels={CALLS}", "model.samplers.sde.relaxation=0.5", "model.samplers.ode.steps=18"]
DEFAULT, DDPM_NAME, PAPER = "Bellman Diffusion", "DDPM", "Bellman Diffusion, as in the paper"
UNAVERAGED = "no averaging"
ADAMW = [
    "model.optimizer._target_=bd_lightning.optimizers.AdamW", "model.lr=3.0e-3", "model.noise.antithetic=0",
    "model.noise.stratified=false",
]  # fmt: skip
CONSTANT = "model.kernel._target_=bd_lightning.kernels.Constant"
OURS = {
    DEFAULT: EQUAL,
    "score matching": [*EQUAL, CONSTANT],
    "Bellman Diffusion, AdamW": [*EQUAL, *ADAMW],
    "score matching, AdamW": [*EQUAL, *ADAMW, CONSTANT],
    "Bellman Diffusion, AdamW, combined trace": [*EQUAL, *ADAMW, "model.objective.trace=combined"],
    "Bellman Diffusion, AdamW, antithetic": [
        *EQUAL, *ADAMW, "model.noise.antithetic=0.5", "model.noise.stratified=true",
    ],
    "Bellman Diffusion, AdamW, trace by Hutchinson": [*EQUAL, *ADAMW, "model.objective.trace=hutchinson"],
    PAPER: ["model=paper"],
}  # fmt: skip
PEERS = {DDPM_NAME: DDPM, "flow matching": FlowMatching}
NAMES = [DEFAULT, "score matching", *PEERS, *list(OURS)[2:]]
READ = ("data", "data.", "model", "model.", "callbacks", "callbacks.metrics.features", "callbacks.metrics.features.")
READ += ("callbacks.ema.decay", "trainer.gradient_clip_val")
INSTEAD = {word.partition("=")[0]: "all methods make as many network calls" for word in EQUAL} | {
    "model.init": "all begin anew",
    "experiment": "use --experiment", "steps": "use --steps", "seed": "use --seeds", "precision": "use --bf16",
    "callbacks.metrics.n": "use --n", "callbacks.metrics.n_test": "use --n", "trainer.precision": "use --bf16",
    "trainer.max_steps": "use --steps", "trainer.accelerator": "use --device", "root": "use --out", "n": "use --n",
    "trainer.accumulate_grad_batches": "use data.batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Habit:
    """What is switched in the training of the default.

    Args:
        recipe: fields of the recipe.
        words: settings of the model.
        mirrored: whether images are mirrored; None leaves it.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()
    mirrored: bool | None = None


class Suite:
    """The data, the features, how methods are built, trained and scored, and the settings that rows of each are of."""

    default, base = DEFAULT, DDPM_NAME

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.words = [f"experiment={options.experiment}", *options.words]
        self.config = common.compose(*self.words)
        self.data = common.make_data(self.config)
        self.data.prepare_data()
        self.data.setup("fit")
        self.facts = self.data.facts
        self.pixels = self.data.observed is self.data
        self.mirrored = self.pixels and self.data.observed.flip
        self.habits = self._habits()
        if unknown := set(options.only or ()) - {*NAMES, *self.habits}:
            raise UserError(f"--only: no {quoted(sorted(unknown))}; there are {quoted([*NAMES, *self.habits])}")
        self.features = build.instantiate(self.config["callbacks"]["metrics"]["features"], "features")
        self.features.prepare(self.data.observed)
        self.features.to(self.device)
        split = torch.utils.data.DataLoader(
            self.data.observed.load_split("test"), 1000, collate_fn=self.data.observed.collate
        )
        self.real = torch.cat([self.features(to_uint8(x).to(self.device)).cpu() for x, _ in split])
        self.steps = options.steps or self.config["steps"]
        words = [word for word in options.words if not word.startswith("model.lr=")]  # no cost depends on the rate
        self.speeds = {"experiment": options.experiment, "words": words, "bf16": options.bf16, "device": options.device}
        self.speeds["config"] = self.digest(lr=None)
        self.trained = {**self.speeds, "words": options.words, "steps": self.steps, "config": self.digest()}
        self.curved, self.scored = {**self.trained, "n": options.n_curve}, {**self.trained, "n": options.n}
        self.model = common.make_model(self.config, self.facts.arguments)

    def digest(self, **model: Any) -> str:
        """What tells configs apart that have the same name, with other values of some arguments of the model."""
        clip, callbacks = self.config["trainer"].get("gradient_clip_val"), self.config["callbacks"]
        features = callbacks["metrics"]["features"]
        parts = [self.config["data"], self.config["model"] | model, clip, callbacks["ema"], features]
        if self.facts.space is not None:  # the codes of an autoencoder, whatever lies at its path
            parts.append(self.facts.space)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]

    def _habits(self) -> dict[str, Habit]:
        """What can be switched, of the habits that the experiment can have."""

        def name(on: bool, habit: str) -> str:
            return f"no {habit}" if on else habit

        bf16, network = self.options.bf16, self.config["model"]["network"]
        found = {"no clipping": Habit({"clip": None}), "no warm-up": Habit({"warmup_steps": 0})}
        found |= {"no decay": Habit({"decay": False}), name(bf16, "bf16"): Habit({"bf16": not bf16})}
        if self.pixels:
            found[name(self.mirrored, "mirrored images")] = Habit(mirrored=not self.mirrored)
        if network["_target_"].endswith("UNet"):
            found["no channels-last"] = Habit(words=["model.network.channels_last=false"])
        if self.device.type == "cuda":
            found["compiled"] = Habit(words=["model.compile=true"])
        return found

    def build(self, name: str, seed: int, words: Sequence[str] = ()) -> Any:
        """An untrained method; `words` are more settings of one of ours."""
        if name in OURS:
            config = common.compose(*words_of(name, self.words), *words)
            return Bellman(common.make_model(config, self.facts.arguments, seed)).to(self.device)
        torch.manual_seed(seed)
        return PEERS[name](self.config, self.facts.arguments).to(self.device)

    def recipe_of(self, method: Any) -> Recipe:
        """How a method is trained: as it asks for itself, or else as the experiment's own model."""
        return Recipe.of(method.trained_as or self.model, self.config, self.steps, self.options.bf16)

    def batches(self, seed: int, mirrored: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end, half of the images mirrored if asked for."""
        torch.manual_seed(seed)
        for x, label in common.batches(self.data, seed):
            if mirrored:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
            yield x.to(self.device), label.to(self.device)

    def weights(self, name: str, seed: int) -> Path:
        """Where the weights of a training with these settings are kept."""
        settings = hashlib.sha256(repr(self.trained).encode()).hexdigest()[:8]
        return self.options.out / f"{name.replace(' ', '-')}-{seed}-{settings}.pt"

    def restore(self, method: Any, name: str, seed: int) -> Any:
        """A method with weights that were kept, in evaluation mode."""
        common.restore(method, self.weights(name, seed), self.device)
        return method.eval()

    def train(self, name: str, seed: int, kept: Path, habit: Habit = Habit()) -> Iterator[tuple[int, Any, Any]]:
        """Trains, or goes on from what was kept, and yields (steps, averaged, raw) at each quarter that lies ahead."""
        method = self.build(name, seed, habit.words)
        training = Training(method, replace(self.recipe_of(method), **habit.recipe))
        mirrored = self.mirrored if habit.mirrored is None else habit.mirrored
        quarters = [round(self.steps * k / 4) for k in (1, 2, 3, 4)]
        for done, (x, label) in training.onward(self.batches(seed, mirrored), self.steps, kept):
            training.step(partial(method.loss, x, label))
            if done in quarters:
                chance = common.chance()
                yield done, training.averaged, method.eval()
                common.set_chance(chance)
                method.train()

    def precision(self) -> torch.autocast:
        """The precision of the training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    @torch.no_grad()
    def draw(self, method: Any, sampler: str, n: int) -> Iterator[Tensor]:
        """n images, bytes, a thousand at a time, in the precision of the training."""
        for start in range(0, n, 1000):
            rows = range(start, min(n, start + 1000))
            label = None
            if method.conditional:
                label = torch.tensor([i % self.facts.num_classes for i in rows], device=self.device)
            with self.precision():
                samples = method.samplers[sampler](method, rows, label)
            yield to_uint8(self.data.decode(samples.float()))

    def score(self, method: Any, sampler: str, n: int) -> dict[str, float]:
        """FID of n samples; with options.n of them KID, precision and recall too."""
        try:
            found = torch.cat([self.features(x.to(self.device)).cpu() for x in self.draw(method, sampler, n)])
        except SamplingDiverged as error:
            print(f"{sampler}: {error}", file=sys.stderr)
            return {"fid": math.inf}
        values = {"fid": frechet_distance(self.real, found)}
        if n == self.options.n:
            few = min(n, len(self.real))
            kid = KernelInceptionDistance(feature=Given(found.shape[1]), subsets=50, subset_size=min(1000, few))
            torch.manual_seed(0)
            kid.update(self.real / self.features.kid_scale, real=True)
            kid.update(found / self.features.kid_scale, real=False)
            values["kid"] = float(kid.compute()[0])
            values["precision"], values["recall"] = precision_recall(
                found[:few], self.real[random_subset(len(self.real), few)]
            )
        return values


def learn(suite: Suite, name: str, seed: int, rows: Rows, habit: Habit | None = None) -> None:
    """Train a method, or the default with a habit switched; keep a method's curve, and the weights."""
    averaged: Any = None
    raw: Any = None
    kept = suite.weights(name, seed).with_suffix(".training")
    method, switched = (name, Habit()) if habit is None else (DEFAULT, habit)
    for done, averaged, raw in suite.train(method, seed, kept, switched):  # noqa: B007
        if habit is not None:
            continue
        key = {"kind": "curve", "name": name, "seed": seed, "done": done, **suite.curved}
        if suite.options.n_curve and not rows.where(**key):
            rows.say(**key, fid=suite.score(averaged, averaged.main, suite.options.n_curve)["fid"])
    if name == DEFAULT:
        common.save(raw.state_dict(), suite.weights(UNAVERAGED, seed))
    common.save(averaged.state_dict(), suite.weights(name, seed))
    kept.unlink(missing_ok=True)


def judge(suite: Suite, name: str, seed: int, rows: Rows) -> None:
    """Keep the scores of a method that are missing, and train it where it was not."""
    method = suite.build(name, seed)
    found = [("score", name, sampler) for sampler in method.samplers]
    if name == DEFAULT:
        found.append(("habit", UNAVERAGED, method.main))
    for kind, what, sampler in found:
        key = {"kind": kind, "name": what, "sampler": sampler, "seed": seed, **suite.scored}
        if not rows.where(**key):
            if not suite.weights(what, seed).exists():
                learn(suite, name, seed, rows)
            rows.say(**key, **suite.score(suite.restore(method, what, seed), sampler, suite.options.n))


def check(options: argparse.Namespace) -> None:
    """Refuse words and configs that the benchmark has no use for, before anything is computed."""
    options.words = arguments.settings(options.words, READ, INSTEAD)
    words = [f"experiment={options.experiment}", *options.words]
    config = common.compose(*words)
    build.check_kind(config["model"], "model", "bd_lightning.modules.BellmanDiffusion")
    metrics = (config["callbacks"] or {}).get("metrics") or {}
    if not metrics.get("features"):
        raise UserError("this benchmark is of images, and callbacks.metrics of this config have no features of them")
    common.averaging(config)
    for name in [name for name in OURS if name in options.only] or [DEFAULT] if options.only else OURS:
        common.compose(*words_of(name, words))
        given = dict(word.split("=", 1) for word in options.words)
        for key, own in (word.split("=", 1) for word in OURS[name]):
            if given.get(key, own) != own:
                print(f"{name} keeps its own {key}={own}: {key}={given[key]} is not for it", file=sys.stderr)


def words_of(name: str, words: Sequence[str]) -> list[str]:
    """Those of one of ours after those of the command line; the paper's single level takes none about noise levels."""
    own = [word for word in words if not (name == PAPER and word.startswith(("model.noise.", "model.noise=")))]
    return [*own, *OURS[name]]


def quoted(names: Sequence[str]) -> str:
    """Names, some of which have commas, in one sentence."""
    return ", ".join(f"'{name}'" for name in names)


def main() -> None:
    """Train what is missing, print the tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--experiment", default="mnist_latent", help="as in train.py")
    parser.add_argument("--out", type=arguments.folder, default=Path("runs/images"), help="folder of rows and weights")
    parser.add_argument("--steps", type=common.count, help="of each training; the experiment's own if left out")
    parser.add_argument("--seeds", type=common.count, default=1, help="how many trainings of each method")
    parser.add_argument("--n", type=common.at_least(NEIGHBOURS + 1), default=10_000, help="samples of a score")
    parser.add_argument("--n-curve", type=common.at_least(0), default=2000, help="samples of a point of a curve")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=arguments.device, default=device, help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="train and sample in bfloat16")
    parser.add_argument("--habits", action="store_true", help="train the default with each habit switched")
    parser.add_argument("--only", action="append", help="a method or a habit; may be repeated")
    picture = arguments.picture(".png", ".jpg", ".pdf")
    parser.add_argument("--figure", type=picture, help="file of the grids; curves go beside it")
    parser.add_argument("words", nargs="*", help="settings of the config, as in train.py")
    options = parser.parse_intermixed_args()
    if UNAVERAGED in (options.only or ()):
        parser.error(f"--only: '{UNAVERAGED}' comes beside '{DEFAULT}', ask for that")
    rows = Rows(options.out / "rows.jsonl")
    check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    methods = [name for name in NAMES if not options.only or name in options.only]
    chosen = [name for name in suite.habits if options.habits or name in (options.only or ())]

    with sound(rows.path):
        timed = not set(methods) <= set(costs_of(suite, rows))
    if timed or DDPM_NAME in methods:
        optional("diffusers")  # before hours of training
    if timed:
        names = [name for name in NAMES if name in (*methods, DDPM_NAME)]
        rows.say(kind="speed", **suite.speeds, values=speed(suite, names))
    for seed in range(options.seeds):
        for name in methods:
            judge(suite, name, seed, rows)
        for name in chosen:
            key = {"kind": "habit", "name": name, "seed": seed, **suite.scored}
            if not rows.where(**key):
                if not suite.weights(name, seed).exists():
                    learn(suite, name, seed, rows, suite.habits[name])
                averaged = suite.restore(suite.build(DEFAULT, seed, suite.habits[name].words), name, seed)
                rows.say(**key, **suite.score(averaged, averaged.main, options.n))
    with sound(rows.path):
        report(suite, rows, methods, [UNAVERAGED, *chosen] if DEFAULT in methods else chosen)
    if options.figure:
        draw(suite, rows, methods, options.figure)


if __name__ == "__main__":
    common.run(main)
