"""What a process and its children hold for themselves: anonymous and shared memory, without pages of mapped files.

Pages of files are the kernel's to drop, so that a program on mapped weights runs in less memory than it shows; what is
anonymous has to fit. The kernel counts both apart (``RssAnon``, ``RssShmem``, ``RssFile`` of ``/proc/PID/status``,
Documentation/filesystems/proc.rst) but keeps no peak of them: `PrivatePeak` samples.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
INTERVAL = 0.05  # seconds between samples
OWN, FILE = ("RssAnon", "RssShmem"), ("RssFile",)


def tree(pid: int | str = "self") -> list[Path]:
    """A process and all below it, as folders of ``/proc``; empty where there is none."""
    found, todo = [], [PROC / str(pid)]
    while todo:
        place = todo.pop()
        found.append(place)
        for task in place.glob("task/*/children"):
            try:
                todo += [PROC / child for child in task.read_text().split()]
            except OSError:  # a thread that ended
                continue
    return found


def held_bytes(pid: int | str = "self") -> tuple[int, int] | None:
    """Private and file-backed bytes of a process tree now; ``None`` where there is no ``/proc``."""
    own = file = 0
    known = False
    for place in tree(pid):
        try:
            lines = (place / "status").read_text().splitlines()
        except OSError:
            continue
        known = True
        rows = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
        own += sum(rows.get(name, 0) for name in OWN)
        file += sum(rows.get(name, 0) for name in FILE)
    return (own, file) if known else None


def return_freed() -> None:
    """Give the system the memory that was freed: the C library keeps hundreds of MiB for what may be asked for next."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library only
    if trim is not None:
        trim(0)


@dataclass(slots=True)
class PrivatePeak:
    """The highest private and file-backed bytes of this process tree, seen every 50 ms by a thread of its own.

    Attributes:
        private, file: peaks in bytes since `reset`; ``None`` where the kernel does not say.
    """

    private: int | None = None
    file: int | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> PrivatePeak:
        """Begin to sample."""
        self._thread = threading.Thread(target=self._run, name="private-peak", daemon=True)
        self._thread.start()
        return self

    def reset(self) -> None:
        """Forget the peaks; what is held now is the first sample."""
        with self._lock:  # a sample under way would bring back what was held before
            self.private = self.file = None
        self.sample()

    def sample(self) -> None:
        """Look once."""
        with self._lock:
            found = held_bytes()
            if found is not None:
                self.private, self.file = max(found[0], self.private or 0), max(found[1], self.file or 0)

    def stop(self) -> None:
        """End sampling, with a last look."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.monotonic()
            self.sample()
            self._stop.wait(max(INTERVAL - (time.monotonic() - start), 0.005))
