"""What a TensorRT network and plan are held against: the manifest's tensor facts, the graph's quantizers and codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.errors import ParityError
from intaglio.profiles.spec import TensorSpec

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
# The plan holds the weights as they are, so a much smaller one has lost some; a few constants may be folded.
LEAST_SHARE = 0.9
# Besides weights the plan holds kernels. Measured on RTX 1.7.1 per layer and profile: 7 to 11 kB in half precision (a
# tiny SD checkpoint), 33 kB in float32 (the embedded VAE encoder in int8: 30.1 MB, of which 1.7 MB are weights).
KERNEL_BYTES = {"float16": 16 << 10, "bfloat16": 16 << 10, "float32": 40 << 10}
SLACK_BYTES = 8 << 20
COMPUTE = {"float16": 2, "bfloat16": 2, "float32": 4}  # dtype -> bytes
PROBES = 8  # quantized weights whose first row of codes is looked for in the plan
PROBE_BYTES = (256, 4096)  # of it: shorter rows are taken together, longer ones cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The graph TensorRT is given.

    Attributes:
        path: the graph, in a scratch folder when it was cast.
        dtype: compute dtype.
        packed: bytes of its initializers, the least a faithful plan needs.
        unpacked: bytes if codes took the compute dtype's; as many as `packed` where there are none.
        copies: bytes of weights TensorRT lays out a second time where it has profiles of one batch, see `sizes`.
        quantizers: DequantizeLinear and QuantizeLinear nodes, by type.
        probes: the first codes of the largest quantized weights, each in the layouts a plan may have.
        facts: what the cast did.
    """

    path: Path
    dtype: str
    packed: int
    unpacked: int
    copies: int
    quantizers: Mapping[str, int]
    probes: tuple[tuple[bytes, ...], ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A parsed network as plain data: ports as (name, dtype, shape with -1 where dynamic), layers by type."""

    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    layers: Mapping[str, int]


def sizes(model: Any, dtype: str) -> dict[str, int]:
    """`packed`, `unpacked` and `copies` of `Prepared`, of a graph whose shapes are known.

    A weight that is multiplied with [batch, K] is kept in a second layout for the profiles of one batch, measured with
    TensorRT-RTX 1.7.1: 2.0 times the weights unquantized, 2.2 times w8a8 and fp8 with static activations; not int8,
    int4 or fp8 weight-only, and not [batch, tokens, K].
    """
    weights = [value.const_value for value in model.graph.initializers.values()]
    codes = [t for n in model.graph if (t := weight_codes(n)) is not None]
    packed = sum(int(t.nbytes) for t in weights)
    unpacked = packed + sum(int(t.size) * COMPUTE[dtype] - int(t.nbytes) for t in codes)
    copies = 0
    for node in model.graph:
        left, right = node.inputs[:2] if node.op_type == "MatMul" else (None, None)
        if left is None or right is None or left.shape is None or len(left.shape) != 2:
            continue
        behind, static = right.producer(), left.producer() is not None and left.producer().op_type == "DequantizeLinear"
        tensor = right.const_value if behind is None else weight_codes(behind) if static else None
        copies += int(tensor.nbytes) if tensor is not None else 0
    return {"packed": packed, "unpacked": unpacked, "copies": copies}


def weight_codes(node: Any) -> Any:
    """The codes a DequantizeLinear reads; None of another node, and where it reads a quantized activation."""
    return node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None


def probes(model: Any) -> tuple[tuple[bytes, ...], ...]:
    """The first row of codes of the largest quantized weights: as they are, transposed, channels last.

    TensorRT-RTX 1.7.1 keeps int8 and fp8 as they are and int4 transposed, [N, K], two to a byte. It joins products of
    one input to one [K, sum of N], so that more than a row need not lie together.
    """
    codes = [t for n in model.graph if (t := weight_codes(n)) is not None and t.nbytes >= max(PROBE_BYTES)]
    result = []
    for tensor in sorted(codes, key=lambda t: -int(t.nbytes))[:PROBES]:
        array, per_byte = tensor.numpy(), 8 // int(tensor.dtype.bitwidth)
        layouts = (array, array.T, np.moveaxis(array, 1, -1))
        result.append(tuple(first_codes(layout, per_byte) for layout in layouts))
    return tuple(result)


def first_codes(array: np.ndarray, per_byte: int) -> bytes:
    """The first row of codes; of two to a byte the first lies in the low nibble (ONNX)."""
    row, (least, most) = array.size // len(array), PROBE_BYTES
    count = min(max(row, least * per_byte), most * per_byte)
    flat = np.ascontiguousarray(array[: -(-count // row)]).reshape(-1)[: count // 2 * 2]
    if per_byte == 1:
        return flat.tobytes()
    nibbles = flat.astype(np.int8).view(np.uint8) & 15
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


def codes_found(path: Path, wanted: Sequence[Sequence[bytes]]) -> int:
    """How many of the probes lie in the plan byte for byte.

    All of them did with TensorRT-RTX 1.7.1, whose kernels are made at run time; ``tensorrt`` may store weights in the
    order of its kernels, so this is recorded as evidence and refused nothing for.
    """
    import mmap

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return sum(any(plan.find(layout) >= 0 for layout in layouts) for layouts in wanted)


def network_facts(network: Any) -> Network:
    """A parsed network as plain data."""

    def port(tensor: Any) -> tuple[str, str, tuple[int, ...]]:
        kind = tensor.dtype.name
        return str(tensor.name), TYPES.get(kind, kind), tuple(int(d) for d in tensor.shape)

    layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    return Network(
        inputs=tuple(port(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(port(network.get_output(i)) for i in range(network.num_outputs)),
        layers=dict(sorted(layers.items())),
    )


def compare(
    component: str,
    network: Network,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    quantizers: Mapping[str, int],
) -> None:
    """Refuse a network that is not what the manifest and the graph say.

    Raises:
        ParityError: naming the component and the first difference in ports, dtypes, dynamic axes or quantizers.
    """
    for kind, found, wanted in (("input", network.inputs, inputs), ("output", network.outputs, outputs)):
        names = [port[0] for port in found]
        if names != [s.name for s in wanted]:
            raise ParityError(f"{component}: TensorRT has the {kind}s {names}, the manifest {[s.name for s in wanted]}")
        for (name, dtype, dims), spec in zip(found, wanted, strict=True):
            if dtype != spec.dtype or len(dims) != len(spec.shape):
                raise ParityError(f"{component}: TensorRT has {name} {dtype} {dims}, the manifest {spec}")
            for have, want in zip(dims, spec.shape, strict=True):
                if (isinstance(want, str) and have != -1) or (isinstance(want, int) and have not in (-1, want)):
                    raise ParityError(f"{component}: TensorRT made {name} {dims}, the manifest says {spec.shape}")
    for node, layer in (("DequantizeLinear", "DEQUANTIZE"), ("QuantizeLinear", "QUANTIZE")):
        if network.layers.get(layer, 0) != quantizers.get(node, 0):
            raise ParityError(
                f"{component}: the graph has {quantizers.get(node, 0)} {node} nodes, TensorRT kept "
                f"{network.layers.get(layer, 0)} {layer} layers; the others were folded away"
            )


def check_size(what: str, size: int, graph: Prepared, layers: int, profiles: int) -> None:
    """Refuse a plan that lost weights or unpacked quantized ones.

    The upper bound lies midway between packed and unpacked weights, plus second copies and what kernels (of each layer
    and profile) take: in a model of more than some ten MB the weights decide, in a tiny one the kernels do and
    `codes_found` is the proof. A graph without quantized weights has no upper bound.

    Raises:
        ParityError: with the bytes of the plan and the bound.
    """
    if size < LEAST_SHARE * graph.packed:
        raise ParityError(f"{what}: the plan has {size} bytes, its weights take {graph.packed}; some are missing")
    bound = (graph.packed + graph.unpacked) // 2 + layers * profiles * KERNEL_BYTES[graph.dtype] + SLACK_BYTES
    bound += graph.copies if profiles > 1 else 0
    if graph.unpacked > graph.packed and size > bound:
        raise ParityError(
            f"{what}: the plan has {size} bytes, more than {bound}; packed weights take {graph.packed}, "
            f"unpacked ones {graph.unpacked}: TensorRT dequantized them at build time"
        )
