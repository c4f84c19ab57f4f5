"""Image generation at equal cost: Bellman Diffusion, score matching, DDPM and flow matching.

    uv run --group benchmarks benchmarks/images.py [--experiment mnist_latent] [--seeds 1] [--out runs/images]
        [--habits] [--only NAME] [KEY=VALUE ...]

Everything is trained with the same network, data, batches, optimiser, schedule, clipping and averaging, those of the
experiment's config, and sampled with the same number of network calls (35; the paper's own dynamics take 300). Two
cores: `--experiment mnist_latent data.autoencoder.ckpt_path=…`, or `mnist_small` for pixels; a GPU: `--experiment
mnist` or `cifar10`.

- Bellman Diffusion: the default; the same by the divergence estimator; and as the paper writes it (`model=paper`).
- Score matching: the constant kernel, all else equal.
- DDPM: diffusers' DDPMScheduler (linear betas, 1,000 steps) and its loss on the noise, sampled by diffusers' own DDIM
  and DPM-Solver++ (one training, the two samplers are separate rows).
- Flow matching: torchcfm's ConditionalFlowMatcher, sampled by Heun's method.

A finished row is kept in OUT/rows.jsonl and not computed again. Prints Markdown tables: FID, KID, precision and recall
of n samples against the test split, mean over seeds; FID of --n-curve samples at each quarter of the training; the time
of a training step relative to DDPM's (all take turns, step by step; median over rounds), memory (on a GPU the peak of a
training step; on a CPU what autograd keeps for its backward pass), and sampling time per 1,000 images. FID without
averaging comes beside; --habits also trains the default with each other habit switched: clipping, warm-up, decay,
bf16, and where they apply mirrored images, channels-last and compilation. --only takes methods or habits. --figure
draws grids and curves.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchmetrics.image.kid import KernelInceptionDistance

from bd_lightning import build as builder
from bd_lightning import config as configs
from bd_lightning.dynamics import SampleNoise, SamplingDiverged
from callbacks.drawing import grid_image
from callbacks.metrics import Given, frechet_distance, precision_recall
from datamodules import to_uint8

CALLS = 35
EQUAL = [f"model.samplers.sde.levels={CALLS}", "model.samplers.sde.churn=0.5", "model.samplers.ode.steps=18"]
OURS = {
    "Bellman Diffusion": EQUAL,
    "score matching": [*EQUAL, "model.kernel._target_=bd_lightning.kernels.Constant"],
    "Bellman Diffusion, divergence estimator": [*EQUAL, "model.estimator=divergence"],
    "Bellman Diffusion, as in the paper": ["model=paper"],
}
DDPM_NAME, FLOW_NAME = "DDPM", "flow matching"
NAMES = ["Bellman Diffusion", "score matching", DDPM_NAME, FLOW_NAME, *list(OURS)[2:]]


class Bellman(nn.Module):
    """A model of this suite, from its config."""

    def __init__(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        super().__init__()
        self.model = builder.instantiate(config["model"], "model", facts)
        self.conditional = self.model.conditional
        self.samplers = {name: self._sampler(name) for name in self.model.samplers}
        self.main = self.model.sampler

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """The weighted losses of both fields, a mean over the batch (B, *)."""
        terms = self.model.losses(x, label if self.conditional else None)
        return (terms["gradient"] + terms["scalar"]).mean()

    def _sampler(self, name: str) -> Callable[[nn.Module, range, Tensor | None], Tensor]:
        return lambda owner, rows, label: owner.model.sample(rows, name, seed=1, label=label)


class DDPM(nn.Module):
    """diffusers' scheduler and loss around the same network. Data are scaled to unit variance."""

    def __init__(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        super().__init__()
        self.network = builder.instantiate(config["model"]["network"], "model.network", facts)
        self.conditional = bool(getattr(self.network, "conditional", False))
        self.shape, self.scale = tuple(facts["shape"]), facts["sigma_data"]
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
        self.samplers = {"DPM-Solver++": _diffusers(DPMSolverMultistepScheduler), "DDIM": _diffusers(DDIMScheduler)}
        self.main = "DPM-Solver++"

    def predict(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The noise in x (B, *) at time steps t (B,). The network is told ¼ ln σ, as Bellman Diffusion tells it."""
        alpha = self.scheduler.alphas_cumprod.to(x.device)[t]
        return self.network(x, ((1 - alpha) / alpha).log() / 8, label)[0]

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """Mean squared error of the noise over a batch (B, *)."""
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        noisy = self.scheduler.add_noise(x / self.scale, noise, t)
        return nn.functional.mse_loss(self.predict(noisy, t, label if self.conditional else None), noise)


def _diffusers(kind: Any) -> Callable[[DDPM, range, Tensor | None], Tensor]:
    def sample(owner: DDPM, rows: range, label: Tensor | None) -> Tensor:
        device = next(owner.parameters()).device
        scheduler = kind.from_config(owner.scheduler.config)
        scheduler.set_timesteps(CALLS, device=device)
        x = SampleNoise(rows, owner.shape, seed=1, device=device)() * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(owner.predict(x, t.expand(len(x)), label), t, x).prev_sample
        return x * owner.scale

    return sample


class Flow(nn.Module):
    """torchcfm's independent coupling around the same network. Data are scaled to unit variance."""

    def __init__(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        super().__init__()
        self.network = builder.instantiate(config["model"]["network"], "model.network", facts)
        self.conditional = bool(getattr(self.network, "conditional", False))
        self.shape, self.scale = tuple(facts["shape"]), facts["sigma_data"]
        self.matcher = ConditionalFlowMatcher(sigma=0.0)
        self.samplers, self.main = {"Heun": _heun}, "Heun"

    def velocity(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The velocity at x (B, *) and times t (B,), 0 noise and 1 data."""
        return self.network(x, ((1 - t).clamp_min(1e-3) / t.clamp_min(1e-3)).log() / 4, label)[0]

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """Mean squared error of the velocity over a batch (B, *)."""
        t, point, target = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x / self.scale)
        return nn.functional.mse_loss(self.velocity(point, t, label if self.conditional else None), target)


def _heun(owner: Flow, rows: range, label: Tensor | None) -> Tensor:
    x = SampleNoise(rows, owner.shape, seed=1, device=next(owner.parameters()).device)()
    times = torch.linspace(0, 1, (CALLS + 1) // 2 + 1).tolist()
    for here, there in zip(times, times[1:]):
        slope = owner.velocity(x, x.new_full((len(x),), here), label)
        euler = x + (there - here) * slope
        if there < 1:  # the last step is Euler's, as in EDM's sampler: CALLS in all
            slope = (slope + owner.velocity(euler, x.new_full((len(x),), there), label)) / 2
        x = x + (there - here) * slope
    return x * owner.scale


class Suite:
    """The data, the features, and how methods are built, trained and scored."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.config = self._compose([])
        self.data = builder.instantiate(self.config["data"], "data")
        self.data.prepare_data()
        self.data.setup("fit")
        self.facts = self.data.facts
        self.features = builder.instantiate(self.config["callbacks"]["metrics"]["features"], "features")
        self.features.prepare(self.data.observed)
        self.features.to(self.device)
        split = torch.utils.data.DataLoader(
            self.data.observed.load_split("test"), 1000, collate_fn=self.data.observed.collate
        )
        self.real = torch.cat([self.features(to_uint8(x).to(self.device)).cpu() for x, _ in split])
        self.steps = options.steps or self.config["steps"]
        self.flip = getattr(self.data, "flip", False)

    def habits(self) -> dict[str, dict[str, Any]]:
        """Arguments of `train` that switch one habit each, of those that the experiment can have."""

        def name(on: bool, habit: str) -> str:
            return f"no {habit}" if on else habit

        bf16, network = self.options.bf16, self.config["model"]["network"]
        found: dict[str, dict[str, Any]] = {"no clipping": {"clip": None}, "no warm-up": {"warmup": 0}}
        found |= {"no decay": {"decay": False}, name(bf16, "bf16"): {"bf16": not bf16}}
        if hasattr(self.data, "flip"):
            found[name(self.flip, "mirrored images")] = {"flip": not self.flip}
        if network["_target_"].endswith("UNet"):
            found["no channels-last"] = {"words": ["model.network.channels_last=false"]}
        if self.device.type == "cuda":
            found["compiled"] = {"words": ["model.compile=true"]}
        return found

    def _compose(self, words: list[str]) -> dict[str, Any]:
        first = [f"experiment={self.options.experiment}", *self.options.words]
        config = configs.compose(configs.parse([*first, *words]))
        builder.check(config)
        return config

    def build(self, name: str, seed: int, words: list[str] | None = None) -> Any:
        """An untrained method; `words` are more settings of one of ours."""
        torch.manual_seed(seed)
        if name in OURS:
            made: Any = Bellman(self._compose([*OURS[name], *(words or [])]), self.facts)
        else:
            made = (DDPM if name == DDPM_NAME else Flow)(self.config, self.facts)
        return made.to(self.device)

    def batches(self, seed: int, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end, half of the images mirrored if `flip`."""
        torch.manual_seed(seed)
        while True:
            for x, label in self.data.train_dataloader():
                if flip:
                    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
                yield x.to(self.device), label.to(self.device)

    def step(self, method: Any, optimizer: Any, x: Tensor, label: Tensor, clip: float | None, bf16: bool) -> None:
        """One step of training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss = method.loss(x, label)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(method.parameters(), clip)
        optimizer.step()

    def optimizer(self, method: Any) -> torch.optim.Optimizer:
        """The optimiser of the experiment."""
        model = self.config["model"]
        betas = tuple(model.get("betas", (0.9, 0.99)))
        parameters = [p for p in method.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=model["lr"], betas=betas, weight_decay=model.get("weight_decay", 0.0))

    def train(
        self,
        name: str,
        seed: int,
        clip: float | None = 1.0,
        warmup: int = 100,
        decay: bool = True,
        bf16: bool | None = None,
        flip: bool | None = None,
        words: list[str] | None = None,
    ) -> Iterator[tuple[int, Any, Any]]:
        """Trains, and yields (steps, averaged, raw) at each quarter. None is what the experiment and options say."""
        method = self.build(name, seed, words).train()
        bf16 = self.options.bf16 if bf16 is None else bf16
        flip = self.flip if flip is None else flip
        averaged = AveragedModel(
            method, multi_avg_fn=get_ema_multi_avg_fn(self.config["callbacks"]["ema"]["decay"]), use_buffers=True
        )
        optimizer = self.optimizer(method)

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / (warmup + 1))
            return warm * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if decay else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        quarters = [round(self.steps * k / 4) for k in (1, 2, 3, 4)]
        for done, (x, label) in zip(range(1, self.steps + 1), self.batches(seed, flip)):
            self.step(method, optimizer, x, label, clip, bf16)
            schedule.step()
            averaged.update_parameters(method)
            if done in quarters:
                state = torch.get_rng_state()
                yield done, averaged.module.eval(), method.eval()
                torch.set_rng_state(state)
                method.train()

    @torch.no_grad()
    def draw(self, method: Any, sampler: str, n: int) -> Iterator[Tensor]:
        """n images, bytes, a thousand at a time."""
        for start in range(0, n, 1000):
            rows = range(start, min(n, start + 1000))
            label = None
            if method.conditional:
                label = torch.tensor([i % self.facts["num_classes"] for i in rows], device=self.device)
            yield to_uint8(self.data.decode(method.samplers[sampler](method, rows, label)))

    def score(self, method: Any, sampler: str, n: int) -> dict[str, float]:
        """FID of n samples; with options.n of them KID, precision and recall too."""
        try:
            found = torch.cat([self.features(x.to(self.device)).cpu() for x in self.draw(method, sampler, n)])
        except SamplingDiverged as error:
            print(f"{sampler}: {error}", file=sys.stderr)
            return {"fid": math.inf}
        values = {"fid": frechet_distance(self.real, found)}
        if n == self.options.n:
            kid = KernelInceptionDistance(feature=Given(found.shape[1]), subsets=50, subset_size=min(1000, n))
            torch.manual_seed(0)
            kid.update(self.real / self.features.kid_scale, real=True)
            kid.update(found / self.features.kid_scale, real=False)
            values["kid"] = float(kid.compute()[0])
            few = min(n, len(self.real))
            values["precision"], values["recall"] = precision_recall(found[:few], self.real[:few])
        return values


def speed(suite: Suite, names: list[str], rounds: int = 30) -> dict[str, dict[str, float]]:
    """Step time relative to DDPM's (which must be there), memory, and sampling time per 1,000 images of methods."""
    methods = {name: suite.build(name, 0).train() for name in names}
    optimizers = {name: suite.optimizer(method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    source = suite.batches(0, suite.flip)
    for i in range(rounds + 3):
        x, label = next(source)
        for name, method in methods.items():
            start = _now(suite.device)
            suite.step(method, optimizers[name], x, label, 1.0, suite.options.bf16)
            if i >= 3:
                times[name].append(_now(suite.device) - start)
    found = {}
    for name, method in methods.items():
        ratios = [a / b for a, b in zip(times[name], times[DDPM_NAME])]
        method.eval()
        seconds = []
        with torch.no_grad():
            for _ in range(3):
                start = _now(suite.device)
                label = torch.zeros(1000, dtype=torch.long, device=suite.device) if method.conditional else None
                try:
                    method.samplers[method.main](method, range(1000), label)
                except SamplingDiverged:  # an untrained model may lose chains; its time is not known then
                    break
                seconds.append(_now(suite.device) - start)
                if sum(seconds) > 60:
                    break
        found[name] = {
            "step": statistics.median(ratios),
            "milliseconds": 1000 * statistics.median(times[name]),
            "memory": memory(suite, method.train(), x, label=torch.zeros(len(x), dtype=torch.long)) / 2**20,
            "sampling": min(seconds) if seconds else math.nan,
        }
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(suite: Suite, method: Any, x: Tensor, label: Tensor) -> float:
    """Bytes of a training step: the peak on a GPU, what autograd keeps on a CPU."""
    label = label.to(x.device)
    if suite.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(suite.device)
        method.loss(x, label).backward()
        return float(torch.cuda.max_memory_allocated(suite.device))
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        try:
            key, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
        except RuntimeError:  # inside forward-mode differentiation tensors do not show their storage
            key, size = -len(kept), t.nbytes
        if key not in own:
            kept[key] = size
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = method.loss(x, label)
    loss.backward()
    return float(sum(kept.values()))


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="mnist_latent")
    parser.add_argument("--out", type=Path, default=Path("runs/images"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--n-curve", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--habits", action="store_true")
    parser.add_argument("--only", action="append", help="a method or a habit to train; may be repeated")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("words", nargs="*", help="settings of the config, as in train.py")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    habits = suite.habits()
    if unknown := set(options.only or ()) - {*NAMES, *habits}:
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join([*NAMES, *habits])}")
    methods = [name for name in NAMES if not options.only or name in options.only]
    chosen = [name for name in habits if options.habits or name in (options.only or ())]
    path = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def known(**row: Any) -> bool:
        return any(all(old.get(k) == v for k, v in row.items()) for old in rows)

    def keep(**row: Any) -> None:
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)

    if set(methods) - set(_costs(rows)):
        keep(kind="speed", values=speed(suite, [name for name in NAMES if name in (*methods, DDPM_NAME)]))
    for seed in range(options.seeds):
        for name in methods:
            if known(kind="score", name=name, seed=seed, steps=suite.steps):
                continue
            averaged: Any = None
            raw: Any = None
            for done, averaged, raw in suite.train(name, seed):  # noqa: B007
                curve = suite.score(averaged, averaged.main, options.n_curve)
                keep(kind="curve", name=name, seed=seed, done=done, fid=curve["fid"])
            torch.save(averaged.state_dict(), options.out / f"{name.replace(' ', '-')}-{seed}.pt")
            if name == "Bellman Diffusion":
                keep(kind="habit", name="no averaging", seed=seed, **suite.score(raw, raw.main, options.n))
            for sampler in averaged.samplers:
                values = suite.score(averaged, sampler, options.n)
                keep(kind="score", name=name, sampler=sampler, seed=seed, steps=suite.steps, **values)
        for name in chosen:
            if not known(kind="habit", name=name, seed=seed):
                *_, (_, averaged, _) = suite.train("Bellman Diffusion", seed, **habits[name])
                keep(kind="habit", name=name, seed=seed, **suite.score(averaged, averaged.main, options.n))
    report(suite, rows)
    if options.figure:
        draw(suite, rows, options.figure)


def _trained(rows: list[dict[str, Any]]) -> list[str]:
    """Methods that have a score."""
    return [name for name in NAMES if any(row["kind"] == "score" and row["name"] == name for row in rows)]


def _costs(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each method costs, by the newest measurement."""
    return {name: cost for row in rows if row["kind"] == "speed" for name, cost in row["values"].items()}


def report(suite: Suite, rows: list[dict[str, Any]]) -> None:
    """Print the tables."""

    def mean(values: list[float], digits: int = 2) -> str:
        found = [v for v in values if v is not None]
        spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.{digits}f}{spread}" if found else "–"

    costs = _costs(rows)
    print(f"{suite.features.description}; {suite.options.n} samples against {len(suite.real)} test images\n")
    print("| method | sampler | FID | KID × 1000 | precision | recall | step time / DDPM | memory, MiB | s per 1,000 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in NAMES:
        mine = [row for row in rows if row["kind"] == "score" and row["name"] == name]
        for sampler in dict.fromkeys(row["sampler"] for row in mine):
            part = [row for row in mine if row["sampler"] == sampler]
            cells = [mean([row["fid"] for row in part]), mean([1000 * row.get("kid", math.nan) for row in part])]
            cells += [mean([row.get(key, math.nan) for row in part], 3) for key in ("precision", "recall")]
            cost = costs[name]
            tail = f"{cost['step']:.2f} | {cost['memory']:.0f} | {cost['sampling']:.1f}"
            print(f"| {name} | {sampler} | {' | '.join(cells)} | {tail} |")
    print(f"\nFID of {suite.options.n_curve} samples after each quarter of {suite.steps} steps:\n")
    print("| method | ¼ | ½ | ¾ | 1 |\n|---|---|---|---|---|")
    for name in _trained(rows):
        curve = [row for row in rows if row["kind"] == "curve" and row["name"] == name]
        cells = [mean([r["fid"] for r in curve if r["done"] == done]) for done in sorted({r["done"] for r in curve})]
        print(f"| {name} | {' | '.join(cells)} |")
    habits = [row for row in rows if row["kind"] == "habit"]
    print("\n| Bellman Diffusion | FID |\n|---|---|")
    for name in dict.fromkeys(row["name"] for row in habits):
        print(f"| {name} | {mean([row['fid'] for row in habits if row['name'] == name])} |")


def draw(suite: Suite, rows: list[dict[str, Any]], path: Path) -> None:
    """A row of samples of each method at its main sampler, and the learning curves beside FILE as FILE-curves."""
    from matplotlib.figure import Figure

    pictures = []
    for name in _trained(rows):
        method = suite.build(name, 0)
        method.load_state_dict(torch.load(suite.options.out / f"{name.replace(' ', '-')}-0.pt", weights_only=True))
        pictures.append(next(suite.draw(method.eval(), method.main, 16)))
    grid_image(torch.cat(pictures), columns=16).save(path)
    costs = _costs(rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in _trained(rows):
        curve = [row for row in rows if row["kind"] == "curve" and row["name"] == name and row["seed"] == 0]
        axes.plot([row["done"] * costs[name]["step"] for row in curve], [row["fid"] for row in curve], "o-", label=name)
    axes.set(xlabel="training time, in steps of DDPM", ylabel=f"FID of {suite.options.n_curve} samples", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_stem(f"{path.stem}_curves"), dpi=120)


if __name__ == "__main__":
    main()
