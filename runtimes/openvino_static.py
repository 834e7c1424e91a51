"""Static int8 in OpenVINO on processors whose integer products saturate: float32 on the same rounded inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

# OpenVINO 2026.4 does not document it. Without VNNI its integer products are 1.5 to 9 % off and no faster than fp32
# (0.95 of its speed in a transformer of 330 M parameters); without this step rounding and product stay in float32.
INTEGER_PRODUCTS = "LP_TRANSFORMS_MODE"
SMOOTHED, RANGES = 0, (1, 2, 3, 4)  # inputs of FakeQuantize: the value; low and high of the input, then of the output


def keep_float(model: Any, settings: dict[str, Any]) -> None:
    """Change an ``openvino.Model`` and the settings it is compiled with, in place.

    A factor for each channel before FakeQuantize goes into its input range. OpenVINO 2026.4 does the same while it
    compiles, and its AVX2 kernel then takes the first channel's range for all where height and width are not known:
    85 % of the codes are wrong. Linear inputs [batch, tokens, channels] are not concerned.
    """
    from openvino import opset13

    settings[INTEGER_PRODUCTS] = False
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.get_output_partial_shape(0).rank.get_length() != 4:
            continue
        multiply = node.input_value(SMOOTHED).get_node()
        sides = [_stored(multiply, i) for i in (0, 1)] if multiply.get_type_name() == "Multiply" else [None, None]
        factor = next((side for side in sides if side is not None), None)
        bounds = [bound for bound in (_stored(node, i) for i in RANGES) if bound is not None]
        if factor is None or len(bounds) != len(RANGES):
            continue
        value = multiply.input_value(1 if sides[0] is not None else 0)
        low, high = (bound / factor for bound in bounds[:2])
        out = (np.broadcast_to(bound, factor.shape).copy() for bound in bounds[2:])
        made = opset13.fake_quantize(value, low, high, *out, levels=node.get_attributes()["levels"])
        made.set_friendly_name(node.get_friendly_name())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
    model.validate_nodes_and_infer_types()


def _stored(node: Any, index: int) -> np.ndarray | None:
    """The float32 values of an input that is a constant, or one converted from half precision; else None."""
    source = node.input_value(index).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    return np.array(source.data, np.float32) if source.get_type_name() == "Constant" else None
