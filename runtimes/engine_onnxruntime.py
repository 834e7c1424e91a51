"""ONNX Runtime: the shared graph or what was lowered from it, on the provider asked for and no other."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError, Unsupported, UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.spec import ComponentRecord
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers
from intaglio.runtimes.processor import products_saturate

GRAPH = "model.onnx"
LOWERED = "model.onnxruntime.onnx"  # for the CPU; written where model.onnx as it is would fail or be slow there
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOG_ERRORS = 3
# MatMulNBits: 1 computes in float32, 4 quantizes activations to int8 in blocks of a row (45 dB; the CPU's default).
ACCURACY = {"exact": "1", "static": "1", "dynamic-per-token": "4"}
ACCURACY_KEY, PRECISE_KEY = "session.qdq_matmulnbits_accuracy_level", "session.x64quantprecision"
PRODUCTS = {"MatMul": "MatMul", "FusedMatMul": "MatMul", "Gemm": "MatMul", "Conv": "Conv", "FusedConv": "Conv"}
CODED = {
    "MatMulIntegerToFloat": "MatMulIntegerToFloat, int8 x int8",
    "MatMulInteger": "MatMulInteger, int8 x int8",
    "DynamicQuantizeMatMul": "DynamicQuantizeMatMul, activations int8 per tensor",
    "QLinearMatMul": "QLinearMatMul, int8 x int8, output rounded",
    "ConvInteger": "ConvInteger, int8 x int8",
    "QLinearConv": "QLinearConv, int8 x int8, output rounded",
    "MatMulBnb4": "MatMulBnb4, nf4 weights",
}


class OnnxRuntimeEngine:
    """One InferenceSession.

    Raises:
        MissingDependency: onnxruntime is not installed.
        Unsupported: the provider for the device is not in this build of ONNX Runtime, or did not come up.
    """

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        ort = need("onnxruntime", extra="onnxruntime")
        refuse_leftovers("onnxruntime", options.settings, ())
        self.record = artifact.manifest.components[component]
        self.provider, provider_options = provider_for(options.device, ort.get_available_providers())
        path = graph_path(artifact, component, self.provider)
        settings = session_options(ort, self.record, options, self.provider)
        start = time.perf_counter()
        self.session: Any = _load(ort, path, settings, self.provider, provider_options, options.device)
        self.compile_seconds = time.perf_counter() - start
        if self.session.get_providers()[0] != self.provider:
            raise Unsupported(f"ONNX Runtime came up on {self.session.get_providers()[0]} instead of {self.provider}")
        return_freed_memory()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        names = [s.name for s in self.record.outputs]
        values = self.session.run(names, check_feeds(self.record, feeds))
        return dict(zip(names, values, strict=True))

    def memory(self) -> dict[str, int | None]:
        """ONNX Runtime does not say what it holds; measure the process."""
        return {"weight_bytes": None}

    def close(self) -> None:
        """Drop the session."""
        self.session = None


def variant_name(dtype: str) -> str:
    """The graph file that computes in `dtype`: ``model.onnx`` in float32, ``model.float16.onnx``."""
    return GRAPH if dtype == "float32" else f"model.{dtype}.onnx"


def graph_path(artifact: Artifact, component: str, provider: str) -> Path:
    """The graph that a provider runs; half precision is for GPUs, float32 is faster and not rounded on a CPU.

    On the CPU that is the lowered graph where the build wrote one. A verified artifact has no file that it does not
    list, so that the file's existence decides.
    """
    folder = artifact.component(component)
    if provider != PROVIDERS["cpu"]:
        return folder / variant_name(artifact.manifest.dtypes["onnx"][component])
    return folder / LOWERED if (folder / LOWERED).is_file() else folder / GRAPH


def activations(record: ComponentRecord) -> str:
    """The activation arithmetic the recipe states; ``exact`` where weights are the checkpoint's own."""
    return record.quantization.activations if record.quantization else "exact"


