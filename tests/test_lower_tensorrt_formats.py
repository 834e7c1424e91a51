"""Every format of the waist in TensorRT plans, built without a GPU: packed where the table says so, or refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from intaglio.exporters.lower_tensorrt import LOWERING, prepare
from intaglio.exporters.lowering import Job
from intaglio.exporters.parity import relative_error
from intaglio.exporters.tensorrt_passes import check_formats, decode_nf4
from intaglio.profiles.errors import Unsupported
from intaglio.profiles.family import Contract
from intaglio.profiles.spec import Range, TensorSpec
from intaglio.quantize.formats import FORMATS, SUPPORT, codec

try:
    import tensorrt_rtx_bindings as rtx
except ImportError:
    rtx = None
needs_rtx = pytest.mark.skipif(rtx is None, reason="tensorrt_rtx_bindings are not installed (extra tensorrt)")

MB = 1 << 20
KERNELS = MB  # of one linear layer in three profiles; measured 0.69 to 0.83 MB
CONV_KERNELS = 3 * MB // 2  # of one convolution; measured 1.25 MB weight-only, 0.86 MB w8a8
NEAR = {"float16": 1e-3, "bfloat16": 8e-3}  # relative L2 to float32; measured 5e-4 to 6e-4 and 4e-3
# Where rounded activations are quantized some take the neighbouring code; measured 2e-3 to 6e-3 and 7e-3 to 2e-2.
NEAR_STATIC = {"float16": 1.5e-2, "bfloat16": 4e-2}
SHAPES = {"batch": Range(min=1, opt=2, max=4), "height": Range(min=64, opt=512, max=1024, multiple=8)}
RNG = np.random.default_rng(11)
LINEAR = tuple(name for name in FORMATS if name != "none")
PACKED = tuple(name for name in LINEAR if SUPPORT[name, "MatMul", "tensorrt"].how == "native")
DECODED = tuple(name for name in LINEAR if SUPPORT[name, "MatMul", "tensorrt"].how == "stored-only")
TYPES = {"INT8": np.int8, "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn, "INT4": ml_dtypes.int4}


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def stored(name, weight, axis, prefix="w"):
    """Initializers of a weight in a format, and the node that gives it back as `prefix`."""
    parts = codec(name).encode(weight, axis)
    arrays = {f"{prefix}.{role}": np.asarray(value) for role, value in parts.items()}
    storage = FORMATS[name].storage
    arrays[f"{prefix}.codes"] = arrays[f"{prefix}.codes"].astype(TYPES.get(storage, np.uint8))
    if storage == "UINT8":
        k, n = weight.shape
        facts = {"domain": "intaglio", "block_size": FORMATS[name].block, "K": k, "N": n}
        return arrays, helper.make_node("DequantizeNF4", list(arrays), [prefix], **facts)
    facts = {"axis": 0, "block_size": FORMATS[name].block} if FORMATS[name].block else {"axis": axis}
    return arrays, helper.make_node("DequantizeLinear", list(arrays), [prefix], **facts)


def static(name, value, out, peak=4.0):
    """The Q/DQ pair of a format with static activations."""
    kind = TYPES[FORMATS[name].activations]
    step = np.float32(peak / (127 if kind is np.int8 else 448))
    arrays = {f"{out}.s": np.asarray(step), f"{out}.z": np.zeros((), kind)}
    pair = [
        node("QuantizeLinear", f"{value} {out}.s {out}.z", f"{out}.q"),
        node("DequantizeLinear", f"{out}.q {out}.s {out}.z", out),
    ]
    return arrays, pair


def linear(name, k, n, value="x", out="y", *, smooth=False, rank=0):
    """One layer as the waist has it: [smoothing,] [Q, DQ,] DQ of the weight, MatMul [, low-rank branch, Add]."""
    weight = (RNG.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
    constants, dequantize = stored(name, weight, 1, f"{out}.w")
    nodes, inner = [dequantize], f"{out}.main" if rank else out
    if smooth:
        constants["f"] = RNG.uniform(0.5, 2, k).astype(np.float32)
        nodes.append(node("Mul", f"{value} f", "smoothed"))
        value = "smoothed"
    exact = value
    if FORMATS[name].static:
        arrays, pair = static(name, value, f"{out}.x")
        constants, nodes, value = constants | arrays, nodes + pair, f"{out}.x"
    nodes.append(node("MatMul", f"{value} {out}.w", inner))
    if rank:
        for part, shape in (("a", (k, rank)), ("b", (rank, n))):
            constants[f"low.{part}"] = (RNG.standard_normal(shape) / 64).astype(np.float16)
            nodes.append(node("Cast", f"low.{part}", f"low.{part}.float", to=TensorProto.FLOAT))
        nodes += [node("MatMul", f"{exact} low.a.float", "down"), node("MatMul", "down low.b.float", "up")]
        nodes.append(node("Add", f"{inner} up", out))
    return nodes, constants


def job(folder, nodes, constants, inputs, outputs, dtype="float16", **options):
    """A component folder with this graph."""
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    ports = [
        [helper.make_tensor_value_info(s.name, kind[s.dtype], s.shape) for s in side] for side in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("intaglio", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ports, tensors), opset_imports=domains, ir_version=10)
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return Job(
        folder=folder,
        component="transformer",
        inputs=inputs,
        outputs=outputs,
        shapes=SHAPES,
        contract=Contract(dtype=dtype, float32_ops=("LayerNormalization", "Softmax")),
        dtype=dtype,
        format="mixed",
        packed_bytes=(folder / "model.onnx.data").stat().st_size,
        options={"sm": "sm89"} | options,
    )


def ports(k, n, *, rows=False):
    axes = ("batch",) if rows else ("batch", "height/8")
    return [(TensorSpec(name=p, dtype="float32", shape=(*axes, size)),) for p, size in (("x", k), ("y", n))]


def built(work):
    """Facts and record of the plan for one GPU."""
    lowered = LOWERING.lower(work)
    (record,) = lowered.engines.values()
    return lowered.facts, record


def code_bytes(name, count):
    return count // 2 if FORMATS[name].block else count


@needs_rtx
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [(256, 512), (2048, 2048)])
@pytest.mark.parametrize("name", PACKED)
def test_a_plan_keeps_the_codes_packed(name, size, dtype, tmp_path):
    facts, record = built(job(tmp_path / "t", *linear(name, *size), *ports(*size), dtype=dtype))
    packed = facts["sm89"]["weight_bytes"]
    assert code_bytes(name, size[0] * size[1]) < packed < 1.2 * code_bytes(name, size[0] * size[1]) + 8192
    assert packed < record["bytes"] <= packed + KERNELS
    assert facts["sm89"]["codes_found"] == "1 of 1" and facts["sm89"]["warnings"] == []
    pairs = int(FORMATS[name].static)
    assert (facts["layers"].get("QUANTIZE", 0), facts["layers"]["DEQUANTIZE"]) == (pairs, 1 + pairs)


@needs_rtx
@pytest.mark.parametrize("size", [(256, 512), (2048, 2048)])
@pytest.mark.parametrize("name", DECODED)
def test_nf4_is_decoded_to_the_compute_dtype(name, size, tmp_path):
    facts, record = built(job(tmp_path / "t", *linear(name, *size), *ports(*size)))
    assert facts["sm89"]["weight_bytes"] == pytest.approx(2 * size[0] * size[1], rel=1e-3)
    assert record["bytes"] <= facts["sm89"]["weight_bytes"] + KERNELS
    assert facts["cast"]["decoded_nf4"] == 1 and "DEQUANTIZE" not in facts["layers"]


@needs_rtx
@pytest.mark.parametrize("name", LINEAR)
def test_smoothing_and_a_low_rank_branch_go_along(name, tmp_path):
    size = (2048, 1024)
    facts, record = built(job(tmp_path / "t", *linear(name, *size, smooth=True, rank=16), *ports(*size), sm="sm120"))
    assert facts["layers"]["MATRIX_MULTIPLY"] == 3 and facts["layers"]["ELEMENTWISE"] == 2
    assert record["bytes"] <= facts["sm120"]["weight_bytes"] + CONV_KERNELS  # three products; measured 1.15 MB


@needs_rtx
@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_one_quantized_activation_may_feed_three_products(name, tmp_path):
    k, nodes, constants = 512, [], {}
    constants, nodes = static(name, "x", "qx")
    for part in "qkv":
        weight = (RNG.standard_normal((k, k)) / 16).astype(np.float32)
        arrays, dequantize = stored(name, weight, 1, f"w{part}")
        constants |= arrays
        nodes += [dequantize, node("MatMul", f"qx w{part}", part)]
    nodes += [node("Attention", "q k v", "y", q_num_heads=8, kv_num_heads=8)]
    facts, record = built(job(tmp_path / "t", nodes, constants, *ports(k, k)))
    assert (facts["layers"]["QUANTIZE"], facts["layers"]["DEQUANTIZE"]) == (1, 4)
    assert facts["sm89"]["codes_found"] == "3 of 3"
    assert record["bytes"] < facts["sm89"]["weight_bytes"] + 3 * MB  # attention has kernels of its own; 2.4 MB


@needs_rtx
@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_a_convolution_stays_packed(name, tmp_path):
    channels = 512
    weight = (RNG.standard_normal((channels, channels, 3, 3)) / 64).astype(np.float32)
    constants, dequantize = stored(name, weight, 0)
    nodes, value = [dequantize], "x"
    if FORMATS[name].static:
        arrays, pair = static(name, "x", "qx")
        constants, nodes, value = constants | arrays, nodes + pair, "qx"
    nodes.append(node("Conv", f"{value} w", "y", pads=[1] * 4))
    spec = [TensorSpec(name=n, dtype="float32", shape=("batch", channels, "height/8", 64)) for n in "xy"]
    facts, record = built(job(tmp_path / "t", nodes, constants, spec[:1], spec[1:]))
    assert facts["sm89"]["weight_bytes"] == pytest.approx(weight.size, rel=1e-3)
    assert record["bytes"] <= weight.size + CONV_KERNELS
    assert facts["sm89"]["codes_found"] == "1 of 1" and facts["sm89"]["warnings"] == []


@needs_rtx
def test_an_embedding_stays_packed(tmp_path):
    table = RNG.standard_normal((8192, 256)).astype(np.float32)
    constants, dequantize = stored("int8", table, 0)
    nodes = [dequantize, node("Gather", "w ids", "y")]
    inputs = (TensorSpec(name="ids", dtype="int64", shape=("batch", "height/8")),)
    outputs = (TensorSpec(name="y", dtype="float32", shape=("batch", "height/8", 256)),)
    facts, record = built(job(tmp_path / "t", nodes, constants, inputs, outputs))
    assert record["bytes"] <= facts["sm89"]["weight_bytes"] + KERNELS
    assert facts["sm89"]["codes_found"] == "1 of 1"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LINEAR)
def test_what_tensorrt_is_given_computes_what_the_waist_says(name, dtype, tmp_path):
    nodes, constants = linear(name, 128, 64, smooth=True, rank=8)
    work = job(tmp_path / "t", nodes, constants, *ports(128, 64), dtype=dtype)
    waist = ir.load(work.folder / "model.onnx")
    decode_nf4(waist)
    feeds = {"x": RNG.standard_normal((2, 8, 128)).astype(np.float32)}
    ir.save(waist, work.folder / "waist.onnx")
    (wanted,) = ReferenceEvaluator(onnx.load(work.folder / "waist.onnx")).run(None, feeds)
    graph = prepare(work, dtype, tmp_path)
    (found,) = ReferenceEvaluator(onnx.load(graph.path)).run(None, feeds)
    assert found.dtype == np.float32
    assert 0 < relative_error(found, wanted) < (NEAR_STATIC if FORMATS[name].static else NEAR)[dtype]


@pytest.mark.parametrize("name", PACKED)
def test_scales_of_channels_and_tensors_are_the_waists_own(name, tmp_path):
    nodes, constants = linear(name, 128, 64)
    graph = prepare(job(tmp_path / "t", nodes, constants, *ports(128, 64)), "bfloat16", tmp_path)
    model = ir.load(graph.path)
    quantizers = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantizers) == 1 + 2 * FORMATS[name].static
    for found in quantizers:
        scale = found.inputs[1].const_value
        if FORMATS[name].block:  # TensorRT has no narrow result of float32 scales there
            assert scale.dtype == ir.DataType.BFLOAT16 and "output_dtype" not in found.attributes
            continue
        assert scale.dtype == ir.DataType.FLOAT
        np.testing.assert_array_equal(scale.numpy(), constants[found.inputs[1].name])
        if found.op_type == "DequantizeLinear":
            assert found.attributes["output_dtype"].as_int() == ir.DataType.BFLOAT16
    matmul = next(n for n in model.graph if n.op_type == "MatMul")
    assert [v.producer().op_type for v in matmul.inputs][1] == "DequantizeLinear"  # no Cast in between


@pytest.mark.parametrize(
    ("name", "rows", "copies"), [("w8a8", True, 1), ("fp8", True, 1), ("int8", True, 0), ("w8a8", False, 0)]
)
def test_weights_of_single_rows_may_lie_in_a_plan_twice(name, rows, copies, tmp_path):
    graph = prepare(job(tmp_path / "t", *linear(name, 256, 512), *ports(256, 512, rows=rows)), "float16", tmp_path)
    assert graph.copies == copies * 256 * 512
    assert graph.unpacked - graph.packed == 256 * 512


@needs_rtx
def test_single_rows_with_static_activations_build(tmp_path):
    facts, _ = built(job(tmp_path / "t", *linear("w8a8", 1024, 2048), *ports(1024, 2048, rows=True)))
    assert 2 < facts["sm89"]["plan_to_weights"] < 3  # the second layout; 2.4


@needs_rtx
@pytest.mark.parametrize("name", ["fp8", "int4", "nf4"])
def test_float32_is_packed_too_and_only_nf4_needs_another_graph(name, tmp_path):
    work = job(tmp_path / "t", *linear(name, 512, 512), *ports(512, 512), dtype="float32")
    facts, record = built(work)
    assert facts["cast"] == ({"decoded_nf4": 1} if name == "nf4" else {})
    assert record["bytes"] <= facts["sm89"]["weight_bytes"] + KERNELS
    own = work.folder / "model.onnx"
    assert (prepare(work, "float32", tmp_path).path == own) == (name != "nf4")


@pytest.mark.parametrize(
    ("name", "sm", "words"),
    [
        ("int4", "sm75", "int4 does not run on sm75; it needs sm80"),
        ("fp8", "sm86", "fp8 does not run on sm86; it needs sm89"),
        ("fp8-weight-only", "sm80", "fp8 does not run on sm80"),
    ],
)
def test_a_gpu_without_the_format_is_refused_before_anything_is_built(name, sm, words, tmp_path):
    work = job(tmp_path / "t", *linear(name, 128, 64), *ports(128, 64), sm=f"sm120,{sm}")
    with pytest.raises(Unsupported, match=f"transformer: {words}"):
        LOWERING.lower(work)
    with pytest.raises(Unsupported, match=f"format {name}: {words}"):
        check_formats(["int8", name], ["sm120", sm])
    check_formats(LINEAR, ["sm89", "sm120"])
    check_formats(["int8", "w8a8", "nf4"], ["sm75"])


def test_int4_read_twice_is_refused_before_it_crashes(tmp_path):
    nodes, constants = linear("int4", 128, 64)
    twice = [*nodes[:-1], node("MatMul", "x y.w", "a"), node("Tanh", "x", "t"), node("MatMul", "t y.w", "b")]
    twice.append(node("Add", "a b", "y"))
    with pytest.raises(Unsupported, match=r"transformer: y\.w\.codes is int4 and read twice"):
        LOWERING.lower(job(tmp_path / "one", twice, constants, *ports(128, 64)))
    again = [twice[0], node("DequantizeLinear", "y.w.codes y.w.scale", "v", axis=0, block_size=64), *twice[1:]]
    again[4] = node("MatMul", "t v", "b")
    with pytest.raises(Unsupported, match="read twice"):
        LOWERING.lower(job(tmp_path / "two", again, constants, *ports(128, 64)))


def test_blocks_that_do_not_divide_the_weight_are_refused(tmp_path):
    nodes, constants = linear("int4", 128, 64)
    constants["y.w.codes"], constants["y.w.scale"] = constants["y.w.codes"][:100], constants["y.w.scale"][:2]
    work = job(tmp_path / "t", nodes, constants, *ports(100, 64))
    with pytest.raises(Unsupported, match=r"y\.w\.codes \(100, 64\) has blocks of 64 along axis 0"):
        LOWERING.lower(work)


def test_nf4_of_another_block_size_is_refused(tmp_path):
    nodes, constants = linear("nf4", 128, 64)
    next(a for a in nodes[0].attribute if a.name == "block_size").i = 128
    with pytest.raises(Unsupported, match="NF4 blocks of 128; blocks of 64 can be decoded"):
        prepare(job(tmp_path / "t", nodes, constants, *ports(128, 64)), "float16", tmp_path)
