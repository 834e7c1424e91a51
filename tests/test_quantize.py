"""Quantized components: what the files hold, what every engine makes of it, and the same codes everywhere."""

from __future__ import annotations

import dataclasses
import math

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
from intaglio.quantize.layers import PARAMETER, Choice, Rules, assign, find_layers
from intaglio.quantize.rewrite import quantize_graph
from intaglio.runtimes.engine import EngineOptions, load_engine
from intaglio.runtimes.probe import Place

CODED = [name for name, row in FORMATS.items() if row.codec]
COMPONENTS = ("unet", "vae_decoder", "text_encoder", "transformer")
FILES = {"unet": "unet", "vae_decoder": "vae", "text_encoder": "text_encoder", "transformer": "transformer"}
WITH_IR = ("text_encoder", "transformer")
EXACT = 1e-5  # relative L2 of an engine to torch on the decoded weights; measured 3.0e-6 at most
# The same where activations are rounded: a value beside the middle of two codes falls to either side, and such flips
# multiply from layer to layer. Measured with every layer static, and with one.
STATIC = {"w8a8": 1e-1, "fp8": 3e-2}
ONE_STATIC = 5e-3
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
            (found,) = engine.run(self.feeds).values() if len(engine.record.outputs) == 1 else (
                np.concatenate([v.ravel() for v in engine.run(self.feeds).values()]),
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
        key = (component, name, repr(changes))
        if key not in held:
            whole = source(component)
            recipe = whole.recipe(name, **changes)
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
    return np.ascontiguousarray(value if smooth is None else value * smooth[:, None])


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
    import onnxruntime

    made = derived(component, name)
    model = onnx.load(made.graph)
    codes = {b.initializer: parameter for parameter, b in made.record.weights.items() if b.format != "none"}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes]
    used = {i for n in nodes for i in n.input}
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
    tensors = [t for t in model.graph.initializer if t.name in used]
    graph = helper.make_graph(nodes, "weights", [], outputs, tensors)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip((codes[n.input[0]] for n in nodes), session.run(None, {}), strict=True))
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
    "convolution": ("unet", "mid_block.resnets.0.conv1.weight"),
    "linear layers that share their input": ("unet", "*.attn1.to_[qkv].weight"),
    "convolution of one pixel": ("unet", "mid_block.attentions.0.proj_in.weight"),
    "linear": ("transformer", "*.ff.net.2.weight"),
    "behind a norm": ("transformer", "*.attn.to_[qkv].weight"),
}


@pytest.mark.parametrize("case", ONE_LAYER)
@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_static_inputs_are_rounded_alike(name, case, derived, monkeypatch):
    component, pattern = ONE_LAYER[case]
    monkeypatch.setattr("intaglio.quantize.layers.LEAST_SHARE", 0)
    made = derived(component, "int8", layers={"*": "none", pattern: name})
    weights = list(quantized_weights(made.artifact, component))
    assert weights
    static = FORMATS[weights[0].binding.format].static
    if not static:
        pytest.fail(f"{case} takes {weights[0].binding.format}")
    error = relative_error(made.source.run(made.artifact, "onnxruntime"), made.source.run(made.artifact, "torch"))
    assert error < ONE_STATIC


