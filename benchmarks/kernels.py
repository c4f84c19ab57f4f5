"""Bellman Diffusion beside denoising score matching: the same network, data, steps, noise levels and solver.

    uv run benchmarks/kernels.py [--steps 1000] [--seeds 3] [--samples 1500]

Both models of a seed are trained in turn, a step of one and a step of the other, so that their step times are
measured side by side. FID is of `samples` samples (ODE, 35 calls) of the averaged weights against the 1,500 training
digits, in features of a classifier of the training split. Prints a Markdown table.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bd_lightning import build as builder
from bd_lightning import config as configs
from callbacks import ClassifierFeatures
from callbacks.metrics import frechet_distance
from datamodules import Digits, to_uint8

KERNELS = {"closed-form slices (Bellman Diffusion)": "ClosedFormSlices", "constant (score matching)": "Constant"}


def build(kernel: str, facts: dict, seed: int) -> torch.nn.Module:
    """The default model with another kernel, from the same initial weights."""
    words = [f"model.kernel._target_=bd_lightning.kernels.{kernel}", "model.kernel.epsilon=0.001"]
    torch.manual_seed(seed)
    return builder.instantiate(configs.compose(configs.parse(words))["model"], "model", facts)


def train(models: list[torch.nn.Module], data: Digits, steps: int, seed: int) -> tuple[list, list[list[float]]]:
    """Averaged models, and the seconds of every step of each."""
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.995)) for m in models]
    optimizers = [torch.optim.AdamW(m.parameters(), m.lr, m.betas, weight_decay=0.0) for m in models]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, m.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
        for o, m in zip(optimizers, models)
    ]
    seconds: list[list[float]] = [[] for _ in models]
    torch.manual_seed(seed)
    step = 0
    while step < steps:
        for x, label in data.train_dataloader():
            order = range(len(models)) if step % 2 else reversed(range(len(models)))
            for i in order:
                start = time.perf_counter()
                noise = torch.Generator().manual_seed(seed * 1_000_003 + step)  # the same noise for both
                terms = models[i].losses(x, label, noise)
                optimizers[i].zero_grad()
                (terms["gradient"] + terms["scalar"]).mean().backward()
                torch.nn.utils.clip_grad_norm_(models[i].parameters(), 1.0)
                optimizers[i].step()
                seconds[i].append(time.perf_counter() - start)
                schedules[i].step()
                averages[i].update_parameters(models[i])
            step += 1
            if step == steps:
                break
    return [a.module.eval() for a in averages], seconds


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1500)
    options = parser.parse_args()
    data = Digits()
    features = ClassifierFeatures()
    features.prepare(data)
    real = features(data.load_split("train").x)
    fids: list[list[float]] = [[] for _ in KERNELS]
    ratios = []
    for seed in range(options.seeds):
        models = [build(kernel, data.facts, seed) for kernel in KERNELS.values()]
        averaged, seconds = train(models, data, options.steps, seed)
        for i, model in enumerate(averaged):
            samples = torch.cat(
                [model.sample(range(options.samples)[k : k + 500]) for k in range(0, options.samples, 500)]
            )
            fids[i].append(frechet_distance(real, features(to_uint8(samples))))
        ratios.append(statistics.median(seconds[0]) / statistics.median(seconds[1]))
        print(f"seed {seed}: FID {fids[0][-1]:.2f} and {fids[1][-1]:.2f}, step time {ratios[-1]:.3f}", flush=True)
    print(f"\n{options.steps} steps, {options.samples} samples, {options.seeds} seeds, {features.description}\n")
    print("| kernel | FID, mean over seeds | each seed | step time, median ratio |\n|---|---|---|---|")
    for i, name in enumerate(KERNELS):
        each = ", ".join(f"{fid:.2f}" for fid in fids[i])
        ratio = f"{statistics.mean(ratios):.2f}" if i == 0 else "1"
        print(f"| {name} | {statistics.mean(fids[i]):.2f} | {each} | {ratio} |")
    print(f"\nFID ratio of the means: {statistics.mean(fids[0]) / statistics.mean(fids[1]):.3f}")


if __name__ == "__main__":
    main()
