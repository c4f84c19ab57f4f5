"""How good samples are against the number of network calls that they take."""

import math
from collections.abc import Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure

from bd_lightning.checks import positive
from callbacks.drawing import SampleModule, data_of
from callbacks.evaluation import Evaluation, Metric, remarked
from callbacks.pictures import publish_lines, publish_picture
from callbacks.records import append_record, run_folder, step_of


class CallsCurve(L.Callback):
    """Judges every sampler of a model at several numbers of network calls, at a test.

    Written to <run folder>/calls.json, a row for each as soon as it is known, to calls.md, a table, and to
    figures/calls-<step>.png; logged as lines calls/<metric>. A sampler that cannot take a number of calls takes the
    nearest below; the least that it can, and one line says so, where there is none below.

    Args:
        calls: numbers of network calls.
        judge: the callback whose metrics are taken.
    """

    def __init__(self, calls: Sequence[int], judge: Evaluation) -> None:
        positive(**{f"calls[{i}]": count for i, count in enumerate(calls)})
        self.calls, self.judge = sorted(set(calls)), judge

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, judge and write."""
        module = cast(SampleModule, pl_module)
        samplers: dict[str, Any] = module.samplers  # type: ignore[assignment]
        rows: list[dict[str, Any]] = []
        for name, sampler in list(samplers.items()):
            asked = [(calls, sampler.with_calls(calls).calls) for calls in self.calls]
            if more := [calls for calls, taken in asked if taken < calls and sampler.consistency]:
                rank_zero_info(f"{name} takes {sampler.calls} network calls, whatever is asked for: {more}")
            if others := [f"{taken} for {calls}" for calls, taken in asked if taken > calls]:
                rank_zero_info(f"{name} needs more network calls than were asked for: it takes {', '.join(others)}")
            for one in {found.calls: found for found in map(sampler.with_calls, self.calls)}.values():
                key = f"{name}@{one.calls}"
                samplers[key] = one
                try:
                    found = self.judge.findings(trainer, module, "test", key)
                finally:
                    del samplers[key]
                if found is not None:
                    row = remarked(found.row, data_of(trainer).remark)
                    values = {m.name: found.values.get(f"test/{m.name}") for m in self.judge.metrics}
                    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
                    place = {"step": step_of(trainer), "sampler": name, "calls": one.calls}
                    rows.append(place | known | {"protocol": row.get("protocol", "")})
                    if trainer.is_global_zero:  # at once: a test may be stopped
                        append_record(trainer, "calls.json", rows[-1])
        if trainer.is_global_zero:
            self.write(trainer, rows)

    def write(self, trainer: L.Trainer, rows: list[dict[str, Any]]) -> None:
        """Write the table and the figure of the rows, and log the lines."""
        folder, metrics = run_folder(trainer), self.judge.metrics
        table = markdown(rows, metrics)
        protocols = "\n\n".join(dict.fromkeys(row["protocol"] for row in rows))
        (folder / "calls.md").write_text(f"{table}\n\n{protocols}\n")
        rank_zero_info(table)
        lines = {metric.name: curves(rows, metric.name) for metric in metrics}
        lines = {name: found for name, found in lines.items() if found}
        if lines:
            caption = "against network calls"
            publish_picture(trainer, "figures/calls", figure(lines).savefig, caption, "figures/calls")
        for name, found in lines.items():
            publish_lines(trainer, f"calls/{name}", found, "network calls")


def curves(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Points (calls, value) of each sampler, where the value is known."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[metric] is not None:
            found.setdefault(row["sampler"], []).append((row["calls"], row[metric]))
    return {name: sorted(points) for name, points in found.items()}


def markdown(rows: Sequence[dict[str, Any]], metrics: Sequence[Metric]) -> str:
    """A Markdown table, a row for each sampler and number of calls."""
    header = ["sampler", "calls", *(metric.name for metric in metrics)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        values = ["–" if row[m.name] is None else f"{row[m.name]:.{m.digits + 1}f}" for m in metrics]
        lines.append([row["sampler"], str(row["calls"]), *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(lines: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """A panel for each metric, a line for each sampler."""
    picture = Figure(figsize=(3.2 * len(lines), 3), dpi=120, layout="constrained")
    for axes, (metric, found) in zip(picture.subplots(1, len(lines), squeeze=False)[0], lines.items()):
        for name, points in found.items():
            axes.plot(*zip(*points), "o-", ms=3, label=name)
        axes.set(xlabel="network calls", title=metric, xscale="log")
        if metric in ("fid", "kid", "w2") and all(value > 0 for points in found.values() for _, value in points):
            axes.set_yscale("log")
    picture.axes[0].legend(fontsize=7)
    return picture
