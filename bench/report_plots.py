"""The plots of the report: speed against fidelity with the sizes, and how far the latents drift step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from intaglio.bench.report import megabytes
from intaglio.bench.report_groups import floor_of, members, plotted, score, short, title
from intaglio.bench.report_style import backend_class
from intaglio.bench.report_svg import (
    ROW,
    Box,
    Frame,
    along,
    fit,
    line,
    log_ticks,
    place_labels,
    svg,
    text,
    text_width,
    ticks,
)

WIDE, NARROW = (1120, 440, 18), (330, 360, 12)  # width, height, radius of the largest bubble; pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 24, 42
STRIP = 40  # pixels at the top for identical pictures, which have no finite PSNR
MOST_LABELS = 24
LOG_FROM = 6.0  # speed-ups that differ by more are shown on a logarithmic axis
LEAST = (0.2, 6.0)  # speed-up and dB that an axis spans at least, so that noise does not look like a difference
Row = Mapping[str, Any]
At = Callable[["Point"], tuple[float, float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A case in the plot: `x` speed-up with its interval, `y` worst PSNR, None where all pictures are identical."""

    label: str
    short: str
    backend: str
    x: float
    low: float
    high: float
    y: float | None
    size: int

    @property
    def fidelity(self) -> float:
        """The PSNR; infinite for identical pictures."""
        return math.inf if self.y is None else self.y

    def beaten_by(self, other: Point, *, sizes: bool) -> bool:
        """Whether another point is nowhere worse and somewhere better, in speed and PSNR and, with `sizes`, in size."""
        mine, theirs = ((p.x, p.fidelity, -p.size if sizes else 0) for p in (self, other))
        return mine != theirs and all(t >= m for m, t in zip(mine, theirs, strict=True))


def points(report: Row, group: Row) -> list[Point]:
    """The cases of a group that have a speed-up and a PSNR, or identical pictures."""
    found = []
    for case in members(report, group):
        worst, speed = case.get("worst") or {}, case.get("speedup")
        if not speed or (worst.get("psnr") is None and not worst.get("identical")):
            continue
        low, high = speed.get("interval") or (speed["min"], speed["max"])
        found.append(
            Point(
                label=case["label"],
                short=short(group, case["label"]),
                backend=case["backend"],
                x=speed["median"],
                low=low,
                high=high,
                y=None if worst.get("identical") else worst["psnr"],
                size=case["artifact_bytes"],
            )
        )
    return found


def front(of: Sequence[Point], *, sizes: bool) -> list[Point]:
    """The points that none beats, by speed."""
    kept = [p for p in of if not any(p.beaten_by(q, sizes=sizes) for q in of)]
    return sorted(kept, key=lambda p: (p.x, -p.fidelity))


def pareto(report: Row) -> str:
    """Speed over fidelity, a plot a group, all on the same axes."""
    found = [(g, points(report, g)) for g in report["groups"]]
    found = [(g, p) for g, p in found if any(q.y is not None for q in p)]
    if not found:
        return "<p class=lead>No picture differs from its reference, or none can be compared: nothing to plot.</p>"
    shown, sentence = plotted(report, found, "Plots", "are in the summary")
    every = [p for _, group in found for p in group]
    floors = [f["psnr"] for g, _ in found if (f := floor_of(g)) and f["psnr"] is not None]
    speeds = [1.0, *(v for p in every for v in (p.low, p.high))]
    psnrs = [*(p.y for p in every if p.y is not None), *floors]
    largest = max(p.size for p in every) or 1
    figures = []
    for group, of in shown:
        sizes = (WIDE, NARROW) if len(shown) == 1 else (NARROW,)
        drawn = []
        for shape in sizes:
            kind = "" if len(sizes) == 1 else "wide-plot" if shape is WIDE else "narrow"
            drawn.append(pareto_plot(report, group, of, (speeds, psnrs, largest), shape, kind))
        name = title(report, group)
        caption = f"<figcaption><b>{escape(name)}</b></figcaption>" if name else ""
        figures.append(f"<figure>{caption}{''.join(drawn)}</figure>")
    kind = "plots one" if len(shown) == 1 else "plots"
    if any(len(of) > MOST_LABELS for _, of in shown):
        sentence += (
            f" Of more than {MOST_LABELS} points only those are named that none beats; point at one for its name."
        )
    rest = f"<p class=lead>{escape(sentence.strip())}</p>" if sentence else ""
    return f'{pareto_key(every)}<div class="{kind}">{"".join(figures)}</div>{rest}'


