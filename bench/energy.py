"""Joules of a piece of work, from the processor's or the GPU's own counter. A figure not known is None, with a reason.

RAPL is read from ``/sys/class/powercap`` (Linux, Documentation/power/powercap/powercap.rst), a GPU's counter by NVML's
``nvmlDeviceGetTotalEnergyConsumption``. Both are of the whole package or board, whoever used it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A counter is updated every so often; a window of ten updates is wrong by a tenth at most.
RAPL_WINDOW, NVML_WINDOW = 0.01, 1.0  # seconds: updates every 1 ms and every 20 to 100 ms


@dataclass(slots=True)
class Energy:
    """The energy between `start` and `stop`.

    Attributes:
        device: the case's device; ``cpu`` reads RAPL, a GPU's name NVML at the index behind the colon.
        reason: empty, or why nothing can be read.
    """

    device: str
    reason: str = ""
    source: str = ""
    _packages: dict[Path, int] = field(default_factory=dict)
    _before: dict[Path, int] = field(default_factory=dict)
    _gpu: int = 0
    _since: float = 0.0

    def __post_init__(self) -> None:
        """Find the counters."""
        if self.device.partition(":")[0].lower() in ("cpu", ""):
            self.source = "RAPL, processor packages"
            self._packages = packages()
            if not self._packages:
                self.reason = f"no processor energy counter can be read under {POWERCAP}"
        else:
            self.source = "NVML, GPU board"
            self.reason = nvml_reason(self._index())

    def _index(self) -> int:
        number = self.device.rpartition(":")[2]
        return int(number) if number.isdigit() else 0

    def start(self) -> None:
        """Begin a window."""
        self._since = time.perf_counter()
        if self.reason:
            return
        if self._packages:
            self._before = {path: int(path.read_text()) for path in self._packages}
        else:
            self._gpu = millijoules(self._index())

    def stop(self) -> dict[str, Any]:
        """``joules`` since `start`, ``source`` and ``reason``."""
        seconds = time.perf_counter() - self._since
        empty = {"joules": None, "source": self.source}
        if self.reason:
            return {**empty, "reason": self.reason}
        window = RAPL_WINDOW if self._packages else NVML_WINDOW
        if seconds < window:
            return {**empty, "reason": f"the counter needs a window of {window:g} s, this one was shorter"}
        if self._packages:
            used = sum((int(p.read_text()) - self._before[p]) % largest for p, largest in self._packages.items()) / 1e6
        else:
            used = (millijoules(self._index()) - self._gpu) / 1e3
        return {"joules": used, "source": self.source, "reason": ""}


def packages() -> dict[Path, int]:
    """Counters of whole processor packages that can be read, with the value at which each wraps; in microjoules."""
    found = {}
    for folder in sorted(POWERCAP.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") != 1:  # a part of a package: it is in the package's own figure
            continue
        try:
            int((folder / "energy_uj").read_text())
            found[folder / "energy_uj"] = int((folder / "max_energy_range_uj").read_text()) + 1
        except (OSError, ValueError):
            continue
    return found


def nvml_reason(index: int) -> str:
    """Empty, or why a GPU's energy cannot be read."""
    from intaglio.bench.memory import gpus

    found, reason = gpus()
    if index >= len(found):
        return reason or f"there is no GPU {index}"
    try:
        millijoules(index)
    except Exception as error:  # NVML's own classes; older boards have no counter
        return f"the GPU does not say ({error})"
    return ""


def millijoules(index: int) -> int:
    """A GPU's counter since its driver was loaded."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(index)))
    finally:
        pynvml.nvmlShutdown()
