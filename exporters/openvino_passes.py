"""What OpenVINO's ONNX reader does not know: ``intaglio::DequantizeNF4``, as an nf4 Constant with a scale per group.

The codes are those of the graph; only the order of the two in a byte is OpenVINO's, first one low. OpenVINO's nf4 has
the same 16 values (arxiv.org/abs/2305.14314, appendix E) and its CPU plugin multiplies with the packed constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from intaglio.quantize.nf4 import GROUP, dynamic_map
from intaglio.quantize.rewrite import DOMAIN, NF4_NODE

if TYPE_CHECKING:
    import openvino


@contextmanager
def waist_reader(scratch: Path) -> Iterator[openvino.Core]:
    """An OpenVINO core that reads every node of the waist.

    Repacked codes lie in an unnamed file in the folder `scratch`, not in memory: a model that was read is valid inside
    the block alone.
    """
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    with TemporaryFile(dir=scratch) as file:
        reader = Nf4Reader(file)
        core.add_extension(ConversionExtension(NF4_NODE, DOMAIN, reader))
        yield core


class Nf4Reader:
    """Turns one node after the other into ``Constant nf4 [N, K/g, g] -> Convert -> Multiply -> Reshape -> Transpose``.

    OpenVINO folds the Transpose into the MatMul. Blocks of 64 run over the flattened [N, K], so where 64 does not
    divide K they end inside a row; groups of g = gcd(K, 64) take the scale of the block they lie in: no value changes.
    The plugin decodes at load where g is 1 or 2.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.kept: list[np.ndarray] = []  # OpenVINO's tensors do not keep the memory alive that they share

    def __call__(self, context: Any) -> list[openvino.Output]:
        """The outputs that replace a node; `context` is OpenVINO's ``NodeContext``."""
        import openvino
        from openvino import opset13 as ops

        block, inputs, outputs = (int(context.get_attribute(name)) for name in ("block_size", "K", "N"))
        codes, *rest = (context.get_input(i).get_node().data for i in range(context.get_input_size()))
        group = gcd(inputs, block)
        count = outputs * inputs // group
        # shapes of OpenVINO tensors count elements; NumPy sees the bytes
        packed = self._repack(codes.reshape(-1))
        tensor = openvino.Tensor(packed, openvino.Shape([outputs, inputs // group, group]), openvino.Type.nf4)
        scale = np.repeat(absmax(rest), block // group)[:count].reshape(outputs, inputs // group, 1)
        weight = ops.multiply(ops.convert(openvino.op.Constant(tensor), "f32"), ops.constant(scale))
        rows = ops.reshape(weight, ops.constant(np.array([outputs, inputs])), special_zero=False)
        found: list[openvino.Output] = ops.transpose(rows, ops.constant(np.array([1, 0]))).outputs()
        return found

    def _repack(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [bytes] with the two codes of each byte exchanged, in the scratch file."""
        start = self.file.seek(0, 2)
        self.file.truncate(start + codes.size)
        packed = np.memmap(self.file, np.uint8, "r+", offset=start, shape=codes.shape)
        np.left_shift(codes, 4, out=packed)
        packed |= codes >> 4
        packed.flush()
        self.kept.append(packed)
        return packed


def absmax(tensors: list[np.ndarray]) -> np.ndarray:
    """float32 [blocks] from a node's inputs behind the codes: as it is, or its codes, their scales and their offset."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    codes, scale, offset = tensors
    value: np.ndarray = dynamic_map()[codes.reshape(-1)] * np.repeat(scale, GROUP)[: codes.size] + offset
    return value
