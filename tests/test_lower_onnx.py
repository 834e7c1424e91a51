"""ONNX Runtime executes the waist's formats from the waist's codes, in the activation arithmetic of the recipe."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from intaglio.exporters.lower_onnx import LOWERING
from intaglio.profiles.spec import TensorSpec
from intaglio.quantize.formats import FORMATS, codec
from intaglio.runtimes import processor
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.engine_onnxruntime import LOWERED, OnnxRuntimeEngine, execution

pytest.importorskip("onnxruntime")

EXACT = 2e-6  # relative L2 to NumPy's product with the decoded weight; measured at most 4.0e-7
DYNAMIC = (1e-3, 8e-3)  # int8 activations in blocks of a row; measured 4.3e-3 to 6.0e-3
SAME_ROW = 1e-6  # a row alone and beside others: another kernel for another number of rows; measured 1.8e-7
MEMORY = {
    "int8": 0.70,
    "int4": 0.50,
    "nf4": 0.50,
    "fp8-weight-only": 0.70,
}  # growth of the process, fp32 = 1; measured 0.35, 0.39, 0.24, 0.35
K, N, TOKENS = 256, 96, 24
STEP = 4 / 127
SHARED, OWN = "model.onnx.data", f"{LOWERED}.data"
INT4 = "MatMulNBits, 4-bit weights, float32"
LATE = "MatMul float32, {} weights decoded on every call"
BNB = "MatMulBnb4, nf4 weights"
EXECUTED = {
    "int8": LATE.format("int8"),
    "int4": INT4,
    "int4-32": INT4,
    "int4-128": INT4,
    "nf4": BNB,
    "nf4-double": BNB,
    "fp8-weight-only": LATE.format("float8e4m3fn"),
}
SHAPES = {"tokens": (2, TOKENS, K), "vector": (3, K), "image": (2, 5, 7, K)}


class Waist:
    """A graph in the forms the quantizer writes."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def node(self, kind, *inputs, domain="", **attributes):
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, array):
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, weight, name, axis=1):
        """The node that yields the decoded weight, and what NumPy decodes."""
        pair, block = codec(name), FORMATS[name].block
        tensors = pair.encode(weight, axis)
        parts = []
        for role, (dtype, shape) in pair.layout(weight.shape, axis).items():
            raw = tensors[role]
            if dtype == "INT4":
                nibbles = raw.reshape(-1).view(np.uint8) & 15
                raw = nibbles[::2] | nibbles[1::2] << 4
            parts.append(f"constant_{len(self.initializers)}")
            raw = np.ascontiguousarray(raw).tobytes()
            self.initializers.append(helper.make_tensor(parts[-1], T.DataType.Value(dtype), shape, raw, raw=True))
        decoded = pair.decode(tensors, weight.shape, axis)
        if name.startswith("nf4"):
            sizes = {"block_size": block, "K": weight.shape[0], "N": weight.shape[1]}
            return self.node("DequantizeNF4", *parts, domain="intaglio", **sizes), decoded
        blocked = {"axis": 0, "block_size": block} if block else {"axis": axis}
        return self.node("DequantizeLinear", *parts, **blocked), decoded

    def static(self, x, dtype=T.INT8):
        zero = f"constant_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(zero, dtype, (), b"\0", raw=True))
        pair = self.constant(np.float32(STEP)), zero
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *pair), *pair)

    def linear(self, x, weight, name):
        dequantized, decoded = self.weight(weight, name)
        product = self.node("MatMul", x, dequantized)
        return self.node("Add", product, self.constant(np.ones(weight.shape[1], np.float32))), decoded


class Component:
    """A component that was written, lowered and can be loaded: input x, one output."""

    def __init__(self, folder, waist, output, x, activations="exact"):
        self.folder = folder
        shape = (*(f"d{i}" for i in range(x.ndim - 1)), x.shape[-1])
        if x.ndim == 4 and "Conv" in "".join(n.op_type for n in waist.nodes):
            shape = ("b", x.shape[1], "h", "w")
        kind = {"float32": T.FLOAT, "int64": T.INT64}[x.dtype.name]
        graph = helper.make_graph(
            waist.nodes,
            "component",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, T.FLOAT, [f"o{i}" for i in range(x.ndim + (kind == T.INT64))])],
            waist.initializers,
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("intaglio", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location=SHARED, size_threshold=1024)
        self.stored = {name: (folder / name).read_bytes() for name in ("model.onnx", SHARED)}
        job = SimpleNamespace(folder=folder, dtype="float32", activations=activations, progress=lambda text: None)
        self.facts = LOWERING.lower(job).facts
        record = SimpleNamespace(
            inputs=(TensorSpec(name="x", dtype=x.dtype.name, shape=shape),),
            outputs=(TensorSpec(name=output, dtype="float32", shape=()),),
            quantization=SimpleNamespace(activations=activations),
        )
        manifest = SimpleNamespace(components={"c": record}, dtypes={"onnx": {"c": "float32"}})
        self.artifact = SimpleNamespace(manifest=manifest, component=lambda name: folder)

    def run(self, x, threads=1):
        engine = OnnxRuntimeEngine(self.artifact, "c", EngineOptions(threads=threads))
        return next(iter(engine.run({"x": x}).values()))

    def executed(self):
        return execution(self.artifact, "c")

    def files(self):
        return {path.name for path in self.folder.iterdir()}


