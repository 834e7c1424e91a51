"""A transformer too large for memory, built under a limit: peak of private memory, seconds and bytes of each stage.

The checkpoint has the widths of FLUX.1-dev's transformer (11.9 billion parameters) or of Qwen-Image's (20 billion) and
random weights in bfloat16 shards, with all of their blocks or fewer; its other components are tiny. The build runs in a
process of its own, which samples what it and its children hold (`intaglio.runtimes.private_memory`).

``make evidence large`` and ``make evidence larger`` measure both whole; ``python -m intaglio.bench.evidence_large MODEL
--share 0.1`` measures at any scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
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
from intaglio.exporters.build_cache import VARIABLE

SHARD = 4 << 30  # bytes of a file
POOL = 1 << 24  # normal numbers that all weights are cut from
DEVIATION = 0.02
CHILD = "from intaglio.bench.evidence_large import child; child()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A published transformer.

    Attributes:
        tiny: module of ``tests/`` and the function there that writes the rest of the checkpoint.
        kind: the library's class.
        widths: the published ``config.json`` without the numbers of blocks.
        blocks: those, of the published model.
        latent_channels: of its VAE, which the tiny one is given.
    """

    tiny: tuple[str, str]
    kind: str
    widths: dict[str, Any]
    blocks: dict[str, int]
    latent_channels: int | None = None


MODELS = {
    # huggingface.co/black-forest-labs/FLUX.1-dev, transformer/config.json
    "flux": Model(
        tiny=("tiny_flux", "flux"),
        kind="FluxTransformer2DModel",
        widths={
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        },
        blocks={"num_layers": 19, "num_single_layers": 38},
        latent_channels=16,
    ),
    # huggingface.co/Qwen/Qwen-Image, transformer/config.json; but for the text's width (3584), which is the tiny
    # encoder's: 11 of 20,430 million parameters fewer
    "qwen_image": Model(
        tiny=("tiny_qwen_image", "qwen_image"),
        kind="QwenImageTransformer2DModel",
        widths={
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "axes_dims_rope": [16, 56, 56],
        },
        blocks={"num_layers": 60},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is built, and what the build may hold.

    Attributes:
        model: of MODELS.
        blocks: numbers of blocks, where they are not the published ones.
        format: of ``--quant``.
        limit: of ``--max-memory``.
        targets: beside ONNX.
        folder: where the checkpoint and the artifact are written.
    """

    model: str = "flux"
    blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    format: str = "int4"
    limit: str = "2GiB"
    targets: tuple[str, ...] = ()
    folder: Path | None = None


ONE_BILLION = Scale(blocks={"num_layers": 1, "num_single_layers": 5})


def measure() -> dict[str, Any]:
    """FLUX.1-dev's transformer in int4 for ONNX Runtime and OpenVINO, in 2 GiB."""
    return measured(Scale(targets=("openvino",)))


def measure_larger() -> dict[str, Any]:
    """Qwen-Image's transformer in int4 for ONNX Runtime, in 2 GiB."""
    return measured(Scale(model="qwen_image"))


def measured(scale: Scale) -> dict[str, Any]:
    """Figures of one build.

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    with tempfile.TemporaryDirectory(dir=scale.folder) as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "checkpoint", scale)
        source = sum(p.stat().st_size for p in (checkpoint / "transformer").glob("*.safetensors"))
        words = [str(checkpoint), str(folder / "artifact"), scale.format, scale.limit, *scale.targets]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {VARIABLE: "0"},
        )
        log = json.loads(done.stdout.splitlines()[-1])
        (record,) = log.pop("components").values()
        asked = {"model": scale.model, "blocks": blocks_of(scale), "format": scale.format, "limit": scale.limit}
        return {"asked": asked, "source_bytes": source, **record, **figures(log, source)}


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
        "remarks": log["remarks"],
        "stages": [{k: v for k, v in row.items() if k not in ("operators", "constants")} for row in log["stages"]],
    }


def blocks_of(scale: Scale) -> dict[str, int]:
    """Numbers of blocks."""
    return {**MODELS[scale.model].blocks, **scale.blocks}


def write_checkpoint(folder: Path, scale: Scale) -> Path:
    """A pipeline folder with tiny encoders and VAE, and a transformer of the published widths."""
    model = MODELS[scale.model]
    sys.path.insert(0, str(ROOT / "tests"))
    tiny: Any = importlib.import_module(model.tiny[0])
    if model.latent_channels is not None:
        tiny.LATENT_CHANNELS = model.latent_channels
    getattr(tiny, model.tiny[1])(folder)
    place = folder / "transformer"
    config = json.loads((place / "config.json").read_text()) | model.widths | blocks_of(scale)
    for path in place.iterdir():
        path.unlink()
    (place / "config.json").write_text(json.dumps(config))
    shards(place, model.kind, config)
    return folder


def shards(place: Path, kind: str, config: dict[str, Any]) -> None:
    """Random weights in bfloat16, in several files as diffusers stores them, written as they are drawn."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        made = getattr(diffusers, kind).from_config(config)
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
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
    """The building process: checkpoint, artifact, format, limit and targets; prints the build log as a line of JSON."""
    checkpoint, artifact, name, limit, *targets = sys.argv[1:]
    sys.path.insert(0, str(ROOT / "tests"))
    partial: Any = importlib.import_module("partial")
    recipe = {"transformer": name}
    built = partial.build_only(
        Path(checkpoint), Path(artifact), "transformer", quant=recipe, max_memory=limit, targets=tuple(targets)
    )
    log = json.loads((built.folder / "build.json").read_text())
    record = built.manifest.components["transformer"]
    sizes = {p.name: p.stat().st_size for p in sorted(built.component("transformer").iterdir())}
    log["components"] = {"transformer": {"parameters": record.parameters, "file_bytes": sizes}}
    print(json.dumps(log))


def main() -> None:
    """Measure at a chosen scale and print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="intaglio.bench.evidence_large", description=__doc__)
    parser.add_argument("model", choices=tuple(MODELS))
    parser.add_argument("--share", type=float, default=1.0, help="of the published model's blocks, at least one each")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--limit", default="2GiB", help="of --max-memory")
    parser.add_argument("--target", action="append", default=[], help="beside onnx")
    parser.add_argument("--folder", type=Path, help="with room for the checkpoint and the artifact")
    args = parser.parse_args()
    blocks = {name: max(1, round(args.share * count)) for name, count in MODELS[args.model].blocks.items()}
    targets = tuple(args.target)
    scale = Scale(
        model=args.model, blocks=blocks, format=args.format, limit=args.limit, targets=targets, folder=args.folder
    )
    print(json.dumps(measured(scale), indent=1))


if __name__ == "__main__":
    main()