def pareto_key(every: Sequence[Point]) -> str:
    """What the marks mean."""
    backends = dict.fromkeys(p.backend for p in every)
    items = [f'<span class="{backend_class(b)}"><i class=dot></i>{escape(b)}</span>' for b in backends]
    small, large = min(p.size for p in every), max(p.size for p in every)
    marks = (
        (
            f'<circle class=bubble cx="9" cy="9" r="{6 * math.sqrt(small / (large or 1)):.1f}"/>',
            f"{megabytes(small)} MB",
        ),
        ('<circle class=bubble cx="9" cy="9" r="6"/>', f"{megabytes(large)} MB: area is size"),
        ('<circle class="bubble beaten" cx="9" cy="9" r="6"/>', "another is no slower, no worse and no larger"),
        ('<line class=front x1="0" x2="18" y1="9" y2="9"/>', "front of speed and fidelity"),
        (
            '<line class=dashed x1="0" x2="18" y1="9" y2="9"/>',
            "noise floor: in the band a picture cannot be told from the reference",
        ),
        (
            '<line class=whisker x1="0" x2="18" y1="9" y2="9"/>',
            "95 % interval of the median, or the range of fewer than five rounds",
        ),
    )
    items += [f'<span class=b-other><svg width="18" height="18">{m}</svg>{escape(t)}</span>' for m, t in marks]
    return f"<div class=key>{''.join(items)}</div>"


def pareto_frame(spans: tuple[Sequence[float], Sequence[float], int], shape: tuple[int, int, int]) -> Frame:
    """The axes: room for the bubbles at all edges, and the strip of identical pictures above."""
    width, height, radius = shape
    low, high = min(spans[0]), max(spans[0])
    missing = max(0.0, LEAST[0] - (high - low)) / 2
    low, high = low - missing if low > missing else low, high + missing
    log = high / low > LOG_FROM
    left, right, top, bottom = LEFT, width - RIGHT, TOP + STRIP, height - BOTTOM
    margin = 1.5 * radius / (right - left)
    across = margin * (math.log(high / low) if log else high - low) or 0.05
    x0, x1 = (low / math.exp(across), high * math.exp(across)) if log else (low - across, high + across)
    worst, best = min(spans[1]), max(spans[1])
    missing = max(0.0, LEAST[1] - (best - worst)) / 2
    worst, best = worst - missing, best + missing
    down = (best - worst) * 1.5 * radius / (bottom - top) or 1.0
    return Frame(
        left=left, right=right, top=top, bottom=bottom, x0=x0, x1=x1, y0=worst - down, y1=best + down, log_x=log
    )


