"""The page of a search: two scatter plots, every point in a table, and what each layer takes. Needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.bench.report_html import STYLE as REPORT_STYLE
from intaglio.bench.search import COLUMNS, cells, ordered, reached

WIDTH, HEIGHT = 440, 330  # of a plot in its own units; it scales to its column
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 44
TICKS = 5
COLOURS = ("#2f74c0", "#c2571a", "#7a4fb5", "#4c8a2b", "#8a6d3b", "#b0357a", "#5f6b76")
REQUESTS_SHOWN = 8

STYLE = """
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
.plots figure{padding:.6rem .6rem .2rem}.plots svg{display:block;width:100%;height:auto}
.plots text{fill:var(--soft);font:11.5px system-ui,-apple-system,"Segoe UI",sans-serif;paint-order:stroke;
stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.plots .axis{stroke:var(--line);stroke-width:1}.plots .budget{stroke:var(--bad);stroke-dasharray:5 4}
.plots text.budget-text{fill:var(--bad)}.plots .frontline{fill:none;stroke:var(--soft);stroke-width:1.5;opacity:.7}
.plots .mix{fill:var(--soft);opacity:.75}.plots .ring{fill:none;stroke:var(--ink);stroke-width:2}
.plots text.name{fill:var(--ink);font-weight:600}
table th:nth-child(n),table td:nth-child(n){text-align:right}
table th:first-child,table td:first-child,td.words,th.words{text-align:left!important}
tr.chosen td{font-weight:600;background:#4c8a2b22}
td.words{white-space:normal;min-width:12rem}td.layer{overflow-wrap:anywhere;white-space:normal;min-width:14rem}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:.84rem;color:var(--soft);margin:.6rem 0}
.key svg{width:14px;height:14px;vertical-align:-2px;margin-right:.3rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:.88rem;margin:.6rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:600px){dl{grid-template-columns:1fr}dt{margin-top:.3rem}}
"""


def ticks(low: float, high: float) -> list[float]:
    """About TICKS round values that lie within."""
    raw = (high - low) / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: the values and a margin."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.09 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def shape(row: Mapping[str, Any], x: float, y: float, colours: Mapping[str, str]) -> str:
    """A square for one format everywhere, a dot for a mix, a ring around the chosen one."""
    ring = f'<circle class=ring cx="{x:.1f}" cy="{y:.1f}" r="9"/>' if row["chosen"] else ""
    if row["kind"] == "uniform":
        fill = colours.get(row["name"], COLOURS[-1])
        return f'{ring}<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="1.5" fill="{fill}"/>'
    return f'{ring}<circle class=mix cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def plot(report: Mapping[str, Any], key: str, label: str, colours: Mapping[str, str], scale: float) -> str:
    """Worst PSNR over one figure of every point."""
    rows = [r for r in report["points"] if not r["note"] and r["psnr"] is not None and r[key] is not None]
    if not rows:
        return "<figure><p>No point has a finite PSNR.</p></figure>"
    limit = report["budget"].get("psnr")
    x0, x1 = bounds([r[key] / scale for r in rows])
    y0, y1 = bounds([r["psnr"] for r in rows] + ([limit] if limit else []))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(x0, x1):
        x, _ = at(value, y0)
        parts.append(f'<line class=axis x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<line class=axis x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    if limit:
        _, y = at(x0, limit)
        parts.append(f'<line class=budget x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        place = f'x="{WIDTH - RIGHT}" y="{y + 15:.1f}" text-anchor="end"'  # few plans are large or fast, and worse
        parts.append(f"<text class=budget-text {place}>budget {limit:g} dB</text>")
    if key == "bytes":
        line = sorted((r["bytes"] / scale, r["psnr"]) for r in rows if r["size_front"])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line))
        parts.append(f'<polyline class=frontline points="{path}"/>')
    for row in sorted(rows, key=lambda r: (r["chosen"], r["kind"] == "uniform")):
        x, y = at(row[key] / scale, row["psnr"])
        title = f"{row['name']}: {row['bytes'] / 1e6:.2f} MB, {row['psnr']:.1f} dB, {row['speed'] or 0:.2f}x speed"
        parts.append(f"<g><title>{escape(title)}</title>{shape(row, x, y, colours)}</g>")
        if row["chosen"] or row["kind"] == "uniform":
            left = x > WIDTH * 0.72
            anchor, side = ("end", -13) if left else ("start", 13)
            parts.append(
                f'<text class=name x="{x + side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
                f"{escape(row['name'])}</text>"
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>')
    parts.append(
        f'<text x="13" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 13 {(TOP + HEIGHT - BOTTOM) / 2})">worst PSNR, dB</text>'
    )
    name = escape(f"Worst PSNR over {label}")
    return f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'


def legend(report: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """What the marks mean."""
    marks = [
        (f'<rect x="2" y="2" width="10" height="10" rx="1.5" fill="{colours[name]}"/>', f"{name} everywhere")
        for name in colours
    ]
    marks.append(('<circle class=mix cx="7" cy="7" r="4" fill="#888"/>', "a mix the search tried"))
    marks.append(('<circle cx="7" cy="7" r="5.5" fill="none" stroke="currentColor" stroke-width="2"/>', "chosen"))
    items = "".join(f'<span><svg viewBox="0 0 14 14">{m}</svg>{escape(t)}</span>' for m, t in marks)
    return f"<div class=key>{items}</div>"


def points_table(report: Mapping[str, Any]) -> str:
    """Every point, the largest first."""
    kinds = [" class=words" if i == len(COLUMNS) - 1 else "" for i in range(len(COLUMNS))]
    head = "".join(f"<th scope=col{kind}>{escape(c)}</th>" for c, kind in zip(COLUMNS, kinds, strict=True))
    rows = []
    for row in ordered(report):
        texts = zip(cells(row, report), kinds, strict=True)
        body = "".join(f"<td{kind}>{escape(text)}</td>" for text, kind in texts)
        rows.append(f"<tr{' class=chosen' if row['chosen'] else ''}>{body}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def layers_table(report: Mapping[str, Any]) -> str:
    """What each group of layers takes, and what each format would do to the output."""
    requests = list(dict.fromkeys(r for row in report["layers"] for r in row["errors"] if r != "none"))[:REQUESTS_SHOWN]
    head = "<th scope=col>weights that share an input</th><th scope=col class=words>format</th><th scope=col>kB</th>"
    head += "".join(f"<th scope=col>{escape(r)} alone</th>" for r in requests)
    rows = []
    for row in report["layers"]:
        names = "<br>".join(escape(m) for m in row["members"])
        formats = escape(", ".join(dict.fromkeys(row["format"])))
        errors = "".join(f"<td>{row['errors'][r]:.1e}</td>" if r in row["errors"] else "<td>–</td>" for r in requests)
        size = f"{row['bytes'] / 1e3:.0f}"
        rows.append(f"<tr><td class=layer>{names}</td><td class=words>{formats}</td><td>{size}</td>{errors}</tr>")
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    names = [r["name"] for r in report["points"] if r["kind"] == "uniform"]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    chosen = next(r for r in report["points"] if r["chosen"])
    small = report["unquantized_bytes"] / chosen["bytes"]
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in report["facts"].items())
    prompts = "".join(f"<li>{escape(p)}</li>" for p in report["prompts"])
    plots = plot(report, "bytes", "size of the component, MB", colours, 1e6)
    plots += plot(report, "speed", "speed against the unquantized component", colours, 1)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Intaglio quantize-search</title><style>{REPORT_STYLE}{STYLE}</style></head><body>
<h1>{escape(report["name"])}</h1>
<p class=lead>The {escape(report["component"])} takes {chosen["bytes"] / 1e6:.1f} MB instead of
{report["unquantized_bytes"] / 1e6:.1f} ({small:.2f} times smaller); the worst of {len(report["prompts"])} pictures is
{reached(chosen)} dB from the unquantized one, asked for was {escape(report["facts"]["asked"])}.</p>
<code>{escape(report["command"])}</code>
<h2>Size, speed and fidelity</h2>
<div class=plots>{plots}</div>{legend(report, colours)}
<p class=lead>Line: the points that none beats in size and PSNR. The unquantized component
({report["unquantized_bytes"] / 1e6:.1f} MB) and identical pictures are outside the plot.</p>
{points_table(report)}
<h2>Layers of the chosen plan</h2>
<p class=lead>The last columns are the relative L2 error of the component's output with this row alone quantized.</p>
{layers_table(report)}
<h2>How this was found</h2><dl>{facts}</dl>
<p class=lead>{escape(sentence(report["machine"]))}. Speed is the median of interleaved calls of the component.
Prompts:</p><ul>{prompts}</ul>
</body></html>
"""
