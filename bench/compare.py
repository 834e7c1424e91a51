"""``intaglio compare OLD NEW``: two benchmark reports, row by row; exit 1 where something became slower.

Only like is compared with like: what was measured and what it was measured on must agree, or the differences are listed
and nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.bench.report import JSON
from intaglio.bench.statistics import SHORT, Comparison, as_json, compared
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.strict import parse_json

SETTINGS = ("prompts", "seed", "size", "steps", "scheduler", "threads", "warmup", "isolation")
MACHINE = ("cpu", "memory_gib", "gpus")
ROW = ("precision", "device", "threads", "size", "batch", "parameters")
SCHEMA = (2,)


def configure_compare(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio compare``."""
    parser.add_argument("old", type=Path, help="folder of a report of intaglio bench, or its report.json")
    parser.add_argument("new", type=Path, help="the same of what is to be judged")
    parser.add_argument("--max-regress", default="0%", metavar="P", help="how much slower is accepted, such as 5%%")
    parser.add_argument("--force", action="store_true", help="compare unlike runs, too; the differences are printed")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run_compare(args: argparse.Namespace) -> int:
    """Compare and print; 1 where a row regressed.

    Raises:
        UsageError: a wrong percentage; a file that is no report; unlike runs; no row in common.
    """
    most = share(args.max_regress)
    old, new = read_report(args.old), read_report(args.new)
    unlike = differences(old, new)
    if unlike and not args.force:
        raise UsageError(
            f"{args.old} and {args.new} differ in {'; '.join(unlike)}; measure again under the same conditions, or add "
            "--force"
        )
    for line in unlike:
        say(f"unlike: {line}")
    found = rows_of(old, new)
    facts = {
        "max_regress": most,
        "unlike": unlike,
        "rows": {label: {**as_json(row), "regressed": row.regressed(most)} for label, row in found.items()},
    }
    print(json.dumps(facts, indent=1) if args.json else text_of(found, most))
    return 1 if any(row.regressed(most) for row in found.values()) else 0


def share(text: str) -> float:
    """``5%`` or ``0.05`` as 0.05.

    Raises:
        UsageError: it is neither, or negative.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if match is None:
        raise UsageError(f"--max-regress {text!r} is not allowed: a share such as 5% or 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def read_report(path: Path) -> dict[str, Any]:
    """A report's JSON.

    Raises:
        UsageError: there is none, or of a version this one does not read.
    """
    file = path / JSON if path.is_dir() else path
    try:
        report = parse_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); run: intaglio bench ARTIFACT -o {path}") from error
    except ValueError as error:
        raise UsageError(f"{file} is not a report of intaglio bench: {error}") from error
    if not isinstance(report, dict) or report.get("schema_version") not in SCHEMA or "cases" not in report:
        raise UsageError(f"{file} is not a report of intaglio bench of a version this one reads: {SCHEMA}")
    return report


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What was measured under other conditions: settings, machine, and of rows in both what they computed."""
    pairs = [(name, old["settings"].get(name), new["settings"].get(name)) for name in SETTINGS]
    pairs += [(f"machine {name}", old["machine"].get(name), new["machine"].get(name)) for name in MACHINE]
    before, after = by_label(old), by_label(new)
    for label in before.keys() & after.keys():
        pairs += [(f"{label} {name}", before[label].get(name), after[label].get(name)) for name in ROW]
    return [f"{name}: {short(a)} and {short(b)}" for name, a, b in sorted(pairs, key=lambda p: p[0]) if a != b]


def short(value: Any) -> str:
    """A value for people."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def by_label(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that were measured."""
    return {row["label"]: row for row in report["cases"] if row["status"] == "ok" and row.get("image_s")}


def rows_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Comparison]:
    """Seconds per image of every row in both.

    Raises:
        UsageError: no row is in both, or one has too few rounds.
    """
    before, after = by_label(old), by_label(new)
    labels = [label for label in before if label in after]
    if not labels:
        raise UsageError(f"no row is in both reports: {', '.join(before) or 'none'} and {', '.join(after) or 'none'}")
    found = {}
    for label in labels:
        a, b = (rows[label]["image_s"]["values"] for rows in (before, after))
        if min(len(a), len(b)) < SHORT:
            raise UsageError(f"{label} has {min(len(a), len(b))} rounds; comparing needs --rounds {SHORT} or more")
        found[label] = compared(a, b)
    return found


def text_of(found: Mapping[str, Comparison], most: float) -> str:
    """A table for people."""
    lines = [f"{'':<40} {'new / old':>9}  {'95 % interval':<16} {'p':>7}"]
    for label, row in found.items():
        verdict = "regressed" if row.regressed(most) else "no difference" if not row.differs else ""
        verdict = verdict or ("slower, accepted" if row.ratio > 1 else "faster")
        lines.append(f"{label:<40} {row.ratio:>9.3f}  {row.low:.3f} to {row.high:<7.3f} {row.p:>7.2g}  {verdict}")
    return "\n".join(lines)


COMPARE = Verb(configure_compare, run_compare)