def pareto_plot(
    report: Row,
    group: Row,
    of: Sequence[Point],
    spans: tuple[Sequence[float], Sequence[float], int],
    shape: tuple[int, int, int],
    kind: str,
) -> str:
    """One plot: axes, the floor's band, the front, bubbles, and labels beside them.

    Args:
        report: whole.
        group: plotted.
        of: its points.
        spans: speeds and PSNRs that the axes hold, and the bytes of the largest bubble.
        shape: width, height and the largest radius in pixels.
        kind: CSS class.
    """
    width, height, radius = shape
    frame = pareto_frame(spans, shape)
    top = TOP + STRIP / 2 - 4
    wanted = 8 if width > NARROW[0] else 4
    across = log_ticks(frame.x0, frame.x1) if frame.log_x else ticks(frame.x0, frame.x1, wanted)
    base = next((c["backend"] for c in report["cases"] if c["label"] == group["reference"]), "the reference")
    parts = [
        frame.across([(v, f"{v:g}×") for v in across], f"speed against {base}"),
        frame.down([(v, f"{v:g}") for v in ticks(frame.y0, frame.y1)], "worst PSNR, dB"),
        line(frame.left, frame.right, top, top),
        text(frame.left - 6, top + 4, "same", "end"),
        floor_band(frame, group),
    ]

    def at(point: Point) -> tuple[float, float, float]:
        y = top if point.y is None else frame.y(point.y)
        return frame.x(point.x), y, max(2.5, radius * math.sqrt(point.size / spans[2]))

    corners = [at(p)[:2] for p in front(of, sizes=False)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    lines = [box for (a, b), (c, d) in pairwise(corners) for box in along(a, b, c, d)]
    lines += [(frame.x(p.low), at(p)[1] - 2, frame.x(p.high), at(p)[1] + 2) for p in of]
    lines += floor_box(frame, group)
    parts.append(f'<polyline class=front points="{path}"/>')
    best = front(of, sizes=True)
    for point in sorted(of, key=lambda p: -p.size):  # the small ones lie on the large ones
        x, y, r = at(point)
        beaten = "" if point in best else " beaten"
        words = f"{point.label}: {point.x:.2f} ({point.low:.2f}–{point.high:.2f}) times the speed, "
        words += f"{score({'identical': point.y is None, 'psnr': point.y})}, {megabytes(point.size)} MB"
        circle = f'<circle class="bubble{beaten}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
        whisker = line(frame.x(point.low), frame.x(point.high), y, y, "whisker")
        parts.append(f'<g class="{backend_class(point.backend)}"><title>{escape(words)}</title>{circle}{whisker}</g>')
    named = of if len(of) <= MOST_LABELS else best[:MOST_LABELS]
    parts.append(point_labels(named, at, (LEFT, 16, width - 2, frame.bottom), lines))
    name = f"Worst PSNR over speed: {'; '.join(f'{p.short} {p.x:.2f}×' for p in of)}"
    return svg(width, height, "".join(parts), name, kind)


def floors_of(group: Row) -> dict[str, float]:
    """Finite PSNRs of the reference against itself, by what was changed."""
    found = {f["what"]: f["worst"]["psnr"] for f in group["noise_floor"] if f["worst"]}
    return {what: psnr for what, psnr in found.items() if psnr is not None}


def floor_box(frame: Frame, group: Row) -> list[Box]:
    """Where the noise floor's figure stands."""
    found = floors_of(group)
    y = frame.y(min(found.values())) if found else 0.0
    return [(frame.left, y + 2, frame.left + text_width("noise floor 99.9 dB"), y + 2 + ROW)] if found else []


def floor_band(frame: Frame, group: Row) -> str:
    """Dashed lines at the noise floors' PSNRs, and a band from the lowest to the top."""
    found = floors_of(group)
    if not found:
        return ""
    lowest = min(found.values())
    y = frame.y(lowest)
    parts = [
        f'<rect class=band x="{frame.left}" y="{TOP}" width="{frame.right - frame.left}" height="{y - TOP:.1f}"/>',
        *(line(frame.left, frame.right, frame.y(v), frame.y(v), "dashed") for v in sorted(set(found.values()))),
        text(frame.left + 4, y + 14, f"noise floor {lowest:.1f} dB", kind="halo"),
    ]
    return "".join(parts)


def point_labels(of: Sequence[Point], at: At, room: Box, lines: Sequence[Box]) -> str:
    """A label beside each point, with a thin line where it could not stay close."""
    marks = [at(p) for p in of]
    boxes = place_labels(marks, [p.short for p in of], room, lines)
    parts = []
    for point, (x, y, r), box in zip(of, marks, boxes, strict=True):
        near = min(max(x, box[0]), box[2]), min(max(y, box[1] + 2), box[3] - 2)
        away = math.hypot(near[0] - x, near[1] - y)
        if away > r + 9:
            parts.append(line(x + (near[0] - x) * r / away, near[0], y + (near[1] - y) * r / away, near[1], "leader"))
        parts.append(text(box[0], box[3] - 3, fit(point.short, box[2] - box[0]), kind="name halo"))
    return "".join(parts)
