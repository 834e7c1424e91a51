"""OpenVINO: the IR on a CPU, GPU or NPU, with the arithmetic set explicitly and checked after compilation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ArtifactError, ToolError, Unsupported
from intaglio.profiles.registry import need, pick
from intaglio.profiles.spec import ComponentRecord
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers
from intaglio.runtimes.openvino_static import keep_float
from intaglio.runtimes.processor import dot_products, products_saturate

XML = "openvino_model.xml"
# The CPU plugin fuses element-wise layers only where it knows every shape: 117 instead of 14 in the embedded UNet,
# whose call then takes 0.73 of the time. The price is a compilation for every new set of shapes; one is kept.
SHAPES = {"free": False, "fixed": True}
PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# Input channels of a row that share an int8 scale, or 0. OpenVINO quantizes nothing where this does not divide the
# weight's block: 32 divides them all. One scale for a whole row lets an outlier in (6e-2 instead of 1e-2), 64 takes
# three quarters of the time and 1.4 times the error.
GROUPS = {"exact": 0, "static": 0, "dynamic-per-token": 32}
PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")  # names of layers that multiply
GATHERS = ("Gather", "Embedding")
PACKED = {"i8", "u8", "i4", "u4"}  # weights whose inputs OpenVINO quantizes if told to; nf4 it computes in float


class OpenVinoEngine:
    """One compiled model.

    Raises:
        MissingDependency: openvino is not installed.
        ArtifactError: the artifact was built without ``--target openvino``.
        Unsupported: no such device, or it does not compute in the dtype asked for.
    """

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        openvino = need("openvino", extra="openvino")
        refuse_leftovers("openvino", options.settings, ("precision", "shapes"))
        self.record = artifact.manifest.components[component]
        path = artifact.component(component) / XML
        if not path.exists():
            raise ArtifactError(f"{path} is missing; build the artifact with --target openvino")
        device = options.device.upper()
        contract = artifact.manifest.contract[component]
        dtype = artifact.manifest.dtypes["openvino"][component]
        self.precision = pick(PRECISIONS, options.settings.get("precision", dtype), "openvino.precision")
        self.fixed = pick(SHAPES, options.settings.get("shapes", "free"), "openvino.shapes")
        self.core, self.path, self.device = openvino.Core(), path, device
        core = self.core
        if device.partition(".")[0] not in core.available_devices and device not in core.available_devices:
            raise Unsupported(f"OpenVINO has no device {device!r}; allowed: {', '.join(core.available_devices)}")
        self.group = GROUPS[activations(self.record)]
        adjustable = GROUP_SIZE in core.get_property(device, "SUPPORTED_PROPERTIES")
        if self.group and not adjustable:
            raise Unsupported(f"OpenVINO does not quantize activations per token on {device}; use cpu")
        settings = compile_settings(device, options.threads, self.precision, self.group if adjustable else None)
        self.exact = device == "CPU" and activations(self.record) == "static" and products_saturate()
        if self.precision == "f16" and contract["activations_scale_factor"]:
            settings["ACTIVATIONS_SCALE_FACTOR"] = str(contract["activations_scale_factor"])
        self.settings = settings
        self.compiled: Any = None
        self.request: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.compile_seconds = 0.0
        if not self.fixed:
            self._compile({})

    def _compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compile for these shapes alone, or for all where there is none; what was compiled before is dropped first."""
        self.request = self.compiled = None
        start = time.perf_counter()
        try:
            model = self.core.read_model(self.path)
            if self.exact:
                keep_float(model, self.settings)
            if shapes:
                model.reshape({name: list(shape) for name, shape in shapes.items()})
            self.compiled = self.core.compile_model(model, self.device, self.settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ToolError(f"OpenVINO cannot compile {self.path} for {self.device}: {reason}") from error
        self.compile_seconds += time.perf_counter() - start
        self._check(self.device)
        self.request, self.shapes = self.compiled.create_infer_request(), shapes

    def _check(self, device: str) -> None:
        used = [str(d) for d in self.compiled.get_property("EXECUTION_DEVICES")]
        if not any(d.startswith(device.partition(".")[0]) for d in used):
            raise Unsupported(f"OpenVINO runs on {used} instead of {device}")
        precision = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision != self.precision:
            raise Unsupported(
                f"OpenVINO computes in {precision} on {device} instead of {self.precision}; "
                "add --set openvino.precision=float32 or build with --dtype openvino=fp32"
            )
        supported = self.compiled.get_property("SUPPORTED_PROPERTIES")
        group = int(self.compiled.get_property(GROUP_SIZE)) if GROUP_SIZE in supported else self.group
        if group != self.group:
            raise Unsupported(
                f"OpenVINO quantizes activations in groups of {group} on {device} instead of {self.group}"
            )
        if self.exact and any(" x " in name for name in executed(self.compiled, self.group)):
            raise Unsupported(
                "OpenVINO multiplies int8 with int8 on this processor, which has no VNNI: sums would saturate at 16 "
                "bits; use --backend onnxruntime, or an artifact built with --quant int8"
            )

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        arrays = check_feeds(self.record, feeds)
        shapes = {name: array.shape for name, array in arrays.items()}
        if self.fixed and shapes != self.shapes:
            self._compile(shapes)
        results = self.request.infer(arrays, share_inputs=True, share_outputs=True)
        # Copied once, here: the request's buffers are overwritten by the next run.
        return {s.name: np.array(results[s.name]) for s in self.record.outputs}

    def memory(self) -> dict[str, int | None]:
        """OpenVINO does not say what it holds on a CPU; measure the process."""
        return {"weight_bytes": None}

    def close(self) -> None:
        """Drop the request and the model."""
        self.request = self.compiled = None


def activations(record: ComponentRecord) -> str:
    """The activation arithmetic the recipe states; ``exact`` where weights are the checkpoint's own."""
    return record.quantization.activations if record.quantization else "exact"


def compile_settings(device: str, threads: int, precision: str, group: int | None) -> dict[str, Any]:
    """Nothing is left to OpenVINO's defaults that would change the numbers.

    On CPUs with AMX or AVX512-BF16 the default compute type is bf16, and activations of weight-compressed layers are
    quantized in groups unless `group` is 0; ``None`` where the device has no such setting.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "CACHE_DIR": "",  # its blobs carry no checksum: 28 of 61 flipped bits changed the output and were not noticed
    }
    if group is not None:
        settings[GROUP_SIZE] = str(group)
    if device == "CPU" and threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    return settings


def execution(artifact: Artifact, component: str, options: EngineOptions | None = None) -> dict[str, int]:
    """What a component's products and table look-ups execute as, and how often, from the compiled model.

    ``FullyConnected i4 weights`` multiplies float activations with packed weights, ``Convolution i8 x i8`` codes with
    codes, ``FullyConnected f32`` is plain float, also where the weights are stored in fewer bits.

    Raises:
        ToolError: as the engine, which is loaded and closed.
    """
    engine = OpenVinoEngine(artifact, component, options or EngineOptions())
    try:
        return executed(engine.compiled, engine.group)
    finally:
        engine.close()


def executed(compiled: Any, group: int) -> dict[str, int]:
    """The same of a compiled model whose activations are quantized in groups of `group` (0: not).

    The CPU plugin quantizes them on processors with VNNI alone; elsewhere they stay float32.
    """
    group = group if dot_products() else 0
    counts: dict[str, int] = {}
    for op in compiled.get_runtime_model().get_ops():
        layer = op.get_rt_info()["layerType"].astype(str)
        if layer in PRODUCTS:
            name = f"{layer} {_product(op, group)}"
        elif layer in GATHERS and op.input(0).get_element_type().get_type_name() in {*PACKED, "nf4", "f8e4m3"}:
            name = f"{layer} {op.input(0).get_element_type().get_type_name()} table"
        else:
            continue
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _product(op: Any, group: int) -> str:
    """Types of what a layer multiplies: activations first, then weights."""
    left, right = (op.input(i).get_element_type().get_type_name() for i in (0, 1))
    if left in PACKED and right in PACKED:
        return f"{left} x {right}"
    if left == right:
        return str(left)
    if right in PACKED and group and op.get_input_size() > 3 and _divides(group, op):
        return f"{right} weights, activations i8 per row in groups of {group}"
    return f"{right} weights"


def _divides(group: int, op: Any) -> bool:
    """Whether the CPU plugin quantizes the input of a FullyConnected with weights [N, K] and scales [N, K/block]."""
    channels, scales = op.input(1).get_partial_shape()[1], op.input(3).get_partial_shape()
    blocks = scales[1].get_length() if scales.rank.get_length() == 2 else 1
    return bool(channels.get_length() >= group and (blocks == 1 or channels.get_length() // blocks % group == 0))