def error(found, wanted):
    assert found.shape == wanted.shape
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def fake(x, dtype="int8"):
    """What QuantizeLinear and DequantizeLinear make of x."""
    scaled = x / np.float32(STEP)
    if dtype == "int8":
        return np.clip(np.rint(scaled), -128, 127) * np.float32(STEP)
    return scaled.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(STEP)


@pytest.fixture
def random():
    return np.random.default_rng(7)


@pytest.fixture
def weight(random):
    return random.standard_normal((K, N), dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXECUTED)
def test_exact_components_multiply_with_the_decoded_weight(name, shape, tmp_path, random, weight):
    x, waist = random.standard_normal(SHAPES[shape], dtype=np.float32), Waist()
    output, decoded = waist.linear("x", weight, name)
    component = Component(tmp_path, waist, output, x)
    assert error(component.run(x), x @ decoded + 1) < EXACT
    assert component.executed() == {EXECUTED[name]: 1}


@pytest.mark.parametrize("name", EXECUTED)
def test_lowered_graphs_read_the_codes_where_they_lie(name, tmp_path, random, weight):
    x, waist = random.standard_normal(SHAPES["tokens"], dtype=np.float32), Waist()
    output, _ = waist.linear("x", weight, name)
    component = Component(tmp_path, waist, output, x)
    added = set() if name.startswith("int4") else {LOWERED, OWN} if name == "nf4-double" else {LOWERED}
    assert component.files() == {"model.onnx", SHARED} | added
    assert component.stored == {n: (tmp_path / n).read_bytes() for n in component.stored}
    assert bool(added) == ("onnxruntime" in component.facts)
    if added:
        lowered = onnx.load(tmp_path / LOWERED, load_external_data=False).graph
        places = {t.name: {e.key: e.value for e in t.external_data} for t in lowered.initializer}
        codes = waist.initializers[0]
        place = places[codes.name]
        start, length = int(place["offset"]), int(place["length"])
        assert place["location"] == SHARED
        assert component.stored[SHARED][start : start + length] == codes.raw_data
        assert all(n.domain != "intaglio" for n in lowered.node)
    if name == "nf4-double":
        assert (tmp_path / OWN).stat().st_size == 4 * K * N // 64


def test_nf4_decodes_bit_for_bit_also_where_blocks_cross_rows(tmp_path, random):
    eye, waist = np.eye(100, dtype=np.float32), Waist()
    dequantized, decoded = waist.weight(random.standard_normal((100, 60), dtype=np.float32), "nf4-double")
    component = Component(tmp_path, waist, waist.node("MatMul", "x", dequantized), eye)
    np.testing.assert_array_equal(component.run(eye), decoded)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_dynamic_components_quantize_activations_by_row(name, tmp_path, random, weight):
    x, waist = random.standard_normal((1, TOKENS, K), dtype=np.float32), Waist()
    output, decoded = waist.linear("x", weight, name)
    component = Component(tmp_path, waist, output, x, "dynamic-per-token")
    assert component.executed() == {f"MatMulNBits, {name[3]}-bit weights, activations int8 per row": 1}
    alone = component.run(x)
    assert DYNAMIC[0] < error(alone, x @ decoded + 1) < DYNAMIC[1]
    loud = np.concatenate([x, 6 * random.standard_normal(x.shape, dtype=np.float32)])
    assert error(component.run(loud)[:1], alone) < SAME_ROW


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), [("w8a8", T.INT8), ("fp8", T.FLOAT8E4M3FN)])
def test_static_products_round_inputs_as_the_waist_says(name, dtype, shape, tmp_path, random, weight, monkeypatch):
    x, waist = 2 * random.standard_normal(SHAPES[shape], dtype=np.float32), Waist()
    x.flat[:4] = [100, -100, STEP / 2, -127.5 * STEP]  # beyond both ends, and ties
    quantized = waist.static("x", dtype)
    first, decoded = waist.linear(quantized, weight, name)
    second, other = waist.linear(quantized, weight[:, ::-1] * 3, name)  # q and k share what was quantized
    component = Component(tmp_path, waist, waist.node("Add", first, second), x, "static")
    rounded = fake(x, "int8" if dtype == T.INT8 else "fp8")
    wanted = rounded @ decoded + rounded @ other + 2
    assert error(component.run(x), wanted) < EXACT
    assert error(rounded, x) > 1e-3  # the test would notice activations that stay float
    counts = {"MatMulIntegerToFloat, int8 x int8": 2} if dtype == T.INT8 else {LATE.format("float8e4m3fn"): 2}
    assert component.executed() == counts
    if dtype == T.INT8:
        kinds = [n.op_type for n in onnx.load(tmp_path / LOWERED, load_external_data=False).graph.node]
        assert kinds.count("QuantizeLinear") == 1
        assert kinds.count("DequantizeLinear") == 0
        assert kinds.count("Add") == 1  # both biases went along
    monkeypatch.setattr(processor, "CPU_FACTS", tmp_path / "nowhere")  # any x64 processor
    assert error(component.run(x), wanted) < EXACT


