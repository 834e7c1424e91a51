"""Bars and areas of the report: seconds per image, seconds per stage, memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from intaglio.bench.report import megabytes, number
from intaglio.bench.report_groups import breakable, measured, score
from intaglio.bench.report_style import STAGES, backend_class, stage_class
from intaglio.bench.report_svg import Frame, line, svg, text, text_width, ticks
from intaglio.bench.report_tables import table

WIDTH, HEIGHT = 300, 225  # of a small multiple, pixels
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 52, 42
SAMPLES = 150  # of a curve: two pixels each
THIN = 1.5  # per cent of a bar, below which a stage has no gap beside it
ABOVE = 1.12  # the axis over the highest peak
MB = 1e6
Row = Mapping[str, Any]


def bar(median: float, low: float, high: float, longest: float, words: str) -> str:
    """A bar to the median and a whisker over the range, in percent of `longest` so that it fits any width."""
    m, a, b = (100 * v / longest * 0.985 for v in (median, low, high))
    whisker = "".join(
        f'<line class=whisker x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1}" y2="{y2}"/>'
        for x1, x2, y1, y2 in ((a, b, 9, 9), (a, a, 5, 13), (b, b, 5, 13))
    )
    rect = f'<rect class=fill x="0" y="2" width="{m:.2f}%" height="14"/>'
    return f'<svg role="img" aria-label="{escape(words)}">{rect}{whisker}</svg>'


def bars(report: Row) -> str:
    """Seconds per image of every measured case, with its speed-up and its fidelity beside the bar."""
    cases = measured(report)
    if not cases:
        return "<p class=lead>No case was measured.</p>"
    longest = max(c["image_s"]["max"] for c in cases)
    parts = []
    for case in cases:
        image = case["image_s"]
        low, middle, high = (number(image[k]) for k in ("min", "median", "max"))
        words = f"{case['label']}: median {middle} s, {low} to {high} s"
        fidelity = "reference" if case["label"] == case.get("reference") else score(case.get("worst"))
        times = f"{case['speedup']['median']:.2f}×" if case.get("speedup") else "–"
        drawn = bar(image["median"], image["min"], image["max"], longest, words)
        parts.append(
            f'<div class="row {backend_class(case["backend"])}">'
            f"<span class=name>{breakable(case['label'])}</span>{drawn}"
            f"<span class=figure><b>{times}</b> · {middle} s · {escape(fidelity)}</span></div>"
        )
    return f"<div class=bars>{''.join(parts)}</div>"


def stage_order(stages: Sequence[str]) -> list[str]:
    """Stages as a picture goes through them; ones not known come before the last."""

    def rank(stage: str) -> float:
        kind = stage_class(stage).removeprefix("s-")
        return STAGES.index(kind) if kind in STAGES else len(STAGES) - 1.5

    return sorted(dict.fromkeys(stages), key=rank)


def stages(report: Row) -> str:
    """A stacked bar a case, the seconds of every stage, and how much of the whole they cover."""
    cases = [c for c in measured(report) if c.get("stage_s")]
    if not cases:
        return "<p class=lead>No case was timed by stage.</p>"
    names = stage_order([s for c in cases for s in c["stage_s"]])
    longest = max(sum(s["median"] for s in c["stage_s"].values() if s) for c in cases)
    digits = 4 if longest < 10 else 2
    rows = []
    for case in cases:
        found = {n: case["stage_s"][n]["median"] for n in names if case["stage_s"].get(n)}
        whole = case.get("stages_of_whole")
        rows.append(
            [
                breakable(case["label"]),
                stack(case["label"], found, longest),
                *(f"{found[n]:.{digits}f}" if n in found else "–" for n in names),
                "–" if whole is None else f"{100 * whole:.1f} %",
            ]
        )
    heads = [f'<span class="{stage_class(n)}"><i class=dot></i>{breakable(n)}</span>' for n in names]
    return table(["case", "median seconds", *heads, "share of the whole"], rows, "Seconds of every stage", {1: "stack"})


def stack(label: str, found: Mapping[str, float], longest: float) -> str:
    """The bar of one case; gaps of a pixel keep neighbours apart without colour."""
    parts, start = [], 0.0
    for name, seconds in found.items():
        width = 100 * seconds / longest if longest else 0.0
        words = escape(f"{name}: {number(seconds)} s")
        apart = " cut-line" if width > THIN else ""
        parts.append(
            f'<rect class="fill {stage_class(name)}{apart}" x="{start:.2f}%" y="0" width="{width:.2f}%" height="16">'
            f"<title>{words}</title></rect>"
        )
        start += width
    words = f"{label}: " + ", ".join(f"{n} {number(s)} s" for n, s in found.items())
    return f'<svg role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'


def starts(report: Row) -> str:
    """What a case takes before it is steady, and what it holds: a row each."""
    rows = []
    for case in measured(report):
        compiled = [s for s in (case.get("compile_s") or {}).values() if s is not None]
        memory, vram = case.get("memory") or {}, case.get("vram") or {}
        weights = [e["weight_bytes"] for e in (case.get("engine_memory") or {}).values() if e.get("weight_bytes")]
        rows.append(
            [
                breakable(case["label"]),
                number(case.get("load_s")),
                number(sum(compiled)) if compiled else "–",
                number(case.get("first_image_s")),
                number(case["image_s"]["median"]),
                *(megabytes(memory.get(k)) for k in ("before_load_bytes", "peak_bytes", "peak_private_bytes")),
                *(megabytes(memory.get(k)) for k in ("peak_file_bytes",)),
                megabytes(sum(weights)) if weights else "–",
                *(megabytes(vram.get(k)) for k in ("framework_bytes", "process_bytes", "device_delta_bytes")),
            ]
        )
    heads = ["case", "load s", "of it compile s", "first s", "steady s", "before load MB", "peak MB", "private MB"]
    heads += ["file-backed MB", "engine weights MB", "VRAM framework MB", "VRAM process MB", "VRAM device MB"]
    kept = [i for i in range(len(heads)) if i < 5 or any(r[i] != "–" for r in rows)]
    return table([heads[i] for i in kept], [[r[i] for i in kept] for r in rows], "From loading to steady, and memory")


def memory(report: Row) -> str:
    """Small multiples: private and file-backed memory over time, the same height of megabytes in all."""
    cases = [c for c in measured(report) if c.get("memory") and c["memory"].get("series")]
    reasons = {c["memory"]["reason"] for c in measured(report) if c.get("memory") and c["memory"]["reason"]}
    words = "".join(f"<p class=lead>{escape(r)}.</p>" for r in sorted(reasons))
    if not cases:
        return (
            f"<p class=lead>Memory over time was not measured; a bench without --quick does.</p>{words}{starts(report)}"
        )
    highest = max(max(c["memory"]["peak_bytes"] or 0, max(a + b for _, a, b in c["memory"]["series"])) for c in cases)
    key = (
        "<div class=key><span class=private><i class=dot></i>private</span>"
        "<span class=file><i class=dot></i>file-backed: weights and libraries, "
        "which the kernel may drop and share</span>"
        '<span><svg width="18" height="18"><line class=peak x1="0" x2="18" y1="9" y2="9"/></svg>'
        "the kernel's peak of the one process</span></div>"
    )
    figures = [f"<figure>{caption(c)}{memory_plot(c, highest / MB * ABOVE)}</figure>" for c in cases]
    return (
        f'{key}<div class="plots small">{"".join(figures)}</div>{words}<h3>From loading to steady</h3>{starts(report)}'
    )


def caption(case: Row) -> str:
    """The name of a case, and the seconds that are in its plot."""
    compiled = [s for s in (case.get("compile_s") or {}).values() if s is not None]
    parts = [f"load {number(case.get('load_s'))}\xa0s"]
    parts += [f"compile {number(sum(compiled))}\xa0s"] if compiled else []
    parts += [
        f"first {number(case.get('first_image_s'))}\xa0s",
        f"steady {number(case['image_s']['median'])}\xa0s",
    ]
    return f"<figcaption><b>{escape(case['label'])}</b><span>{' · '.join(parts)}</span></figcaption>"


def thin(series: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """At most SAMPLES samples and the last: the highest of each stretch."""
    width = -(-len(series) // SAMPLES) or 1
    parts = [series[i : i + width] for i in range(0, len(series), width)]
    return [*(max(part, key=lambda s: s[1] + s[2]) for part in parts), series[-1]]


def memory_plot(case: Row, top: float) -> str:
    """One case: areas on each other, marks, the peak."""
    found = case["memory"]
    series = thin(found["series"])
    end = max(series[-1][0], *found["marks"].values(), 0.001) if found["marks"] else max(series[-1][0], 0.001)
    frame = Frame(left=LEFT, right=WIDTH - RIGHT, top=TOP, bottom=HEIGHT - BOTTOM, x0=0, x1=end, y0=0, y1=top)
    parts = [
        frame.across([(v, f"{v:g}") for v in ticks(0, end, 4)], "seconds"),
        frame.down([(v, f"{v:.0f}") for v in ticks(0, top, 4)], "MB"),
    ]
    base = [(s, 0.0) for s, _, _ in series]
    private = [(s, a / MB) for s, a, _ in series]
    both = [(s, (a + b) / MB) for s, a, b in series]
    for kind, low, high in (("private", base, private), ("file", private, both)):
        path = " ".join(f"{frame.x(s):.1f},{frame.y(v):.1f}" for s, v in [*high, *reversed(low)])
        parts.append(f'<g class={kind}><polygon class=area points="{path}"/></g>')
    for row, (name, at) in enumerate(found["marks"].items()):
        x, height = frame.x(at), TOP - 6 - 13 * (row % 2)
        words = f"{name} {at:.1f} s"
        last = x + 3 + text_width(words) > WIDTH
        parts += [
            line(x, x, height - 8, frame.bottom, "rule"),
            text(x - 3 if last else x + 3, height, words, "end" if last else "start"),
        ]
    if found["peak_bytes"] is not None:
        y = frame.y(found["peak_bytes"] / MB)
        words = f"peak {megabytes(found['peak_bytes'])} MB"
        parts += [line(frame.left, frame.right, y, y, "peak"), text(frame.left + 4, y - 4, words, kind="name halo")]
    label = f"{case['label']}: memory over {end:.1f} seconds, peak {megabytes(found['peak_bytes'])} MB"
    return svg(WIDTH, HEIGHT, "".join(parts), label)
