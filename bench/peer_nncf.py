"""Compress chosen layers of an OpenVINO IR by NNCF: ``PYTHON peer_nncf.py PLAN``, with a peer's own interpreter.

PLAN is a JSON file: ``model`` and ``output`` (paths of ``.xml``), ``layers`` (the names of all operations with a
weight), ``passes``: each a ``mode`` of ``nncf.CompressWeightsMode``, a ``group_size`` or null, and its ``names``.
This file imports nothing of ours, so that it runs where only NNCF and OpenVINO are installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def compress(plan: dict[str, Any]) -> None:
    """Do the passes one after the other; each leaves the other layers alone."""
    import nncf
    import openvino

    model = openvino.Core().read_model(plan["model"])
    for step in plan["passes"]:
        if not step["names"]:
            continue
        others = sorted(set(plan["layers"]) - set(step["names"]))
        chosen = {"group_size": step["group_size"], "ratio": 1.0, "all_layers": True} if step["group_size"] else {}
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode(step["mode"]),
            ignored_scope=nncf.IgnoredScope(names=others, validate=False),
            **chosen,
        )
    openvino.save_model(model, plan["output"], compress_to_fp16=False)


def main() -> int:
    """The command line."""
    compress(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
