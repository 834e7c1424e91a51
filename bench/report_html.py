"""The report as one HTML page that needs nothing else: style, pictures and plots are inside the file.

Everything on it comes from the report and the pictures it names; the same report makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from intaglio.bench.machine import sentence
from intaglio.bench.report import notes
from intaglio.bench.report_bars import bars, memory, stages
from intaglio.bench.report_drift import drift
from intaglio.bench.report_pictures import Store, gallery, grid, store_for, worst
from intaglio.bench.report_pictures import data_uri as data_uri
from intaglio.bench.report_plots import pareto
from intaglio.bench.report_style import PAGE_STYLE, SCRIPT
from intaglio.bench.report_style import STYLE as STYLE
from intaglio.bench.report_tables import components, digests, environment, exceeded, facts, scores, summary

LONG = 30  # characters of a word of the command that may break
FLOOR = (
    "The worst over the prompts. The noise floor is the reference against itself with what is named changed: a score "
    "no worse than it cannot be told from rounding."
)
NO_FLOOR = "The worst over the prompts. The noise floor was not measured; a bench without --quick does."
Row = Mapping[str, Any]


def section(name: str, heading: str, lead: str, body: str) -> str:
    """A part of the page; `lead` is plain text."""
    words = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    return f'<section id="{name}"><h2>{escape(heading)}</h2>{words}{body}</section>\n'


def counted(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def opening(report: Row) -> str:
    """What was measured, where, how to do it again, and which artifacts they were."""
    cases, settings = report["cases"], report["settings"]
    own = [c for c in cases if c["artifact"] in report["artifacts"]]
    backends = len({c["backend"] for c in own})
    others = len({c["backend"] for c in cases}) - backends
    axes = {k: v for k, v in report["axes"].items() if k not in ("artifact", "backend")}
    swept = [f"{k.replace('_', ' ')} {', '.join(v)}" for k, v in axes.items()]
    parts = [counted(len(report["artifacts"]), "artifact"), counted(backends, "backend"), *swept]
    parts += [counted(others, "other tool")] if others else []
    said = f"{counted(len(cases), 'case')}: {'; '.join(parts)}; {counted(len(settings['prompts']), 'prompt')}; "
    said += f"{counted(settings['rounds'], 'interleaved round')}. On {sentence(report['machine'])}."
    command = " ".join(
        f"<span>{escape(w)}</span>" if len(w) < LONG else escape(w) for w in report["command"].split(" ")
    )
    pairs = [("created", report["created"]), *digests(report)]
    return f"<p class=lead>{escape(said)}</p><code>{command}</code>{facts(pairs)}"


def pictures(report: Row, store: Store) -> str:
    """The switches, the worst pictures, and all."""
    switches = (
        "<div class=switches><label><input type=checkbox id=heat> FLIP heat maps: where the eye sees a difference"
        ' <span class=magma role=img aria-label="black: none, bright: large"></span></label>'
        "<label class=all>Uncover the reference in all <input type=range id=all min=0 max=100 value=0></label></div>"
    )
    body = f"{switches}<h3>The worst by FLIP</h3>{worst(store, report)}{gallery(store, report)}"
    lead = "Move a slider to uncover the reference over a picture, from the left."
    if store.scaled:
        lead += f" Larger pictures are shown scaled down to {store.largest} pixels; the originals lie beside the page."
    return section("pictures", "Pictures", lead, body)


def method(report: Row) -> str:
    """Scores beside their noise floor, what is beyond its limits, what a reader must know, and the environment."""
    items = "".join(f"<li>{escape(n)}</li>" for n in notes(report))
    return (
        section(
            "scores",
            "Scores and the noise floor",
            FLOOR if any(g["noise_floor"] for g in report["groups"]) else NO_FLOOR,
            scores(report),
        )
        + section("exceeded", "Beyond their limits", "", exceeded(report))
        + section("method", "How this was measured", "", f"<ul>{items}</ul>")
        + section("environment", "Environment", "", environment(report))
    )


def page(report: Row, folder: Path) -> str:
    """The whole page; pictures are read from `folder`."""
    store = store_for(report, folder)
    backend = report["reference"]["backend"]
    parts = [
        section("summary", "Summary", "", summary(report)),
        section(
            "pareto",
            "Speed, fidelity and size",
            "Right is faster, up is nearer to the reference’s pictures; “same” are identical pictures.",
            pareto(report),
        ),
        section(
            "seconds",
            "Seconds per image",
            f"Bar: median; whisker: range. Bold: speed against {backend}, interleaved. Last: the worst PSNR.",
            bars(report) + stages(report),
        ),
        section("memory", "Memory over time", "", memory(report)),
        section(
            "drift",
            "Drift of the latents",
            "How far the latents are from the reference’s after each step, the first prompt. Lines that coincide are "
            "drawn thinner over each other. Dashed: the reference against itself.",
            drift(report) + "<h3>Errors of the components</h3>" + components(report),
        ),
    ]
    if report["grid"]:
        lead = (
            "The first prompt. Below each picture: the median seconds and the PSNR to the reference of its own group."
        )
        parts.append(section("grid", "Grid", lead, grid(store, report)))
    parts += [pictures(report, store), method(report)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Intaglio benchmark</title><style>{STYLE}{PAGE_STYLE}</style></head><body>
<h1>Intaglio benchmark</h1>
{opening(report)}
{"".join(parts)}{store.html()}
<script>{SCRIPT}</script></body></html>
"""