def test_the_low_rank_branch_sees_the_input_before_it_is_rounded(tmp_path, random, weight):
    x, waist = random.standard_normal(SHAPES["tokens"], dtype=np.float32), Waist()
    smooth = random.uniform(0.5, 2, K).astype(np.float32)
    down, up = (random.standard_normal(s).astype(np.float16) for s in ((K, 8), (8, N)))
    scaled = waist.node("Mul", "x", waist.constant(smooth))
    dequantized, decoded = waist.weight(weight, "w8a8")
    product = waist.node("MatMul", waist.static(scaled), dequantized)
    casts = [waist.node("Cast", waist.constant(v), to=T.FLOAT) for v in (down, up)]
    branch = waist.node("MatMul", waist.node("MatMul", scaled, casts[0]), casts[1])
    component = Component(tmp_path, waist, waist.node("Add", product, branch), x, "static")
    smoothed = x * smooth
    wanted = fake(smoothed) @ decoded + smoothed @ down.astype(np.float32) @ up.astype(np.float32)
    assert error(component.run(x), wanted) < EXACT
    assert component.executed() == {"MatMul float32": 2, "MatMulIntegerToFloat, int8 x int8": 1}


CONVOLUTIONS = {
    "3x3": ((24, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
    "stride 2, one-sided padding": ((24, 64, 3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    "dilated": ((24, 64, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "oblong": ((24, 64, 1, 5), {"pads": [0, 2, 0, 2], "strides": [1, 3]}),
    "1x1, stride 2": ((24, 64, 1, 1), {"strides": [2, 2]}),
}


def torch_conv(x, weight, bias, attributes):
    import torch

    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    options = {"stride": attributes.get("strides", 1), "dilation": attributes.get("dilations", 1)}
    weights = torch.from_numpy(weight).double(), torch.from_numpy(bias).double()
    return torch.nn.functional.conv2d(padded, *weights, **options).numpy()


@pytest.mark.parametrize("name", ["int8", "w8a8"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, name, tmp_path, random):
    shape, attributes = CONVOLUTIONS[case]
    x, bias = random.standard_normal((2, 64, 11, 14), dtype=np.float32), np.arange(24, dtype=np.float32)
    waist, static = Waist(), name == "w8a8"
    dequantized, decoded = waist.weight(random.standard_normal(shape, dtype=np.float32), name, axis=0)
    source = waist.static("x") if static else "x"
    output = waist.node("Conv", source, dequantized, waist.constant(bias), kernel_shape=shape[2:], **attributes)
    component = Component(tmp_path, waist, output, x, "static" if static else "exact")
    assert error(component.run(x), torch_conv(fake(x) if static else x, decoded, bias, attributes)) < EXACT
    late = "Conv float32, int8 weights decoded on every call"
    assert component.executed() == {"MatMulIntegerToFloat, int8 x int8" if static else late: 1}
    assert component.files() == {"model.onnx", SHARED, LOWERED}  # the codes are turned at load, not stored twice


def test_a_depthwise_convolution_keeps_float_arithmetic_on_rounded_inputs(tmp_path, random, monkeypatch):
    x, waist = random.standard_normal((2, 16, 9, 9), dtype=np.float32), Waist()
    dequantized, decoded = waist.weight(random.standard_normal((16, 1, 3, 3), dtype=np.float32), "w8a8", axis=0)
    shapes = (128, 16, 1, 1), (128, 128, 1, 1)  # as many channels twice: what stands for them is not to be shared
    later = [waist.weight(random.standard_normal(s, dtype=np.float32), "int8", axis=0) for s in shapes]
    output = waist.node("Conv", waist.static("x"), dequantized, group=16, kernel_shape=(3, 3))
    for more, _ in later:
        output = waist.node("Conv", output, more)
    component = Component(tmp_path, waist, output, x, "static")
    import torch

    wanted = torch.nn.functional.conv2d(torch.from_numpy(fake(x)), torch.from_numpy(decoded), groups=16)
    for _, pointwise in later:
        wanted = torch.nn.functional.conv2d(wanted, torch.from_numpy(pointwise))
    wanted = wanted.numpy()
    assert error(component.run(x), wanted) < EXACT
    late = "Conv float32, int8 weights decoded on every call"
    assert component.executed() == {late: 3, "DequantizeLinear of activations": 1}
    monkeypatch.setattr(processor, "CPU_FACTS", tmp_path / "nowhere")  # any x64 processor
    assert error(component.run(x), wanted) < EXACT


def test_a_table_is_looked_up_in_codes(tmp_path, random):
    ids, waist = random.integers(0, 500, (2, 77)), Waist()
    dequantized, decoded = waist.weight(random.standard_normal((500, 64), dtype=np.float32), "int8", axis=0)
    component = Component(tmp_path, waist, waist.node("Gather", dequantized, "x"), ids)
    np.testing.assert_array_equal(component.run(ids), decoded[ids])
    assert component.executed() == {"Gather of int8 codes": 1}


def test_a_graph_without_codes_is_left_alone(tmp_path, random, weight):
    x, waist = random.standard_normal(SHAPES["tokens"], dtype=np.float32), Waist()
    component = Component(tmp_path, waist, waist.node("MatMul", "x", waist.constant(weight)), x)
    assert component.files() == {"model.onnx", SHARED}
    assert component.executed() == {"MatMul float32": 1}
    assert error(component.run(x), x @ weight) < EXACT


PEAK = """
import sys
from types import SimpleNamespace
import numpy as np
from intaglio.profiles.spec import TensorSpec
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.engine_onnxruntime import OnnxRuntimeEngine
from intaglio.runtimes.host_memory import peak_bytes, resident_bytes
from pathlib import Path

x = TensorSpec(name="x", dtype="float32", shape=("b", "t", 1024))
y = TensorSpec(name=sys.argv[2], dtype="float32", shape=())
record = SimpleNamespace(inputs=(x,), outputs=(y,), quantization=None)
manifest = SimpleNamespace(components={"c": record}, dtypes={"onnx": {"c": "float32"}})
artifact = SimpleNamespace(manifest=manifest, component=lambda name: Path(sys.argv[1]))
import onnxruntime

before = resident_bytes()
engine = OnnxRuntimeEngine(artifact, "c", EngineOptions(threads=1))
for seed in range(2):
    engine.run({"x": np.full((2, 128, 1024), 0.1, np.float32)})
print(peak_bytes() - before)
"""


def peak_of(name, folder, layers=40, size=1024):
    """Bytes a process grows by, at its peak, that loads and runs `layers` linears of size x size."""
    folder.mkdir()
    waist, value = Waist(), "x"
    weight = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32) / 32
    if name == "none":
        dequantized = waist.constant(weight)
    else:
        dequantized, _ = waist.weight(weight, name)
    nodes, parts = list(waist.nodes), list(waist.initializers)
    for layer in range(layers):
        for part in parts if layer else ():  # not equal to the first: ONNX Runtime keeps one of equal tensors
            turned = part.raw_data[4 * layer :] + part.raw_data[: 4 * layer]
            copy = helper.make_tensor(f"{part.name}.{layer}", part.data_type, part.dims, turned, raw=True)
            waist.initializers.append(copy)
        for node in nodes if layer else ():
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            copy.name, copy.output[0] = f"{node.name}.{layer}", f"{node.output[0]}.{layer}"
            copy.input[:] = [f"{part}.{layer}" for part in node.input]
            waist.nodes.append(copy)
        value = waist.node("MatMul", value, f"{dequantized}.{layer}" if layer else dequantized)
    Component(folder, waist, value, np.zeros((2, 128, size), np.float32))
    command = [sys.executable, "-c", PEAK, str(folder), value]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux'")
def test_weights_stay_packed_in_memory(tmp_path):
    whole = peak_of("none", tmp_path / "none")
    shares = {name: peak_of(name, tmp_path / name) / whole for name in MEMORY}
    print(whole / 1e6, shares)
    assert all(share <= MEMORY[name] for name, share in shares.items()), shares
