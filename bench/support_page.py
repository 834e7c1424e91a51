"""``docs/support.md``, generated from the tables: what each target does with each format, and what has been run.

``python -m intaglio.bench.support_page`` writes it; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.exporters.component import FAMILIES
from intaglio.exporters.lowering import TARGETS
from intaglio.profiles.family import load_family
from intaglio.quantize.formats import FORMATS, SUPPORT
from intaglio.quantize.formats import TARGETS as RUNTIMES
from intaglio.runtimes.engine import ENGINES
from intaglio.runtimes.schedulers import SCHEDULERS

PAGE = ROOT / "docs/support.md"
GPU_RUN = "tensorrt_run"  # evidence of a plan that ran on a GPU it was built for
INTRODUCTION = """# What is supported

This page is generated from the tables the code reads (`python -m intaglio.bench.support_page`); a test compares it.

*native*: the backend computes on the packed weights or keeps them packed in memory. *stored-only*: the file is smaller,
the backend unpacks the weights to compute. *verified*: a test or a check on file ran it on the hardware it is for;
*unverified*: it is built and compared as a network, and has not been run."""


def ran_on_gpu(root: Path = ROOT) -> bool:
    """Whether a TensorRT run on a supported GPU is on file."""
    file = root / FOLDER / f"{GPU_RUN}.json"
    return file.exists() and bool(json.loads(file.read_text())["figures"])


def verification(runtime: str, root: Path = ROOT) -> str:
    """``verified`` or ``unverified`` with what was looked at."""
    if runtime != "tensorrt":
        return "verified on CPU"
    if ran_on_gpu(root):
        return "verified on the GPU of bench/results/evidence/tensorrt_run.json"
    return "unverified: built ahead of time, network and plan size checked, never run on a GPU"


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "", "## Families", "", "| family | pipelines |", "| --- | --- |"]
    lines += [f"| `{name}` | {', '.join(load_family(name).pipelines)} |" for name in FAMILIES]
    lines += ["", "## Targets and backends", "", "| backend | built by | state |", "| --- | --- | --- |"]
    by = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}
    for engine in ENGINES:
        target = f"`--target {by[engine]}`" if by.get(engine) in TARGETS else "-"
        lines.append(f"| `{engine}` | {target} | {verification(engine)} |")
    lines += ["", "## Formats", "", "| format | bits | operator | backend | how | faster than fp32 | why |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, op, runtime), row in SUPPORT.items():
        assert runtime in RUNTIMES
        faster = "yes" if row.faster else "no: smaller, not faster"
        lines.append(f"| `{name}` | {FORMATS[name].bits} | {op} | {runtime} | {row.how} | {faster} | {row.reason} |")
    lines += ["", "## Schedulers", "", ", ".join(f"`{name}`" for name in SCHEDULERS), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
