"""The look of the pages: one style sheet for light and dark mode, phones and screens."""

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1b1b1a; --soft: #62615c; --rule: #e3e2de;
  --warn: #fff4d6; --c0: #2a78d6; --c1: #eb6834; --c2: #1b9e74; --c3: #4a3aa7; --c4: #c98500; --c5: #d55181;
  --c6: #008300; --c7: #e34948; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201f; --ink: #f1f0ec; --soft: #a5a49d;
  --rule: #373734; --warn: #3d3415; --c0: #4a95ef; --c1: #ee7a4c; --c2: #2fb58a; --c3: #9d93ee; --c4: #d99a1f;
  --c5: #e2699a; --c6: #3aa63a; --c7: #ec7272; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 56px; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 4px 0 10px; } .soft, small, figcaption small { color: var(--soft); } small { font-size: 12px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 10px 14px; flex: 1 1 130px; }
.tile b { display: block; font-size: 23px; font-weight: 600; line-height: 1.3; } .tile span { color: var(--soft);
  font-size: 13px; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px 10px; }
figcaption { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
figure ul { list-style: none; padding: 0; margin: 4px 0; display: flex; flex-wrap: wrap; gap: 1px 14px;
  font-size: 12.5px;
  color: var(--soft); } figure li b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
figure i { display: inline-block; width: 14px; height: 0; border-top: 3px solid; margin: 0 6px 3px 0;
  border-radius: 2px; }
figure i.dashed { border-top-style: dashed; }
figure img { display: block; width: 100%; max-width: 620px; height: auto; margin-top: 8px; border-radius: 4px;
  image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); } svg .level { stroke: var(--soft); stroke-dasharray: 2 4; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.raw { stroke-width: 1; }
polyline.dashed { stroke-dasharray: 6 5; }
COLOURS
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td.text { white-space: normal; min-width: 160px; text-align: left; }
ol.protocols { font-size: 13px; color: var(--soft); padding-left: 24px; margin: 8px 0 0; list-style: upper-alpha; }
.warn { background: var(--warn); border-radius: 10px; padding: 10px 14px; margin: 12px 0; font-size: 14px; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; margin-bottom: 10px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 6px 0 14px; }
@media print { body { max-width: none; } figure, .tile { break-inside: avoid; } }
"""


def _colours() -> str:
    rules = [
        f"polyline.c{k} {{ stroke: var(--c{k}); }} circle.c{k} {{ fill: var(--c{k}); }} "
        f"i.c{k} {{ border-color: var(--c{k}); }}"
        for k in range(8)
    ]
    return "\n".join(rules)


def document(title: str, parts: Iterable[str], mark: str = "") -> str:
    """A whole page: HTML that needs nothing but itself; `mark` goes into its head."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'{mark}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.replace('COLOURS', _colours())}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of escaped cells that scrolls by itself where the screen is narrow."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
