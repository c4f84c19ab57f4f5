"""The rows of gpu.py as tables."""

from typing import Any

from benchmarks.rows import Rows, table

JUDGED = ("test/fid", "test/kid", "test/precision", "test/recall")


def report(rows: Rows, peak: float | None, device: str) -> str:
    """All rows as text; `peak` is in TFLOP/s of bf16, None where it is not known."""
    text = []
    for row in rows.where(kind="devices"):
        rehearsal = " REHEARSAL on a CPU, with all sizes cut." if device == "cpu" else ""
        text.append(f"{row['card']}, torch {row['torch']}.{rehearsal}")
        fine = row["configs"] - len(row["wrong"])
        text += [f"{fine} of {row['configs']} configs step and sample on it.", *row["wrong"]]
        if "waits" in row:
            text.append(f"A training step waits for {row['waits'] or 'nothing'}.")
    for work in rows.where(kind="flops"):
        size = f"{work['parameters'] / 1e6:.3g} million parameters, batch {work['batch']}"
        text.append(f"\nA training step of {size} is {work['flop'] / 1e12:.3g} TFLOP.")
        header = ["model", "ms", "images/s", "share of bf16 peak", "GiB", "first step, s"]
        text.append(table(header, [_step(row, work["flop"], peak) for row in rows.where(kind="speed")]))
    runs = [_run(row, rows) for row in rows.where(kind="trained")]
    if runs:
        header = ["model", "mode", "minutes", "steps", "million images", "FID at quarters", "FID", "KID", "precision"]
        text.append(table([*header, "recall"], runs))
    text += [f"\n{row['name']}: {row['protocol']}" for row in rows.where(kind="judged")]
    return "\n".join(text) + "\n"


def _step(row: dict[str, Any], flop: float, peak: float | None) -> list[str]:
    """Time, rate, share of the peak and memory of a step."""
    if "failed" in row:
        return [row["name"], f"failed: {row['failed'][:100]}", *["–"] * 4]
    share = "–" if peak is None else f"{flop / row['seconds'] / peak / 1e12:.1%}"
    memory = "–" if row["memory"] is None else f"{row['memory'] / 2**30:.1f}"
    rate = f"{row['batch'] / row['seconds']:.0f}"
    return [row["name"], f"{1000 * row['seconds']:.1f}", rate, share, memory, f"{row['first']:.1f}"]


def _run(row: dict[str, Any], rows: Rows) -> list[str]:
    """How a model was trained, and how it was judged, once it was."""
    test = next(iter(rows.where(kind="judged", name=row["name"])), {})
    curve = ", ".join("–" if fid is None else f"{fid:.2f}" for _, fid in row["curve"])
    values = ["–" if test.get(key) is None else f"{test[key]:.3g}" for key in JUDGED]
    images = f"{row['images'] / 1e6:.2f}"
    return [row["name"], row["mode"], f"{row['minutes']:g}", str(row["steps"]), images, curve, *values]
