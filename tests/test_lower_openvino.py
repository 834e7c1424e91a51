"""OpenVINO executes the waist's formats from the waist's codes, with the activation arithmetic the recipe states."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from intaglio.exporters.lower_openvino import LOWERING, XML
from intaglio.exporters.lowering import Job
from intaglio.profiles.family import Contract
from intaglio.profiles.spec import TensorSpec
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.nf4 import CODE_BOOK
from intaglio.runtimes import processor
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.engine_openvino import GROUPS, OpenVinoEngine, executed, execution

openvino = pytest.importorskip("openvino")

EXACT = 2e-6  # relative L2 to NumPy's product with the decoded weight; measured at most 3.4e-7
ROUNDED = 5e-4  # static int8: values within 1e-6 of a tie may take the other code; measured at most 1.5e-4
ROUNDED_FP8 = 1e-2  # static fp8: OpenVINO rounds to float16 on the way, 0.4 % of the codes differ; measured 5.7e-3
DYNAMIC = (1e-3, 8e-3)  # int8 activations in groups of 32; measured 3.4e-3 to 5.3e-3
MEMORY = {"int8": 0.40, "int4": 0.30, "nf4": 0.30}  # growth of the process, fp32 = 1; measured 0.33, 0.23, 0.23
K, N, TOKENS = 256, 96, 24
PACKED = {"int8": "i8", "int4": "i4", "int4-32": "i4", "int4-128": "i4", "nf4": "nf4", "nf4-double": "nf4"}
FP8 = ("fp8", "fp8-weight-only")
WEIGHT_FORMATS = [name for name, row in FORMATS.items() if row.codec]


class Waist:
    """A graph in the forms the quantizer writes."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def node(self, kind, *inputs, domain="", **attributes):
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, array, dtype=None, shape=None):
        name = f"constant_{len(self.initializers)}"
        tensor = (
            numpy_helper.from_array(np.asarray(array), name)
            if dtype is None
            else helper.make_tensor(name, dtype, shape, array, raw=True)
        )
        self.initializers.append(tensor)
        return name

    def weight(self, weight, name, axis=1):
        """The node that yields the decoded weight, and what NumPy decodes."""
        pair, block = codec(name), FORMATS[name].block
        tensors = pair.encode(weight, axis)
        decoded = pair.decode(tensors, weight.shape, axis)
        parts = []
        for role, (dtype, shape) in pair.layout(weight.shape, axis).items():
            raw = tensors[role]
            if dtype == "INT4":
                nibbles = raw.reshape(-1).view(np.uint8) & 15
                raw = nibbles[::2] | nibbles[1::2] << 4
            parts.append(self.constant(np.ascontiguousarray(raw).tobytes(), T.DataType.Value(dtype), shape))
        if name.startswith("nf4"):
            sizes = {"block_size": block, "K": weight.shape[0], "N": weight.shape[1]}
            return self.node("DequantizeNF4", *parts, domain="intaglio", **sizes), decoded
        blocked = {"axis": 0, "block_size": block} if block else {"axis": axis}
        return self.node("DequantizeLinear", *parts, **blocked), decoded

    def static(self, x, scale, dtype=T.INT8):
        pair = self.constant(np.float32(scale)), self.constant(b"\0", dtype, ())
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *pair), *pair)

    def linear(self, x, weight, name):
        dequantized, decoded = self.weight(weight, name)
        product = self.node("MatMul", x, dequantized)
        return self.node("Add", product, self.constant(np.ones(weight.shape[1], np.float32))), decoded


