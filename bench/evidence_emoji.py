"""The embedded checkpoint draws what its prompt names: 200 names in each language, 20 steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from intaglio.bench.retrieval import LANGUAGES, ranks, share_within
from intaglio.exporters.build import build
from intaglio.exporters.checkpoint import embedded_folder
from intaglio.exporters.emoji_data import read_training_set
from intaglio.runtimes.pipeline import load

NAMES, STEPS = 200, 20


def measure() -> dict[str, Any]:
    """Shares of names whose right emoji is the nearest, and within the five nearest, per language."""
    data = read_training_set(embedded_folder("emoji"))
    figures: dict[str, Any] = {"training_images": len(data.names), "names": NAMES, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = load(build("emoji", Path(folder) / "emoji", targets=("openvino",)), backend="openvino")
        for language in LANGUAGES:
            indices = data.spread(NAMES)
            run = ranks(pipeline, data, indices, language, steps=STEPS)
            found = [rank for _, rank, _ in track(run, language, total=NAMES, console=Console(stderr=True))]
            misses = [data.names[i][language] for i, r in zip(indices, found, strict=True) if r >= 5]
            figures[language] = {
                "top1": share_within(found, 1),
                "top5": share_within(found),
                "median_rank": float(np.median(found)),
                "misses": misses,
            }
    return figures
