"""How long a matrix will take, from what earlier reports measured: ``intaglio bench … --dry-run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case
from intaglio.bench.report import JSON
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.strict import parse_json

MEMORY_PASS = 1  # further load and picture of a case in a thorough run


def known_rows(reports: Sequence[Path]) -> list[dict[str, Any]]:
    """Measured rows of earlier reports; a file that is none has none."""
    rows = []
    for path in reports:
        try:
            content = parse_json((path / JSON if path.is_dir() else path).read_bytes())
            rows += [r for r in content["cases"] if r.get("step_s") and r.get("image_s")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return rows


def seconds_of(case: Case, artifact: Artifact, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of one case: loads, first pictures, warm-up and rounds; None where no earlier report has its like.

    A row of the same artifact, backend and device is taken; its steps are scaled by pixels, pictures and steps, what is
    not a step by pixels and pictures.
    """
    wanted = (artifact.manifest.digest, case.backend, case.device)
    own = [r for r in rows if (r["manifest_digest"], r["backend"], r["device"]) == wanted and r["prompts"]]
    if not own:
        return None
    row = min(own, key=lambda r: abs((r["threads"] or 0) - case.threads))
    width, height = case.size or tuple(row["prompts"][0]["size"])
    area = width * height / (row["prompts"][0]["size"][0] * row["prompts"][0]["size"][1]) * case.batch / row["batch"]
    before = row["parameters"]["num_inference_steps"] if row["parameters"] else row["steps"]
    steps = case.steps or before
    step = row["step_s"]["median"]
    rest = max(row["image_s"]["median"] - step * before, 0.0)
    image = area * (step * steps + rest)
    pictures = 1 + case.warmup + len(case.prompts) + case.repeats
    return float(row["load_s"] * (1 + MEMORY_PASS) + image * (pictures + MEMORY_PASS))


def listing(cases: Sequence[Case], artifacts: Mapping[str, Artifact], rows: Sequence[Mapping[str, Any]]) -> str:
    """What will run, a line a case, and the time of all of it as far as it is known."""
    found = [seconds_of(c, artifacts[c.artifact], rows) for c in cases]
    width = max(len(c.label) for c in cases)
    lines = [
        f"{c.label:<{width}}  {c.repeats} rounds, {len(c.prompts)} prompts  {'?' if s is None else duration(s)}"
        for c, s in zip(cases, found, strict=True)
    ]
    known = sum(s for s in found if s is not None)
    unknown = sum(s is None for s in found)
    total = f"{len(cases)} cases, about {duration(known)}" if unknown < len(cases) else f"{len(cases)} cases"
    if unknown:
        total += f"; of {unknown} no earlier report (-o, --known) has the like, so their time is not known"
    return "\n".join([*lines, total])


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
