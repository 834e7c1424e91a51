"""``python -m intaglio.bench.engine_peak ARTIFACT MANIFEST COMPONENT BACKEND FEEDS``: peak memory of load and one call.

A process that imports the engine and nothing else, so that the peak is the backend's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.manifest import Manifest
from intaglio.profiles.strict import from_dict
from intaglio.runtimes.engine import load_engine
from intaglio.runtimes.host_memory import peak_bytes, reset_peak


def main(folder: str, note: str, component: str, backend: str, feeds: str) -> None:
    """Load a component, run it on the arrays of an ``.npz``, print the peak in bytes."""
    manifest = from_dict(Manifest, json.loads(Path(note).read_text(encoding="utf-8")), note)
    with np.load(feeds, allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays}
    reset_peak()
    load_engine(backend, Artifact(folder=Path(folder), manifest=manifest), component).run(values)
    print(peak_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:6])
