"""Memory of a process, from the kernel's and the driver's own counters. A figure not known is None, with a reason.

The host peak is `intaglio.runtimes.host_memory`'s; here are its split into private and file-backed pages, and VRAM.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intaglio.runtimes import host_memory
from intaglio.runtimes.host_memory import available_bytes as available_bytes
from intaglio.runtimes.private_memory import held_bytes, tree

ROLLUP = Path("/proc/self/smaps_rollup")
KIB = 1024
INTERVAL, LONGEST = 0.02, 400  # seconds between samples; samples of a series that a report carries


def read_kib(path: Path, key: str) -> int:
    """Bytes of one ``Key:   123 kB`` line.

    Raises:
        OSError: the file cannot be read.
        KeyError: it has no such line.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * KIB
    raise KeyError(key)


def reset_peak() -> str:
    """Set the high-water mark of this process to what it holds now.

    Returns:
        An empty string, or the reason why it could not.
    """
    if not sys.platform.startswith("linux"):
        return f"the peak is read from Linux's /proc; this is {sys.platform}"
    return "" if host_memory.reset_peak() else "the kernel refuses to reset the peak"


def host_memory_now() -> dict[str, Any]:
    """What this one process holds and has held since `reset_peak`, in bytes.

    Returns:
        ``peak_bytes`` (resident high-water mark), ``resident_bytes``, ``anonymous_bytes`` (private data) and
        ``file_bytes`` (mapped files such as weights and libraries, which the kernel may drop and share) as of now, and
        ``reason``: empty, or why they are None. The kernel keeps no split of the peak itself.
    """
    names = ("peak_bytes", "resident_bytes", "anonymous_bytes", "file_bytes")
    if not sys.platform.startswith("linux"):
        return {**dict.fromkeys(names), "reason": f"memory is read from Linux's /proc; this is {sys.platform}"}
    peak = host_memory.peak_bytes()
    try:
        resident, anonymous = read_kib(ROLLUP, "Rss"), read_kib(ROLLUP, "Anonymous")
    except (OSError, KeyError) as error:
        return {**dict.fromkeys(names), "peak_bytes": peak, "reason": f"{ROLLUP} cannot be read ({error})"}
    peak = None if peak is None else max(peak, resident)  # the kernel's counters are batched per thread
    values = (peak, resident, anonymous, resident - anonymous)
    return {**dict(zip(names, values, strict=True)), "reason": ""}


@dataclass(slots=True)
class Watcher:
    """Memory of this process and its children over time.

    The peak is the kernel's own, exact; the split into private and file-backed pages, and whatever children hold, is
    sampled every 20 ms.
    """

    samples: list[tuple[float, int, int]] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)
    children: int = 0
    reason: str = ""
    before: dict[str, Any] = field(default_factory=dict)
    _began: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> Watcher:
        """Reset the kernel's peak and begin to sample."""
        self.reason, self.before = reset_peak(), host_memory_now()
        self._began = time.perf_counter()
        self._sample()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()
        return self

    def mark(self, name: str) -> None:
        """Note when something was done."""
        self.marks[name] = round(time.perf_counter() - self._began, 3)

    def stop(self) -> dict[str, Any]:
        """End sampling.

        Returns:
            What `host_memory_now` says, ``before_load_bytes``, ``children`` (most at once), ``peak_private_bytes`` and
            ``peak_file_bytes`` (each the highest sampled, at times of their own), ``series`` of [seconds, private
            bytes, file-backed bytes] thinned to LONGEST rows, and ``marks`` in seconds.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()
        found = host_memory_now()
        if self.reason:
            found.update(peak_bytes=None, reason=self.reason)
        most = max((a + b for _, a, b in self.samples), default=None)
        if self.children and found["peak_bytes"] is not None and most is not None:
            found["peak_bytes"] = max(found["peak_bytes"], most)
        return {
            **found,
            "before_load_bytes": self.before["resident_bytes"],
            "children": self.children,
            "peak_private_bytes": max((a for _, a, _ in self.samples), default=None),
            "peak_file_bytes": max((b for _, _, b in self.samples), default=None),
            "series": thinned(self.samples),
            "marks": self.marks,
        }

    def _sample(self) -> None:
        found = held_bytes()
        if found is not None:
            self.samples.append((round(time.perf_counter() - self._began, 3), *found))
            self.children = max(self.children, len(tree()) - 1)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()


def thinned(samples: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """At most LONGEST samples, the highest of each stretch."""
    width = -(-len(samples) // LONGEST) or 1
    parts = [samples[i : i + width] for i in range(0, len(samples), width)]
    return [max(part, key=lambda s: s[1] + s[2]) for part in parts]


def gpus() -> tuple[list[dict[str, Any]], str]:
    """NVIDIA GPUs as ``{"name", "memory_bytes", "driver"}``, and the reason why there are none."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return [], "nvidia-ml-py is not installed; run: pip install 'intaglio[bench]'"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], "no NVIDIA GPU"
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = [
            {
                "name": pynvml.nvmlDeviceGetName(h),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(h).total),
                "driver": driver,
            }
            for h in handles
        ]
    finally:
        pynvml.nvmlShutdown()
    return found, "" if found else "no NVIDIA GPU"


def vram_used(index: int) -> tuple[int, int | None]:
    """Bytes in use on one GPU: by everybody, and by this process (None where the driver does not say).

    Inside a container the driver's process ids are another namespace's, so a process that is not listed is None, not 0.
    """
    import os

    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        listed = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), listed.get(os.getpid())
    finally:
        pynvml.nvmlShutdown()


class VramProbe:
    """VRAM of one case: made before it loads, read after it has run.

    Args:
        device: the backend's device name; the number after a colon is the GPU's index.
    """

    def __init__(self, device: str) -> None:
        self.index = int(device.rpartition(":")[2]) if device.rpartition(":")[2].isdigit() else 0
        found, self.reason = gpus()
        if found and device == "cpu":
            self.reason = "the case runs on the CPU"
        self.before = 0 if self.reason else vram_used(self.index)[0]

    def read(self) -> dict[str, Any]:
        """Three figures, because none is the whole: each in bytes, or None with its reason under ``reasons``.

        ``framework_bytes`` is the highest of torch's allocator (blind to other libraries and the context),
        ``process_bytes`` what the driver attributes to this process, ``device_delta_bytes`` the whole device's since
        the probe. ``reason`` is the one reason for all three, where there is one.
        """
        names = ("framework_bytes", "process_bytes", "device_delta_bytes")
        if self.reason:
            return {**dict.fromkeys(names), "reasons": dict.fromkeys(names, self.reason), "reason": self.reason}
        used, process = vram_used(self.index)
        framework = torch_peak(self.index)
        figures = dict(zip(names, (framework, process, used - self.before), strict=True))
        missing = ("no framework with an allocator of its own ran", "the driver does not list this process", "")
        reasons = {n: m for n, m in zip(names, missing, strict=True) if figures[n] is None}
        return {**figures, "reasons": reasons, "reason": ""}


def torch_peak(index: int) -> int | None:
    """The most that torch's allocator held on a GPU, None where torch was not used on it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved(index)) or None
