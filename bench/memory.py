"""Memory of a process, from the kernel's and the driver's own counters. A figure not known is None, with a reason.

The host peak is `intaglio.runtimes.host_memory`'s; here are its split into private and file-backed pages, and VRAM.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from intaglio.runtimes import host_memory
from intaglio.runtimes.host_memory import available_bytes as available_bytes

ROLLUP = Path("/proc/self/smaps_rollup")
KIB = 1024


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
        """``process_bytes`` as the driver attributes it, ``device_delta_bytes`` since the probe, and ``reason``."""
        if self.reason:
            return {"process_bytes": None, "device_delta_bytes": None, "reason": self.reason}
        used, process = vram_used(self.index)
        reason = "" if process is not None else "the driver does not list this process"
        return {"process_bytes": process, "device_delta_bytes": used - self.before, "reason": reason}
