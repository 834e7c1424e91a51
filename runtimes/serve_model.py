"""One artifact of a server: its worker process, replaced when it dies and when another build takes the folder."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.profiles.artifact import generation_of
from intaglio.runtimes.embedding_cache import DEFAULT_BYTES
from intaglio.runtimes.serve_errors import without_paths
from intaglio.runtimes.serve_pace import Pace
from intaglio.runtimes.serve_process import LoadFailed, Process
from intaglio.runtimes.serve_reader import reader_of

if TYPE_CHECKING:
    from intaglio.runtimes.pipeline import Pipeline

LOG = logging.getLogger("intaglio.serve")
RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the n-th start in a row that failed
ENDING_SECONDS = 0.05  # between looks at a worker that ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """How an artifact is served.

    Attributes:
        name: by which requests ask for it.
        folder: of the artifact.
        concurrency: pictures under way at once.
        rows: of one call of the denoiser; the artifact's own limit where ``None``.
        cache_bytes: of prompt embeddings.
        watchdog: seconds a worker may say nothing once it has loaded.
        patience: seconds a worker that is replaced may take to end what it began.
        loading: seconds a worker may take to load.
        loader: ``module:function`` in the place of `intaglio.load`, for tests.
    """

    name: str
    folder: Path
    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 0
    checkpoint: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    concurrency: int = 4
    rows: int | None = None
    cache_bytes: int = DEFAULT_BYTES
    watchdog: float = 300.0
    patience: float = 600.0
    loading: float = 1800.0
    loader: str = ""

    def load_message(self) -> dict[str, Any]:
        """The first message to a worker."""
        options = {
            "backend": self.backend,
            "device": self.device,
            "threads": self.threads,
            "checkpoint": self.checkpoint,
            "settings": dict(self.settings),
        }
        facts = {"rows": self.rows, "cache_bytes": self.cache_bytes, "loader": self.loader}
        return {"folder": str(self.folder), "options": options, **facts}


class Model:
    """A served artifact.

    Attributes:
        reader: what checks requests.
        estimate: bytes its worker will hold, by those on disk.
        fresh: bytes the last one held when it had just loaded, where the kernel said.
        process: the worker that gets new requests; ``None`` where it is not loaded, or is being started again.
        starting: one that loads.
        leaving: workers that end what they began.
        yielding: no new requests begin, because its memory is wanted.
        unloaded: on purpose.
        swaps, restarts, failures: how often another build took over, a worker died, a start failed.
        past: what workers that are gone had counted: the numbers of their last ``pulse``.
    """

    def __init__(self, settings: ModelSettings, changed: Callable[[], None]) -> None:
        self.settings, self.changed = settings, changed
        self.reader, self.estimate = reader_of(settings)
        self.fresh: int | None = None
        self.process: Process | None = None
        self.starting: Process | None = None
        self.leaving: set[Process] = set()
        self.pace = Pace()
        self.generation: Any = None
        self.used = 0.0
        self.yielding, self.unloaded, self.closed = False, True, False
        self.swaps = self.restarts = self.failures = 0
        self.past: Counter[str] = Counter()
        self.lock = asyncio.Lock()
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        """By which requests ask for it."""
        return self.settings.name

    @property
    def ready(self) -> bool:
        """Whether a request that fits is served."""
        return self.process is not None or self.unloaded

    @property
    def running(self) -> int:
        """Pictures under way, in a worker that leaves too."""
        return sum(len(process.receivers) for process in self.processes)

    @property
    def processes(self) -> list[Process]:
        """All workers, those that leave too."""
        return [*self.leaving, *([self.process] if self.process is not None else [])]

    def places(self) -> int:
        """How many more pictures can begin."""
        process = self.process
        if process is None or not process.alive or self.yielding:
            return 0
        return max(0, self.settings.concurrency - len(process.receivers))

    def said(self, error: Exception) -> str:
        """What a log may show of an error."""
        return without_paths(str(error), self.settings.folder)

    def size(self) -> int:
        """Bytes that a worker to be started will hold.

        Not what the last one held in the end: requests made it grow, by memory that allocators keep.
        """
        return self.estimate if self.fresh is None else self.fresh

    def held(self) -> int:
        """Bytes of all its living workers now, mapped files included; of one that loads at least what it will hold."""
        total = sum(process.held() or self.size() for process in self.processes)
        if self.starting is not None:
            return total + max(self.size(), self.starting.held() or 0)
        return total + (self.size() if self.process is None and not self.unloaded else 0)

    async def look(self) -> None:
        """See how large what lies in the folder now is: it may be another build than the one that was loaded last.

        Raises:
            ToolError: it cannot be read.
        """
        _, self.estimate = await asyncio.to_thread(reader_of, self.settings)
        if generation_of(self.settings.folder) != self.generation:
            self.fresh = None

    async def load(self) -> None:
        """Start a worker where there is none.

        Raises:
            LoadFailed: it cannot be loaded.
        """
        async with self.lock:
            if self.process is None:
                self.unloaded = False
                await self._replace()

    async def _started(self) -> tuple[Process, Pipeline, int]:
        """A worker on what lies in the folder now, and of that what `reader_of` says.

        Raises:
            LoadFailed, ToolError: it cannot be loaded.
        """
        process = Process(watchdog=self.settings.watchdog, ended=self._ended, pulsed=self._pulsed)
        self.starting = process
        try:
            await process.start(self.settings.load_message(), self.settings.loading)
            reader, estimate = await asyncio.to_thread(reader_of, self.settings)
        except BaseException:
            await process.kill()
            raise
        finally:
            self.starting = None
        if not process.alive:
            raise LoadFailed("the worker died as soon as it had loaded its artifact")
        return process, reader, estimate

    async def _replace(self) -> None:
        """Start a worker on what lies in the folder now, and give it what comes from here on."""
        before = generation_of(self.settings.folder)
        try:
            process, self.reader, self.estimate = await self._started()
        except Exception:
            self.failures += 1
            raise
        old, self.process = self.process, process
        self.generation, self.used, self.fresh = before, time.monotonic(), process.held()
        self.yielding = self.unloaded = False
        if old is not None:
            self.leave(old)
        LOG.info("%s: worker %s loaded in %.1f s", self.name, process.pid, process.facts["seconds"])
        self.changed()

    def leave(self, process: Process) -> None:
        """Let a worker end what it began."""
        self.leaving.add(process)
        self.spawn(self._left(process))

    async def _left(self, process: Process) -> None:
        await process.stop(self.settings.patience)
        self.leaving.discard(process)
        self.changed()

    async def unload(self) -> None:
        """Give the memory back, after what is under way."""
        self.yielding = True
        while self.running:
            await asyncio.sleep(ENDING_SECONDS)
        async with self.lock:  # no worker is being started then
            if self.process is not None:
                self.leave(self.process)
            self.process, self.unloaded, self.yielding = None, True, False
        while self.leaving:
            await asyncio.sleep(ENDING_SECONDS)

    def _pulsed(self, busy: bool) -> None:
        """A round is over; a worker that leaves may still work when this one rests, and the other way round.

        A worker's first picture is slower than all others: engines compile, memory is touched first.
        """
        if not any(process.warm for process in self.processes):
            self.pace.pause()
            self.pace.begin(time.monotonic())
            return
        self.pace.tick(time.monotonic(), busy=busy or any(p.pulse.get("running", 0) > 0 for p in self.processes))

    def _ended(self, process: Process) -> None:
        """A worker's process is over."""
        self.leaving.discard(process)
        self.past.update(process.pulse)
        self.pace.pause()
        if process is self.process:
            self.process = None
            if not process.expected and not self.closed:
                self.restarts += 1
                LOG.warning("%s: worker %s died; it is started again", self.name, process.pid)
                self.spawn(self._restart())
        self.changed()

    async def _restart(self) -> None:
        """Start a worker again, more slowly each time it fails."""
        for attempt in itertools.count():
            await asyncio.sleep(RESTART_SECONDS[min(attempt, len(RESTART_SECONDS) - 1)])
            if self.unloaded:  # meanwhile, on purpose
                return
            try:
                await self.load()
            except Exception as error:
                LOG.error("%s: cannot be loaded: %s", self.name, self.said(error))  # noqa: TRY400 (the message says it)
            else:
                return

    async def swap(self) -> None:
        """Let a worker on what lies in the folder now take over, if there is one to take over from.

        Raises:
            LoadFailed, ToolError: it cannot be loaded; the old one stays.
        """
        async with self.lock:
            if self.process is not None:
                await self._replace()
                self.swaps += 1

    def spawn(self, work: Any) -> None:
        """Run something beside."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def close(self, patience: float) -> None:
        """End every worker, after what it began."""
        self.closed = True
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(process.stop(patience) for process in self.processes))
        self.process = None
