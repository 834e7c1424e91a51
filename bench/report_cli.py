"""``intaglio report``: everything a report consists of, made again from its JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from intaglio.bench.report import CSV, HTML, JSON, MARKDOWN, table, texts_of, write_atomic
from intaglio.bench.report_files import check_schema, model_card
from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.strict import parse_json


def configure_report(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio report``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder made by intaglio bench or demo")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    parser.add_argument("--model-card", action="store_true", help="print the block for a model card on the Hub")


def run_report(args: argparse.Namespace) -> int:
    """Write Markdown, CSV and HTML again, or compare them, or print a model card.

    Raises:
        UsageError: there is no report, or its JSON is not as the schema has it.
    """
    report = read(args.folder)
    if args.model_card:
        print(model_card(report), end="")
        return 0
    made = texts_of(report, args.folder)
    if args.check:
        differ = [n for n in (MARKDOWN, CSV, HTML) if not same(args.folder / n, made[n])]
        for name in differ:
            say(f"{args.folder / name} is not what {JSON} makes; run: intaglio report {args.folder}")
        return 1 if differ else 0
    for name in (MARKDOWN, CSV, HTML):
        write_atomic(args.folder / name, made[name])
    print(table(report))
    say(f"written: {args.folder / HTML}")
    return 0


def same(path: Path, text: str) -> bool:
    """Whether a file is this text, byte for byte."""
    return path.exists() and path.read_bytes() == text.encode()


def read(folder: Path) -> dict[str, Any]:
    """The report in a folder.

    Raises:
        UsageError: there is none, or it is not as the schema has it.
    """
    try:
        report = parse_json((folder / JSON).read_bytes())
    except OSError as error:
        problem = f"{folder / JSON} cannot be read ({error.strerror})"
        raise UsageError(f"{problem}; run: intaglio bench ARTIFACT -o {folder}") from error
    except ValueError as error:
        raise UsageError(f"{folder / JSON} is no report: {error}") from error
    if not isinstance(report, dict):
        raise UsageError(f"{folder / JSON} is no report: it holds a {type(report).__name__}")
    check_schema(report)
    return report


REPORT = Verb(configure_report, run_report)
