"""Quantized components: what the files hold, what every engine makes of it, and the same codes everywhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_sd3
from onnx import TensorProto, helper
from partial import build_only

from intaglio.exporters.derive import contract_of, derive
from intaglio.exporters.parity import random_feeds, relative_error, untraced_sizes
from intaglio.exporters.quantization import calibrate_component
from intaglio.exporters.recipes import completed, needs_feeds, rules_of
from intaglio.exporters.store import DATA, GRAPH, weight_bindings
from intaglio.profiles.errors import UsageError
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.quantize.decode import codes_digest, decoded_weights, quantized_weights
from intaglio.quantize.feeds import Recorder
from intaglio.quantize.formats import FORMATS, codec
from intaglio.quantize.layers import PARAMETER, Rules, assign, find_layers
from intaglio.quantize.rewrite import quantize_graph
from intaglio.runtimes.engine import EngineOptions, load_engine
from intaglio.runtimes.probe import Place

CODED = [name for name, row in FORMATS.items() if row.codec]
COMPONENTS = ("unet", "vae_decoder", "text_encoder", "transformer")
FILES = {"unet": "unet", "vae_decoder": "vae", "text_encoder": "text_encoder", "transformer": "transformer"}
WITH_IR = ("text_encoder", "transformer")
EXACT = 1e-5  # relative L2 of an engine to torch on the decoded weights; measured 3.0e-6 at most
# The same where activations are rounded: a value beside the middle of two codes falls to either side, and such flips
# multiply from layer to layer; with one static layer there were none. Measured 2.5e-2 and 1.6e-3.
STATIC = {"w8a8": 1e-1, "fp8": 3e-2}
# relative L2 of a weight to the checkpoint's, of 16, 8 and 4 bits
LOSS = {"int8": 2e-2, "w8a8": 3e-2, "fp8": 4e-2, "int4": 1.7e-1, "nf4": 1.2e-1}


@dataclasses.dataclass(frozen=True)
class Source:
    """An unquantized component: its artifact, its checkpoint's weights by name, feeds and the answer of torch."""

    artifact: object
    weights: dict
    feeds: dict
    recorded: object
    component: str

    def recipe(self, name, **changes):
        return completed(self.component, ComponentRecipe(format=name, **changes), self.rules)

    @property
    def rules(self):
        return rules_of(contract_of(self.artifact, self.component))

    def run(self, artifact, backend):
        settings = {"precision": "float32"} if backend == "openvino" else {}
        engine = load_engine(backend, artifact, self.component, EngineOptions(settings=settings))
        try:
            (found,) = (
                engine.run(self.feeds).values()
                if len(engine.record.outputs) == 1
                else (np.concatenate([v.ravel() for v in engine.run(self.feeds).values()]),)
            )
            return found
        finally:
            engine.close()


@dataclasses.dataclass(frozen=True)
class Derived:
    """A quantized component and what calibration said."""

    source: Source
    artifact: object
    scales: dict
    recipe: ComponentRecipe

    @property
    def record(self):
        return self.artifact.manifest.components[self.source.component]

    @property
    def graph(self):
        return self.artifact.component(self.source.component) / GRAPH


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory):
    """The transformer of a tiny Stable Diffusion 3, and its checkpoint."""
    folder = tmp_path_factory.mktemp("mmdit")
    checkpoint = tiny_sd3.without_t5(folder / "checkpoint")
    return checkpoint, build_only(checkpoint, folder / "artifact", "transformer")


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    """A function: component to its `Source`."""
    from safetensors.numpy import load_file

    held = {}

    def made(component):
        if component not in held:
            if component == "transformer":
                checkpoint, artifact = request.getfixturevalue("mmdit")
            else:
                checkpoint, artifact = (request.getfixturevalue(f) for f in ("tiny_checkpoint", "tiny_artifact"))
            (file,) = (checkpoint / FILES[component]).glob("*.safetensors")
            record = artifact.manifest.components[component]
            feeds = random_feeds(record.inputs, untraced_sizes(artifact.manifest.shapes)[0])
            recorded = tmp_path_factory.mktemp("feeds") / "feeds.zip"
            recorder = Recorder(recorded)
            recorder.add(component, Place(), feeds)
            recorder.close()
            held[component] = Source(artifact, load_file(file), feeds, recorded, component)
        return held[component]

    return made


