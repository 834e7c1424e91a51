"""The verb ``plan``: what a build would do, take and warn of, with nothing built and no weight read."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from intaglio.exporters.cli import configure_inputs, inputs_of
from intaglio.profiles.command import Verb, say
from intaglio.profiles.registry import need
from intaglio.runtimes.host_memory import available_bytes

MB = 1e6


def configure_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio plan``: those of ``build`` that decide what is built."""
    configure_inputs(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run_plan(args: argparse.Namespace) -> int:
    """Plan and print.

    Raises:
        ToolError: what `build` would refuse.
    """
    for module in ("torch", "diffusers", "transformers"):
        need(module, extra="export")
    from intaglio.exporters.plan import make_plan

    plan = make_plan(args.checkpoint, **inputs_of(args))
    facts = described(plan)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for remark in facts["remarks"]:
        say(f"note: {remark}")
    print(text_of(facts))
    return 0


def described(plan: Any) -> dict[str, Any]:
    """The plan as plain data; bytes are of private memory, `stored_bytes` those of the checkpoint's weights."""
    from intaglio.exporters.estimates import estimates
    from intaglio.exporters.memory import component_bytes, stage_bytes, weights_of

    stages = stage_bytes(plan)
    memory = plan.memory or available_bytes()
    components = {}
    for component in plan.components:
        recipe, name = plan.recipe[component.name], component.name
        own = {stage.partition(": ")[2]: size for stage, size in stages.items() if stage.partition(": ")[0] == name}
        formats = {
            key: {
                "artifact_bytes": row.stored,
                "build_bytes": max(component_bytes(plan, component, replace(recipe, format=key, layers={})).values()),
                "run_bytes": row.run,
                "fits": row.fits(memory) if memory else [],
            }
            for key, row in estimates(plan, component).items()
        }
        components[name] = {
            "parameters": sum(weights_of(plan, component)),
            "format": recipe.format,
            "activations": recipe.activations,
            "dtypes": {target: plan.dtypes[target][name] for target in plan.targets},
            "stage_bytes": own,
            "formats": formats,
        }
    return {
        "checkpoint": plan.checkpoint.name,
        "family": plan.profile.name,
        "targets": list(plan.targets),
        "components": components,
        "memory_bytes": memory,
        "peak_bytes": max(stages.values()),
        "calibration": plan.calibration.to_json() if plan.calibration else None,
        "certificate": plan.certificate.prompts if plan.certificate else 0,
        "remarks": list(plan.remarks),
    }


def text_of(facts: dict[str, Any]) -> str:
    """A table for people: what each component takes in each format, the plan's own marked."""
    memory = facts["memory_bytes"]
    lines = [f"{facts['checkpoint']}: {facts['family']}, targets {', '.join(facts['targets'])}"]
    fits = f"fits {memory / MB:.0f} MB" if memory else "fits"
    for name, row in facts["components"].items():
        dtypes = ", ".join(f"{target} {dtype}" for target, dtype in row["dtypes"].items())
        stage = max(row["stage_bytes"], key=lambda key: row["stage_bytes"][key])
        lines.append(
            f"  {name:<15} {row['parameters'] / 1e6:>9.1f} M parameters  {row['format']:<8} {dtypes}; "
            f"about {row['stage_bytes'][stage] / MB:.0f} MB to {stage}"
        )
        lines.append(
            f"    {'format':<16} {'MB on disk':>10} {'to build':>9} {'onnxruntime':>12} {'openvino':>9}  {fits}"
        )
        for key, cells in row["formats"].items():
            mark = "*" if key == row["format"] else " "
            run = cells["run_bytes"]
            lines.append(
                f"  {mark} {key:<16} {cells['artifact_bytes'] / MB:>10.1f} {cells['build_bytes'] / MB:>9.0f} "
                f"{run['onnxruntime'] / MB:>12.0f} {run['openvino'] / MB:>9.0f}  {', '.join(cells['fits']) or '-'}"
            )
    prompts = facts["certificate"]
    calibrated = f"{facts['calibration']['prompts']} prompts" if facts["calibration"] else "none"
    lines.append(f"calibration: {calibrated}; certificate: {f'{prompts} prompts' if prompts else 'none'}")
    lines.append(f"private memory of the build: about {facts['peak_bytes'] / MB:.0f} MB at most")
    lines.append("memory at run is of one component, private and mapped; each target beside onnx is as large on disk")
    return "\n".join(lines)


PLAN = Verb(configure_plan, run_plan)
