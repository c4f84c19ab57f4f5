"""benchmarks/gpu.py: rows that are kept, what is refused, its tables, and DDPM as an objective of the suite."""

import math
import re
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from bd_lightning.checks import UserError
from bd_lightning.dynamics import ProbabilityFlow
from bd_lightning.kernels import Constant
from bd_lightning.modules import BellmanDiffusion
from bd_lightning.networks import MLP
from benchmarks import gpu, peers
from benchmarks.gpu_report import report
from benchmarks.rows import Rows


def bench(folder, **options):
    given = {"device": "cpu", "minutes": 0.5, "data": None, "weights": None, "eager": True, "out": folder / "out"}
    return gpu.Bench(Namespace(**given | {"words": []} | options))


def test_a_finished_row_is_not_done_again(tmp_path):
    made = []
    for _ in range(2):
        one = bench(tmp_path)
        assert one.once("plan", "a", lambda: made.append(1) or {"steps": 8})["steps"] == 8
    assert made == [1] and (tmp_path / "out" / "report.md").is_file()


def test_a_folder_holds_one_set_of_settings(tmp_path):
    bench(tmp_path)
    bench(tmp_path)
    for other in ({"minutes": 1.0}, {"words": ["model.lr=1e-3"]}):
        with pytest.raises(UserError, match="holds rows of other settings: give another --out"):
            bench(tmp_path, **other)


def test_steps_fill_the_minutes_in_the_mode_of_the_first(tmp_path, monkeypatch):
    one, asked = bench(tmp_path, eager=False), []
    seconds = {"bf16": 0.3, "bf16, compiled": 0.1}
    monkeypatch.setattr(gpu, "speed", lambda bench, name, mode: asked.append(mode) or {"seconds": seconds[mode]})
    monkeypatch.setattr(gpu, "report", lambda *args: "")
    first = one.once("plan", "Bellman Diffusion", lambda: gpu.plan(one, "Bellman Diffusion"))
    assert (first["mode"], first["steps"]) == ("bf16, compiled", 300)
    assert gpu.plan(one, "DDPM")["mode"] == "bf16, compiled" and asked == ["bf16", "bf16, compiled", "bf16, compiled"]
    eager = bench(tmp_path / "eager")
    assert gpu.plan(eager, "Bellman Diffusion")["mode"] == "bf16" and asked[3:] == ["bf16"]
    monkeypatch.setattr(gpu, "speed", lambda *args: {"failed": "no compiler here"})
    with pytest.raises(UserError, match="no step of score matching can be taken: no compiler here"):
        gpu.plan(one, "score matching")
    words = gpu.run_words(one, "DDPM", first)
    assert "steps=300" in words and "eval_every=75" in words and "model.compile=true" in words


def test_what_runs_have_left_is_looked_at_and_what_is_the_users_stays(tmp_path, monkeypatch):
    one, name = bench(tmp_path), "Bellman Diffusion"
    monkeypatch.setattr(gpu.common, "train_py", lambda *words: None)
    for read in (lambda: gpu.weights(one, name), lambda: gpu.judged(one, name, {})):
        with pytest.raises(UserError, match="runs has no run of Bellman Diffusion, which .* says was trained"):
            read()
    folder = one.out / "runs" / "p" / "bellman-diffusion"
    (folder / "samples").mkdir(parents=True)
    monkeypatch.setattr(gpu, "run_words", lambda *args: [])
    for _ in range(2):
        with pytest.raises(UserError, match="bellman-diffusion lacks grids or numbers of its run, or they are damaged"):
            gpu.trained(one, name, {"steps": 4})
        (folder / "samples" / "ode-0000004.png").write_text("a")
        (folder / "fid.json").write_text('[{"step": 4')
    (one.out / "weights").mkdir()
    (one.out / "weights" / "mine.pth").write_text("a")
    gpu.weights(one, name)
    assert (one.out / "weights" / "mine.pth").is_file()


