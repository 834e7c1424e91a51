"""How far the latents drift from the reference's, step by step, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from intaglio.bench.report_groups import members, plotted, short, title
from intaglio.bench.report_style import backend_class
from intaglio.bench.report_svg import (
    FONT,
    ROW,
    Frame,
    fit,
    line,
    log_ticks,
    power,
    spread_down,
    svg,
    text,
    text_width,
    ticks,
)

WIDE, NARROW = (1120, 400), (330, 340)  # width and least height, pixels
LEFT, TOP, BOTTOM = 48, 28, 42
ALONE, WIDTHS = 1.75, (6.0, 3.4, 1.2)  # of lines; those of several backends may coincide, so the later are thinner
MARGIN = 1.3  # of the axis beyond the values
Row = Mapping[str, Any]
Curve = tuple[str, str, Sequence[float | None]]  # label, backend (empty for a noise floor), values by step


def drift(report: Row) -> str:
    """Relative L2 of the latents after every step, a plot a group, all on the same axes."""
    found, same, lost = [], [], []
    for group in report["groups"]:
        cases = [c for c in members(report, group) if c.get("drift") and c["label"] != group["reference"]]
        curves = [(short(group, c["label"]), c["label"], c["backend"], c["drift"]) for c in cases]
        floors = [(f["what"], f["drift"]) for f in group["noise_floor"] if f["drift"]]
        curves += [(f"floor: {what}", f"noise floor, {what}", "", curve) for what, curve in floors]
        lines = [(name, backend, curve) for name, _, backend, curve in curves if any(curve)]
        same += [name for _, name, _, curve in curves if all(v == 0 for v in curve)]
        lost += [name for _, name, _, curve in curves if None in curve]
        if lines:
            found.append((group, lines))
    words = f"<p class=lead>The same latents at every step: {escape(', '.join(same))}.</p>" if same else ""
    words += f"<p class=lead>NaN or infinity at some step: {escape(', '.join(lost))}.</p>" if lost else ""
    if not found:
        return words or "<p class=lead>No case has latents that can be compared with its reference's.</p>"
    values = [v for _, lines in found for _, _, curve in lines for v in curve if v]
    span = (min(values) / MARGIN, max(values) * MARGIN)
    shown, sentence = plotted(report, found, "Curves", "have their last step among the scores")
    figures = []
    for group, lines in shown:
        sizes = ((WIDE, "wide-plot"), (NARROW, "narrow")) if len(shown) == 1 else ((NARROW, ""),)
        drawn = "".join(drift_plot(lines, span, shape, kind) for shape, kind in sizes)
        name = title(report, group)
        caption = f"<figcaption><b>{escape(name)}</b></figcaption>" if name else ""
        figures.append(f"<figure>{caption}{drawn}</figure>")
    kind = "plots one" if len(shown) == 1 else "plots"
    rest = f"<p class=lead>{escape(sentence)}</p>" if sentence else ""
    return f'<div class="{kind}">{"".join(figures)}</div>{words}{rest}'


def drift_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten; with 2 and 5 times where there would be few."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(powers) > 2:
        return [(10.0**e, power(e)) for e in powers]
    return [(v, f"{v:g}") for v in log_ticks(low, high)]


def joined(points: Sequence[tuple[float, float] | None]) -> str:
    """A path through points; one that is missing leaves a gap."""
    parts, pen = [], "M"
    for point in points:
        parts.append(f"{pen}{point[0]:.1f},{point[1]:.1f}" if point else "")
        pen = "L" if point else "M"
    return "".join(parts)


def points_of(frame: Frame, curve: Sequence[float | None]) -> list[tuple[float, float] | None]:
    """Where the values of a curve lie; None for a zero or what is not finite."""
    return [(frame.x(i + 1), frame.y(v)) if v else None for i, v in enumerate(curve)]


def curves(frame: Frame, lines: Sequence[Curve]) -> str:
    """The lines, the thick ones first so that they cover none, and the noise floor's last."""
    backends = list(dict.fromkeys(backend for _, backend, _ in lines if backend))
    parts: list[tuple[int, str]] = []
    for label, backend, curve in lines:
        at = points_of(frame, curve)
        rank = backends.index(backend) if backend else len(backends)
        thick = WIDTHS[min(rank, len(WIDTHS) - 1)] if len(backends) > 1 else ALONE
        look = f'class=stroke stroke-width="{thick}"' if backend else 'class="dashed floor-line"'
        drawn = f'<path {look} d="{joined(at)}"/>'
        known = [p for p in at if p]
        if len(known) == 1:
            drawn += f'<circle class=fill cx="{known[0][0]:.1f}" cy="{known[0][1]:.1f}" r="3"/>'
        parts.append((rank, f'<g class="{backend_class(backend)}"><title>{escape(label)}</title>{drawn}</g>'))
    return "".join(drawn for _, drawn in sorted(parts, key=lambda part: part[0]))


def ends(frame: Frame, lines: Sequence[Curve], width: float) -> str:
    """A label for every line, beside its last point."""
    last = [[p for p in points_of(frame, curve) if p][-1] for _, _, curve in lines]
    heights = spread_down([y for _, y in last], frame.top, frame.bottom)
    parts = []
    for (label, backend, _), (x, y), height in zip(lines, last, heights, strict=True):
        parts.append(line(x + 1, frame.right + 12, y, height, "leader"))
        parts.append(text(frame.right + 14, height + 4, fit(label, width), kind="name" if backend else ""))
    return "".join(parts)


def drift_plot(
    lines: Sequence[Curve],
    span: tuple[float, float],
    shape: tuple[int, int],
    kind: str,
) -> str:
    """One plot of curves, the noise floor's dashed, each labelled at its end.

    Args:
        lines: with one value or more each.
        span: values at the bottom and the top.
        shape: width and height in pixels.
        kind: CSS class.
    """
    width = shape[0]
    height = max(shape[1], ROW * len(lines) + TOP + BOTTOM)
    room = min(max(text_width(label) for label, _, _ in lines) + 18, width * 0.55)
    steps = max(len(curve) for _, _, curve in lines)
    frame = Frame(
        left=LEFT + 4,
        right=width - room,
        top=TOP,
        bottom=height - BOTTOM,
        x0=1,
        x1=max(steps, 2),
        y0=span[0],
        y1=span[1],
        log_y=True,
    )
    whole = sorted({int(v) for v in ticks(0, steps, 8 if width > NARROW[0] else 4) if v == int(v) > 0} | {1, steps})
    gap = (steps - 1) * 3 * FONT / (frame.right - frame.left)
    kept = [v for v in whole if v in (1, steps) or (v - 1 > gap and steps - v > gap)]
    parts = [
        frame.across([(v, f"{v}") for v in kept], "step"),
        frame.down(drift_ticks(*span), "relative L2 of the latents"),
    ]
    parts += [curves(frame, lines), ends(frame, lines, room - 14)]
    name = f"Relative L2 of the latents over {steps} steps: {', '.join(label for label, _, _ in lines)}"
    return svg(width, height, "".join(parts), name, kind)
