"""A run of four steps, and command lines that are refused and change nothing."""

from pathlib import Path

import train

WORDS = [
    "model=mlp", "model.network.width=16", "model.network.depth=1", "model.samplers.sde=null",
    "model.samplers.ode.steps=3", "data.batch_size=64", "callbacks.metrics=null", "callbacks.best=null",
    "callbacks.grid=null", "callbacks.trajectory=null", "callbacks.progress=null", "callbacks.memorisation=null",
    "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "steps=4", "eval_every=2",
]  # fmt: skip


def launch(root: Path, *words: str) -> int:
    return train.main([*WORDS, f"root={root}", f"data.root={root.parent / 'data'}", *words])


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(root: Path, capsys, *words: str) -> str:
    """The one sentence of a refusal that changes no file."""
    before = contents(root.parent)
    capsys.readouterr()
    assert launch(root, *words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert contents(root.parent) == before
    return said[0]
