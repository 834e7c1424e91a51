"""Every fault of `intaglio.bench.faults` in an unquantized and an int8 artifact, and as many runs without any.

A fault counts as found where the benchmark's own verdict, at the default limits, says so; nothing else looks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case
from intaglio.bench.faults import FAULTS, FILE_FAULTS
from intaglio.bench.journal import Journal, plan_of
from intaglio.bench.matrix import matrix
from intaglio.bench.run import run_matrix
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError

FORMATS = {"fp32": {}, "int8": {"*": "int8"}}
STEPS, RERUNS = 8, 50
NOT_HERE = {"swapped_encoders": "the embedded checkpoint has one text encoder; tests/test_faults.py has it on SDXL"}
ONLY = {"doubled_scale": ("int8",)}  # by format where not all have it
LOADER = "intaglio.bench.faults:load"


def measure() -> dict[str, Any]:
    """What was found of what was put in, and what was said of runs without a fault."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from intaglio.exporters.build import build

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="intaglio-faults-") as name, Progress(*columns, console=console) as bars:
        artifacts = {}
        for kind, quant in bars.track(list(FORMATS.items()), description="build"):
            artifacts[kind] = build("emoji", Path(name) / kind, targets=("onnx",), quant=quant, options={})
        rows: dict[str, Any] = {}
        task = bars.add_task("faults", total=len(artifacts) * 2)
        for kind, artifact in artifacts.items():
            faults = [f for f in (*FAULTS, *FILE_FAULTS) if f not in NOT_HERE and kind in ONLY.get(f, FORMATS)]
            found = judged(Path(name) / f"{kind}-faults", artifacts, kind, {f: f for f in faults})
            bars.advance(task)
            clean = judged(Path(name) / f"{kind}-clean", artifacts, kind, {str(k): "" for k in range(RERUNS // 2)})
            bars.advance(task)
            rows[kind] = {
                "found": {f: found[f] for f in faults},
                "missed": [f for f in faults if not found[f]],
                "reruns": len(clean),
                "false_alarms": {k: reasons for k, reasons in clean.items() if reasons},
            }
            assert artifact.folder.exists()
    return {"steps": STEPS, "not_here": NOT_HERE, "formats": rows}


def judged(
    folder: Path, artifacts: Mapping[str, Artifact], kind: str, faults: Mapping[str, str]
) -> dict[str, Sequence[str]]:
    """What the benchmark says against each case: the sound unquantized artifact on ONNX Runtime is the reference."""
    sound, judged_one = artifacts["fp32"], artifacts[kind]
    common: dict[str, Any] = {"prompts": ("red heart", "猫脸"), "steps": STEPS, "rounds": 1, "warmup": 0}
    reference = replace(matrix([sound], ["onnxruntime"], **common)[0], label="reference/onnxruntime")
    (base,) = matrix([judged_one], ["onnxruntime"], loader=LOADER, **common)
    cases: list[Case] = [reference]
    cases += [replace(base, label=f"{n}/onnxruntime", settings={"fault": f} if f else {}) for n, f in faults.items()]
    folder.mkdir()
    journal = Journal(folder)
    table = {str(a.folder): a for a in (sound, judged_one)}
    journal.write("plan", **plan_of(cases, {key: a.manifest.digest for key, a in table.items()}, 0))
    report = run_matrix(cases, table, journal, command="make evidence faults", parts=("components",))
    said = {}
    for row in report["cases"][1:]:
        if row["error"].startswith("load: the fault"):  # it was not put in, so it was not found either
            raise ToolError(row["error"])
        name = row["label"].rpartition("/")[0]
        said[name] = [row["error"]] if row["status"] == "error" else row["verdict"]["exceeded"]
    return said
