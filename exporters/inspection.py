"""What an artifact holds, and what each installed backend makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.registry import installed
from intaglio.profiles.strict import to_dict
from intaglio.quantize.decode import codes_digest


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


def describe_text(facts: dict[str, Any]) -> str:
    """The facts in a few lines."""
    lines = [f"{facts['name']} ({facts['family']}), {facts['bytes'] / 1e6:.1f} MB, manifest {facts['digest'][:16]}"]
    for name, c in facts["components"].items():
        quantized = f", {c['quantization']['coverage']['weights']:.1%} of MatMul weights" if c["quantization"] else ""
        lines.append(
            f"  {name:<13} {c['format']:<5} {c['parameters'] / 1e6:7.2f} M parameters {c['bytes'] / 1e6:7.1f} MB  "
            f"{', '.join(c['targets'])}{quantized}"
        )
    lines.insert(1, f"  licence       {facts['licence'] or 'the checkpoint says nothing'}")
    for target, dtypes in facts["dtypes"].items():
        computed = sorted(set(dtypes.values()))
        detail = computed[0] if len(computed) == 1 else ", ".join(f"{c} {d}" for c, d in dtypes.items())
        lines.append(f"  {target:<13} computes in {detail}")
    for axis, r in facts["shapes"].items():
        lines.append(f"  {axis:<13} {r['min']} to {r['max']}, {r['opt']} best, steps of {r['multiple']}")
    return "\n".join([*lines, *(f"  {name}" for name in facts["engines"])])