def build(folder, waist, output, shape, result=None, dtype="float32"):
    """Write the graph of one input `shape` and one output `result` (or a row of N for each of the input), lower it."""
    folder.mkdir(exist_ok=True)
    specs = (TensorSpec(name="x", dtype=dtype, shape=shape),)
    kind = {"float32": T.FLOAT, "int64": T.INT64}[dtype]
    graph = helper.make_graph(
        waist.nodes,
        "component",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(output, T.FLOAT, None)],
        waist.initializers,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("intaglio", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    outputs = (TensorSpec(name=output, dtype="float32", shape=result or (*shape[:-1], N)),)
    job = Job(
        folder=folder,
        component="component",
        inputs=specs,
        outputs=outputs,
        shapes={},
        contract=Contract(),
        dtype="float32",
        format="none",
        packed_bytes=0,
        options={},
    )
    return LOWERING.lower(job)


def load(folder, activations="exact"):
    record = SimpleNamespace(
        inputs=(), outputs=(), quantization=SimpleNamespace(activations=activations) if activations else None
    )
    manifest = SimpleNamespace(
        components={"component": record},
        contract={"component": {"activations_scale_factor": 0.0}},
        dtypes={"openvino": {"component": "float32"}},
    )
    artifact = SimpleNamespace(manifest=manifest, component=lambda name: folder)
    return OpenVinoEngine(artifact, "component", EngineOptions(threads=1))


def run(engine, x):
    return engine.compiled({"x": x})[0]


def seen(engine):
    return executed(engine.compiled, engine.group)


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def fake(x, scale):
    """What QuantizeLinear and DequantizeLinear make of x."""
    return np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.fixture
def x(random):
    return random.standard_normal((2, TOKENS, K), dtype=np.float32)


def constant_bytes(folder, kind):
    """Raw bytes of the one Constant of an element type in the IR."""
    model = openvino.Core().read_model(folder / XML)
    found = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    (codes,) = (op for op in found if op.get_element_type().get_type_name() == kind)
    return bytes(codes.data.view(np.uint8))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_ir_holds_the_codes_of_the_graph(name, tmp_path, random):
    waist = Waist()
    output, _ = waist.linear("x", random.standard_normal((K, N), dtype=np.float32), name)
    codes = waist.initializers[0].raw_data
    lowered = build(tmp_path / "c", waist, output, ("batch", "tokens", K))
    kind = "f8e4m3" if name in FP8 else PACKED.get(name, "i8")
    if kind == "nf4":
        pairs = np.frombuffer(codes, np.uint8)
        codes = (pairs << 4 | pairs >> 4).astype(np.uint8).tobytes()
    assert constant_bytes(tmp_path / "c", kind) == codes
    assert lowered.facts["constants"][kind] == len(codes)
    assert {p.name for p in (tmp_path / "c").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "openvino_model.xml",
        "openvino_model.bin",
    }


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_exact_components_multiply_with_the_decoded_weight(name, tmp_path, random, x):
    waist = Waist()
    output, decoded = waist.linear("x", random.standard_normal((K, N), dtype=np.float32), name)
    build(tmp_path / "c", waist, output, ("batch", "tokens", K))
    engine = load(tmp_path / "c")
    assert error(run(engine, x), x @ decoded + 1) < EXACT
    # fp8 is decoded when the model is loaded: stored in fewer bytes, computed in float
    wanted = "f32" if name in FP8 else f"{PACKED.get(name, 'i8')} weights"
    assert seen(engine) == {f"FullyConnected {wanted}": 1}


def test_nf4_has_the_same_sixteen_values():
    tensor = openvino.Tensor(openvino.Type.nf4, openvino.Shape([16]))
    codes = np.arange(16, dtype=np.uint8)
    tensor.data[:] = codes[::2] | codes[1::2] << 4
    decoded = openvino.opset13.convert(openvino.op.Constant(tensor), "f32")
    values = openvino.Core().compile_model(openvino.Model([decoded], [], "values"), "CPU")({})[0]
    np.testing.assert_array_equal(values, CODE_BOOK)


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
@pytest.mark.parametrize(
    ("inputs", "packed"), [(320, True), (288, True), (40, True), (36, True), (34, False), (7, False)]
)
def test_nf4_blocks_may_end_inside_a_row(name, inputs, packed, tmp_path, random):
    waist = Waist()
    output, decoded = waist.linear("x", random.standard_normal((inputs, 33), dtype=np.float32), name)
    build(tmp_path / "c", waist, output, ("batch", "tokens", inputs), ("batch", "tokens", 33))
    engine = load(tmp_path / "c")
    x = random.standard_normal((2, TOKENS, inputs), dtype=np.float32)
    assert error(run(engine, x), x @ decoded + 1) < EXACT
    assert seen(engine) == {"FullyConnected nf4 weights" if packed else "FullyConnected f32": 1}


@pytest.mark.parametrize("name", PACKED)
def test_dynamic_activations_are_quantized_in_rows(name, tmp_path, random, x):
    waist = Waist()
    output, decoded = waist.linear("x", random.standard_normal((K, N), dtype=np.float32), name)
    build(tmp_path / "c", waist, output, ("batch", "tokens", K))
    engine = load(tmp_path / "c", "dynamic-per-token")
    found = run(engine, x)
    if name.startswith("nf4") or not processor.dot_products():  # no integer product with code books, or none at all
        assert error(found, x @ decoded + 1) < EXACT
        assert seen(engine) == {f"FullyConnected {PACKED[name]} weights": 1}
    else:
        assert DYNAMIC[0] < error(found, x @ decoded + 1) < DYNAMIC[1]
        assert seen(engine) == {f"FullyConnected {PACKED[name]} weights, activations i8 per row in groups of 32": 1}
    louder = np.concatenate([x[:1], x[1:] * 6])
    np.testing.assert_array_equal(run(engine, louder)[:1], found[:1])
    np.testing.assert_array_equal(run(engine, x[:1]), found[:1])
    np.testing.assert_array_equal(run(engine, x[:1, :5]), found[:1, :5])


def test_rows_shorter_than_a_group_stay_float_and_are_not_claimed_to_be_quantized(tmp_path, random):
    for inputs, quantized in ((24, False), (40, processor.dot_products())):
        waist = Waist()
        output, decoded = waist.linear("x", random.standard_normal((inputs, N), dtype=np.float32), "int8")
        folder = tmp_path / str(inputs)
        build(folder, waist, output, ("batch", "tokens", inputs))
        engine = load(folder, "dynamic-per-token")
        x = random.standard_normal((2, TOKENS, inputs), dtype=np.float32)
        assert (error(run(engine, x), x @ decoded + 1) > DYNAMIC[0]) == quantized
        assert any("activations i8" in name for name in seen(engine)) == quantized


@pytest.mark.parametrize("activations", [*GROUPS, None])
def test_the_engine_sets_and_checks_the_arithmetic(activations, tmp_path, random):
    waist = Waist()
    output, _ = waist.linear("x", random.standard_normal((K, N), dtype=np.float32), "int8")
    build(tmp_path / "c", waist, output, ("batch", "tokens", K))
    engine = load(tmp_path / "c", activations)
    group = int(engine.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    assert group == (32 if activations == "dynamic-per-token" else 0)
    assert engine.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def gelu(x):
    from scipy.special import erf

    return (0.5 * x * (1 + erf(x / np.sqrt(2)))).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def plain(waist, weight, x):
    output, decoded = waist.linear(waist.static("x", 0.03), weight, "w8a8")
    return output, fake(x, 0.03) @ decoded + 1, 1


def smoothed(waist, weight, x):
    factors = np.linspace(0.5, 2, K, dtype=np.float32)
    scaled = waist.node("Mul", "x", waist.constant(factors))
    output, decoded = waist.linear(waist.static(scaled, 0.03), weight, "w8a8")
    return output, fake(x * factors, 0.03) @ decoded + 1, 1


def shared_by_three(waist, weight, x):
    quantized, total, wanted = waist.static("x", 0.03), None, 0.0
    for turn in range(3):
        output, decoded = waist.linear(quantized, np.roll(weight, turn * 5, axis=0), "w8a8")
        total = output if total is None else waist.node("Add", total, output)
        wanted = wanted + fake(x, 0.03) @ decoded + 1
    return total, wanted, 3


def gelu_and_residual(waist, weight, x):
    hidden, first = waist.linear(waist.static("x", 0.03), weight, "w8a8")
    inner, second = waist.linear(waist.static(waist.node("Gelu", hidden), 0.5), weight.T, "w8a8")
    wanted = fake(gelu(fake(x, 0.03) @ first + 1), 0.5) @ second + 1 + x
    return waist.node("Add", "x", inner), wanted, 2


def geglu(waist, weight, x):
    hidden, first = waist.linear(waist.static("x", 0.03), weight, "w8a8")
    halves = [
        waist.node("Slice", hidden, *(waist.constant(np.array([v])) for v in (start, start + N // 2, -1)))
        for start in (0, N // 2)
    ]
    product = waist.node("Mul", halves[0], waist.node("Gelu", halves[1]))
    output, second = waist.linear(waist.static(product, 3.0), weight.T[: N // 2], "w8a8")
    value = fake(x, 0.03) @ first + 1
    return output, fake(value[..., : N // 2] * gelu(value[..., N // 2 :]), 3.0) @ second + 1, 2


def low_rank_branch(waist, weight, x):
    left, right = weight[:, :8].astype(np.float16), weight[:8].astype(np.float16)
    floats = [waist.node("Cast", waist.constant(part), to=T.FLOAT) for part in (left, right)]
    branch = waist.node("MatMul", waist.node("MatMul", "x", floats[0]), floats[1])
    output, decoded = waist.linear(waist.static("x", 0.03), weight, "w8a8")
    wanted = fake(x, 0.03) @ decoded + 1 + x @ left.astype(np.float32) @ right.astype(np.float32)
    return waist.node("Add", output, branch), wanted, 1


STATIC = [plain, smoothed, shared_by_three, gelu_and_residual, geglu, low_rank_branch]


@pytest.fixture(params=["this processor", "no VNNI"])
def static_product(request, tmp_path, monkeypatch):
    """What a static product executes as: codes with codes, or floats with codes where integer sums would saturate."""
    if request.param == "no VNNI":
        facts = tmp_path / "cpuinfo"
        facts.write_text("flags : sse4_2 avx2", encoding="utf-8")
        monkeypatch.setattr(processor, "CPU_FACTS", facts)
    return "weights" if processor.products_saturate() else "x i8"


@pytest.mark.parametrize("pattern", STATIC)
@pytest.mark.parametrize("tokens", [True, False])
def test_static_int8_multiplies_codes_with_codes(pattern, tokens, static_product, tmp_path, random, x):
    """Linears of a transformer block, also with inputs [batch, K] as of the time embedding."""
    waist = Waist()
    x = x if tokens else x[:, 0]
    output, wanted, products = pattern(waist, random.standard_normal((K, N), dtype=np.float32), x)
    axes = ("batch", "tokens") if tokens else ("batch",)
    build(tmp_path / "c", waist, output, (*axes, K), (*axes, wanted.shape[-1]))
    engine = load(tmp_path / "c", "static")
    assert error(run(engine, x), wanted) < ROUNDED
    floats = {"FullyConnected f32": 2} if pattern is low_rank_branch else {}
    assert seen(engine) == {**floats, f"FullyConnected i8 {static_product}": products}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("static", [True, False])
def test_convolutions_are_integer_with_static_inputs_and_float_without(size, static, static_product, tmp_path, random):
    import torch

    waist, channels = Waist(), 32
    weight = random.standard_normal((channels, channels, size, size), dtype=np.float32)
    x = random.standard_normal((2, channels, 10, 12), dtype=np.float32)
    active = waist.node("Mul", "x", waist.node("Sigmoid", "x"))
    dequantized, decoded = waist.weight(weight, "int8", axis=0)
    source = waist.static(active, 0.03) if static else active
    bias = waist.constant(np.ones(channels, np.float32))
    conv = waist.node("Conv", source, dequantized, bias, pads=[size // 2] * 4)
    shape = ("batch", channels, "height", "width")
    build(tmp_path / "c", waist, waist.node("Add", "x", conv), shape, shape)
    engine = load(tmp_path / "c", "static" if static else "exact")
    fed = fake(silu(x), 0.03) if static else silu(x)
    wanted = torch.nn.functional.conv2d(torch.from_numpy(fed), torch.from_numpy(decoded), padding=size // 2).numpy()
    assert error(run(engine, x), wanted + 1 + x) < (ROUNDED if static else EXACT)
    integer = static and static_product == "x i8"
    assert seen(engine) == {"Convolution i8 x i8" if integer else "Convolution f32": 1}


def test_smoothed_inputs_of_convolutions_are_rounded_by_channel(static_product, tmp_path, random):
    """Without VNNI that is OpenVINO's FakeQuantize, whose AVX2 kernel takes one channel's range for all of them."""
    import torch

    waist, channels = Waist(), 32
    weight = random.standard_normal((channels, channels, 3, 3), dtype=np.float32)
    x = random.standard_normal((2, channels, 10, 12), dtype=np.float32)
    factors = np.linspace(0.5, 2, channels, dtype=np.float32).reshape(1, channels, 1, 1)
    dequantized, decoded = waist.weight(weight, "w8a8", axis=0)
    padded = waist.node("Pad", "x", waist.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1])))
    source = waist.static(waist.node("Mul", padded, waist.constant(factors)), 0.03)
    shape = ("batch", channels, "height", "width")
    build(tmp_path / "c", waist, waist.node("Conv", source, dequantized, strides=[2, 2]), shape, shape)
    engine = load(tmp_path / "c", "static")
    fed = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1))) * factors
    rounded = torch.from_numpy(fake(fed, 0.03))
    wanted = torch.nn.functional.conv2d(rounded, torch.from_numpy(decoded), stride=2).numpy()
    assert error(run(engine, x), wanted) < ROUNDED
    assert seen(engine) == {"Convolution i8 x i8" if static_product == "x i8" else "Convolution f32": 1}


def test_static_fp8_inputs_are_rounded_to_fp8(tmp_path, random, x):
    import ml_dtypes

    waist, scale = Waist(), np.float32(0.01)
    output, decoded = waist.linear(
        waist.static("x", scale, T.FLOAT8E4M3FN), random.standard_normal((K, N), dtype=np.float32), "fp8"
    )
    build(tmp_path / "c", waist, output, ("batch", "tokens", K))
    engine = load(tmp_path / "c", "static")
    rounded = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert error(run(engine, x), rounded @ decoded + 1) < ROUNDED_FP8 < error(x @ decoded + 1, rounded @ decoded + 1)
    assert seen(engine) == {"FullyConnected f32": 1}


def test_an_embedding_gathers_codes(tmp_path, random):
    waist = Waist()
    table, decoded = waist.weight(random.standard_normal((300, 64), dtype=np.float32), "int8", axis=0)
    output = waist.node("Gather", table, "x")
    build(tmp_path / "c", waist, output, ("batch", "tokens"), ("batch", "tokens", 64), "int64")
    engine = load(tmp_path / "c")
    ids = random.integers(0, 300, (2, 7))
    np.testing.assert_array_equal(run(engine, ids), decoded[ids])
    assert seen(engine) == {"Gather i8 table": 1}


def test_openvinos_own_cache_of_models_which_has_no_checksum_is_off():
    from intaglio.runtimes.engine_openvino import compile_settings

    assert compile_settings("CPU", 1, "f32", 0)["CACHE_DIR"] == ""


GROWTH = """
import sys, numpy as np, openvino
from intaglio.runtimes.engine_openvino import compile_settings
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", compile_settings("CPU", 1, "f32", 0))
compiled({"x": np.ones((1, 64, 1024), np.float32)})
print(peak() - before)
"""


def stack(name, layers, random):
    """Linears of random codes, 1024 x 1024 each."""
    waist, x = Waist(), "x"
    for _ in range(layers):
        scale = waist.constant(np.full(1024, 1e-3, np.float32))
        if name == "none":
            weight = waist.constant(random.standard_normal((1024, 1024), dtype=np.float32))
        elif name == "int8":
            weight = waist.node(
                "DequantizeLinear", waist.constant(random.bytes(1 << 20), T.INT8, (1024, 1024)), scale, axis=1
            )
        elif name == "int4":
            scales = waist.constant(np.full((16, 1024), 1e-3, np.float32))
            codes = waist.constant(random.bytes(1 << 19), T.INT4, (1024, 1024))
            weight = waist.node("DequantizeLinear", codes, scales, axis=0, block_size=64)
        else:
            codes = waist.constant(random.bytes(1 << 19), T.UINT8, (1 << 19,))
            peaks = waist.constant(np.full(1 << 14, 1e-3, np.float32))
            weight = waist.node("DequantizeNF4", codes, peaks, domain="intaglio", block_size=64, K=1024, N=1024)
        x = waist.node("Tanh", waist.node("MatMul", x, weight))
    return waist, x


def test_packed_weights_stay_packed_in_memory(tmp_path, random):
    """Growth of the peak over the bare process, loaded and run once: 40 layers, 168 MB in float32."""
    grown = {}
    for name in ("none", *MEMORY):
        waist, output = stack(name, 40, random)
        build(tmp_path / name, waist, output, ("batch", "tokens", 1024), ("batch", "tokens", 1024))
        command = [sys.executable, "-c", GROWTH, str(tmp_path / name / XML)]
        grown[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {n: grown[n] / grown["none"] for n in MEMORY if grown[n] > grown["none"] * MEMORY[n]} == {}


def test_execution_counts_what_an_artifact_runs(tiny_artifact_int8):
    counts = execution(tiny_artifact_int8, "unet")
    assert counts["FullyConnected i8 weights"] > 0 and counts["Convolution f32"] > 0
    assert not any("i8 x i8" in name or "activations" in name for name in counts)
