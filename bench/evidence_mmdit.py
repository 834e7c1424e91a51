"""Formats on a random MMDiT of the shape of SD 3.5 Medium: speed, memory and component error on each backend.

Four joint blocks of width 1536 (330 M parameters), 1024 image tokens of a 512 pixel picture and 333 text tokens. Times
of all rows are taken in turn in one process, so that what else the machine does meets them alike; memory in a process
of its own for each row.
"""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from intaglio.bench.evidence import ROOT
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.runtimes.engine import Engine, load_engine
from intaglio.runtimes.fidelity import relative_l2

NAME = "transformer"
LAYERS, HEADS, TEXT_WIDTH, POOLED = 4, 24, 4096, {"text_encoder": 768, "text_encoder_2": 1280}
SIZES = {"batch": 1, "height": 512, "width": 512, "tokens": 333}
ROUNDS, CALLS = 7, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a format with its activation arithmetic, on a backend."""

    format: str
    backend: str
    activations: str = "exact"

    @property
    def key(self) -> str:
        """Folder of the artifact, the same for all backends."""
        return f"{self.format}-{self.activations}"


ROWS = (
    Row(format="none", backend="torch"),
    *(
        Row(format=name, backend=backend, activations=activations)
        for backend in ("onnxruntime", "openvino")
        for name, activations in (
            ("none", "exact"),
            ("int8", "exact"),
            ("int8", "dynamic-per-token"),
            ("w8a8", "static"),
            ("int4", "exact"),
            ("nf4", "exact"),
        )
    ),
)


def measure() -> dict[str, Any]:
    """Build the checkpoint and every format, then measure; figures by row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = build_source(folder)
        artifacts = derive_all(source, folder)
        feeds = example_feeds(source, seed=11)
        memory = {
            row: peak_of(artifacts[row.key], row, folder, feeds) for row in track(ROWS, "memory", console=shown())
        }
        seconds, errors = interleaved(artifacts, feeds)
        return {
            "model": {"parameters": source.manifest.components[NAME].parameters, "layers": LAYERS, "sizes": SIZES},
            "rounds": ROUNDS,
            "rows": [figures(row, artifacts, memory, seconds, errors) for row in ROWS],
        }


def shown() -> Console:
    """Where progress goes."""
    return Console(stderr=True)


def build_source(folder: Path) -> Artifact:
    """The unquantized artifact of the transformer alone, for both backends."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny: Any = importlib.import_module("tiny_sd3")
    partial: Any = importlib.import_module("partial")
    import diffusers
    import torch

    tiny.WIDTHS, tiny.T5_WIDTH = POOLED, TEXT_WIDTH
    checkpoint = tiny.stable_diffusion_3(folder / "checkpoint", layers=1, dual=())
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=LAYERS,
        attention_head_dim=64,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=64 * HEADS,
        pooled_projection_dim=sum(POOLED.values()),
        out_channels=16,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
    )
    tiny.enliven(transformer).save_pretrained(checkpoint / NAME)
    del transformer
    built: Artifact = partial.build_only(
        checkpoint, folder / "none-exact", NAME, targets=("openvino",), options={"certificate.prompts": "0"}
    )
    return built


def example_feeds(artifact: Artifact, seed: int) -> dict[str, np.ndarray]:
    """Normal latents and text states, one timestep."""
    from intaglio.exporters.parity import random_feeds

    return random_feeds(artifact.manifest.components[NAME].inputs, SIZES, seed)


def derive_all(source: Artifact, folder: Path) -> dict[str, Artifact]:
    """Every format of ROWS from the same feeds and the same weights."""
    from intaglio.exporters.derive import contract_of, derive
    from intaglio.exporters.quantization import calibrate_component
    from intaglio.quantize.feeds import Recorder
    from intaglio.runtimes.probe import Place

    recorder = Recorder(folder / "feeds.zip")
    for call in range(CALLS):
        recorder.add(NAME, Place(step=call), example_feeds(source, seed=100 + call))
    recorder.close()
    artifacts = {"none-exact": source}
    for row in track(ROWS, "formats", console=shown()):
        if row.key in artifacts:
            continue
        recipe, calibrated = ComponentRecipe(format=row.format, activations=row.activations), {}
        if row.activations == "static":
            contract = contract_of(source, NAME)
            calibrated[NAME] = calibrate_component(
                source, NAME, recipe, contract, folder / "feeds.zip", lambda text: None
            )
        artifacts[row.key] = derive(source, folder / row.key, {NAME: recipe}, calibrated, ("onnx", "openvino"))
    return artifacts


def interleaved(
    artifacts: dict[str, Artifact], feeds: dict[str, np.ndarray]
) -> tuple[dict[Row, list[float]], dict[Row, float]]:
    """Seconds a call of every row over the rounds, and the relative L2 of its output to torch's on the same feeds."""
    engines: dict[Row, Engine] = {row: load_engine(row.backend, artifacts[row.key], NAME) for row in ROWS}
    outputs = {row: engine.run(feeds)["out_hidden_states"] for row, engine in engines.items()}  # warms up, too
    truth = outputs[ROWS[0]]
    errors = {row: relative_l2(value, truth) for row, value in outputs.items()}
    seconds: dict[Row, list[float]] = {row: [] for row in ROWS}
    for _ in track(range(ROUNDS), "rounds", console=shown()):
        for row, engine in engines.items():
            start = time.perf_counter()
            engine.run(feeds)
            seconds[row].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    return seconds, errors


def peak_of(artifact: Artifact, row: Row, folder: Path, feeds: dict[str, np.ndarray]) -> int:
    """Peak resident bytes of a process that loads the row's graph and runs it once."""
    note, arrays = folder / "artifact.json", folder / "feeds.npz"
    note.write_bytes(artifact.manifest.to_bytes())
    np.savez(arrays, **feeds)  # type: ignore[arg-type]
    words = [str(artifact.folder), str(note), NAME, row.backend, str(arrays)]
    command = [sys.executable, "-m", "intaglio.bench.engine_peak", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def figures(
    row: Row,
    artifacts: dict[str, Artifact],
    memory: dict[Row, int],
    seconds: dict[Row, list[float]],
    errors: dict[Row, float],
) -> dict[str, Any]:
    """One row as plain data; ratios are medians over rounds of times of the same round."""
    plain = dataclasses.replace(row, format="none", activations="exact")

    def ratio(other: Row) -> float:
        return round(float(np.median(np.array(seconds[other]) / np.array(seconds[row]))), 3)

    artifact = artifacts[row.key]
    record = artifact.manifest.components[NAME].quantization
    files = {"openvino": ("openvino_model.bin",), "onnxruntime": ("model.onnx.data", "model.onnxruntime.onnx.data")}
    paths = [artifact.component(NAME) / name for name in files.get(row.backend, ("model.onnx.data",))]
    return {
        "backend": row.backend,
        "format": row.format,
        "activations": row.activations,
        "speed_of_torch": ratio(ROWS[0]),
        "speed_of_own_fp32": ratio(plain),
        "peak_bytes": memory[row],
        "peak_of_own_fp32": round(memory[row] / memory[plain], 3),
        "relative_l2": float(f"{errors[row]:.3e}"),
        "bytes": sum(p.stat().st_size for p in paths if p.exists()),
        "coverage_weights": record.coverage.weights if record else None,
        "coverage_macs": record.coverage.macs if record else None,
    }
