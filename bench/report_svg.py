"""What plots are made of: scales, ticks and labels that do not overlap. SVG coordinates are CSS pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

FONT = 12  # pixels
ADVANCE, WIDE_ADVANCE = 0.56, 1.0  # of a character over the font's size: Latin, and Chinese, Japanese, Korean
CJK = 0x2E80
ROW = 14  # pixels between the baselines of two labels
GAP = 5  # pixels between a mark and its label
STEP = 18  # pixels across between two places tried for a label

Box = tuple[float, float, float, float]  # left, top, right, bottom


def text_width(text: str, size: float = FONT) -> float:
    """Pixels that a text takes in a common sans serif, rather too many than too few."""
    return sum(WIDE_ADVANCE if ord(c) >= CJK else ADVANCE for c in text) * size


def fit(text: str, width: float) -> str:
    """A text that takes at most so many pixels, its end replaced by an ellipsis where it is longer."""
    if text_width(text) <= width + 1:
        return text
    while text and text_width(text + "…") > width:
        text = text[:-1]
    return text + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within a range."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for p in powers for m in (1, 2, 5) if low <= (v := float(f"{m}e{p}")) <= high]


def power(exponent: int) -> str:
    """``10⁻⁸``."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The rectangle of a plot and the values at its edges.

    Attributes:
        left, right, top, bottom: edges in pixels.
        x0, x1, y0, y1: values at the left, right, bottom and top edge.
        log_x, log_y: whether an axis is logarithmic.
    """

    left: float
    right: float
    top: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float
    log_x: bool = False
    log_y: bool = False

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + share(value, self.x0, self.x1, self.log_x) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return self.bottom - share(value, self.y0, self.y1, self.log_y) * (self.bottom - self.top)

    def across(self, values: Sequence[tuple[float, str]], label: str) -> str:
        """Vertical grid lines, their figures below, and what the axis is."""
        parts = [line(self.x(v), self.x(v), self.top, self.bottom) for v, _ in values]
        parts += [text(self.x(v), self.bottom + 16, t, "middle") for v, t in values]
        return "".join([*parts, text((self.left + self.right) / 2, self.bottom + 34, label, "middle")])

    def down(self, values: Sequence[tuple[float, str]], label: str) -> str:
        """Horizontal grid lines, their figures at the left, and what the axis is, above the plot."""
        parts = [line(self.left, self.right, self.y(v), self.y(v)) for v, _ in values]
        parts += [text(self.left - 6, self.y(v) + 4, t, "end") for v, t in values]
        return "".join([*parts, text(2, 13, label)])


def share(value: float, low: float, high: float, log: bool) -> float:
    """Where a value lies in a range, 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def line(x1: float, x2: float, y1: float, y2: float, kind: str = "axis") -> str:
    """A straight line of a CSS class."""
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """A line of text; `words` are escaped here."""
    kinds = f' class="{kind}"' if kind else ""
    return f'<text{kinds} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def svg(width: float, height: float, body: str, label: str, kind: str = "") -> str:
    """A plot that scales to its column and says what it is."""
    kinds, box = f"plot {kind}".strip(), f"0 0 {width:.0f} {height:.0f}"
    return f'<svg class="{kinds}" viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>'


def along(x1: float, y1: float, x2: float, y2: float, step: float = 8.0) -> list[Box]:
    """Small boxes that cover a straight line."""
    count = max(1, round(math.hypot(x2 - x1, y2 - y1) / step))
    middles = [(x1 + (x2 - x1) * (i + 0.5) / count, y1 + (y2 - y1) * (i + 0.5) / count) for i in range(count)]
    half = (abs(x2 - x1) / count / 2 + 1, abs(y2 - y1) / count / 2 + 1)
    return [(x - half[0], y - half[1], x + half[0], y + half[1]) for x, y in middles]


def overlap(a: Box, b: Box) -> float:
    """Square pixels that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def places(mark: tuple[float, float, float], width: float, room: Box) -> Iterator[Box]:
    """Boxes for a label around a mark (x, y, radius) that lie within a room, the nearest first."""
    x, y, radius = mark
    left, right = x - radius - GAP - width, x + radius + GAP
    found = []
    for row in range(-int(room[3] // ROW), int(room[3] // ROW) + 1):
        top = y - ROW / 2 + row * ROW
        for column in range(-8, 9):
            start = right + column * STEP if column >= 0 else left + (column + 1) * STEP
            box = (start, top, start + width, top + ROW)
            if box[0] >= room[0] and box[2] <= room[2] and box[1] >= room[1] and box[3] <= room[3]:
                away = abs(row) * ROW + (abs(column) if column >= 0 else abs(column + 1) + 0.5) * STEP
                found.append((away, box))
        box = (x - width / 2, top, x + width / 2, top + ROW)  # straight above or below
        if abs(row) * ROW >= radius + ROW / 2 and box[0] >= room[0] and box[2] <= room[2] and box[1] >= room[1]:
            found.append((abs(row) * ROW + STEP / 3, box))
    yield from (box for _, box in sorted(found) if box[3] <= room[3])


def place_labels(
    marks: Sequence[tuple[float, float, float]], words: Sequence[str], room: Box, others: Sequence[Box] = ()
) -> list[Box]:
    """A box for each mark's label, none on another label or, where there is room, on a mark or one of `others`.

    Args:
        marks: (x, y, radius) in pixels.
        words: the label of each mark.
        room: where labels may lie.
        others: what else is not to be covered.

    Returns:
        As many boxes; where all places are taken, the one that covers the least.
    """
    taken: list[Box] = [*((x - r, y - r, x + r, y + r) for x, y, r in marks), *others]
    found: list[Box] = []
    for mark, word in zip(marks, words, strict=True):
        width = min(text_width(word), room[2] - room[0])
        best, least = (mark[0], mark[1], mark[0] + width, mark[1] + ROW), math.inf
        for box in places(mark, width, room):
            covered = sum(overlap(box, other) for other in taken)
            if covered < least:
                best, least = box, covered
            if not covered:
                break
        found.append(best)
        taken.append(best)
    return found


def spread_down(wanted: Sequence[float], top: float, bottom: float, step: float = ROW) -> list[float]:
    """Heights as near to the wanted ones as `step` between neighbours allows, between top and bottom if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    last = top - step
    for index in order:
        last = found[index] = max(wanted[index], last + step)
    last = bottom + step
    for index in reversed(order):
        last = found[index] = min(found[index], last - step)
    return found
