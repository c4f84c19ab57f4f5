"""export: a trained model as a folder that others can use (see `exported`), with a model card."""

import glob
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from bd_lightning import addresses, checkpoints, exported, report
from bd_lightning.checks import UserError, one_of
from bd_lightning.cli import build, objects, predict
from bd_lightning.cli.folders import SETTINGS, made, short, writing
from bd_lightning.cli.plan import Plan
from bd_lightning.combinations import choose_labels
from bd_lightning.facts import Facts
from bd_lightning.facts import read as read_facts
from bd_lightning.modules import Autoencoder
from bd_lightning.modules.base import Module
from bd_lightning.report.folder import read_json
from datamodules import SampleRequests

SHOWN = 64
"""Samples that are drawn for the card, of seed 0."""
STALE = 3600
"""Seconds after which an unfinished folder is what a killed process has left."""


def run(plan: Plan) -> None:
    """Write the folder `to`, whole or not at all.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    config, facts = plan.config, plan.facts
    assert facts is not None  # a plan to export has a checkpoint
    target = free_place(config["to"])
    precision = config["precision"] or "float32"
    try:
        one_of(tuple(exported.PRECISIONS), precision=precision)
        objects.prepare(config)
        with placed(target) as folder:
            stored = {**plan.record, "facts": facts.plain()}
            stored = exported.portable(with_autoencoder(stored, folder, precision))
            module = objects.model(plan, facts)
            rows = measured(plan, module)  # a damaged record is found before anything is drawn
            codes = module.codes_of(config["ckpt_path"])
            exported.write(folder, module, stored, plan.step, precision, rounded(plan, precision), codes)
            product = draw(plan, folder)
            write_card(plan, folder, module, target.name, precision, product, *rows)
    except ValueError as error:
        raise UserError(f"export: {error}") from error
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{short(target)}: {size / 1e6:.2f} MB; {module.next_step(short(target) + build.trust(config))}")


def free_place(to: str | None) -> Path:
    """The folder to write, which is not there yet.

    Raises:
        UserError: if none was named, or something lies there.
    """
    if not to:
        raise UserError("export needs to=FOLDER, the folder to write")
    if "://" in to:
        raise UserError(f"export writes a folder of this machine, not {to}: upload it with that hub's own client")
    target = Path(os.path.abspath(to))
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise UserError(f"{short(target)} is there already: delete it, or give to= another name")
    return target


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """A folder beside its place, moved there when all in it is written, and removed if it is not."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with writing(target, "to"), made(target.parent, target.exists, "to"):
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            if old.exists() and time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
        try:
            part.mkdir()
            yield part
            free_place(str(target))  # another process may have been faster
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def with_autoencoder(config: Mapping[str, Any], folder: Path, precision: str) -> dict[str, Any]:
    """A config whose autoencoder, if it has one, lies in the folder, and facts that know it by that.

    Raises:
        UserError: for an autoencoder that cannot be put into a folder.
    """
    node = config["data"].get("autoencoder")
    if not node:
        return dict(config)
    if "source" in node and not Path(node["source"]).exists():
        return dict(config)  # of a hub, where everybody finds it
    if "ckpt_path" not in node:
        raise UserError("export takes an autoencoder of this suite along, or one of a hub by its name; this is neither")
    module, stored = checkpoints.load(node["ckpt_path"], Autoencoder)
    space = module.codes_of(node["ckpt_path"])
    inner = folder / exported.AUTOENCODER
    inner.mkdir()
    exported.write(inner, module, exported.portable(stored), module.loaded_step, precision, codes=space)
    data = {**config["data"], "autoencoder": {**node, "ckpt_path": exported.AUTOENCODER}}
    return {**config, "data": data, "facts": {**config["facts"], "space": space}}


def draw(plan: Plan, folder: Path) -> str | None:
    """Draw samples by the model as the folder has it, into samples.png or samples.csv.

    Returns:
        The name of that file; None for a model that draws none.
    """
    model, stored = checkpoints.load(folder)
    try:
        model.check_predict()
    except UserError:
        return None
    facts = read_facts(stored["facts"])
    alone = {key: value for key, value in plan.config["trainer"].items() if key not in exported.MACHINE}
    alone |= {"devices": 1, "enable_progress_bar": False}
    one = replace(plan, config={**plan.config, "data": stored["data"], "trainer": alone})
    place = folder / "drawn"
    writer = predict.build_writer(one, facts, place)
    requests = SampleRequests(SHOWN, 0, choose_labels([], facts, model))
    trainer = objects.trainer(one, logger=False, callbacks=[writer])
    trainer.predict(model, DataLoader(requests, batch_size=SHOWN), return_predictions=False)
    (drawn,) = [path for path in place.iterdir() if path.name in ("grid.png", "samples.csv")]
    result = drawn.replace(folder / f"samples{drawn.suffix}")
    shutil.rmtree(place)
    return result.name


# ---- the model card


