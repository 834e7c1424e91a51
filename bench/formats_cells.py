"""Cells of a table of formats and backends, each in a process of its own: timed in turns, drawn by several at once.

All cells load first, so that one that fails ends the check at once. They stay, idle, and rounds in a random order time
them, so that the machine's moods hit all of them alike. A ratio is taken within a round: seconds of the cell over
seconds of the reference, under 1 is faster.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.bench.assemble import spread
from intaglio.bench.cases import Case
from intaglio.bench.machine import usable_cores
from intaglio.bench.run import SETTLE, order_of
from intaglio.bench.worker import Client, WorkerError, to_json
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError
from intaglio.quantize.feeds import read_feeds
from intaglio.runtimes.engine import Engine, EngineOptions, load_engine

if TYPE_CHECKING:
    from rich.progress import Progress

REFERENCE, TORCH, DENOISER = "fp32", "torch", "unet"
SEED, CALLS, TIMEOUT = 0, 5, 300.0  # of noise and order; denoiser calls a round; seconds an answer may take
Pick = tuple[str, int]  # language and index of a name


@dataclass(slots=True, kw_only=True)
class Cell:
    """A format on a backend, and what was measured so far."""

    format: str
    backend: str
    case: Case
    worker: Client | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One request to the worker.

        Raises:
            ToolError: the cell failed; it is named.
        """
        assert self.worker is not None
        try:
            return self.worker.ask(do, **fields)
        except WorkerError as error:
            raise ToolError(f"{self.format} on {self.backend}: {error}") from error

    def against(self, other: Cell) -> dict[str, Any] | None:
        """Seconds as a ratio to another cell's, round by round."""
        return spread([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


class Denoiser:
    """The UNet alone behind the face of a pipeline: what it calls a picture is `CALLS` calls on one recorded step."""

    def __init__(self, engine: Engine, feeds: Mapping[str, np.ndarray]) -> None:
        self.engine, self.feeds = engine, feeds

    def stream(self, prompt: str, **parameters: object) -> Generator[SimpleNamespace, None, SimpleNamespace]:
        """Seconds of each call; the prompt and all parameters are the record's."""
        made = np.empty(0)
        for _ in range(CALLS):
            start = time.perf_counter()
            (made,) = self.engine.run(self.feeds).values()
            yield SimpleNamespace(seconds=time.perf_counter() - start)
        return SimpleNamespace(latents=made, images=[made], seconds={}, parameters={})

    def memory(self) -> dict[str, dict[str, int | None]]:
        """What the engine says it holds."""
        return {DENOISER: self.engine.memory()}


def load_denoiser(
    artifact: str, *, backend: str, device: str, threads: int, checkpoint: str, settings: dict[str, str], verify: bool
) -> Denoiser:
    """The signature of `intaglio.load`; ``settings["feeds"]`` is the file of recorded feeds."""
    options = EngineOptions(device=device, threads=threads, checkpoint=checkpoint)
    engine = load_engine(backend, Artifact.open(artifact, verify=verify), DENOISER, options)
    return Denoiser(engine, next(read_feeds(settings["feeds"], DENOISER)))


@contextlib.contextmanager
def running(cells: Sequence[Cell], bars: Progress, about: str) -> Iterator[None]:
    """Load every cell and make its first image, which gives its peak memory; they stay until the block ends."""
    with contextlib.ExitStack() as stack:
        for cell in bars.track(cells, description=about):
            cell.worker = Client(cell.case, timeout=TIMEOUT)
            stack.callback(cell.worker.close)
            cell.ask("watch")
            cell.ask("load", case=to_json(cell.case))
            cell.ask("run", prompt=0)
            cell.peak_bytes = cell.ask("memory")["host"]["peak_bytes"]
        yield


def take_turns(cells: Sequence[Cell], rounds: int, bars: Progress, about: str) -> None:
    """Time every cell once a round, in an order drawn anew; round k draws the same prompt everywhere."""
    by_label = {cell.case.label: cell for cell in cells}
    turns = [(turn, label) for turn in range(rounds) for label in order_of(list(by_label), turn, SEED)]
    for turn, label in bars.track(turns, description=about):
        time.sleep(SETTLE)
        cell = by_label[label]
        cell.seconds.append(cell.ask("run", prompt=turn % len(cell.case.prompts))["seconds"])


def draw(cells: Sequence[Cell], picks: Mapping[str, Sequence[Pick]], folder: Path, bars: Progress) -> None:
    """Every cell's pictures, a cell per core at a time."""
    task = bars.add_task("pictures", total=sum(len(picks[cell.backend]) for cell in cells))

    def one(cell: Cell) -> None:
        for number, pick in enumerate(picks[cell.backend]):
            path = picture(folder, cell, pick)
            cell.ask("image", prompt=number, folder=str(path.parent), stem=path.stem)
            bars.advance(task)

    with ThreadPoolExecutor(usable_cores()) as pool:
        jobs = [pool.submit(one, cell) for cell in cells]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def picture(folder: Path, cell: Cell, pick: Pick) -> Path:
    """Where a picture lies."""
    return folder / cell.case.label.replace(" ", "-") / f"{pick[0]}-{pick[1]}.png"


def find(cells: Sequence[Cell], name: str, backend: str) -> Cell:
    """The cell of a format and a backend."""
    return next(c for c in cells if (c.format, c.backend) == (name, backend))


def timing(cell: Cell, cells: Sequence[Cell], calls: int = 1) -> dict[str, Any]:
    """Seconds of one call, their ratios to fp32 on the same backend and on torch, peak memory of load and first run."""
    return {
        "format": cell.format,
        "backend": cell.backend,
        "status": "measured",
        "seconds": round(statistics.median(cell.seconds) / calls, 5),
        "seconds_ratio_to_fp32": cell.against(find(cells, REFERENCE, cell.backend)),
        "seconds_ratio_to_torch": cell.against(find(cells, REFERENCE, TORCH)),
        "peak_bytes": cell.peak_bytes,
    }
