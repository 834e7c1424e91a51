"""What a search is asked to keep, and the points it found: figures of plans whose pictures were made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import suggestion

BUDGETS = {"psnr": "decibels, such as psnr=30", "ssim": "0 to 1, such as ssim=0.95"}
SAME_SPEED = 1.05  # ratios closer than this are noise, so that neither is faster

Plan = tuple[int, ...]
"""Index of the level of every group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan whose pictures were made.

    Attributes:
        kind: ``uniform`` (one format everywhere) or ``search``.
        bytes: of the component's ONNX data file.
        speed: of the component against the unquantized one, above 1 is faster; ``None``: not measured.
        psnr, ssim: the worst of all prompts; medians beside them. ``psnr`` is infinite for identical pictures.
        predicted: root of the summed squared errors.
        note: why there are no figures, such as a NaN.
    """

    name: str
    kind: str
    plan: Plan
    bytes: int
    speed: float | None
    psnr: float
    psnr_median: float
    ssim: float
    ssim_median: float
    predicted: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite PSNR is ``null`` with ``identical`` set."""
        row = {key: getattr(self, key) for key in self.__slots__ if key != "plan"}
        row["identical"] = math.isinf(self.psnr)
        for key in ("psnr", "psnr_median", "ssim", "ssim_median", "predicted", "speed"):
            row[key] = None if row[key] is None or math.isinf(row[key]) else round(row[key], 6)
        return row


def parse_budget(texts: Iterable[str]) -> dict[str, float]:
    """``psnr=30`` or ``psnr=30,ssim=0.95``, each key at most once.

    Raises:
        UsageError: an unknown key, a value that is no number or means nothing, a key twice, or nothing at all.
    """
    found: dict[str, float] = {}
    for text in (part for whole in texts for part in whole.split(",")):
        key, _, value = (word.strip() for word in text.partition("="))
        if key not in BUDGETS:
            raise UsageError(f"--budget {text!r} is unknown; allowed: {', '.join(BUDGETS)}.{suggestion(key, BUDGETS)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (0 < number < (1 if key == "ssim" else math.inf)):
            raise UsageError(f"--budget {text!r} is not allowed: {BUDGETS[key]}")
        if key in found:
            raise UsageError(f"--budget {key} is given twice; once is enough")
        found[key] = number
    return found


def met(point: Point, budget: Mapping[str, float]) -> bool:
    """Whether the worst picture is within every limit."""
    return not point.note and all(getattr(point, key) >= limit for key, limit in budget.items())


def unmet(budget: Mapping[str, float], points: Sequence[Point]) -> str:
    """One line: what was asked for, and the best that was reached."""
    asked = ", ".join(f"{key}={limit:g}" for key, limit in budget.items())
    valid = [p for p in points if not p.note]
    if not valid:
        return f"--budget {asked} cannot be met: no plan made a picture ({points[0].note})"
    best = max(valid, key=lambda p: (min(slack(p, budget), 1.0), p.psnr))
    reached = ", ".join(f"{key}={getattr(best, key):.4g}" for key in budget)
    return (
        f"--budget {asked} cannot be met with these formats: the best reachable is {reached} ({best.name}, "
        f"{best.bytes / 1e6:.1f} MB); ask for no more than that, or add more accurate --formats"
    )


def slack(point: Point, budget: Mapping[str, float]) -> float:
    """By what factor the squared error may grow until the budget is spent; below 1 where it is overspent.

    PSNR falls by 10 dB for ten times the squared error, 1 - SSIM grows about in proportion to it.
    """
    factors = []
    for key, limit in budget.items():
        value = getattr(point, key)
        if key == "psnr":
            factors.append(10 ** min((value - limit) / 10, 99))
        else:
            factors.append((1 - limit) / max(1 - value, 1e-9))
    return min(factors, default=math.inf)


def front(points: Sequence[Point], *, speed: bool = True) -> list[Point]:
    """The points that no other beats: none is at least as small, as accurate (and as fast), and better in one."""

    def beats(a: Point, b: Point) -> bool:
        ratio = (a.speed or 1) / (b.speed or 1) if speed else 1.0
        as_good = a.bytes <= b.bytes and a.psnr >= b.psnr and ratio > 1 / SAME_SPEED
        return as_good and (a.bytes < b.bytes or a.psnr > b.psnr or ratio >= SAME_SPEED)

    valid = [p for p in points if not p.note]
    return [p for p in valid if not any(beats(q, p) for q in valid)]
