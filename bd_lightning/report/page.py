"""The page of one run."""

import base64
import os
import re
import shlex
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bd_lightning.report.curves import Line, chart, number
from bd_lightning.report.folder import Run
from bd_lightning.report.style import document, table

LARGEST = 12_000_000
"""Bytes of the largest picture that a page takes in; larger ones are named."""
LOSSES = ("loss", "loss_gradient", "loss_scalar")


def run_page(run: Run, next_step: str | None = None, trust: str = "") -> str:
    """The page of a run.

    Args:
        run: the run.
        next_step: what one does with the trained model, words and a command line; None leaves it out.
        trust: what command lines need more to load the checkpoints, as `build.trust` says.

    Returns:
        HTML, one file without external resources and without scripts.
    """
    parts = [_header(run), _tiles(run)]
    parts += _section("Samples", _pictures(run))
    parts += _section("Curves", [*_losses(run), *_metrics(run)])
    parts += _evaluations(run)
    if more := _diagnostics(run):
        parts.append(f'<h2>Diagnostics</h2><details><summary>{len(more)} more</summary><div class="cards">')
        parts.append("".join(more) + "</div></details>")
    parts.append(_commands(run, next_step, trust))
    text = (run.folder / "config.yaml").read_text(encoding="utf-8")
    parts.append(f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>")
    return document(run.name, parts)


def write(page: str, path: Path) -> None:
    """Write a page, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


# ---- parts of the page


def _section(title: str, cards: Sequence[str]) -> list[str]:
    return [f'<h2>{title}</h2><div class="cards">{"".join(cards)}</div>'] if cards else []


def _header(run: Run) -> str:
    groups = [run.config.get(group) for group in ("model", "data")]
    kinds = [str(node.get("_target_", "")).rpartition(".")[2] for node in groups if isinstance(node, dict)]
    total = run.config.get("steps")
    how_far = f"step {run.step} of {total}" if isinstance(total, int) and total >= run.step else f"step {run.step}"
    now = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<h1>{escape(run.name)}</h1><p class="soft">{escape(" on ".join(filter(None, kinds)))} · {how_far} '
        f"· written {now}</p>"
    )


def headline(run: Run) -> list[str]:
    """Names of the numbers that a run is judged by: those of its evaluations, and the losses."""
    losses = [name for name in ("val/loss", "train/loss") if name in run.curves]
    return [name for name in run.metrics if name in run.curves] + losses


def digits(run: Run, name: str) -> int | None:
    """Decimals that a number is shown with; None for no more than it needs."""
    found: int | None = run.metrics.get(name, {}).get("digits")
    return found


def _tiles(run: Run) -> str:
    tiles = []
    for name in headline(run):
        last, best = run.last(name), run.best(name)
        assert last is not None
        shown = number(last, digits(run, name))
        note = f"best {number(best[1], digits(run, name))} at {best[0]}" if best else "&nbsp;"
        tiles.append(f'<div class="tile"><span>{escape(name)}</span><b>{shown}</b><span>{note}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _losses(run: Run) -> list[str]:
    cards = []
    for name in LOSSES:
        found = [(f"{stage}/{name}", colour) for colour, stage in enumerate(("train", "val"))]
        lines = [Line(key, run.curves[key], colour) for key, colour in found if key in run.curves]
        if lines:
            cards.append(chart(name, lines))
    return cards


def levels(run: Run, name: str) -> dict[str, float]:
    """What a number should be read against: its value for real data, where its record has one."""
    stage, _, metric = name.partition("/")
    for rows in run.records.values():
        for row in reversed(rows):
            if name in row:
                first = next(key for key in row if key.startswith(f"{stage}/")) == name
                floor = row.get(f"{metric}_floor", row.get("floor") if first else None)
                return {"real data": float(floor)} if isinstance(floor, (int, float)) else {}
    return {}


def _metrics(run: Run) -> list[str]:
    names = [name for name in run.curves if name.startswith("val/") and name.partition("/")[2] not in LOSSES]
    declared = [name for name in run.metrics if name in names]
    families = _families([name for name in names if name not in declared])
    cards = [chart(name, [Line(name, run.curves[name])], levels(run, name)) for name in declared]
    return cards + [_family(run, title, members) for title, members in families.items()]


def _diagnostics(run: Run) -> list[str]:
    rest = [n for n in run.curves if not n.startswith("val/") and not n.startswith("train/loss")]
    constants = [name for name in rest if len({value for _, value in run.curves[name]}) == 1]
    return [_family(run, *family) for family in _families([n for n in rest if n not in constants]).items()]


def _families(names: Sequence[str]) -> dict[str, list[str]]:
    """Names that differ in what follows "_sigma_", or in a number at their end, belong together."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"(_sigma_.*|_\d+)$", "", name), []).append(name)
    return families


def _family(run: Run, title: str, members: list[str]) -> str:
    if members == [title]:
        return chart(title, [Line(title, run.curves[title])])
    ends = {name: name[len(title) :].removeprefix("_").replace("sigma_", "σ ").replace("-", "–") for name in members}

    def size(name: str) -> float:
        found = re.search(r"\d+(\.\d+)?", ends[name])
        return float(found[0]) + (0.001 if "above" in name else 0) - (0.001 if "below" in name else 0) if found else 0

    ordered = sorted(members, key=size)
    shades = [0.3 + 0.7 * i / max(1, len(ordered) - 1) for i in range(len(ordered))]
    return chart(title, [Line(ends[n], run.curves[n], 0, shade) for n, shade in zip(ordered, shades)])


def _pictures(run: Run) -> list[str]:
    cards = [_picture(path, kind, f"step {step}") for kind, (step, path) in run.pictures().items()]
    cards += [_picture(path, f"{path.parent.name}/{path.stem}", "animation") for path in run.animations()]
    return cards


def _picture(path: Path, title: str, note: str) -> str:
    caption = f"<figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
    if path.stat().st_size > LARGEST:
        size = path.stat().st_size / 1e6
        return f"<figure>{caption}<p class=soft>{size:.0f} MB: {escape(path.name)} in the run folder</p></figure>"
    kind = "gif" if path.suffix == ".gif" else "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure>{caption}<img alt="{escape(title)}, {escape(note)}" src="data:image/{kind};base64,{data}"></figure>'
    )


