"""The cast pass: numbers close to float32's, islands where they must be, everything else left alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from intaglio.exporters.cast import cast_graph
from intaglio.exporters.parity import random_feeds, relative_error
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.runtimes.engine_onnxruntime import ACCURACY, ACCURACY_KEY

F32, F16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
NEAR = 1e-2  # relative L2 of float16 to float32; measured 4e-4 to 2e-3
RNG = np.random.default_rng(3)


def model(nodes, inputs, outputs, constants, opset=23):
    """An onnx-ir model of (name, dtype, shape) ports and named arrays."""
    ports = [[helper.make_tensor_value_info(*port) for port in side] for side in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", *ports, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.serde.deserialize_model(proto)


def run(graph, feeds, tmp_path, without=()):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
    ir.save(graph, path, external_data=f"{path.stem}.data")
    onnx.checker.check_model(str(path), full_check=True)
    return session(path, without).run(None, feeds)


def session(path, without=()):
    options = ort.SessionOptions()
    # else int8 linears quantize activations, and that is what one measures
    options.add_session_config_entry(ACCURACY_KEY, ACCURACY["exact"])
    cpu = ["CPUExecutionProvider"]
    return ort.InferenceSession(str(path), options, providers=cpu, disabled_optimizers=list(without))


def block(weight=None):
    """Linear, attention with a mask, normalization: [batch, 8, 64] to the same."""
    weight = RNG.standard_normal((64, 64)).astype(np.float32) / 8 if weight is None else weight
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["q"]),
        helper.make_node("Attention", ["q", "x", "x", "mask"], ["a"], q_num_heads=4, kv_num_heads=4),
        helper.make_node("LayerNormalization", ["a", "g", "b"], ["n"]),
        helper.make_node("Gelu", ["n"], ["e"]),
        helper.make_node("Add", ["e", "x"], ["y"]),
    ]
    mask = np.triu(np.full((8, 8), np.finfo(np.float32).min, np.float32), 1)
    constants = {"w": weight, "b": np.full(64, 0.1, np.float32), "g": np.ones(64, np.float32), "mask": mask}
    return model(nodes, [("x", F32, ["batch", 8, 64])], [("y", F32, ["batch", 8, 64])], constants)


X = {"x": RNG.standard_normal((2, 8, 64)).astype(np.float32)}


def types(graph):
    return {n.op_type: n.outputs[0].dtype for n in graph.graph}


def test_float16_is_near_float32_and_ports_stay_as_they_are(tmp_path):
    graph = block()
    wanted = run(graph, X, tmp_path)[0]
    report = cast_graph(graph, "float16", ["LayerNormalization", "Softmax"])
    found = run(graph, X, tmp_path)[0]
    assert 0 < relative_error(found, wanted) < NEAR
    assert [(v.name, v.dtype) for v in (*graph.graph.inputs, *graph.graph.outputs)] == [
        ("x", ir.DataType.FLOAT),
        ("y", ir.DataType.FLOAT),
    ]
    assert graph.graph.outputs[0].shape == ir.Shape(["batch", 8, 64])
    assert types(graph)["MatMul"] == types(graph)["Attention"] == types(graph)["Gelu"] == ir.DataType.FLOAT16
    assert types(graph)["LayerNormalization"] == ir.DataType.FLOAT
    assert report.to_json() == {
        "dtype": "float16",
        "narrow_nodes": 5,
        "float32_nodes": {"LayerNormalization": 1},
        "casts": 4,  # x in, around the island, y out; x is cast once for its four readers
        "clamped_constants": 1,
        "float32_scales": 0,
    }


def test_softmax_in_float32_is_asked_of_attention_unless_told_not_to():
    for flag, expected in ((True, ir.DataType.FLOAT.value), (False, None)):
        graph = block()
        cast_graph(graph, "float16", ["Softmax"], softmax_attribute=flag)
        (attention,) = [n for n in graph.graph if n.op_type == "Attention"]
        found = attention.attributes.get("softmax_precision")
        assert (found and found.as_int()) == expected


def test_a_fully_masked_row_is_not_nan(tmp_path):
    graph = block()
    graph.graph.initializers["mask"].const_value = ir.tensor(np.full((8, 8), np.finfo(np.float32).min, np.float32))
    assert cast_graph(graph, "float16", []).clamped == {"mask.float16"}
    assert np.isfinite(run(graph, X, tmp_path)[0]).all()


def test_bfloat16_types_agree_and_its_masks_are_finite(tmp_path):
    graph = block()
    cast_graph(graph, "bfloat16", ["LayerNormalization"])
    assert types(graph)["MatMul"] == ir.DataType.BFLOAT16
    assert np.isfinite(graph.graph.initializers["mask.bfloat16"].const_value.numpy().astype(np.float32)).all()
    onnx.shape_inference.infer_shapes(ir.serde.serialize_model(graph), check_type=True, strict_mode=True)


def test_angles_keep_float32_back_to_the_input(tmp_path):
    nodes = [
        helper.make_node("Unsqueeze", ["t", "axis"], ["t2"]),
        helper.make_node("Mul", ["t2", "f"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    constants = {"axis": np.int64([1]), "f": np.geomspace(1, 1e-4, 32).astype(np.float32), "w": np.eye(32, dtype="f4")}
    graph = model(nodes, [("t", F32, ["batch"])], [("y", F32, ["batch", 32])], constants)
    feeds = {"t": np.float32([999.3, 500.7])}  # in float16 999.5 and 500.75: 0.2 and 0.05 radians off
    wanted = run(graph, feeds, tmp_path)[0]
    report = cast_graph(graph, "float16", [])
    assert report.float32 == {"Unsqueeze": 1, "Mul": 1, "Sin": 1}
    assert relative_error(run(graph, feeds, tmp_path)[0], wanted) < 1e-3


def test_shape_arithmetic_in_floats_and_integers_is_untouched(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=1, end=2),
        helper.make_node("Cast", ["shape"], ["float"], to=F32),
        helper.make_node("Mul", ["float", "half"], ["halved"]),
        helper.make_node("Cast", ["halved"], ["size"], to=I64),
        helper.make_node("Concat", ["minus", "size", "two"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"half": np.float32([0.5]), "minus": np.int64([-1]), "two": np.int64([2])}
    graph = model(nodes, [("x", F32, [1, "n"])], [("y", F32, [1, "m", 2])], constants)
    report = cast_graph(graph, "float16", [])
    assert report.float32 == {"Cast": 2, "Mul": 1}
    large = np.zeros((1, 4098), np.float32)  # 2049 has no float16
    assert run(graph, {"x": large}, tmp_path)[0].shape == (1, 2049, 2)


@pytest.mark.parametrize(("op", "constant"), [("Mul", 70000.0), ("Add", 1e-12)])
def test_a_constant_the_narrow_type_cannot_hold_keeps_its_node_in_float32(op, constant, tmp_path):
    nodes = [helper.make_node(op, ["x", "c"], ["m"]), helper.make_node("Div", ["m", "d"], ["y"])]
    ports = [("x", F32, ["n"])], [("y", F32, ["n"])]
    graph = model(nodes, *ports, {"c": np.float32(constant), "d": np.float32(2)})
    report = cast_graph(graph, "float16", [])
    assert report.float32 == {op: 1} and report.narrow == {"Div": 1} and not report.clamped


def test_a_weight_too_large_for_the_narrow_type_is_refused_when_it_is_written(tmp_path):
    weight = np.ones((128, 64), np.float32)
    weight[0, 0] = 1e5
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = model(nodes, [("x", F32, ["n", 128])], [("y", F32, ["n", 64])], {"w": weight})
    cast_graph(graph, "float16", [])
    with pytest.raises(Unsupported, match=r"w\.float16 holds 100000, more than float16's 65504"):
        ir.save(graph, tmp_path / "m.onnx", external_data="m.data")


def test_weights_stored_as_in_the_checkpoint_are_used_as_they_are(tmp_path):
    for stored, wanted in ((np.float16, "w"), (ml_dtypes.bfloat16, "w.float16")):
        weight = (np.arange(64 * 64).reshape(64, 64) % 7 / 8).astype(stored)
        proto = onnx.numpy_helper.from_array(weight.astype(np.float32), "w")
        cast = helper.make_node("Cast", ["w"], ["wf"], to=F32)
        nodes = [cast, helper.make_node("MatMul", ["x", "wf"], ["y"])]
        graph = model(nodes, [("x", F32, ["n", 64])], [("y", F32, ["n", 64])], {"w": numpy_helper.to_array(proto)})
        tensor = ir.tensor(weight, name="w")
        graph.graph.initializers["w"].const_value, graph.graph.initializers["w"].dtype = tensor, tensor.dtype
        cast_graph(graph, "float16", [])
        assert list(graph.graph.initializers) == [wanted]
        assert [n.op_type for n in graph.graph] == ["Cast", "MatMul", "Cast"]
        assert graph.graph.initializers[wanted].const_value.numpy().astype(np.float32).tolist() == weight.tolist()


def quantized(scale):
    codes = RNG.integers(-127, 128, (64, 64)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = {"codes": codes, "scale": np.full(64, scale, np.float32)}
    return model(nodes, [("x", F32, ["n", 64])], [("y", F32, ["n", 64])], constants), codes


@pytest.mark.parametrize(
    ("scale", "dtype", "kept"), [(1e-2, "float16", False), (1e-6, "float16", True), (1e-2, "bfloat16", True)]
)
def test_scales_are_narrowed_where_that_costs_no_more_than_float16s_rounding(scale, dtype, kept, tmp_path):
    graph, codes = quantized(scale)
    feeds = {"x": RNG.standard_normal((3, 64)).astype(np.float32)}
    wanted = run(graph, feeds, tmp_path)[0]
    report = cast_graph(graph, dtype, [])
    assert report.float32_scales == int(kept)
    assert types(graph)["DequantizeLinear"] == (ir.DataType.FLOAT if kept else ir.DataType.FLOAT16)
    np.testing.assert_array_equal(graph.graph.initializers["codes"].const_value.numpy(), codes)
    if dtype == "float16":
        assert relative_error(run(graph, feeds, tmp_path)[0], wanted) < NEAR


INT8, FP8, INT4 = np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.int4
# codes, scale shape, attributes, static activations; relative L2 of float16 to float32 measured 3e-4 to 5e-3
FORMS = {
    "int8": (INT8, (64,), {"axis": 1}, False),
    "w8a8": (INT8, (64,), {"axis": 1}, True),
    "int4": (INT4, (2, 64), {"axis": 0, "block_size": 64}, False),
    "fp8 weight-only": (FP8, (64,), {"axis": 1}, False),
    "fp8": (FP8, (64,), {"axis": 1}, True),
}


def layer(form, scale=1e-2):
    """A smoothed linear layer of 128 to 64 with a low-rank branch, in a form of the waist."""
    kind, shape, attributes, static = FORMS[form]
    constants = {"codes": RNG.integers(-7, 8, (128, 64)).astype(kind), "scale": np.full(shape, scale, np.float32)}
    constants |= {"f": RNG.uniform(0.5, 2, 128).astype("f4"), "s": np.float32(0.02), "z": np.zeros((), kind)}
    constants |= {n: (RNG.standard_normal(d) / 32).astype("f2") for n, d in (("a", (128, 4)), ("b", (4, 64)))}
    nodes = [helper.make_node("Mul", ["x", "f"], ["m"])]
    if static:
        nodes.append(helper.make_node("QuantizeLinear", ["m", "s", "z"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]))
    nodes += [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], **attributes),
        helper.make_node("MatMul", ["d" if static else "m", "w"], ["main"]),
        helper.make_node("Cast", ["a"], ["af"], to=F32),
        helper.make_node("Cast", ["b"], ["bf"], to=F32),
        helper.make_node("MatMul", ["m", "af"], ["down"]),
        helper.make_node("MatMul", ["down", "bf"], ["up"]),
        helper.make_node("Add", ["main", "up"], ["y"]),
    ]
    if not static:
        del constants["s"], constants["z"]
    return model(nodes, [("x", F32, ["n", 128])], [("y", F32, ["n", 64])], constants)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_waist_runs_in_float16(form, tmp_path):
    graph = layer(form)
    feeds = {"x": RNG.standard_normal((3, 128)).astype(np.float32)}
    # ONNX Runtime 1.31 fuses static fp8 in float32 (not in float16) to an operator that has no fp8, and stops
    wanted = run(graph, feeds, tmp_path, ["QDQSelectorActionTransformer"] if form == "fp8" else [])[0]
    codes = graph.graph.initializers["codes"].const_value.numpy()
    report = cast_graph(graph, "float16", [])
    assert report.float32_scales == 0 and not report.float32
    assert [n.op_type for n in graph.graph].count("Cast") == 2  # x in, y out: the low-rank branch is stored narrow
    kept = graph.graph.initializers["codes"].const_value
    np.testing.assert_array_equal(kept.numpy(), codes)
    assert 0 < relative_error(run(graph, feeds, tmp_path)[0], wanted) < NEAR


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("float32_scales", [False, True])
def test_types_agree_in_bfloat16_whatever_the_scales_are(form, float32_scales):
    graph = layer(form)
    report = cast_graph(graph, "bfloat16", [], float32_scales=float32_scales)
    onnx.shape_inference.infer_shapes(ir.serde.serialize_model(graph), check_type=True, strict_mode=True)
    blocked, static = "block_size" in FORMS[form][2], FORMS[form][3]
    assert report.float32_scales == (0 if blocked else 1 + 2 * static)
    products = [n for n in graph.graph if n.op_type == "MatMul"]
    assert {v.dtype for n in products for v in n.inputs} == {ir.DataType.BFLOAT16}
    direct = {n.inputs[1].producer().op_type for n in products if n.inputs[1].producer() is not None}
    assert direct == ({"DequantizeLinear"} if blocked or float32_scales else {"Cast"})


def test_float32_scales_leave_activations_in_the_dtype_they_have():
    graph = layer("w8a8", scale=1e-6)  # no float16
    cast_graph(graph, "float16", [], float32_scales=True)
    quantize = next(n for n in graph.graph if n.op_type == "QuantizeLinear")
    assert [v.dtype for v in quantize.inputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT8]
    for node in (n for n in graph.graph if n.op_type == "DequantizeLinear"):
        assert len(node.inputs) == 2 and node.inputs[1].dtype == ir.DataType.FLOAT
        assert node.outputs[0].dtype == ir.DataType.FLOAT16
    graph = layer("w8a8")
    graph.graph.opset_imports[""] = 21
    with pytest.raises(Unsupported, match="float32 scales need opset 23, not 21"):
        cast_graph(graph, "float16", [], float32_scales=True)


@pytest.mark.parametrize(
    ("small", "dtype", "kept"),
    [(1e-6, "float16", False), (1e-9, "float16", True), (1e-6, "bfloat16", False), (1e-2, "bfloat16", False)],
)
def test_scales_of_blocks_count_by_the_largest_of_their_column(small, dtype, kept):
    graph = layer("int4")
    scale = np.full((2, 64), 1e-2, np.float32)
    scale[1] = small  # float16 holds 1e-6 to 6 %, which is nothing beside 1e-2; 1e-9 would become zero
    graph.graph.initializers["scale"].const_value = ir.tensor(scale)
    assert cast_graph(graph, dtype, []).float32_scales == int(kept)


def test_a_long_row_of_factors_is_looked_at_like_a_short_one():
    nodes = [helper.make_node("Mul", ["x", "f"], ["m"]), helper.make_node("Mul", ["m", "two"], ["y"])]
    factors = np.ones(8192, np.float32)
    factors[5] = 1e5
    constants = {"f": factors, "two": np.float32(2)}
    graph = model(nodes, [("x", F32, ["n", 8192])], [("y", F32, ["n", 8192])], constants)
    report = cast_graph(graph, "float16", [])
    assert (report.float32, report.narrow) == ({"Mul": 1}, {"Mul": 1})


@pytest.mark.parametrize("behind", ["DequantizeLinear", "Cast", ""])
def test_a_walk_from_angles_ends_at_a_product_with_a_weight_however_stored(behind):
    nodes = [helper.make_node("Mul", ["x", "two"], ["m"])]
    constants = {"two": np.float32(2), "w": np.full((128, 64), 3, np.float32)}
    if behind == "DequantizeLinear":
        constants |= {"w": np.full((128, 64), 3, np.int8), "scale": np.ones(64, np.float32)}
        nodes.append(helper.make_node(behind, ["w", "scale"], ["wf"], axis=1))
    elif behind:
        constants["w"] = constants["w"].astype(np.float16)
        nodes.append(helper.make_node(behind, ["w"], ["wf"], to=F32))
    nodes += [helper.make_node("MatMul", ["m", "wf" if behind else "w"], ["p"]), helper.make_node("Sin", ["p"], ["y"])]
    graph = model(nodes, [("x", F32, ["n", 128])], [("y", F32, ["n", 64])], constants)
    cast_graph(graph, "float16", [])
    assert types(graph)["Mul"] == ir.DataType.FLOAT16 and types(graph)["Sin"] == ir.DataType.FLOAT


def test_what_the_cast_cannot_see_through_is_refused():
    with pytest.raises(UsageError, match="float61"):
        cast_graph(block(), "float61", [])
    node = helper.make_node("DequantizeNF4", ["x"], ["y"], domain="intaglio", name="up")
    with pytest.raises(Unsupported, match=r"intaglio::DequantizeNF4 \(up\)"):
        cast_graph(model([node], [("x", F32, ["n"])], [("y", F32, ["n"])], {}), "float16", [])


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_every_component_of_a_real_graph_is_near_float32(component, tiny_artifact_int8, tmp_path):
    record = tiny_artifact_int8.manifest.components[component]
    contract = tiny_artifact_int8.manifest.contract[component]
    feeds = random_feeds(record.inputs, {"batch": 2, "height": 64, "width": 72, "tokens": 16, "context_tokens": 16})
    path = tiny_artifact_int8.component(component) / "model.onnx"
    wanted = session(path).run(None, feeds)
    graph = ir.load(path)
    report = cast_graph(graph, "float16", contract["float32_ops"])
    assert report.dtype == "float16" and sum(report.narrow.values()) > 3 * sum(report.float32.values())
    for found, reference in zip(run(graph, feeds, tmp_path), wanted, strict=True):
        assert found.dtype == np.float32
        assert relative_error(found, reference) < NEAR