def session_options(ort: Any, record: ComponentRecord, options: EngineOptions, provider: str) -> Any:
    """Options of a session: threads, the record's activation arithmetic, nothing from environment or defaults."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = LOG_ERRORS
    # The pattern is a second block beside the one that the first call grew: 67 instead of 56 MB of 24 convolutions.
    settings.enable_mem_pattern = False
    settings.add_session_config_entry(ACCURACY_KEY, ACCURACY[activations(record)])
    if activations(record) == "static" and provider == PROVIDERS["cpu"] and products_saturate():
        settings.add_session_config_entry(PRECISE_KEY, "1")
    if provider != PROVIDERS["cpu"]:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return settings


def _load(ort: Any, path: Path, settings: Any, provider: str, provider_options: dict[str, str], device: str) -> Any:
    try:
        return ort.InferenceSession(str(path), settings, providers=[(provider, provider_options)])
    except Exception as error:  # onnxruntime raises its own C++ exception types, all derived from Exception
        raise ToolError(f"ONNX Runtime cannot load {path} on {device}: {' '.join(str(error).split())}") from error


def return_freed_memory() -> None:
    """Let glibc give back what loading freed, such as weights that were transposed: 65 to 33 MB after 40 int4 layers.

    Elsewhere there is no ``malloc_trim``, and nothing to do.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def provider_for(device: str, available: list[str]) -> tuple[str, dict[str, str]]:
    """The execution provider of a device name such as ``cpu`` or ``cuda:0``.

    Raises:
        UsageError: the name is not one of ours.
        Unsupported: the installed wheel does not have the provider.
    """
    kind, _, index = device.lower().partition(":")
    if kind not in PROVIDERS or (index and not index.isdigit()):
        raise UsageError(f"device {device!r} is unknown to onnxruntime; allowed: cpu, cuda, cuda:N")
    provider = PROVIDERS[kind]
    if provider not in available:
        raise Unsupported(
            f"device {device!r} needs {provider}, this ONNX Runtime has {', '.join(available)}; "
            "run: pip uninstall onnxruntime && pip install 'intaglio[cuda]'"
        )
    return provider, {"device_id": index or "0"} if kind == "cuda" else {}


def execution(artifact: Artifact, component: str, options: EngineOptions | None = None) -> dict[str, int]:
    """What a component's products with weights execute as, and how often, from ONNX Runtime's own optimized graph.

    ``MatMulNBits, 4-bit weights, float32`` multiplies packed weights, ``MatMul float32, int8 weights decoded on every
    call`` says so, ``MatMul float32`` has a float weight. The optimized graph is written to a temporary folder with its
    weights (they cannot be left out), read without them and removed.

    Raises:
        MissingDependency: onnx or onnxruntime is not installed.
        ToolError: ONNX Runtime cannot load the graph, or the temporary folder lacks space.
    """
    ort, onnx = need("onnxruntime", extra="onnxruntime"), need("onnx", extra="export")
    options = options or EngineOptions()
    record = artifact.manifest.components[component]
    provider, provider_options = provider_for(options.device, ort.get_available_providers())
    path = graph_path(artifact, component, provider)
    with tempfile.TemporaryDirectory() as scratch:
        _check_space(path, Path(scratch))
        settings = session_options(ort, record, options, provider)
        settings.optimized_model_filepath = str(Path(scratch) / GRAPH)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        _load(ort, path, settings, provider, provider_options, options.device)
        return executed(onnx.load(Path(scratch) / GRAPH, load_external_data=False).graph)


def _check_space(path: Path, scratch: Path) -> None:
    """Refuse before a disk is full; half-precision weights that ONNX Runtime casts at load take twice their space."""
    needed = 2 * sum(p.stat().st_size for p in path.parent.glob("model.on*.data"))
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise ToolError(
            f"{scratch.parent} has {free / 1e9:.1f} GB free, the optimized graph of {path.parent} may take "
            f"{needed / 1e9:.1f}; set TMPDIR to a larger disk"
        )


def executed(graph: Any) -> dict[str, int]:
    """The same of an ``onnx.GraphProto`` that ONNX Runtime wrote."""
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    decoded = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights}
    names = (_named(node, weights, decoded) for node in graph.node)
    counts: dict[str, int] = {}
    for name in filter(None, names):
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _named(node: Any, weights: Mapping[str, int], decoded: Mapping[str, Any]) -> str | None:
    """How a person would call a node that multiplies with a weight or decodes one."""
    if node.op_type in CODED:
        return CODED[node.op_type]
    if node.op_type == "MatMulNBits":
        facts = {a.name: a.i for a in node.attribute}
        arithmetic = "activations int8 per row" if facts.get("accuracy_level") == 4 else "float32"
        return f"MatMulNBits, {facts['bits']}-bit weights, {arithmetic}"
    if node.op_type == "DequantizeLinear":
        return None if node.output[0] in decoded else "DequantizeLinear of activations"
    if node.op_type == "Gather" and node.input[0] in weights and _type_name(weights[node.input[0]]) == "int8":
        return "Gather of int8 codes"
    if node.op_type in PRODUCTS and len(node.input) > 1:
        kind, source = PRODUCTS[node.op_type], decoded.get(node.input[1])
        if source is not None:
            return f"{kind} float32, {_type_name(weights[source.input[0]])} weights decoded on every call"
        return f"{kind} float32" if node.input[1] in weights else None
    return None


def _type_name(dtype: int) -> str:
    """The name of an ONNX data type: ``int8``, ``float8e4m3fn``.

    ``PRECISE_KEY`` moves int8 codes to uint8 with a zero point of 128: int8 all the same.
    """
    onnx = need("onnx", extra="export")
    name = str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return "int8" if name == "uint8" else name
