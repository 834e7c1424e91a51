"""What the page asks of a report: measured cases, groups that share a picture, their names and their noise floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from intaglio.bench.report import decibels, number

Row = Mapping[str, Any]
MOST_PLOTS = 6  # groups that get a plot of their own; a sentence names the others
FLOOR_WORST = {"psnr": min, "ssim": min, "ms_ssim": min, "ssimulacra2": min, "flip": max, "latents_relative_l2": max}


def measured(report: Row) -> list[Row]:
    """The cases that ran to their end and have a time."""
    return [c for c in report["cases"] if c["status"] == "ok" and c.get("image_s")]


def members(report: Row, group: Row) -> list[Row]:
    """The measured cases of a group, in the report's order."""
    labels = set(group["labels"])
    return [c for c in measured(report) if c["label"] in labels]


def group_of(report: Row, label: str) -> Row | None:
    """The group that a case belongs to; None for one that was not run."""
    return next((g for g in report["groups"] if label in g["labels"]), None)


def title(report: Row, group: Row) -> str:
    """What tells a group's picture from the others': ``steps 8, scheduler euler``; empty for an only group."""
    pictures = [g["picture"] for g in report["groups"]]
    varying = [k for k in group["picture"] if len({p[k] for p in pictures}) > 1]
    return ", ".join(f"{k.replace('_', ' ')} {group['picture'][k]}" for k in varying)


def short(group: Row | None, label: str) -> str:
    """A case's label without what its whole group shares: ``int4/onnxruntime steps=8`` is ``int4/onnxruntime``."""
    first, *rest = label.split(" ")
    shared = group["picture"] if group else {}
    return " ".join([first, *(word for word in rest if word.partition("=")[0] not in shared)])


def plotted(report: Row, found: Sequence[tuple[Row, Any]], what: str, where: str) -> tuple[list[tuple[Row, Any]], str]:
    """The first groups, and a sentence about those that get no plot."""
    rest = [title(report, group) for group, _ in found[MOST_PLOTS:]]
    words = f"{what} of the first {MOST_PLOTS} of {len(found)} groups; the others, {'; '.join(rest)}, {where}."
    return list(found[:MOST_PLOTS]), words if rest else ""


def floor_of(group: Row | None) -> dict[str, Any] | None:
    """The noise floor of a group: per metric the worst of the reference against itself; None if not measured.

    ``identical`` is true where nothing that was changed changed the picture; a PSNR is then None.
    """
    floors = [f["worst"] for f in group["noise_floor"] if f["worst"]] if group else []
    if not floors:
        return None
    found: dict[str, Any] = {"identical": all(f["identical"] for f in floors)}
    for key, pick in FLOOR_WORST.items():
        values = [f[key] for f in floors if f.get(key) is not None]
        found[key] = pick(values) if values else None
    return found


def breakable(label: str) -> str:
    """A label as HTML that may break after the artifact's name and inside an axis."""
    return escape(label).replace("/", "/<wbr>").replace("=", "=<wbr>")


def tiny(value: float | None) -> str:
    """Two significant digits, with an exponent where the figure is small: ``0.0216``, ``4.6e-05``."""
    if value is None:
        return "–"
    return "0" if value == 0 else number(value, 3) if abs(value) >= 1e-3 else f"{value:.1e}"


def score(figures: Mapping[str, Any] | None) -> str:
    """A PSNR with its unit; ``identical``, or a dash where there is nothing to compare."""
    words = decibels(figures or {})
    return words if words in ("identical", "–") else f"{words} dB"