@pytest.fixture(scope="module")
def derived(source, tmp_path_factory):
    """A function: component, format and values of the recipe to its `Derived`, made once."""
    held = {}

    def made(component, name, **changes):
        whole = source(component)
        recipe = whole.recipe(name, **changes)
        key = (component, repr(recipe))
        if key not in held:
            contract = contract_of(whole.artifact, component)
            calibrated = {}
            if needs_feeds(recipe):
                calibrated[component] = calibrate_component(
                    whole.artifact, component, recipe, contract, whole.recorded, lambda text: None
                )
            targets = ("onnx", "openvino") if component in WITH_IR else ("onnx",)
            folder = tmp_path_factory.mktemp("derived") / "artifact"
            made = derive(whole.artifact, folder, {component: recipe}, calibrated, targets)
            held[key] = Derived(whole, made, calibrated[component].scales if calibrated else {}, recipe)
        return held[key]

    return made


def as_coded(weight, stored, smooth):
    """A checkpoint's weight as the codec is given it."""
    linear = stored.binding.transform == "transpose"
    value = weight.reshape(weight.shape[:2]).T if linear else weight
    if smooth is None:
        return np.ascontiguousarray(value)
    return value * (smooth[:, None] if value.ndim == 2 else smooth[None, :, None, None])


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", CODED)
def test_the_file_holds_what_the_codec_makes_of_the_checkpoint(name, component, derived):
    made = derived(component, name)
    decoded = {w.parameter: value for w, value in decoded_weights(made.artifact, component)}
    assert decoded
    for stored in quantized_weights(made.artifact, component):
        weight = made.source.weights[stored.parameter]
        scales = made.scales.get(stored.parameter)
        given = as_coded(weight, stored, scales.smooth if scales else None)
        pair = codec(stored.binding.format)
        wanted = pair.encode(given, stored.axis)
        assert list(wanted) == list(stored.tensors)
        for role, values in wanted.items():
            np.testing.assert_array_equal(stored.tensors[role], values, err_msg=f"{stored.parameter} {role}")
        if scales and scales.smooth is not None:
            np.testing.assert_array_equal(stored.smooth, (1 / scales.smooth).astype(np.float32))
        assert stored.activation == (np.float32(scales.activation) if scales and scales.activation else None)
        assert FORMATS[stored.binding.format].static == (stored.activation is not None)
        found = decoded[stored.parameter]
        loss = relative_error(found.reshape(weight.shape), weight)
        assert 1e-4 < loss < LOSS[stored.binding.format.split("-")[0]], stored.parameter


@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize("name", [n for n in CODED if FORMATS[n].storage != "UINT8"])
def test_decode_equals_onnx_dequantizelinear(name, component, derived):
    made = derived(component, name)
    model = onnx.load(made.graph)
    codes = {b.initializer: parameter for parameter, b in made.record.weights.items() if b.format != "none"}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes]
    used = {i for n in nodes for i in n.input}
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
    tensors = [t for t in model.graph.initializer if t.name in used]
    graph = helper.make_graph(nodes, "weights", [], outputs, tensors)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    found = dict(zip((codes[n.input[0]] for n in nodes), session_of(alone).run(None, {}), strict=True))
    stored = list(quantized_weights(made.artifact, component))
    assert len(stored) == len(found) > 0
    for weight in stored:
        np.testing.assert_array_equal(weight.decode(), found[weight.parameter], err_msg=weight.parameter)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", CODED)
def test_engines_compute_what_torch_computes_on_the_decoded_weights(name, component, derived):
    made = derived(component, name)
    static = made.record.quantization.activations == "static"
    assert static == (FORMATS[name].static and component != "text_encoder")
    reference = made.source.run(made.artifact, "torch")
    plain = made.source.run(made.source.artifact, "torch")
    loss = relative_error(reference, plain)
    assert 1e-3 < loss < 0.5  # the torch engine runs the codes, not the checkpoint; measured 8e-3 to 2.5e-1
    for backend in ("onnxruntime", "openvino") if component in WITH_IR else ("onnxruntime",):
        error = relative_error(made.source.run(made.artifact, backend), reference)
        assert error < (STATIC[name] if static else EXACT), backend
        assert error < loss


ONE_LAYER = {
    ("w8a8", "convolution"): ("unet", "mid_block.resnets.0.conv1.weight"),
    ("w8a8", "convolution of one pixel"): ("unet", "mid_block.attentions.0.proj_in.weight"),
    ("w8a8", "linear layers that share their input"): ("unet", "mid_block.*.attn1.to_[qkv].weight"),
    ("fp8", "convolution of one pixel"): ("unet", "mid_block.attentions.0.proj_in.weight"),
    ("fp8", "linear"): ("transformer", "*.ff.net.2.weight"),
}


