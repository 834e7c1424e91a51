"""Seconds and peak memory of each stage of a build, shown as progress and kept for ``build.json``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from intaglio.runtimes.host_memory import peak_bytes, reset_peak
from intaglio.runtimes.private_memory import PrivatePeak, return_freed


class Stages:
    """A progress bar on stderr over `total` stages, and their log.

    With `bounded` memory that was freed is returned to the system before each stage, which takes up to a second.
    """

    def __init__(self, total: int, *, bounded: bool = False) -> None:
        self._bounded = bounded
        self.log: list[dict[str, Any]] = []
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("build", total=total)
        self._name = ""
        self._private = PrivatePeak()

    def __enter__(self) -> Stages:
        """Show the bar."""
        self._progress.start()
        self._private.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop the bar; after an error it goes, so that the error stands alone."""
        if kind is not None:
            self._progress.live.transient = True
            self._progress.console.quiet = not self._progress.console.is_interactive
        self._progress.stop()
        self._private.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time one stage; the block may add facts to the dict it is given."""
        self._name = name
        self._progress.update(self._task, description=name)
        facts: dict[str, Any] = {}
        if self._bounded:
            return_freed()
        resettable = reset_peak()
        self._private.reset()
        start = time.monotonic()
        yield facts
        row = {"stage": name, "seconds": round(time.monotonic() - start, 3)}
        peak = peak_bytes() if resettable else None
        self._private.sample()
        private = {"private_peak_bytes": self._private.private, "file_peak_bytes": self._private.file}
        self.log.append({**row, "peak_bytes": peak, **private, **facts})
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        """Show what a long stage is doing."""
        self._progress.update(self._task, description=f"{self._name}: {text}"[:34])