def test_data_is_found_or_refused(tmp_path):
    with pytest.raises(UserError, match="neither cifar-10-batches-py nor train and test"):
        gpu.data_words(tmp_path, tmp_path)
    (tmp_path / "train").mkdir()
    assert gpu.data_words(tmp_path, tmp_path)[0] == "data=folder"
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert f"data.root={tmp_path}" in gpu.data_words(tmp_path, tmp_path)
    with pytest.raises(UserError, match="--weights: file not found"):
        gpu.inception(tmp_path / "none.pth")
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not here")
    (tmp_path / "rubbish.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="the Inception weights could not be read from"):
        gpu.inception(tmp_path / "rubbish.pth")


def test_places_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*out .*give another --out"):
        bench(tmp_path / "file")
    still = SimpleNamespace(update=lambda loss: None)
    lost = Namespace(device=torch.device("cpu"), out=tmp_path / "gone", training=lambda *words: (still, None))
    with pytest.raises(UserError, match=r"cannot write .*profile\.txt .*make room"):
        gpu.profile(lost)


@pytest.mark.parametrize(("words", "said"), [
    (["--minutes", "0"], "--minutes and --call must be positive"),
    (["--minutes", "1", "--call", "-3"], "--minutes and --call must be positive"),
    (["--minutes", "nan"], "--minutes and --call must be positive"),
    (["--minutes", "inf"], "--minutes and --call must be positive, and below a million"),
    (["--minutes", "1", "--call", "inf"], "--minutes and --call must be positive, and below a million"),
    (["--minutes", "1", "--device", "cuda"], "PyTorch finds no GPU here"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(words, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as stop:
        gpu.common.run(gpu.main)
    assert stop.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_report_has_what_there_is(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    assert report(rows, 989, "cuda") == "\n"
    rows.add(kind="devices", name="all", card="NVIDIA H200", torch="2.11", configs=8, wrong=["a: b"], waits="")
    rows.add(kind="flops", name="Bellman Diffusion", batch=512, flop=19.0e12, parameters=36_600_000)
    rows.add(kind="speed", name="a: bf16", seconds=0.05, first=1.0, batch=512, memory=2**31)
    rows.add(kind="speed", name="a: bf16, compiled", failed="no compiler")
    rows.add(kind="trained", name="a", mode="bf16", minutes=3, steps=8, images=4096, curve=[[4, None], [8, 12.5]])
    text = report(rows, 989, "cuda")
    assert "7 of 8 configs step" in text and "a: b" in text and "waits for nothing" in text
    assert "| a: bf16 | 50.0 | 10240 | 38.4% | 2.0 | 1.0 |" in text and "failed: no compiler" in text
    assert "| a | bf16 | 3 | 8 | 0.00 | –, 12.50 | – | – | – | – |" in text
    rows.add(kind="judged", name="a", protocol="50000 samples", **{"test/fid": 3.214, "test/kid": None})
    assert "| 3.21 | – | – | – |" in report(rows, None, "cuda") and "a: 50000 samples" in report(rows, None, "cuda")
    assert "REHEARSAL" in report(rows, None, "cpu")


@pytest.mark.parametrize("damage", [{"configs": "eight"}, {"wrong": 3}, {"seconds": 0}, {"seconds": "x"}, {"flop": "x"},
                                    {"curve": 5}, {"steps": "8"}, {"mode": "fp8"}])  # fmt: skip
def test_rows_with_values_of_another_kind(damage, tmp_path, monkeypatch):
    rows = [
        {"kind": "devices", "name": "all", "card": "CPU", "torch": "2.11", "configs": 8, "wrong": []},
        {"kind": "flops", "name": "Bellman Diffusion", "batch": 16, "flop": 19.0e9, "parameters": 36_600},
        *({"kind": "speed", "name": f"Bellman Diffusion: {mode}", "seconds": 0.05, "first": 1.0, "batch": 16,
           "memory": None} for mode in ("float32", "bf16")),
        {"kind": "profile", "name": "Bellman Diffusion", "file": "profile.txt"},
        {"kind": "plan", "name": "Bellman Diffusion", "mode": "bf16", "steps": 8, "minutes": 0.5},
        {"kind": "trained", "name": "Bellman Diffusion", "mode": "bf16", "minutes": 3, "steps": 8, "images": 409,
         "curve": [[4, None]]},
    ]  # fmt: skip
    one = bench(tmp_path)
    for row in rows:
        one.rows.add(**row | {key: value for key, value in damage.items() if key in row})
    monkeypatch.setattr(gpu, "judged", lambda *args: {"protocol": "none"})
    monkeypatch.setattr(gpu, "weights", lambda *args: {})
    with pytest.raises(UserError, match="has a row with a value that is none of its kind"):
        gpu.everything(one)


@pytest.mark.parametrize(("words", "said"), [
    (["steps=4"], "'steps=4' would not be read: use --minutes"),
    (["trainer.precision=16-mixed"], "would not be read: both are timed"),
    (["callbacks.grid=null"], "callbacks.grid=null: what it leaves is reported here"),
    (["callbacks=null"], "callbacks"),
    (["callbacks.metrics=null"], "callbacks.metrics=null: what it leaves is reported here"),
])  # fmt: skip
def test_words_that_would_be_of_no_use_are_refused(words, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        bench(tmp_path, words=words)


def test_a_report_that_is_lost_is_written_again(tmp_path):
    one = bench(tmp_path)
    one.once("plan", "a", lambda: {"steps": 8})
    (one.out / "report.md").unlink()
    assert one.report() == (one.out / "report.md").read_text()
    (one.out / "report.md").unlink()
    (one.out / "report.md").mkdir()
    with pytest.raises(UserError, match="cannot write .*report.md .Is a directory."):
        one.report()


def test_cards_are_told_apart():
    known = {
        "NVIDIA H200": 989, "NVIDIA GH200 480GB": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA A10": 125,
    }  # fmt: skip
    others = ["Quadro", "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA RTX A3000", "NVIDIA A10G", "NVIDIA GB200"]
    assert {card: gpu.peak_of(card) for card in [*known, *others]} == known | dict.fromkeys(others)


def test_a_call_is_asked_to_stop_until_it_hears(monkeypatch):
    monkeypatch.setattr(gpu, "AGAIN", 0.3)
    heard = []
    with pytest.raises(KeyboardInterrupt), gpu.stopped_after(0.05):
        for _ in range(3):
            try:
                time.sleep(20)
            except KeyboardInterrupt:  # as a compiler does
                heard.append(1)
        time.sleep(20)
    assert len(heard) == 3
    with gpu.stopped_after(0.05):
        pass
    time.sleep(0.2)  # what has ended is left alone


def test_a_card_with_too_little_memory_is_one_sentence(tmp_path):
    def made():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    one = bench(tmp_path)
    with pytest.raises(UserError, match="too little memory for flops with batches of 16: give data.batch_size=N"):
        one.once("flops", "Bellman Diffusion", made)
    assert not one.rows.where(kind="flops")


class Fixed(MLP):
    """Predicts a constant of the noise."""

    def forward(self, x, c_noise, label=None):
        return torch.full_like(x, 0.5), torch.zeros(len(x))


def test_ddpm_as_an_objective_of_the_suite():
    module = BellmanDiffusion(
        Fixed((2,), width=4, depth=1), Constant(), (2,), 0, 2.0, {"ode": ProbabilityFlow(steps=3)},
        objective=peers.NoiseError(), noise=peers.LinearBetas(scale=2.0), parametrisation="noise",
    )  # fmt: skip
    x = torch.randn(64, 2)
    losses = module.losses(x, None, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    alpha = peers.alphas_cumprod()[torch.randint(0, 1000, (64,), generator=generator)]
    noise = torch.randn(64, 2, generator=generator)
    torch.testing.assert_close(losses.gradient, (noise - 0.5).square().mean(1))
    torch.testing.assert_close(losses.sigma, 2 * ((1 - alpha) / alpha).sqrt())
    assert float(losses.total.detach()) == pytest.approx(float((noise - 0.5).square().mean()), rel=1e-5)
    sigma = torch.full((64,), 3.0)
    with torch.no_grad():
        torch.testing.assert_close(module.fields.score(x, sigma), torch.full_like(x, -0.5 / 3.0))
        assert module.sample(range(4)).isfinite().all()
    with pytest.raises(ValueError, match="needs parametrisation=noise"):
        BellmanDiffusion(MLP((2,)), Constant(), (2,), 0, 2.0, module.samplers, objective=peers.NoiseError())


def test_ddpm_is_built_from_words():
    config = gpu.common.compose("experiment=cifar10_h200", *gpu.REHEARSAL, *gpu.MODELS["DDPM"])
    model = gpu.common.make_model(config, {"shape": (3, 8, 8), "num_classes": 10, "sigma_data": 0.5})
    assert isinstance(model.objective, peers.NoiseError) and isinstance(model.noise, peers.LinearBetas)
    assert math.isfinite(float(model.losses(torch.randn(4, 3, 8, 8)).total.detach()))