def _evaluations(run: Run) -> list[str]:
    """Every row of every record, with a letter for its protocol."""
    parts = []
    for name, rows in {**run.records, **run.evaluations}.items():
        skipped = ("step", "drawn", "protocol", "summary")
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in skipped))
        protocols = list(dict.fromkeys(row["protocol"] for row in rows if "protocol" in row))
        letters = {protocol: letter(i) for i, protocol in enumerate(protocols)}
        head = ["step", *map(escape, keys), *(["protocol"] if protocols else [])]
        body = [
            [str(row["step"]), *(_cell(run, key, row.get(key)) for key in keys)]
            + ([letters.get(row.get("protocol", ""), "")] if protocols else [])
            for row in rows
        ]
        notes = "".join(f"<li>{escape(protocol)}</li>" for protocol in protocols)
        parts.append(f"<h2>{escape(name)}</h2>{table(head, body)}")
        if notes:
            parts.append(f'<ol class="protocols">{notes}</ol>')
    return parts


def letter(i: int) -> str:
    """A, B, …, Z, AA, …, as an ordered list numbers its items."""
    return (letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _cell(run: Run, key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value, digits(run, key.replace("test/", "val/", 1)))
    return "" if value is None else escape(str(value))


def short(path: Path) -> str:
    """A path as a shell takes it, relative to the working directory where that is shorter."""
    return shlex.quote(min(os.path.relpath(path), str(path), key=len))


def _commands(run: Run, next_step: str | None, trust: str) -> str:
    best, last = (run.folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    lines = []
    if next_step:
        words, _, command = next_step.partition(": ")
        lines += [f"# {words}", command]
    if best.is_file():
        lines += ["# the test split", f"train.py test ckpt_path={short(best)}{trust}"]
    if last.is_file():
        steps = run.config.get("steps")
        more = 2 * max(1, steps if isinstance(steps, int) else run.step)
        lines += ["# to go on", f"train.py ckpt_path={short(last)}{trust} steps={more}"]
    lines += ["# the same again", f"train.py --config {short(run.folder / 'config.yaml')}"]
    lines += ["# beside another run", f"train.py compare {short(run.folder)} OTHER"]
    return f"<h2>To go on</h2><pre>{escape(chr(10).join(lines))}</pre>"
