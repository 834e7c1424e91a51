"""What the figures were taken on, without the names of hosts or people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from intaglio.bench.memory import gpus, read_kib

FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
)
PACKAGES = (
    "intaglio",
    "numpy",
    "pillow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx_cu13_libs",
    "torch",
    "diffusers",
    "transformers",
    "flip-evaluator",
    "mlcommons_loadgen",
)


def cpu_info() -> dict[str, Any]:
    """Model name, the instruction sets that decide int8 and bf16 speed, and whether it is a virtual machine's."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "flags": [f for f in FLAGS if f in flags],
        "virtual": "hypervisor" in flags if flags else None,
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "quota_cores": quota_cores(),
    }


def usable_cores() -> int | None:
    """Logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def quota_cores() -> float | None:
    """The control group's CPU quota in cores, None where there is no limit or it cannot be known."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory_gib() -> int | None:
    """Memory of the machine, to the nearest GiB; None where it cannot be known."""
    try:
        return round(read_kib(Path("/proc/meminfo"), "MemTotal") / 2**30)
    except (OSError, KeyError):
        return None


def system_name() -> str:
    """``Debian GNU/Linux 12 (bookworm), Linux 6.1``."""
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, where installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "intaglio" not in versions:  # run from the source tree
        from intaglio import __version__

        versions = {"intaglio": __version__, **versions}
    return versions


def git_commit() -> str | None:
    """The commit of the source tree this package lies in, None where it is not one. Git itself is not needed."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "pyproject.toml").exists() and (folder / ".git").is_dir():
            return read_head(folder / ".git")
    return None


def read_head(git: Path) -> str | None:
    """The commit that HEAD of a ``.git`` folder names, loose or packed."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)


def load_average() -> float | None:
    """Runnable tasks over the last minute: above the number of cores, others were competing. None on Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def fingerprint() -> dict[str, Any]:
    """Processor, memory, system, Python, packages, GPUs and commit, as plain data."""
    found, reason = gpus()
    return {
        "cpu": cpu_info(),
        "memory_gib": memory_gib(),
        "system": system_name(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "gpus": found,
        "gpus_reason": reason,
        "git_commit": git_commit(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """One line for a person: ``Intel Xeon (2 cores, avx512_vnni), 24 GiB, Linux 6.1, Python 3.11, no NVIDIA GPU``."""
    cpu = machine["cpu"]
    cores = f"{cpu['cores']} core{'s' if cpu['cores'] != 1 else ''}"
    parts = [f"{cpu['model']} ({', '.join([cores, *cpu['flags']])}{', virtual' if cpu['virtual'] else ''})"]
    if machine["memory_gib"]:
        parts.append(f"{machine['memory_gib']} GiB")
    parts += [machine["system"], f"Python {machine['python']}"]
    parts.append(", ".join(g["name"] for g in machine["gpus"]) or machine["gpus_reason"])
    return ", ".join(parts)
