"""``python -m intaglio.bench.plain_onnxruntime JSON``: a graph timed with onnxruntime and NumPy, and nothing of ours.

The other side of `intaglio.bench.evidence_crosscheck`, in a process that imports no engine, loop or worker. JSON holds
``graph`` and ``feeds`` (an ``.npz``), ``options`` (attributes of SessionOptions), ``entries`` (of its configuration),
``provider``, ``warmup`` and ``calls``. It prints one JSON line: ``seconds`` of every call, ``digest`` of the outputs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import numpy as np


def main(text: str) -> None:
    """Load, warm up, time every ``session.run`` alone."""
    import onnxruntime

    asked: dict[str, Any] = json.loads(text)
    settings = onnxruntime.SessionOptions()
    for name, value in asked["options"].items():
        setattr(settings, name, value)
    for key, value in asked["entries"].items():
        settings.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(asked["graph"], settings, providers=[asked["provider"]])
    with np.load(asked["feeds"], allow_pickle=False) as arrays:
        feeds = {name: arrays[name] for name in arrays}
    for _ in range(asked["warmup"]):
        session.run(None, feeds)
    seconds, made = [], []
    for _ in range(asked["calls"]):
        start = time.perf_counter()
        made = session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in made)).hexdigest()
    print(json.dumps({"seconds": seconds, "digest": digest}))


if __name__ == "__main__":
    main(sys.argv[1])
