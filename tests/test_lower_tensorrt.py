"""TensorRT plans, built without a GPU: sizes, profiles, options, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from intaglio.exporters import lower_tensorrt
from intaglio.exporters.lower_tensorrt import DEFAULT_SMS, LOWERING, RTX_SMS, prepare, profiles, wanted_sms
from intaglio.exporters.lowering import Job, lowering
from intaglio.exporters.tensorrt_checks import Network, Prepared, check_size, compare
from intaglio.exporters.tensorrt_plans import INSIDE, KINDS, tried
from intaglio.profiles.errors import MissingDependency, ParityError, ToolError, Unsupported, UsageError
from intaglio.profiles.family import Contract
from intaglio.profiles.spec import Range, TensorSpec
from intaglio.runtimes import tensorrt_api

try:
    import tensorrt_rtx_bindings as rtx
except ImportError:
    rtx = None
needs_rtx = pytest.mark.skipif(rtx is None, reason="tensorrt_rtx_bindings are not installed (extra tensorrt)")

K, N = 256, 512
MB = 1 << 20
SHAPES = {"batch": Range(min=1, opt=2, max=4), "height": Range(min=64, opt=512, max=1024, multiple=8)}
INPUTS = (TensorSpec(name="x", dtype="float32", shape=("batch", K)),)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=("batch", N)),)
RNG = np.random.default_rng(11)


def write(folder, nodes, constants, inputs, outputs, domains=()):
    ports = [[helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in p] for p in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 23), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ports, tensors), opset_imports=opsets, ir_version=10)
    folder.mkdir(exist_ok=True)
    save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)


def job(folder, inputs=INPUTS, outputs=OUTPUTS, format_="none", contract=None, dtype="float16", **options):
    return Job(
        folder=folder,
        component="unet",
        inputs=inputs,
        outputs=outputs,
        shapes=SHAPES,
        contract=contract or Contract(dtype="float16", float32_ops=("LayerNormalization", "Softmax")),
        dtype=dtype,
        format=format_,
        packed_bytes=(folder / "model.onnx.data").stat().st_size,
        options=options,
    )


def linear(folder, format_):
    """One 256 x 512 linear layer, and a second one of its kind behind a normalization."""
    weight = RNG.standard_normal((K, N)).astype(np.float32) / 16
    if format_ == "none":
        write(folder, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, INPUTS, OUTPUTS)
    else:
        codes = RNG.integers(-127, 128, (K, N)).astype(np.int8)
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        write(folder, nodes, {"codes": codes, "scale": np.full(N, 1e-3, np.float32)}, INPUTS, OUTPUTS)
    return folder


ATTENTION_IN = (TensorSpec(name="x", dtype="float32", shape=("batch", "height/8", 80)),)
ATTENTION_OUT = (TensorSpec(name="y", dtype="float32", shape=("batch", "height/8", 80)),)


def attention(folder):
    """W8A8 linear, normalization, attention with heads of 20, which no fused kernel takes in float32."""
    codes = RNG.integers(-127, 128, (80, 80)).astype(np.int8)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g"], ["n"]),
        helper.make_node("QuantizeLinear", ["n", "s"], ["nq"]),
        helper.make_node("DequantizeLinear", ["nq", "s"], ["nd"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["nd", "w"], ["q"]),
        helper.make_node("Attention", ["q", "n", "n"], ["a"], q_num_heads=4, kv_num_heads=4),
        helper.make_node("Add", ["a", "x"], ["y"]),
    ]
    constants = {"g": np.ones(80, "f4"), "s": np.float32(0.02), "codes": codes, "scale": np.full(80, 1e-3, "f4")}
    write(folder, nodes, constants, ATTENTION_IN, ATTENTION_OUT)
    return folder


@needs_rtx
@pytest.mark.parametrize(("format_", "bytes_each"), [("none", 2), ("int8", 1)])
def test_a_plan_holds_the_weights_in_the_contracts_dtype_or_packed(tmp_path, format_, bytes_each):
    work = job(linear(tmp_path / "unet", format_), format_=format_, sm="sm89")
    lowered = lowering("tensorrt").lower(work)
    (name,) = lowered.engines
    assert name == "tensorrt/model.sm89.engine"
    record, facts = lowered.engines[name], lowered.facts["sm89"]
    assert (work.folder / name).stat().st_size == record["bytes"] == facts["plan_bytes"]
    assert K * N * bytes_each < record["bytes"] <= K * N * bytes_each + MB
    assert facts["weight_bytes"] == pytest.approx(K * N * bytes_each, rel=0.02)
    assert facts["plan_to_weights"] == pytest.approx(record["bytes"] / facts["weight_bytes"], abs=1e-3)
    assert {k: record[k] for k in ("sm", "api", "version")} == {
        "sm": "sm89",
        "api": "tensorrt-rtx",
        "version": rtx.__version__,
    }
    assert record["profiles"] == [{"batch": [1, 1, 1]}, {"batch": [2, 2, 2]}, {"batch": [1, 2, 4]}]
    assert lowered.facts["dtype"] == "float16"
    assert facts["codes_found"] == ("1 of 1" if format_ == "int8" else "0 of 0")
    assert lowered.facts["layers"].get("DEQUANTIZE", 0) == (format_ == "int8")
    assert sorted(p.name for p in work.folder.iterdir()) == ["model.onnx", "model.onnx.data", "tensorrt"]


@needs_rtx
def test_attention_and_w8a8_build_for_two_gpus_and_attention_may_be_split(tmp_path):
    work = job(attention(tmp_path / "unet"), ATTENTION_IN, ATTENTION_OUT, format_="int8", sm="sm89,sm120")
    told = []
    lowered = LOWERING.lower(dataclasses.replace(work, progress=told.append))
    assert list(lowered.engines) == ["tensorrt/model.sm89.engine", "tensorrt/model.sm120.engine"]
    assert told == ["tensorrt: cast to float16", "tensorrt: build sm89", "tensorrt: build sm120"]
    assert lowered.facts["sm120"]["decomposable_attention"] == 1
    assert (lowered.facts["layers"]["QUANTIZE"], lowered.facts["layers"]["DEQUANTIZE"]) == (1, 2)
    assert lowered.facts["cast"]["float32_nodes"] == {"LayerNormalization": 1}
    assert lowered.engines["tensorrt/model.sm89.engine"]["profiles"][-1] == {
        "batch": [1, 2, 4],
        "height": [64, 512, 1024],
    }


@needs_rtx
def test_one_profile_for_all_keeps_a_single_copy_of_the_weights(tmp_path):
    folder = tmp_path / "unet"
    port = [TensorSpec(name=n, dtype="float32", shape=("batch", 1024)) for n in "xy"]
    weight = RNG.standard_normal((1024, 1024)).astype(np.float32) / 32
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])]
    write(folder, nodes, {"w": weight}, port[:1], port[1:])
    lowered = LOWERING.lower(job(folder, port[:1], port[1:], sm="sm89", profiles="range"))
    (record,) = lowered.engines.values()
    assert record["profiles"] == [{"batch": [1, 2, 4]}]
    assert record["bytes"] <= weight.size * 2 + MB


@needs_rtx
def test_float32_is_built_only_when_asked_for_and_from_the_graph_itself(tmp_path):
    folder = attention(tmp_path / "unet")
    work = job(folder, ATTENTION_IN, ATTENTION_OUT, sm="sm89", dtype="float32")
    lowered = LOWERING.lower(work)
    assert lowered.facts["dtype"] == "float32" and lowered.facts["cast"] == {}
    assert prepare(work, "float32", tmp_path).path == folder / "model.onnx"
    assert prepare(work, "bfloat16", tmp_path).path == tmp_path / "model.onnx"


@needs_rtx
def test_a_graph_tensorrt_refuses_is_one_line_with_its_reason(tmp_path):
    nodes = [helper.make_node("Engrave", ["x"], ["y"], domain="intaglio")]
    write(tmp_path / "unet", nodes, {"unused": np.zeros(512, "f4")}, INPUTS, INPUTS, domains=["intaglio"])
    with pytest.raises(ToolError, match=r"^unet: TensorRT cannot parse the graph: .*Engrave") as caught:
        LOWERING.lower(job(tmp_path / "unet", sm="sm89", dtype="float32"))
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match="intaglio::Engrave"):
        LOWERING.lower(job(tmp_path / "unet", sm="sm89"))


@needs_rtx
def test_a_gpu_that_cannot_compute_the_dtype_is_an_error_not_a_skip(tmp_path):
    work = job(linear(tmp_path / "unet", "none"), sm="sm89,sm75", dtype="bfloat16")
    with pytest.raises(ToolError, match=r"^unet: TensorRT builds no plan for sm75: .*") as caught:
        LOWERING.lower(work)
    assert "\n" not in str(caught.value)


@needs_rtx
@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([("name", "z")], [], r"unet: TensorRT has the inputs \['x'\], the manifest \['z'\]"),
        ([], [("name", "z")], r"unet: TensorRT has the outputs \['y'\], the manifest \['z'\]"),
        ([("dtype", "float16")], [], r"unet: TensorRT has x float32 \(-1, 256\), the manifest .*float16"),
        ([], [("shape", ("batch", N, 1))], r"unet: TensorRT has y float32 \(-1, 512\)"),
        ([("shape", ("batch", "height"))], [], r"unet: TensorRT made x \(-1, 256\), the manifest says \('batch', 'h"),
        ([], [("shape", ("batch", N + 1))], r"unet: TensorRT made y \(-1, 512\)"),
    ],
)
def test_a_network_that_is_not_the_manifests_is_refused(tmp_path, inputs, outputs, message):
    doctored = [dataclasses.replace(s[0], **dict(c)) for s, c in ((INPUTS, inputs), (OUTPUTS, outputs))]
    work = job(linear(tmp_path / "unet", "int8"), (doctored[0],), (doctored[1],), format_="int8", sm="sm89")
    with pytest.raises(ParityError, match=message):
        LOWERING.lower(work)
    assert list((work.folder / "tensorrt").iterdir()) == []


def test_folded_quantizers_are_refused():
    network = Network(
        inputs=(("x", "float32", (-1, K)),), outputs=(("y", "float32", (-1, N)),), layers={"DEQUANTIZE": 1}
    )
    compare("unet", network, INPUTS, OUTPUTS, {"DequantizeLinear": 1})
    with pytest.raises(ParityError, match="unet: the graph has 2 DequantizeLinear nodes, TensorRT kept 1 DEQUANTIZE"):
        compare("unet", network, INPUTS, OUTPUTS, {"DequantizeLinear": 2})
    with pytest.raises(ParityError, match="1 QuantizeLinear nodes, TensorRT kept 0"):
        compare("unet", network, INPUTS, OUTPUTS, {"DequantizeLinear": 1, "QuantizeLinear": 1})


def prepared(packed, unpacked, copies=0):
    return Prepared(
        path=Path("model.onnx"),
        dtype="float16",
        packed=packed * MB,
        unpacked=unpacked * MB,
        copies=copies * MB,
        quantizers={},
        probes=(),
        facts={},
    )


def test_a_plan_of_an_implausible_size_is_refused():
    int8 = prepared(800, 1600)
    check_size("unet sm89", 850 * MB, int8, 1000, 3)
    with pytest.raises(ParityError, match=r"unet sm89: the plan has \d+ bytes, its weights take \d+; some are missing"):
        check_size("unet sm89", 700 * MB, int8, 1000, 3)
    with pytest.raises(ParityError, match=r"unet sm89: the plan has \d+ bytes, more than \d+; .*dequantized"):
        check_size("unet sm89", 1650 * MB, int8, 1000, 3)


def test_only_codes_can_be_unpacked_and_second_copies_need_a_second_profile():
    check_size("unet sm89", 3300 * MB, prepared(1600, 1600), 1000, 3)  # nothing is quantized
    mixed = prepared(800, 1400, copies=400)
    check_size("unet sm89", 1300 * MB, mixed, 1000, 3)
    with pytest.raises(ParityError, match="dequantized"):
        check_size("unet sm89", 1300 * MB, mixed, 1000, 1)


def test_profiles_are_batch_one_batch_two_and_the_whole_range():
    whole = {"batch": (1, 2, 4), "height": (64, 512, 1024)}
    assert profiles(ATTENTION_IN, SHAPES) == [{**whole, "batch": (1, 1, 1)}, {**whole, "batch": (2, 2, 2)}, whole]
    one = {"batch": Range(min=1, opt=1, max=1)}
    assert profiles(INPUTS, one) == [{"batch": (1, 1, 1)}]
    two = {"batch": Range(min=1, opt=1, max=2)}
    assert profiles(INPUTS, two) == [{"batch": (1, 1, 1)}, {"batch": (2, 2, 2)}]
    four = {"batch": Range(min=4, opt=4, max=8)}
    assert profiles(INPUTS, four) == [{"batch": (4, 4, 8)}]
    unbatched = (TensorSpec(name="ids", dtype="float32", shape=("height", 3)),)
    assert profiles(unbatched, SHAPES) == [{"height": (64, 512, 1024)}]
    assert profiles(ATTENTION_IN, SHAPES, ()) == [whole]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("sm98", ["'sm98'", ", ".join(RTX_SMS), "Did you mean 'sm89'?"]),
        ("sm90", ["'sm90'", "no Hopper", "install tensorrt"]),
        ("", ["''", "allowed: sm75"]),
        ("sm89,", ["''", "allowed: sm75"]),
        ("sm89,sm89", ["names one twice", "--set tensorrt.sm=sm89,sm120"]),
    ],
)
def test_wrong_compute_capabilities_are_refused_with_what_is_allowed(value, words):
    with pytest.raises(UsageError) as caught:
        wanted_sms({"sm": value})
    assert all(word in str(caught.value) for word in words), caught.value


@needs_rtx
def test_options_are_checked_before_anything_is_built():
    assert LOWERING.options == ("sm", "profiles", "weights")
    LOWERING.check({})
    LOWERING.check({"sm": "sm86, SM121"})
    assert wanted_sms({}) == DEFAULT_SMS == ("sm89", "sm120")
    assert wanted_sms({"sm": "sm86, SM121"}) == ("sm86", "sm121")
    with pytest.raises(UsageError, match=r"unknown tensorrt.profiles 'batch'; allowed: batches, range"):
        LOWERING.check({"profiles": "batch"})
    assert all(hasattr(rtx.ComputeCapability, sm.upper()) for sm in RTX_SMS)


def test_a_missing_package_is_the_pip_line(monkeypatch):
    monkeypatch.setitem(tensorrt_api.APIS, "tensorrt-rtx", "no_such_bindings")
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[tensorrt\]'"):
        LOWERING.check({"sm": "sm89"})


def test_the_gpu_in_the_machine_is_built_for_by_tensorrt_itself(monkeypatch):
    for there, gpu, expected in (((), "sm89", "tensorrt-rtx"), (("tensorrt",), None, "tensorrt-rtx")):
        monkeypatch.setattr(lower_tensorrt, "installed_apis", lambda there=there: there)
        monkeypatch.setattr(lower_tensorrt, "present_gpu", lambda gpu=gpu: gpu)
        assert lower_tensorrt.api_for("sm89") == expected
    monkeypatch.setattr(lower_tensorrt, "present_gpu", lambda: "sm90")
    assert lower_tensorrt.api_for("sm90") == "tensorrt" and lower_tensorrt.api_for("sm89") == "tensorrt-rtx"
    assert wanted_sms({"sm": "sm90,sm89"}) == ("sm90", "sm89")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_every_component_of_a_real_checkpoint_builds(component, tiny_artifact_int8, tmp_path):
    import shutil

    from intaglio.exporters.lowering import Job
    from intaglio.profiles.family import load_family

    manifest = tiny_artifact_int8.manifest
    record, folder = manifest.components[component], tmp_path / component
    shutil.copytree(tiny_artifact_int8.component(component), folder)
    job = Job(
        folder=folder,
        component=component,
        inputs=record.inputs,
        outputs=record.outputs,
        shapes=manifest.shapes,
        contract=load_family(manifest.family).contract[component],
        dtype="float16",
        format=record.format,
        packed_bytes=(folder / "model.onnx.data").stat().st_size,
        options={"sm": "sm89"},
    )
    lowered = LOWERING.lower(job)
    (name,) = lowered.engines
    assert (folder / name).stat().st_size == lowered.engines[name]["bytes"] > 0
    assert lowered.engines[name]["sm"] == "sm89"
    assert lowered.facts["layers"]


@needs_rtx
@pytest.mark.parametrize("kind", [k for k in KINDS if k != INSIDE])
def test_plans_without_fixed_weights_are_tried_and_what_the_builder_says_is_passed_on(kind):
    if tensorrt_api.present_gpu() is not None:
        pytest.skip("with a GPU in the machine the builder may make one")
    with pytest.raises(Unsupported) as refusal:
        LOWERING.check({"sm": "sm89", "weights": kind})
    text = str(refusal.value)
    assert text.startswith(f"tensorrt.weights={kind} is not supported for sm89: tensorrt-rtx {rtx.__version__}")
    assert "refuses it without that GPU: " in text
    assert text.endswith("use --set tensorrt.weights=inside")
    assert tried("tensorrt-rtx", "DIRECT_IO", "sm89")[1] == "", "the trial itself makes plans"


@needs_rtx
def test_a_kind_of_plan_that_does_not_exist():
    with pytest.raises(UsageError, match=r"tensorrt\.weights"):
        LOWERING.check({"sm": "sm89", "weights": "outside"})