@pytest.mark.parametrize("name, case", ONE_LAYER)
def test_static_inputs_are_rounded_alike(name, case, derived, monkeypatch):
    component, pattern = ONE_LAYER[name, case]
    monkeypatch.setattr("intaglio.quantize.layers.LEAST_SHARE", 0)
    made = derived(component, "none", layers={pattern: name})
    weights = list(quantized_weights(made.artifact, component))
    assert {w.binding.format for w in weights} == {name}
    reference = made.source.run(made.artifact, "torch")
    unrounded = derived(component, "none", layers={pattern: FORMATS[name].weight_only})
    rounding = relative_error(made.source.run(unrounded.artifact, "torch"), reference)
    error = relative_error(made.source.run(made.artifact, "onnxruntime"), reference)
    assert error < EXACT < rounding / 10, "measured 9.6e-7 at most, and 2.6e-4 to 1.5e-2 of the rounding"


def test_layers_that_share_an_input_share_its_rounding(derived):
    made = derived("unet", "w8a8")
    model = ir.load(made.graph)
    quantizers = {n.inputs[0].name: n for n in model.graph if n.op_type == "QuantizeLinear"}
    static = [w for w in quantized_weights(made.artifact, "unet") if w.activation is not None]
    assert len(quantizers) == sum(n.op_type == "QuantizeLinear" for n in model.graph) < len(static)


def packed(array):
    """int4 values, low nibble first, as IR and ONNX store them."""
    nibbles = array.astype(np.uint8).reshape(-1) & 15
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


def nibbles_exchanged(array):
    return (array >> 4 | array << 4).astype(np.uint8).tobytes()


IR_CODES = {  # element type in the IR, and the stored codes as the IR's bytes
    "int8": ("i8", lambda codes: codes.tobytes()),
    "w8a8": ("i8", lambda codes: codes.tobytes()),
    "int4": ("i4", packed),
    "int4-32": ("i4", packed),
    "int4-128": ("i4", packed),
    "fp8": ("f8e4m3", lambda codes: codes.tobytes()),
    "fp8-weight-only": ("f8e4m3", lambda codes: codes.tobytes()),
    "nf4": ("nf4", nibbles_exchanged),  # the first of two lies low there and high in bitsandbytes
    "nf4-double": ("nf4", nibbles_exchanged),
}


@pytest.mark.parametrize("component", WITH_IR)
@pytest.mark.parametrize("name", CODED)
def test_the_same_codes_lie_in_onnx_and_in_the_ir(name, component, derived):
    import openvino

    made = derived(component, name)
    model = openvino.Core().read_model(made.graph.with_name("openvino_model.xml"))
    found: dict[str, list[bytes]] = {}
    for op in model.get_ops():
        kind = op.get_element_type().get_type_name() if op.get_type_name() == "Constant" else ""
        if kind in {k for k, _ in IR_CODES.values()} and op.get_byte_size() > 1:  # a zero point is no code
            found.setdefault(kind, []).append(np.array(op.data).view(np.uint8).tobytes())
    wanted: dict[str, list[bytes]] = {}
    for weight in quantized_weights(made.artifact, component):
        kind, as_bytes = IR_CODES[weight.binding.format]
        wanted.setdefault(kind, []).append(as_bytes(weight.tensors["codes"]))
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in wanted.items()}


BITS = {"int8": 0.3, "w8a8": 0.3, "fp8": 0.3, "int4": 0.2, "nf4": 0.2}  # of float32; tables and small layers stay float


@pytest.mark.parametrize("name", BITS)
def test_weights_stay_packed_on_disk(name, derived):
    made = derived("unet", name)
    whole = {b.initializer for b in made.record.weights.values()}
    stored = made.graph.with_name(DATA).stat().st_size
    before = made.source.artifact.component("unet").joinpath(DATA).stat().st_size
    assert whole
    assert stored < (BITS[name] + 0.1) * before
    codes = sum(
        w.tensors["codes"].size * (0.5 if FORMATS[w.binding.format].storage == "INT4" else 1)
        for w in quantized_weights(made.artifact, "unet")
    )
    assert codes < stored


