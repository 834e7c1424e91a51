"""What an artifact holds, and what each installed backend makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intaglio.profiles.artifact import BUILD_LOG, Artifact
from intaglio.profiles.registry import installed, resolve
from intaglio.profiles.strict import to_dict
from intaglio.quantize.decode import codes_digest

# Target to its backend and the function that says what that executes.
EXECUTION = {
    "onnx": ("onnxruntime", "intaglio.runtimes.engine_onnxruntime:execution"),
    "openvino": ("openvino", "intaglio.runtimes.engine_openvino:execution"),
}


def describe(folder: str | Path) -> dict[str, Any]:
    """Facts about a verified artifact: components with formats, sizes, operators and codes digests; ranges; engines."""
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    components = {}
    for name, record in manifest.components.items():
        facts: dict[str, Any] = {
            "format": record.format,
            "parameters": record.parameters,
            "bytes": artifact.size_bytes(name + "/"),
            "quantization": to_dict(record.quantization) if record.quantization else None,
            "targets": list(record.targets),
            "inputs": {s.name: [s.dtype, *s.shape] for s in record.inputs},
            "outputs": {s.name: [s.dtype, *s.shape] for s in record.outputs},
        }
        if record.quantization and installed("onnx_ir"):
            facts["codes_sha256"] = codes_digest(artifact, name)
            facts["execution"] = executions(artifact, name)
        components[name] = facts
    return {
        "name": manifest.name,
        "family": manifest.family,
        "licence": manifest.licence,
        "digest": manifest.digest,
        "bytes": artifact.size_bytes(),
        "components": components,
        "dtypes": manifest.dtypes,
        "shapes": to_dict(manifest.shapes),
        "settings": manifest.settings,
        "engines": manifest.engines,
    }


def executions(artifact: Artifact, component: str) -> dict[str, dict[str, int]]:
    """What each installed backend executes of a quantized component: operators with their precisions, counted.

    ONNX Runtime and OpenVINO are asked after they compiled the graph. A TensorRT plan cannot be looked into without
    its GPU: what its network kept was counted when it was built.
    """
    result = {}
    for target, (backend, path) in EXECUTION.items():
        if target in artifact.manifest.components[component].targets and all(installed(m) for m in (backend, "onnx")):
            result[backend] = resolve(path)(artifact, component)
    log = json.loads((artifact.folder / BUILD_LOG).read_text(encoding="utf-8"))
    for row in log["stages"]:
        if row["stage"] == f"{component}: tensorrt":
            plans = {f"{sm} codes found": facts["codes_found"] for sm, facts in row.items() if sm.startswith("sm")}
            result["tensorrt"] = {**{k: v for k, v in row["layers"].items() if "QUANTIZE" in k}, **plans}
    return result


def describe_text(facts: dict[str, Any]) -> str:
    """The facts in a few lines."""
    lines = [f"{facts['name']} ({facts['family']}), {facts['bytes'] / 1e6:.1f} MB, manifest {facts['digest'][:16]}"]
    for name, c in facts["components"].items():
        quantized = f", {c['quantization']['coverage']['weights']:.1%} of MatMul weights" if c["quantization"] else ""
        lines.append(
            f"  {name:<13} {c['format']:<5} {c['parameters'] / 1e6:7.2f} M parameters {c['bytes'] / 1e6:7.1f} MB  "
            f"{', '.join(c['targets'])}{quantized}"
        )
        for backend, counts in c.get("execution", {}).items():
            lines.append(f"    {backend:<11} " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    lines.insert(1, f"  licence       {facts['licence'] or 'the checkpoint says nothing'}")
    for target, dtypes in facts["dtypes"].items():
        computed = sorted(set(dtypes.values()))
        detail = computed[0] if len(computed) == 1 else ", ".join(f"{c} {d}" for c, d in dtypes.items())
        lines.append(f"  {target:<13} computes in {detail}")
    for axis, r in facts["shapes"].items():
        lines.append(f"  {axis:<13} {r['min']} to {r['max']}, {r['opt']} best, steps of {r['multiple']}")
    return "\n".join([*lines, *(f"  {name}" for name in facts["engines"])])
