"""Names in an OpenVINO IR that depend on the graph alone.

OpenVINO names what an ONNX node became besides its own output ``Constant_10225``, and counts through the life of the
process: the same graph, read second, would have other names, and an artifact another digest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino


def number_names(model: openvino.Model) -> None:
    """Name in place, in topological order from 0, every operation that has no name of its own."""
    unnamed, taken = [], set()
    for op in model.get_ordered_ops():
        if op.get_friendly_name() == op.get_name():
            unnamed.append(op)
        else:
            taken.add(op.get_friendly_name())
    number = 0
    for op in unnamed:
        while (name := f"{op.get_type_name()}_{number}") in taken:
            number += 1
        op.set_friendly_name(name)
        number += 1
