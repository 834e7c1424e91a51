"""Peak host memory of this process by the kernel's own counter.

``VmHWM`` of ``/proc/self/status`` is exact and needs no sampler; writing 5 to ``/proc/self/clear_refs`` resets it
(Linux, Documentation/filesystems/proc.rst). ``resource.ru_maxrss`` is inherited over fork and cannot be reset.
"""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


def _field(name: str) -> int | None:
    try:
        text = STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
