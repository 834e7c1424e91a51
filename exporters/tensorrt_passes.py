"""What a waist needs before TensorRT sees it: NF4 decoded, and what would crash it or come out wrong refused.

Found with TensorRT-RTX 1.7.1: int4 codes that two products read, directly or through one DequantizeLinear, end the
process; blocks that do not divide K are taken for shorter ones without a word where their number divides K; int4 is
refused below sm80 and fp8 below sm89, only once the network is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from intaglio.profiles.errors import Unsupported
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.layers import PARAMETER
from intaglio.quantize.rewrite import DOMAIN, NF4_NODE, register, replace_uses
from intaglio.quantize.tensors import values_of

# ONNX dtype of codes -> (what users call it, the least compute capability); int8 has no entry: all take it
LEAST_SM = {"INT4": ("int4", 80), "FLOAT8E4M3FN": ("fp8", 89)}


def check_gpus(storages: Iterable[str], sms: Iterable[str], what: str) -> None:
    """Refuse codes that a compute capability has no instructions for, before anything is built.

    Args:
        storages: ONNX dtypes of codes and static activations, as in `FORMATS`.
        sms: compute capabilities, ``sm89``.
        what: whose they are, for the message.

    Raises:
        Unsupported: with the format, the compute capability and the least that is allowed.
    """
    for storage in sorted(set(storages) & set(LEAST_SM)):
        name, least = LEAST_SM[storage]
        for sm in sms:
            if int(sm[2:]) < least:
                raise Unsupported(
                    f"{what}: {name} does not run on {sm}; it needs sm{least} or newer (--set tensorrt.sm=sm{least}), "
                    "or take int8"
                )


def check_formats(formats: Iterable[str], sms: Iterable[str]) -> None:
    """`check_gpus` by the names of formats, for before a build; see `FORMATS`.

    Raises:
        Unsupported: as there.
    """
    for name in formats:
        check_gpus((FORMATS[name].storage, FORMATS[name].activations), sms, f"format {name}")


def check_graph(component: str, model: ir.Model, sms: Iterable[str]) -> None:
    """Refuse what TensorRT would refuse late, crash on or compute wrongly.

    Raises:
        Unsupported: codes a compute capability has no instructions for, int4 codes with two readers, blocks that do
            not divide K.
    """
    check_gpus((v.dtype.name for v in model.graph.initializers.values()), sms, component)  # codes and zero points
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or not codes.is_initializer():
            continue
        name = codes.metadata_props.get(PARAMETER, codes.name)
        if codes.dtype == ir.DataType.INT4 and max(len(codes.uses()), len(node.outputs[0].uses())) > 1:
            raise Unsupported(f"{component}: {name} is int4 and read twice, which crashes TensorRT; store it twice")
        block = node.attributes.get("block_size")
        size = block.as_int() if block is not None else 0
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        if size and int(codes.shape[axis]) % size:
            raise Unsupported(
                f"{component}: {name} {tuple(codes.shape)} has blocks of {size} along axis {axis}, which do not divide "
                "it; TensorRT would take them for shorter ones: use a smaller block or int8"
            )


def decode_nf4(model: ir.Model) -> int:
    """Put float32 weights in the place of DequantizeNF4 nodes; returns their number.

    Values stay lazy: a weight is decoded when the graph is written. Parameter names go along.

    Raises:
        Unsupported: a block size the codec does not have.
    """
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type == NF4_NODE]
    for node in nodes:
        parts = [v.const_value for v in node.inputs]
        pair: Any = codec("nf4-double" if len(parts) > 2 else "nf4")
        shape = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
        block = node.attributes["block_size"].as_int()
        if block != pair.block:
            raise Unsupported(f"{node.inputs[0].name} has NF4 blocks of {block}; blocks of {pair.block} can be decoded")
        roles = list(pair.layout(shape, 1))

        def read(
            pair: Any = pair, roles: list[str] = roles, parts: list[Any] = parts, shape: tuple[int, int] = shape
        ) -> ir.Tensor:
            tensors = {role: values_of(part) for role, part in zip(roles, parts, strict=True)}
            return ir.tensor(pair.decode(tensors, shape, 1))

        name = f"{node.inputs[0].name}.decoded"
        tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), cache=False, name=name)
        value = register(model, name, tensor)
        if PARAMETER in node.inputs[0].metadata_props:
            value.metadata_props[PARAMETER] = node.inputs[0].metadata_props[PARAMETER]
        replace_uses(model, node.outputs[0], value)
        sources = list(node.inputs)
        model.graph.remove(node, safe=True)
        for source in sources:
            if not source.uses():
                del model.graph.initializers[source.name]
    if nodes:
        del model.graph.opset_imports[DOMAIN]
    return len(nodes)
