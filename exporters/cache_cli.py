"""The verb ``cache``: what earlier builds left to be taken again, how much of it, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from intaglio.exporters.build_cache import (
    VARIABLE,
    Entry,
    collect,
    damaged,
    entries,
    entries_folder,
    limit_bytes,
)
from intaglio.exporters.graph_cache import graphs_folder
from intaglio.profiles.command import Verb, say
from intaglio.profiles.sizes import parse_bytes

MB = 1e6


def configure_cache(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio cache``."""
    parser.add_argument(
        "action",
        choices=tuple(ACTIONS),
        help="list entries; gc removes those unused for longest; verify hashes every file and removes damaged entries",
    )
    parser.add_argument("--max-size", metavar="SIZE", help=f"for gc: bytes to keep, 0 for none (default: {VARIABLE})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run_cache(args: argparse.Namespace) -> int:
    """Do one of ACTIONS.

    Raises:
        UsageError: a wrong size, or one without ``gc``.
    """
    return ACTIONS[args.action](args)


def list_entries(args: argparse.Namespace) -> int:
    """Every entry, the one used last first, and the sums."""
    rows = [described(place, entry, used) for place, entry, used in entries() if entry is not None][::-1]
    graphs = [p.stat().st_size for p in graphs_folder().glob("*") if p.is_file()]
    total = sum(row["bytes"] for row in rows)
    if args.json:
        facts = {"folder": str(entries_folder()), "limit": limit_bytes(), "bytes": total, "entries": rows}
        print(json.dumps({**facts, "graphs": {"count": len(graphs), "bytes": sum(graphs)}}, indent=1))
        return 0
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
        about = "  ".join(row["about"].values())
        print(f"{row['key'][:12]}  {row['bytes'] / MB:>9.1f} MB  {used}  {about}")
    print(f"{len(rows)} entries, {total / MB:.1f} of {limit_bytes() / MB:.0f} MB, in {entries_folder()}")
    print(f"{len(graphs)} traced graphs, {sum(graphs) / MB:.1f} MB, in {graphs_folder()}")
    return 0


def described(place: Path, entry: Entry, used: float) -> dict[str, Any]:
    """An entry as plain data."""
    return {
        "key": place.name,
        "about": entry.about,
        "bytes": entry.bytes,
        "files": sorted(entry.files),
        "used": round(used),
    }


def collect_garbage(args: argparse.Namespace) -> int:
    """Remove what exceeds the limit, and with a limit of 0 the traced graphs as well."""
    text = args.max_size
    limit = limit_bytes() if text is None else 0 if text.strip() == "0" else parse_bytes(text, "--max-size")
    gone = collect(limit)
    if limit == 0:
        shutil.rmtree(graphs_folder(), ignore_errors=True)
    left = sum(entry.bytes for _, entry, _ in entries() if entry)
    facts = {"removed": len(gone), "bytes": left, "limit": limit}
    print(json.dumps(facts, indent=1) if args.json else f"{len(gone)} removed, {left / MB:.1f} MB left")
    return 0


def verify_entries(args: argparse.Namespace) -> int:
    """Hash every file; damaged entries are named and removed, so that they are made again. Exit 1 if there was one."""
    rows = list(entries())
    wrong = {place: reason for place, entry, _ in rows if (reason := damaged(place, entry))}
    for place, reason in wrong.items():
        say(f"removed: {reason}")
        shutil.rmtree(place, ignore_errors=True)
    facts = {"entries": len(rows), "damaged": {place.name: reason for place, reason in wrong.items()}}
    print(json.dumps(facts, indent=1) if args.json else f"{len(rows)} entries, {len(wrong)} damaged and removed")
    return 1 if wrong else 0


ACTIONS = {"list": list_entries, "gc": collect_garbage, "verify": verify_entries}
CACHE = Verb(configure_cache, run_cache)