def test_deriving_gives_the_codes_of_a_build(derived, tiny_checkpoint, tmp_path):
    made = derived("vae_decoder", "w8a8")
    options = {"calibration.feeds": str(made.source.recorded)}
    built = build_only(
        tiny_checkpoint, tmp_path / "built", "vae_decoder", quant={"vae_decoder": "w8a8"}, options=options
    )
    assert codes_digest(built, "vae_decoder") == codes_digest(made.artifact, "vae_decoder")
    data = (built.component("vae_decoder") / DATA).read_bytes()
    assert data == made.graph.with_name(DATA).read_bytes()
    assert built.manifest.components["vae_decoder"].quantization.calibration["feeds_sha256"]


def test_an_artifact_is_not_quantized_twice(derived, tmp_path):
    made = derived("text_encoder", "int8")
    with pytest.raises(UsageError, match=r"text_encoder is int8 already.*without --quant"):
        derive(made.artifact, tmp_path / "twice", {"text_encoder": made.recipe}, {})
    assert not (tmp_path / "twice").exists()


ON_ONNXRUNTIME = {  # format and activations, and what its matrix products execute as
    ("int8", "exact"): "MatMul float32, int8 weights decoded",
    ("int8", "dynamic-per-token"): "MatMulNBits, 8-bit weights, activations int8 per row",
    ("int4", "exact"): "MatMulNBits, 4-bit weights, float32",
    ("int4", "dynamic-per-token"): "MatMulNBits, 4-bit weights, activations int8 per row",
    ("nf4", "exact"): "MatMulBnb4, nf4 weights",
    ("w8a8", "static"): "MatMulIntegerToFloat, int8 x int8",
}


@pytest.mark.parametrize("name, activations", ON_ONNXRUNTIME)
def test_onnxruntime_executes_linear_layers_on_their_codes(name, activations, derived):
    from intaglio.runtimes.engine_onnxruntime import execution

    made = derived("unet", name, activations=activations)
    assert made.record.quantization.activations == activations
    weights = quantized_weights(made.artifact, "unet")
    unfolded = name == "w8a8"  # convolutions are matrix products there, too
    linear = sum(w.binding.format.startswith(name) and (w.axis == 1 or unfolded) for w in weights)
    counts = execution(made.artifact, "unet")
    found = sum(n for text, n in counts.items() if text.startswith(ON_ONNXRUNTIME[name, activations]))
    assert found == linear > 0, counts


def test_openvino_executes_linear_layers_on_their_codes(derived):
    from intaglio.runtimes.engine_openvino import execution
    from intaglio.runtimes.processor import products_saturate

    static = "i8" if products_saturate() else "i8 x i8"
    for name, kind in (("int8", "i8"), ("int4", "i4"), ("w8a8", static), ("nf4", "nf4")):
        made = derived("transformer", name)
        linear = sum(w.binding.format.startswith(name) for w in quantized_weights(made.artifact, "transformer"))
        counts = execution(made.artifact, "transformer")
        assert sum(n for text, n in counts.items() if f" {kind}" in text) >= linear > 0, counts


RANK = 8


@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize("name", ["int4", "nf4", "w8a8", "fp8"])
def test_a_low_rank_branch_brings_weights_closer(name, component, derived):
    made = derived(component, name, rank=RANK)
    figures = made.record.quantization.low_rank
    assert 0 < figures["with"] < figures["without"]
    corrected = 0
    for weight in quantized_weights(made.artifact, component):
        wanted = weight.binding.format != "int8" and weight.axis == 1  # matrix products alone
        assert (weight.low_rank is not None) == wanted, weight.parameter
        if weight.low_rank is not None:
            corrected += 1
            (k, n), (down, up) = weight.shape, weight.low_rank
            assert down.dtype == up.dtype == np.float16
            assert (down.shape, up.shape) == ((k, RANK), (RANK, n))
    assert corrected
    static = made.record.quantization.activations == "static"
    reference = made.source.run(made.artifact, "torch")
    error = relative_error(made.source.run(made.artifact, "onnxruntime"), reference)
    assert error < (STATIC[name] if static else EXACT)
    if not static:
        plain = made.source.run(made.source.artifact, "torch")
        without = made.source.run(derived(component, name).artifact, "torch")
        assert relative_error(reference, plain) < relative_error(without, plain)


# --- the rewrite alone ----------------------------------------------------------------------------------------------


