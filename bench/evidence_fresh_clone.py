"""The README's two commands on a fresh clone with a fresh environment."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from intaglio.bench.evidence import ROOT
from intaglio.profiles.errors import ToolError

COMMANDS = ("make demo", "make test")


def measure() -> dict[str, Any]:
    """Minutes of each command; the last lines of their output; a command that fails is an error.

    Raises:
        ToolError: with the command and the end of its output.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        for command in COMMANDS:
            start = time.monotonic()
            done = subprocess.run(
                command.split(), cwd=clone, env=environment, capture_output=True, text=True, check=False
            )
            tail = done.stdout.splitlines()[-30:]
            if done.returncode:
                raise ToolError(
                    f"{command} failed in a fresh clone: {' | '.join((tail + done.stderr.splitlines())[-8:])}"
                )
            figures[command] = {"minutes": round((time.monotonic() - start) / 60, 2), "output": tail}
    return figures
