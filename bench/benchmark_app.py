"""OpenVINO's ``benchmark_app`` in a process of its own: its command line, its report, and what it says it ran with."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.errors import ToolError

APP = "benchmark_app"
MAIN = "from openvino.tools.benchmark.main import main; main()"  # what the script of the wheel runs
REPORT = "benchmark_report.json"
PROPERTY, TITLE, NEXT = "[ INFO ]   ", "[ INFO ] Model:", "[Step 9/"  # of its log
SHAPES = {False: "-data_shape", True: "-shape"}  # the first leaves the graph's dimensions as they are
TIMEOUT = 300.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is timed.

    Attributes:
        graph: the IR's ``.xml``.
        feeds: by input name.
        calls: one after the other, one request; the tool makes one more before.
        settings: of the compilation on the CPU. Some have no flag and others exclude each other as flags, so that all
            go in as a file.
        fixed: whether the model is compiled for these shapes alone.
    """

    graph: Path
    feeds: Mapping[str, np.ndarray]
    calls: int
    settings: Mapping[str, str]
    fixed: bool


def run_app(run: Run, place: Path) -> tuple[float, dict[str, str]]:
    """Median seconds of one inference without its inputs and outputs, and the properties of the compiled model.

    Raises:
        ToolError: the tool failed, hung, or printed what we cannot read.
    """
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        for key, array in run.feeds.items():
            np.save(folder / f"{key}.npy", array, allow_pickle=False)
        (folder / "config.json").write_text(json.dumps({"CPU": dict(run.settings)}), encoding="utf-8")
        log = output_of([sys.executable, "-c", MAIN, *words(run, folder)], APP, TIMEOUT)
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return seconds(report, run.calls), properties(log)


def words(run: Run, folder: Path) -> list[str]:
    """Arguments: our arrays, one request at a time, a report as JSON. Its guess of layouts is switched off."""
    sizes = ",".join(f"{name}[{','.join(map(str, array.shape))}]" for name, array in run.feeds.items())
    files = ",".join(f"{name}:{folder / name}.npy" for name in run.feeds)
    layouts = ",".join(f"{name}[...]" for name in run.feeds)
    once = ["-m", str(run.graph), "-d", "CPU", "-load_config", str(folder / "config.json")]
    once += ["-api", "sync", "-niter", str(run.calls), SHAPES[run.fixed], sizes, "-layout", layouts, "-i", files]
    return [*once, "-report_type", "no_counters", "-report_folder", str(folder), "-json_stats"]


def output_of(command: Sequence[str], side: str, timeout: float) -> str:
    """What a process printed.

    Raises:
        ToolError: it failed or hung; with its last words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{side} gave no answer within {timeout:g} s") from error
    if done.returncode:
        raise ToolError(f"{side} failed: {' '.join((done.stdout + done.stderr).split())[-600:]}")
    return done.stdout


def seconds(report: Mapping[str, Any], calls: int) -> float:
    """The median latency of the JSON report, which states it to 10 microseconds.

    Raises:
        ToolError: the report states an error, or other than `calls` iterations.
    """
    found = report["execution_results"]
    if "error" in found:
        raise ToolError(f"{APP} failed: {found['error']}")
    if int(found["total number of iterations"]) != calls:
        raise ToolError(f"{APP} made {found['total number of iterations']} iterations instead of {calls}")
    return float(found["latency (ms)"]) / 1e3


def properties(log: str) -> dict[str, str]:
    """Properties of the compiled model, which the tool prints in step 8.

    Raises:
        ToolError: it printed none.
    """
    _, found, rest = log.partition(f"{TITLE}\n")
    lines = [line.removeprefix(PROPERTY) for line in rest.partition(NEXT)[0].splitlines() if line.startswith(PROPERTY)]
    if not found or not lines:
        raise ToolError(f"{APP} did not print the properties of the model; is this another version of it?")
    return dict(line.split(": ", 1) for line in lines)