def write_card(
    plan: Plan,
    folder: Path,
    module: Module,
    name: str,
    precision: str,
    product: str | None,
    records: dict[str, list[dict[str, Any]]],
    others: int,
) -> None:
    """Write README.md, and the records with the rows that it quotes (`measured`)."""
    for record, rows in records.items():
        (folder / record).write_text(json.dumps(rows, indent=1))
    facts: Any = plan.facts
    trust = build.trust(plan.config)
    example = module.example.replace('load("FOLDER")', 'load("FOLDER", trust=True)') if trust else module.example
    averaged = "averaged weights" if (plan.config["callbacks"] or {}).get("ema") else "weights"
    card = CARD.format(
        name=name,
        command=module.next_step("FOLDER" + trust).partition(": ")[2],
        python=PYTHON.format(code=example) if example else "",
        safety=NEEDS_TRUST if trust else PLAIN,
        what=what(plan, facts) + module.describe(),
        weights=f"{averaged} of step {plan.step}, in {precision}",
        shown=shown(product),
        numbers=numbers([row for rows in records.values() for row in rows], others, rounded(plan, precision)),
    )
    (folder / "README.md").write_text(card)


CARD = """---
library_name: bellman-diffusion
tags: [bellman-diffusion, generative-model]
---

# {name}

{what}; {weights}. Made by the suite of Bellman Diffusion (arXiv 2410.01796).

{shown}## Use

In a checkout of the suite, with this folder, or an address of it (`hf://owner/name`, `wandb://entity/project/artifact:alias`),
as `ckpt_path`:

```bash
uv run {command}
```

{python}{safety}

## Numbers

{numbers}
"""

PLAIN = "Weights and config are numbers and words: loading them runs nothing that they bring along."
NEEDS_TRUST = (
    "The config names classes that are not the suite's: they have to be importable, and loading with trust runs them."
)
PYTHON = """In Python, with `bd_lightning` and `safetensors` installed:

```python
{code}
```

"""


def rounded(plan: Plan, precision: str) -> str:
    """The precision that weights were rounded to, here or before: that of a folder that is exported again is kept."""
    before = str((plan.checkpoint or {}).get("precision", "float32"))
    return before if precision == "float32" else precision


def what(plan: Plan, facts: Facts) -> str:
    """The model and its data in a line."""
    kind = plan.config["model"]["_target_"].rpartition(".")[2]
    network = plan.config["model"].get("network")
    trunk = f", {network['_target_'].rpartition('.')[2]}" if network else ""
    classes = f", {facts.num_classes} classes" if facts.num_classes else ""
    return f"`{kind}`{trunk}, of {facts.name} (samples of shape {list(facts.shape)}{classes})"


def shown(product: str | None) -> str:
    """The part of the card that shows samples."""
    if product is None:
        return ""
    text = f"![samples]({product})\n\n" if product.endswith(".png") else ""
    return f"{text}*`{product}`: the first {SHOWN} samples of seed 0 by the default sampler.*\n\n"


def measured(plan: Plan, module: Module) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Rows of records, of an exported folder or of the run and the evaluations of this very file, of its step.

    What a run says of itself is of the average that it follows, not of one that `average` made.

    Returns:
        By the name of their file, those of the samplers that the module has, set and guided as they are here, and
        those that no sampler has a part in; and the number of others.
    """
    own = Path(addresses.local(plan.config["ckpt_path"]))
    folder = own if own.is_dir() else plan.run_dir  # an exported folder has its numbers with it
    if not (folder / "config.yaml").is_file():
        return {}, 0
    run = report.read(folder)
    ours = [*module.drawings(), None]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    others = 0
    made = (plan.checkpoint or {}).get("made_by") is not None
    for name, rows in {**({} if made else run.records), **run.evaluations}.items():
        if name in run.evaluations:
            settings = read_json((folder / name).with_name(SETTINGS), dict)
            judged = settings.get("checkpoints")
            if not isinstance(judged, list) or judged[:1] != [addresses.digest(own)]:  # an autoencoder's may follow
                continue
        for row in rows:
            if row["step"] == plan.step and "protocol" in row:
                alike = row.get("drawn", "unknown") in ours
                others += not alike
                if alike:
                    found.setdefault(Path(name).name, {})[json.dumps(row, sort_keys=True)] = row
    return {name: list(rows.values()) for name, rows in found.items()}, others


def numbers(rows: list[dict[str, Any]], others: int, precision: str) -> str:
    """The rows as a table, or that there are none."""
    if not rows:
        how = "with the samplers and guidance of this folder" if others else "where this was exported from"
        return f"Nothing was measured {how}."

    def plain(text: str) -> str:
        return " ".join(str(text).split()).replace("|", "\\|")

    lines = ["| numbers | how |", "|---|---|"]
    for row in rows:
        values = {plain(key): value for key, value in row.items() if "/" in key and isinstance(value, (int, float))}
        text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        lines.append(f"| {text} | {plain(row.get('protocol', ''))} |")
    caveat = (
        "" if precision == "float32" else f"\n\nMeasured in float32, before the weights were rounded to {precision}."
    )
    return "\n".join(lines) + caveat
