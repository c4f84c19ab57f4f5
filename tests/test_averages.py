"""Averages of any length after training, against averages that were followed all along."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from bd_lightning import averages, checkpoints
from bd_lightning.averages import Profile
from bd_lightning.checks import UserError
from callbacks import PowerAverages
from callbacks.averages import floating
from small_run import WORDS

STEPS = 48


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72)])
def test_lengths_and_exponents(length, gamma):
    assert averages.gamma_of(length) == pytest.approx(gamma, abs=0.01)
    assert averages.length_of(averages.gamma_of(length)) == pytest.approx(length)
    t = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma + 1) * t**gamma  # the profile at t = 1
    mean = (p * t).mean()
    assert np.sqrt((p * (t - mean) ** 2).mean()) == pytest.approx(length, rel=2e-3)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, float("nan")])
def test_lengths_that_no_average_has(length):
    with pytest.raises(ValueError, match="above 0 and below 0.289"):
        averages.gamma_of(length)


def test_products_of_profiles_are_their_integrals():
    t = (np.arange(400_000) + 0.5) / 400_000 * 30
    profiles = [Profile(30, 6.9), Profile(20, 0.5), Profile(30, 17.0), Profile(10, 3.0)]
    values = np.stack([(p.gamma + 1) * t**p.gamma / p.step ** (p.gamma + 1) * (t <= p.step) for p in profiles])
    assert averages.products(profiles, profiles) == pytest.approx(values @ values.T * 30 / len(t), rel=1e-3)


def test_an_average_is_followed_with_its_weights_over_time():
    gamma, steps = 6.94, 40
    shares = np.eye(steps)[0]
    for step in range(2, steps + 1):
        beta = averages.kept(step, gamma)
        shares = beta * shares + (1 - beta) * np.eye(steps)[step - 1]
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert shares == pytest.approx(np.diff(edges), abs=1e-12)


def followed(path: np.ndarray, length: float) -> np.ndarray:
    """An average of a path (steps, d) after every step."""
    gamma, mean, out = averages.gamma_of(length), path[0], []
    for step, now in enumerate(path, 1):
        beta = averages.kept(step, gamma)
        mean = beta * mean + (1 - beta) * now
        out.append(mean)
    return np.stack(out)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_any_length_is_rebuilt_from_snapshots_of_two(length):
    rng = np.random.default_rng(0)
    path = np.cumsum(0.02 * rng.normal(size=(3200, 50)), 0) + 0.1 * rng.normal(size=(3200, 50))
    steps = range(200, 3201, 200)
    two = {one: followed(path, one) for one in (0.05, 0.1)}
    found = averages.fit(
        [Profile(t, averages.gamma_of(one)) for t in steps for one in two], Profile(3200, averages.gamma_of(length))
    )
    stored = np.stack([two[one][t - 1] for t in steps for one in two]).astype(np.float16).astype(float)
    truth = followed(path, length)[-1]
    nearest = min(np.abs(two[one][-1] - truth).mean() for one in two)
    assert np.abs(found.coefficients @ stored - truth).mean() < 0.15 * nearest and found.error < 0.05


def test_a_snapshot_on_a_full_disk_is_one_sentence_and_the_one_before_stays(tmp_path):
    path, profiles = tmp_path / "snapshots" / "1.pt", [Profile(1, 6.9)]
    averages.save_snapshot(path, profiles, [{"w": torch.ones(10)}], [])
    before = path.read_bytes()
    path.with_name("1.pt.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write the snapshot .*1.pt \(.*disk full\?\): make room, then"):
        averages.save_snapshot(path, profiles, [{"w": torch.ones(10**6)}], [])
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["1.pt"]


def test_a_snapshot_without_tensors_is_damaged(tmp_path):
    path = tmp_path / averages.SNAPSHOTS / "1.pt"
    averages.save_snapshot(path, [Profile(1, 6.9)], [{"w": torch.ones(2)}], [])
    torch.save({**torch.load(path, weights_only=True), "weights": [{"w": 5}]}, path)
    with pytest.raises(UserError, match="1.pt is no snapshot of averages, or it is damaged"):
        averages.snapshots(tmp_path)


def test_weights_that_stand_still_stay_where_they_are():
    profiles = [Profile(t, gamma) for t in (10, 20, 30) for gamma in (17.0, 6.9)]
    assert averages.fit(profiles, Profile(30, 1.0)).coefficients.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no snapshot up to step 5"):
        averages.fit(profiles, Profile(5, 1.0))


# ---- runs

POWER = ["callbacks.ema._target_=callbacks.PowerAverages", "callbacks.ema.snapshots=12"]
MOVES = ["model.warmup_steps=0", "model.lr_decay=none", "model.lr=0.02", f"eval_every={STEPS // 2}"]


@pytest.fixture(scope="module")
def power_run(tmp_path_factory) -> Path:
    """A run that follows two averages."""
    root = tmp_path_factory.mktemp("power")
    words = [*WORDS, *POWER, *MOVES, f"steps={STEPS}", "run_id=two"]
    assert train.main([*words, f"root={root}", f"data.root={root / 'data'}"]) == 0
    return root / "bellman-diffusion" / "two"


def test_snapshots_of_steps_that_are_repeated_are_dropped(power_run, tmp_path):
    run = Path(shutil.copytree(power_run, tmp_path / "bellman-diffusion" / "two"))
    abandoned, kept = run / "averages" / "00009999.pt", run / "averages" / f"{STEPS:08d}.pt"
    shutil.copy(kept, abandoned)
    words = [f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"steps={STEPS + 4}", "eval_every=4"]
    assert train.main(words) == 0
    assert kept.is_file() and not abandoned.exists() and (run / "averages" / f"{STEPS + 4:08d}.pt").is_file()


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(path)["state_dict"]


def distance(a: dict, b: dict) -> float:
    return float(sum((a[name] - b[name]).double().square().sum() for name in a) ** 0.5)


def test_a_run_keeps_snapshots_and_average_makes_a_length_of_them(power_run, capsys):
    assert [path.name for path in sorted((power_run / "averages").iterdir())] == [
        f"{step:08d}.pt" for step in range(4, STEPS + 1, 4)
    ]
    last = power_run / "checkpoints" / "last.ckpt"
    assert train.main(["average", f"ckpt_path={power_run}", "length=0.05,0.07,0.15"]) == 0
    assert "length-0.07.ckpt: at step 48, of 12 snapshots" in capsys.readouterr().out
    made = {length: weights(power_run / "checkpoints" / f"length-{length}.ckpt") for length in (0.05, 0.07, 0.15)}
    assert distance(made[0.05], weights(last)) < 0.02 * distance(made[0.15], weights(last))  # it was followed
    longer = averages.snapshots(power_run)[-1]
    second = averages.combined([longer], [1.0])
    assert distance(made[0.07], second) < distance(made[0.05], second)
    words = ["predict", f"ckpt_path={power_run / 'checkpoints' / 'length-0.07.ckpt'}", "n=2"]
    assert train.main([*words, "callbacks.progress=null"]) == 0


def test_an_average_of_another_length_is_what_a_run_that_follows_it_has(power_run, tmp_path):
    words = [*WORDS, *POWER, *MOVES, f"steps={STEPS}", "run_id=direct"]
    words += ["callbacks.ema.lengths=[0.07,0.2]", f"root={tmp_path}", f"data.root={power_run.parents[1] / 'data'}"]
    assert train.main(words) == 0
    assert train.main(["average", f"ckpt_path={power_run}", "length=[0.07]"]) == 0
    direct = weights(tmp_path / "bellman-diffusion" / "direct" / "checkpoints" / "last.ckpt")
    made = weights(power_run / "checkpoints" / "length-0.07.ckpt")
    other = weights(power_run / "checkpoints" / "last.ckpt")
    assert distance(made, direct) < 0.1 * distance(other, direct)


def test_both_averages_go_on_after_an_interruption(power_run, tmp_path):
    words = [*WORDS, *POWER, *MOVES, "run_id=one"]
    words += [f"data.root={power_run.parents[1] / 'data'}", "callbacks.ema.snapshots=4"]
    folders = [tmp_path / name / "bellman-diffusion" / "one" for name in ("whole", "parts")]
    assert train.main([*words, f"root={folders[0].parents[1]}", f"steps={STEPS}"]) == 0
    assert train.main([*words, f"root={folders[1].parents[1]}", f"steps={STEPS // 2}"]) == 0
    last = folders[1] / "checkpoints" / "last.ckpt"
    assert train.main([f"ckpt_path={last}", f"steps={STEPS}"]) == 0
    ends = [averages.snapshots(folder)[-2:] for folder in folders]
    for one, other in zip(*ends):
        assert one.profile == other.profile
        assert distance(averages.combined([one], [1.0]), averages.combined([other], [1.0])) == 0


def test_mistakes_in_averages(power_run, trained, tmp_path, capsys):
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert train.main(list(words)) == 2
        return capsys.readouterr().err

    run = f"ckpt_path={power_run}"
    assert "average needs length=0.05,0.1" in refused("average", run)
    assert "length 0.4: the length of an average is a share" in refused("average", run, "length=0.4")
    assert "length 0.005 cannot be made of these 12 snapshots" in refused("average", run, "length=0.005")
    assert "'length' must be list of float or null, got 'long'" in refused("average", run, "length=long")
    assert "'score' must be" in refused("average", run, "length=0.1", "score=fid")
    assert "no snapshots of averages: train with callbacks.ema" in refused(
        "average", f"ckpt_path={trained}", "length=0.1"
    )
    assert "is no run folder with checkpoints/last.ckpt" in refused("average", f"ckpt_path={tmp_path}", "length=0.1")
    assert "'length' is for train.py average" in refused("test", f"{run}/checkpoints/last.ckpt", "length=0.1")
    ckpt = trained / "checkpoints" / "last.ckpt"
    words = [f"ckpt_path={ckpt}", "steps=8", "run_id=other", f"root={tmp_path}", *POWER[:1]]
    assert "no power averages to go on with" in refused(*words)
    with pytest.raises(ValueError, match="lengths must be two that differ"):
        PowerAverages((0.1, 0.1))
    free = "model.optimizer._target_=bd_lightning.optimizers.ScheduleFree"
    words = [*WORDS, *POWER, free, "model.optimizer.betas=[0.9,0.99]", "model.lr_decay=none", f"root={tmp_path}"]
    assert "ScheduleFree has an average of its own" in refused(*words, f"data.root={tmp_path}")


def test_a_damaged_snapshot(power_run, capsys):
    path = power_run / "averages" / "00000004.pt"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100])
        assert train.main(["average", f"ckpt_path={power_run}", "length=0.1"]) == 2
        assert "is no snapshot of averages, or it is damaged" in capsys.readouterr().err
    finally:
        path.write_bytes(whole)


def test_what_half_precision_cannot_hold_is_kept_whole(tmp_path):
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = 1e6
    weights = floating(module)
    averages.save_snapshot(tmp_path / "averages" / "1.pt", [Profile(1, 2.0)], [weights], set(weights))
    stored = averages.combined(averages.snapshots(tmp_path), [1.0])
    assert torch.equal(stored["weight"].float(), weights["weight"])
    assert torch.equal(stored["bias"].half(), weights["bias"].half())


@pytest.mark.parametrize("steps", [5, 31, 32, 4000])
def test_no_more_snapshots_than_asked_for(steps):
    average = PowerAverages(snapshots=16)
    kept = [step for step in range(1, steps + 1) if average.due(step, steps)]
    assert len(kept) == min(16, steps) and kept[-1] == steps
    assert max(b - a for a, b in zip(kept, kept[1:])) <= -(-steps // 16)


@pytest.mark.parametrize("ema", [[], POWER], ids=["exponential", "power"])
def test_counts_of_classes_are_no_weights(tmp_path, ema):
    words = [*WORDS, *ema, "model=relative", "model.network.width=8", "model.network.depth=1", "data.batch_size=32"]
    words += [
        "steps=12",
        "eval_every=12",
        "run_id=counts",
        "model.sampler=ode",
        f"root={tmp_path}",
        f"data.root={tmp_path / 'data'}",
    ]
    assert train.main(words) == 0
    run = tmp_path / "bellman-diffusion" / "counts"
    last = checkpoints.read(run / "checkpoints" / "last.ckpt")
    live, averaged = last["current_model_state"]["fields.counts"], last["state_dict"]["fields.counts"]
    assert live.sum() == 12 * 32 and torch.equal(averaged, live)
    if ema:
        assert train.main(["average", f"ckpt_path={run}", "length=0.07"]) == 0
        assert torch.equal(weights(run / "checkpoints" / "length-0.07.ckpt")["fields.counts"], live)
