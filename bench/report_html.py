"""The report as one HTML page that needs nothing else: style, pictures and bars are inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.bench.report import cells, columns, decibels, names, notes, number

WIDEST = 8  # pictures side by side; more wrap
LARGEST = 512  # pixels; a larger picture is shown scaled down, the original lies beside the page
COLOURS = {"torch": "#8a6d3b", "onnxruntime": "#2f74c0", "openvino": "#7a4fb5", "tensorrt": "#4c8a2b"}
OTHER = "#5f6b76"

STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#5c6670;--line:#d9dee3;--page:#fbfbf9;--card:#fff;--bad:#a5351f}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaec;--soft:#9aa4ad;--line:#343b42;--page:#14171a;--card:#1b1f23;
--bad:#f08a74}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:76rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .5rem;font-weight:600}
code{font:.82rem/1.4 ui-monospace,Menlo,Consolas,monospace;color:var(--soft);overflow-wrap:anywhere}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600}
th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}
td.reason{text-align:left;color:var(--soft);white-space:normal;min-width:20rem}
tr.error td.reason{color:var(--bad)}
.bars{display:grid;grid-template-columns:max-content minmax(6rem,1fr) max-content;gap:.45rem .8rem;align-items:center;
font-size:.86rem;font-variant-numeric:tabular-nums}
.bars .row{display:contents}
.bars svg{display:block;width:100%;height:18px}.bars .figure{color:var(--soft)}.bars b{color:var(--ink)}
.whisker{stroke:var(--ink);stroke-width:1.5;opacity:.75}
.grid{display:grid;grid-template-columns:repeat(var(--n),minmax(0,13rem));gap:.8rem}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#8883}
figure .heat{display:none}
figcaption{padding:.45rem .6rem .55rem;font-size:.8rem;line-height:1.35}
figcaption b{display:block;overflow-wrap:anywhere}figcaption span{display:block;color:var(--soft)}
.switch{display:inline-flex;gap:.5rem;align-items:center;cursor:pointer;font-size:.92rem}
.legend{display:inline-block;width:6rem;height:.7rem;border-radius:3px;vertical-align:middle;
background:linear-gradient(90deg,#000004,#51127c,#b73779,#fc8961,#fcfdbf)}
body:has(#heat:checked) .heat{display:block}body:has(#heat:checked) .judged .picture{display:none}
body>.lead{margin:0 0 .8rem;font-size:.9rem;color:var(--soft)}
ul{padding-left:1.1rem;font-size:.9rem;color:var(--soft)}li{margin:.25rem 0}
@media(max-width:600px){body{padding:1rem .75rem 2rem}.grid{grid-template-columns:repeat(3,1fr);gap:.45rem}
.bars{display:block}.bars .row{display:grid;grid-template-columns:1fr max-content;gap:.1rem .6rem;margin-bottom:.8rem}
.bars svg{grid-column:1/-1;order:3}
figcaption{padding:.35rem .4rem .45rem;font-size:.72rem}}
"""


def data_uri(path: Path) -> str:
    """A picture as a ``data:`` URI: PNG as it is, or scaled down to LARGEST as WebP."""
    from PIL import Image

    raw, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(raw)) as image:
        if max(image.size) > LARGEST:
            image.thumbnail((LARGEST, LARGEST))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=92)
            raw, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def colour(backend: str) -> str:
    """The backend's colour, the same in every figure."""
    return COLOURS.get(backend.split()[0], OTHER)


def summary(report: Mapping[str, Any]) -> str:
    """The table of all cases."""
    heads = columns(report)
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    rows = []
    for case in report["cases"]:
        texts, fixed = cells(report, case), len(names(report))
        body = "".join(f"<td>{escape(t)}</td>" for t in (texts if case["status"] == "ok" else texts[:fixed]))
        if case["status"] != "ok":
            body += f'<td class=reason colspan="{len(heads) - fixed}">{escape(texts[fixed])}</td>'
        rows.append(f'<tr class="{escape(case["status"])}">{body}</tr>')
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def bar(median: float, low: float, high: float, longest: float, fill: str, text: str) -> str:
    """A bar to the median and a whisker over the range, in percent of `longest` so that it fits any width."""
    m, a, b = (100 * v / longest * 0.985 for v in (median, low, high))
    whisker = "".join(
        f'<line class=whisker x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1}" y2="{y2}"/>'
        for x1, x2, y1, y2 in ((a, b, 9, 9), (a, a, 5, 13), (b, b, 5, 13))
    )
    rect = f'<rect x="0" y="2" width="{m:.2f}%" height="14" rx="3" fill="{fill}"/>'
    return f'<svg role="img" aria-label="{escape(text)}">{rect}{whisker}</svg>'


