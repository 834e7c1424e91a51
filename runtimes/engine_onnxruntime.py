"""ONNX Runtime: the shared graph itself, on the CPU or CUDA provider, never on another than the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError, Unsupported, UsageError
from intaglio.profiles.registry import need
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers

GRAPH = "model.onnx"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOG_ERRORS = 3
SESSION_CONFIG = {
    # MatMulNBits quantizes activations to int8 on the CPU by default: 45 dB instead of 130. 1 means exact.
    "session.qdq_matmulnbits_accuracy_level": "1",
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
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = LOG_ERRORS
        for key, value in SESSION_CONFIG.items():
            settings.add_session_config_entry(key, value)
        if self.provider != PROVIDERS["cpu"]:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Half precision is for GPUs: on a CPU the float32 graph is what runs, faster and without rounding.
        dtype = artifact.manifest.dtypes["onnx"][component] if self.provider != PROVIDERS["cpu"] else "float32"
        path = artifact.component(component) / variant_name(dtype)
        try:
            self.session: Any = ort.InferenceSession(str(path), settings, providers=[(self.provider, provider_options)])
        except Exception as error:  # onnxruntime raises its own C++ exception types, all derived from Exception
            raise ToolError(f"ONNX Runtime cannot load {path} on {options.device}: {error}") from error
        if self.session.get_providers()[0] != self.provider:
            raise Unsupported(f"ONNX Runtime came up on {self.session.get_providers()[0]} instead of {self.provider}")

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
