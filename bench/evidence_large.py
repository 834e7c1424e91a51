"""A transformer too large for memory, built under a limit: peak of private memory, seconds and bytes of each stage.

The checkpoint is FLUX.1-dev's transformer in bfloat16 shards with random weights (`shards`), whole (11.9 billion
parameters) or with fewer blocks; its other components are tiny. The build runs in a process of its own, which samples
what it and its children hold (`intaglio.runtimes.private_memory`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from intaglio.bench.evidence import ROOT

SHARD = 4 << 30  # bytes of a file
POOL = 1 << 24  # normal numbers that all weights are cut from
DEVIATION = 0.02
CHILD = "from intaglio.bench.evidence_large import child; child()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many blocks of FLUX.1-dev's 19 and 38, and what the build may hold.

    Attributes:
        double, single: number of blocks.
        format: of ``--quant``.
        limit: of ``--max-memory``.
        folder: where the checkpoint and the artifact are written.
    """

    double: int = 19
    single: int = 38
    format: str = "int4"
    limit: str = "2GiB"
    folder: Path | None = None


WHOLE = Scale()
ONE_BILLION = Scale(double=1, single=5)


def measure(scale: Scale = WHOLE) -> dict[str, Any]:
    """Figures of one build.

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    with tempfile.TemporaryDirectory(dir=scale.folder) as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "checkpoint", scale)
        source = sum(p.stat().st_size for p in (checkpoint / "transformer").glob("*.safetensors"))
        words = [str(checkpoint), str(folder / "artifact"), scale.format, scale.limit]
        done = subprocess.run([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True, check=True)
        log = json.loads(done.stdout.splitlines()[-1])
        (record,) = log.pop("components").values()
        return {
            "scale": {k: v for k, v in dataclasses.asdict(scale).items() if k != "folder"},
            "source_bytes": source,
            **record,
            **figures(log, source),
        }


def figures(log: dict[str, Any], source: int) -> dict[str, Any]:
    """Peaks, and what each stage took."""
    stages = {row["stage"].rpartition(": ")[2]: row for row in log["stages"]}
    capture = stages["capture"]
    write = capture["write_seconds"]
    return {
        "seconds": log["seconds"],
        "private_peak_bytes": max(row["private_peak_bytes"] for row in log["stages"]),
        "file_peak_bytes": max(row["file_peak_bytes"] for row in log["stages"]),
        "capture_seconds": round(capture["seconds"] - write, 1),
        "write_seconds": write,
        "write_bytes_per_second": round(source / write),
        "parity_relative_l2": log["parity_relative_l2"],
        "stages": log["stages"],
    }


def write_checkpoint(folder: Path, scale: Scale) -> Path:
    """A FluxPipeline folder with tiny encoders and VAE, and a transformer of FLUX.1-dev's widths."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny: Any = importlib.import_module("tiny_flux")
    tiny.LATENT_CHANNELS = 16
    tiny.flux(folder)
    place = folder / "transformer"
    config = json.loads((place / "config.json").read_text())
    config |= {
        "num_layers": scale.double,
        "num_single_layers": scale.single,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    }
    for path in place.iterdir():
        path.unlink()
    (place / "config.json").write_text(json.dumps(config))
    shards(place, config)
    return folder


def shards(place: Path, config: dict[str, Any]) -> None:
    """Random weights in bfloat16, in several files as diffusers stores them, written as they are drawn."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        shapes = {n: tuple(p.shape) for n, p in FluxTransformer2DModel.from_config(config).named_parameters()}
    rng = np.random.default_rng(0)
    pool = (DEVIATION * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16)
    groups: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if sum(2 * math.prod(shapes[n]) for n in groups[-1]) + 2 * math.prod(shape) > SHARD:
            groups.append([])
        groups[-1].append(name)
    files: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = place / f"diffusion_pytorch_model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(file, {name: shapes[name] for name in names}, pool, rng)
        files.update(dict.fromkeys(names, file.name))
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(file: Path, shapes: Mapping[str, tuple[int, ...]], pool: np.ndarray, rng: np.random.Generator) -> None:
    """One safetensors file: the header's length, the header, and each tensor cut from `pool` at a random place."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            left, place = math.prod(shape), int(rng.integers(POOL))
            if "norm_" in name and len(shape) == 1:  # a norm's scale
                opened.write((1 + pool[:left].astype(np.float32)).astype(pool.dtype).tobytes())
                continue
            while left:
                part = pool[place : place + left]
                opened.write(part.tobytes())
                left, place = left - part.size, 0


def child() -> None:
    """The building process: checkpoint, artifact, format and limit; prints the build log as one line of JSON."""
    checkpoint, artifact, name, limit = sys.argv[1:]
    sys.path.insert(0, str(ROOT / "tests"))
    partial: Any = importlib.import_module("partial")
    built = partial.build_only(
        Path(checkpoint), Path(artifact), "transformer", quant={"transformer": name}, max_memory=limit
    )
    log = json.loads((built.folder / "build.json").read_text())
    record = built.manifest.components["transformer"]
    data = (built.component("transformer") / "model.onnx.data").stat().st_size
    log["components"] = {"transformer": {"parameters": record.parameters, "artifact_bytes": data}}
    print(json.dumps(log))