def bars(report: Mapping[str, Any]) -> str:
    """Seconds per image of every measured case, with its speed-up and its fidelity beside the bar."""
    measured = [c for c in report["cases"] if c["status"] == "ok" and c["image_s"]]
    if not measured:
        return "<p>No case was measured.</p>"
    longest = max(c["image_s"]["max"] for c in measured)
    parts = []
    for case in measured:
        image, worst = case["image_s"], case["worst"] or {}
        text = (
            f"{case['label']}: median {number(image['median'])} s, {number(image['min'])} to {number(image['max'])} s"
        )
        label = "reference" if case["label"] == report["reference"]["label"] else decibels(worst)
        unit = " dB" if worst.get("psnr") is not None and not worst.get("identical") else ""
        times = f"{case['speedup']['median']:.2f}×" if case["speedup"] else "–"
        parts.append(
            f"<div class=row><span class=name>{escape(case['label'])}</span>"
            f"{bar(image['median'], image['min'], image['max'], longest, colour(case['backend']), text)}"
            f"<span class=figure><b>{times}</b> · {number(image['median'])} s · {label}{unit}</span></div>"
        )
    return f"<div class=bars>{''.join(parts)}</div>"


def figure(case: Mapping[str, Any], picture: Mapping[str, Any], folder: Path, reference: str) -> str:
    """One picture with its heat map behind the switch, and a caption."""
    is_reference = case["label"] == reference
    title = escape(f"{case['label']}: {picture['prompt']}")
    heat = ""
    if picture.get("heat"):
        heat = f'<img class=heat alt="FLIP heat map, {title}" src="{data_uri(folder / picture["heat"])}">'
    times = f"{case['speedup']['median']:.2f}× speed" if case["speedup"] else ""
    if is_reference:
        fidelity = "reference"
    elif picture.get("identical"):
        fidelity = "identical"
    elif picture.get("psnr") is None:
        fidelity = "not comparable"
    else:
        fidelity = f"{picture['psnr']:.1f} dB</span><span>FLIP {picture['flip']:.3f}"
    name = escape(case["label"]).replace("/", "/<wbr>")  # a long label breaks after the artifact's name
    caption = f"<figcaption><b>{name}</b><span>{times}</span><span>{fidelity}</span></figcaption>"
    source = data_uri(folder / picture["image"])
    kind = " class=judged" if heat else ""
    return f'<figure{kind}><img class=picture alt="{title}" src="{source}">{heat}{caption}</figure>'


def gallery(report: Mapping[str, Any], folder: Path) -> str:
    """A row of pictures per prompt, a column per case; on a phone the row wraps."""
    reference = report["reference"]["label"]
    parts = []
    for index, prompt in enumerate(report["settings"]["prompts"]):
        pictures = [
            figure(case, case["prompts"][index], folder, reference)
            for case in report["cases"]
            if case["status"] == "ok" and index < len(case.get("prompts", []))
        ]
        style = f"--n:{min(len(pictures), WIDEST)}"
        parts.append(f'<h3>{escape(prompt)}</h3><div class=grid style="{style}">{"".join(pictures)}</div>')
    return "".join(parts)


def page(report: Mapping[str, Any], folder: Path) -> str:
    """The whole page; pictures are read from `folder`."""
    backend = escape(report["reference"]["backend"])
    items = "".join(f"<li>{escape(n)}</li>" for n in notes(report))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Intaglio benchmark</title><style>{STYLE}</style></head><body>
<h1>Intaglio benchmark</h1>
<p class=lead>{escape(sentence(report["machine"]))}. Speeds are ratios from interleaved rounds.</p>
<code>{escape(report["command"])}</code>
<h2>Seconds per image</h2>
<p class=lead>Bar: median; whisker: range. Bold: speed against {backend}, interleaved. Last: the worst PSNR.</p>
{bars(report)}
<h2>Figures</h2>{summary(report)}
<h2>Pictures</h2>
<label class=switch><input type=checkbox id=heat> Show where the eye sees a difference (FLIP)
<span class=legend role=img aria-label="black: none, bright: large"></span></label>
{gallery(report, folder)}
<h2>How this was measured</h2><ul>{items}</ul>
</body></html>
"""