def graph_of(nodes, weights, inputs, outputs):
    """An ir.Model of `nodes` whose initializers in `weights` are parameters of their names."""
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, w.shape, w.tobytes(), raw=True) for n, w in weights.items()]
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in v.items()] for v in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, tensors)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    for name in weights:
        model.graph.initializers[name].metadata_props[PARAMETER] = name
    return model


def session_of(model):
    """ONNX Runtime on the nodes as they are: its fusions may round activations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answer(model, **feeds):
    return session_of(ir.to_proto(model)).run(None, feeds)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_convolution_of_one_pixel_becomes_a_matrix_product_without_transposes():
    nodes = [
        helper.make_node("Conv", ["x", "proj_in", "bias"], ["a"], kernel_shape=[1, 1]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["d", "proj_out"], ["y"], kernel_shape=[1, 1]),
    ]
    weights = {"proj_in": normal(96, 64, 1, 1), "proj_out": normal(64, 96, 1, 1, seed=1), "bias": normal(96)}
    made = (nodes, weights, {"x": (2, 64, 4, 5)}, {"y": None})
    model = graph_of(*made)
    layers = find_layers(model)
    assert [(la.op, la.pointwise, la.channels) for la in layers] == [("MatMul", True, 64), ("MatMul", True, 96)]
    choices = assign(layers, ComponentRecipe(format="int4"), Rules())
    assert [c.format for c in choices.values()] == ["int4", "int4-32"]
    decoded = {}
    for weight in quantize_graph(model, choices):
        pair, value = codec(weight.format), weight.layer.read()
        decoded[weight.layer.parameter] = pair.decode(pair.encode(value, 1), value.shape, 1)
    assert [n.op_type for n in model.graph if n.op_type != "DequantizeLinear"] == [
        *("Transpose", "MatMul", "Add", "Relu", "MatMul", "Transpose")
    ]
    assert [o.name for o in model.graph.outputs] == ["y"]
    x = normal(2, 64, 4, 5, seed=2)
    same = {name: np.ascontiguousarray(w.T)[:, :, None, None] for name, w in decoded.items()}
    (wanted,) = answer(graph_of(nodes, {**weights, **same}, *made[2:]), x=x)
    (found,) = answer(model, x=x)
    assert relative_error(found, wanted) < 1e-6  # measured 2e-7


@pytest.mark.parametrize("changes", [{"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"group": 2}])
def test_other_convolutions_of_one_pixel_stay_convolutions(changes):
    weight = normal(64, 32 if "group" in changes else 64, 1, 1)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[1, 1], **changes)]
    model = graph_of(nodes, {"w": weight}, {"x": (1, 64, 4, 4)}, {"y": None})
    (layer,) = find_layers(model)
    assert (layer.op, layer.pointwise) == ("Conv", False)


def test_tied_weights_have_codes_of_their_own():
    nodes = [helper.make_node("MatMul", ["x", "tied"], ["a"]), helper.make_node("MatMul", ["a", "tied"], ["y"])]
    model = graph_of(nodes, {"tied": normal(64, 64)}, {"x": (3, 64)}, {"y": None})
    (weight, twin) = quantize_graph(model, assign(find_layers(model), ComponentRecipe(format="int8"), Rules()))
    assert weight.layer.parameter == twin.layer.parameter == "tied"
    decoders = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert len({n.inputs[0].name for n in decoders}) == len(decoders) == 2
    assert all(len(v.uses()) == 1 for n in decoders for v in (*n.inputs, *n.outputs))
    assert list(weight_bindings(model)) == ["tied"]
    pair, x = codec("int8"), normal(3, 64, seed=1)
    decoded = pair.decode(pair.encode(weight.layer.read(), 1), (64, 64), 1)
    (found,) = answer(model, x=x)
    assert relative_error(found, x @ decoded @ decoded) < 1e-6  # measured 3e-7


def test_a_table_that_is_a_matrix_too_stays_high_unless_the_recipe_names_it():
    nodes = [
        helper.make_node("Gather", ["tied", "ids"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "tied"], ["y"]),
    ]
    model = graph_of(nodes, {"tied": normal(64, 64)}, {"ids": (64,)}, {"y": None})
    layers = find_layers(model)
    assert [layer.op for layer in layers] == ["Gather", "MatMul"]
    assert assign(layers, ComponentRecipe(format="int4"), Rules())["tied"].format == "none"
    named = assign(layers, ComponentRecipe(format="int4", layers={"tied": "int4"}), Rules())
    assert named["tied"].format == "int8"
