"""``intaglio export-for``: an artifact as another tool's folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from intaglio.exporters.interop import TOOLS, arrange
from intaglio.profiles.command import Verb, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio export-for``."""
    parser.add_argument("tool", choices=sorted(TOOLS), help="what is to load it")
    parser.add_argument("artifact", type=Path, help="folder made by intaglio build")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--copy", action="store_true", help="copy the weights instead of linking them")


def run(args: argparse.Namespace) -> int:
    """Arrange the folder and say what the tool does otherwise.

    Raises:
        ToolError: the tool does not run the family, or the output exists.
    """
    made = arrange(args.artifact, args.output, args.tool, copy=args.copy)
    for note in made.notes:
        say(note)
    say(f"load it with: {made.load}")
    print(args.output)
    return 0


EXPORT_FOR = Verb(configure, run)
