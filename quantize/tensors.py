"""Tensors of a graph that are read when they are needed and never kept: a graph may have more weights than memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from intaglio.quantize.arrays import contiguous


class WeightView(ir.LazyTensor):
    """A tensor whose values are made from what lies elsewhere, in the dtype and the order they have there.

    Args:
        view: the values with the tensor's shape, in any dtype and any order of axes in memory, such as a transposed
            view of a mapped file.
        dtype: what the tensor is in the graph.
        shape: of the tensor.
    """

    view: Callable[[], np.ndarray]

    def __init__(
        self, view: Callable[[], np.ndarray], *, dtype: ir.DataType, shape: Sequence[int], name: str | None = None
    ) -> None:
        def read() -> ir.Tensor:
            return ir.tensor(contiguous(view()).astype(dtype.numpy(), copy=False))

        super().__init__(read, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
        self.view = view


def values_of(tensor: Any) -> np.ndarray:
    """A tensor's values, read anew: float32 or what they are stored as, in any order in memory.

    An external tensor keeps what it was asked for, nibbles unpacked, and a descriptor of its file; a fresh one is asked
    and forgotten.
    """
    if isinstance(tensor, WeightView):
        return tensor.view()
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
    return np.asarray(tensor.numpy())
