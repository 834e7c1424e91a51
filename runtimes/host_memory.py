"""Peak host memory of this process by the kernel's own counter, and what the machine could still give.

``VmHWM`` of ``/proc/self/status`` is exact and needs no sampler; writing 5 to ``/proc/self/clear_refs`` resets it
(Linux, Documentation/filesystems/proc.rst). ``resource.ru_maxrss`` is inherited over fork and cannot be reset.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def reset_peak() -> bool:
    """Start a new peak; False where the kernel does not allow it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The highest resident size since the last reset, in bytes; ``None`` where there is no ``/proc``."""
    return _field("VmHWM")


def resident_bytes() -> int | None:
    """The resident size now, in bytes."""
    return _field("VmRSS")


def available_bytes() -> int | None:
    """Memory that can still be had, by the kernel and the control group (v2); ``None`` where neither says."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        rows = (line.split() for line in MEMORY.read_text().splitlines())
        found += [int(words[1]) * 1024 for words in rows if words[0] == "MemAvailable:"]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _field(name: str) -> int | None:
    try:
        text = STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
