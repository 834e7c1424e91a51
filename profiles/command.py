"""What a verb of the command line is. The table of verbs is in ``intaglio/__main__.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """`configure` adds arguments to the verb's parser; `run` does the work and returns the exit code.

    Results go to stdout, everything else to stderr. User errors are raised as `ToolError`.
    """

    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def say(text: str) -> None:
    """One line to a person, on stderr."""
    print(text, file=sys.stderr, flush=True)
