"""The two Python packages with TensorRT's API, which of them are installed, and the GPU that is present.

``tensorrt`` (NVIDIA's index only) builds and runs on the GPU it sees. ``tensorrt_rtx_bindings`` (on PyPI) builds for
named compute capabilities without a GPU. An engine runs only on the API and the release that built it:
"TensorRT-RTX engines are not compatible between different releases"
(docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html).
"""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType
from typing import Any

from intaglio.profiles.errors import MissingDependency, Unsupported
from intaglio.profiles.registry import installed, need

APIS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}  # name recorded with an engine -> module
EXTRA = "tensorrt"
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CUDA 13's runtime, which cuda-bindings and TensorRT-RTX's cu13 packages hold, needs a driver of 13.0 or newer
# (docs.nvidia.com/deploy/cuda-compatibility); its first is Linux 580.65.
DRIVER_CUDA = 13000
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h


def installed_apis() -> tuple[str, ...]:
    """Names of the installed APIs, without importing them."""
    return tuple(name for name, module in APIS.items() if installed(module))


def load_api(name: str) -> ModuleType:
    """Import one API by its name in APIS.

    Raises:
        MissingDependency: it is not installed, with the pip line.
        Unsupported: it is installed and cannot be loaded on this machine.
    """
    try:
        return need(APIS[name], extra=EXTRA)
    except MissingDependency as error:
        if name != "tensorrt":
            raise
        line = "tensorrt is not installed; run: pip install tensorrt --extra-index-url https://pypi.nvidia.com"
        raise MissingDependency(line) from error
    except (OSError, ImportError, RuntimeError) as error:
        raise Unsupported(f"{APIS[name]} is installed and does not load: {last_line(str(error))}") from error


def last_line(text: str) -> str:
    """The last line of a library's message that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def make_logger(trt: ModuleType) -> Any:
    """An ``ILogger`` that keeps messages: ``.errors`` and ``.warnings``, lists of lines."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(msg.split()))
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(" ".join(msg.split()))

    return Log()


def load_driver() -> ctypes.CDLL:
    """NVIDIA's driver.

    Raises:
        Unsupported: there is none.
    """
    try:
        return ctypes.CDLL(DRIVER)
    except OSError as error:
        raise Unsupported(f"TensorRT has no NVIDIA GPU here: the driver's {DRIVER} is not found") from error


def check_driver() -> None:
    """The driver knows the CUDA release that TensorRT's packages are made for.

    Raises:
        Unsupported: there is no driver, or it is older; with both releases.
    """
    found = ctypes.c_int(0)
    status = load_driver().cuDriverGetVersion(ctypes.byref(found))
    if status:
        raise Unsupported(f"{DRIVER} returns {status} for its version; install NVIDIA's driver 580 or newer")
    if found.value < DRIVER_CUDA:
        have, wanted = (f"{v // 1000}.{v % 1000 // 10}" for v in (found.value, DRIVER_CUDA))
        raise Unsupported(
            f"NVIDIA's driver here is for CUDA {have}, TensorRT needs {wanted}; install driver 580 or newer"
        )


def capability_of_gpu(index: int) -> str:
    """Compute capability of GPU `index` as ``sm89``, asked of NVIDIA's driver.

    Raises:
        Unsupported: no driver, no GPU, or fewer than `index` + 1.
    """
    driver = load_driver()
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        raise Unsupported(f"TensorRT has no NVIDIA GPU here: {DRIVER} returns {status} and counts {count.value}")
    if index >= count.value:
        raise Unsupported(f"TensorRT has no GPU cuda:{index}; allowed: cuda:0 to cuda:{count.value - 1}")
    device, numbers = ctypes.c_int(0), []
    status = driver.cuDeviceGet(ctypes.byref(device), index)
    for attribute in (MAJOR, MINOR):
        number = ctypes.c_int(0)
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    if status:
        raise Unsupported(f"{DRIVER} returns {status} for the compute capability of cuda:{index}")
    return f"sm{numbers[0]}{numbers[1]}"


def present_gpu() -> str | None:
    """``sm89`` of the first GPU, ``None`` where there is none."""
    try:
        return capability_of_gpu(0)
    except Unsupported:
        return None
