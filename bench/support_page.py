"""``docs/support.md``, generated from the tables: what each target does with each format, and what has been run.

``python -m intaglio.bench.support_page`` writes it; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.exporters.component import FAMILIES
from intaglio.exporters.dtypes import SHORT
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


def family_rows() -> list[str]:
    """Family x component x compute dtype: what runs in which dtype, and what ``--dtype`` may ask for."""
    rows = [
        "| family | pipelines | component | dtype | `--dtype` | float32 islands |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in FAMILIES:
        profile = load_family(name)
        first = f"| `{name}` | {', '.join(profile.pipelines)} "
        for component, contract in profile.contract.items():
            allowed = ", ".join(SHORT[d] for d in contract.allowed)
            islands = [*contract.float32_ops, *(f"`{pattern}`" for pattern in contract.float32_parameters)]
            rows.append(f"{first}| `{component}` | {SHORT[contract.dtype]} | {allowed} | {', '.join(islands) or '-'} |")
            first = "| | "
    return rows


def measured_rows(root: Path = ROOT) -> list[str]:
    """Family x task x backend x precision: the worst figures on file of one picture and of a batch of two."""
    file = root / FOLDER / "families.json"
    if not file.exists():
        return ["Not measured; run `make evidence families`."]
    rows = [
        "Against diffusers' own pipeline in float32 on tiny random checkpoints, one picture and two prompts at once:",
        "the worst relative L2 of final latents and of an un-clamped decode, the lowest PSNR. *Noise* is the PSNR left",
        "when every weight changes by 1e-6. TensorRT plans (denoiser, VAE decoder) are built ahead of time in the",
        "contract's dtype and not run.",
        "",
        "| family | case | task | backend | latents | decode | picture dB | noise dB | TensorRT |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in json.loads(file.read_text())["figures"].items():
        plans = "; ".join(text.split(",")[0] for text in case["tensorrt"].values())
        for backend in ("onnxruntime", "openvino"):
            both = case[backend].values()
            latents, decode = (max(f[name] for f in both) for name in ("latents", "decode"))
            picture = min((f"{f['psnr']:.1f}" for f in both if f["psnr"] is not None), default="identical", key=float)
            figures = f"{latents:.1e} | {decode:.1e} | {picture} | {case['disturbed_1e-6_psnr']}"
            rows.append(f"| `{case['family']}` | {name} | {case['task']} | {backend} | {figures} | {plans} |")
    return rows


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "", "## Families", "", *family_rows(), "", "## What was measured", "", *measured_rows()]
    lines += ["", "## Targets and backends", "", "| backend | built by | state |", "| --- | --- | --- |"]
    by = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "tensorrt"}
    for engine in ENGINES:
        target = f"`--target {by[engine]}`" if by.get(engine) in TARGETS else "-"
        lines.append(f"| `{engine}` | {target} | {verification(engine)} |")
    lines += ["", "## Formats", "", "| format | bits | operator | backend | how | faster than fp32 | why |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, op, runtime), row in SUPPORT.items():
        assert runtime in RUNTIMES
        faster = {True: "yes", False: "no: smaller, not faster", None: "not measured"}[row.faster]
        lines.append(f"| `{name}` | {FORMATS[name].bits} | {op} | {runtime} | {row.how} | {faster} | {row.reason} |")
    lines += ["", "## Schedulers", "", ", ".join(f"`{name}`" for name in SCHEDULERS), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
