"""OpenVINO: the IR on a CPU, GPU or NPU, with the arithmetic set explicitly and checked after compilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ArtifactError, ToolError, Unsupported
from intaglio.profiles.registry import need, pick
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers

XML = "openvino_model.xml"
PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class OpenVinoEngine:
    """One compiled model.

    Raises:
        MissingDependency: openvino is not installed.
        ArtifactError: the artifact was built without ``--target openvino``.
        Unsupported: no such device, or it does not compute in the dtype asked for.
    """

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        openvino = need("openvino", extra="openvino")
        refuse_leftovers("openvino", options.settings, ("precision",))
        self.record = artifact.manifest.components[component]
        path = artifact.component(component) / XML
        if not path.exists():
            raise ArtifactError(f"{path} is missing; build the artifact with --target openvino")
        device = options.device.upper()
        contract = artifact.manifest.contract[component]
        dtype = artifact.manifest.dtypes["openvino"][component]
        self.precision = pick(PRECISIONS, options.settings.get("precision", dtype), "openvino.precision")
        core = openvino.Core()
        if device.partition(".")[0] not in core.available_devices and device not in core.available_devices:
            raise Unsupported(f"OpenVINO has no device {device!r}; allowed: {', '.join(core.available_devices)}")
        settings = compile_settings(device, options.threads, self.precision)
        if self.precision == "f16" and contract["activations_scale_factor"]:
            settings["ACTIVATIONS_SCALE_FACTOR"] = str(contract["activations_scale_factor"])
        try:
            self.compiled: Any = core.compile_model(path, device, settings)
        except RuntimeError as error:
            raise ToolError(f"OpenVINO cannot compile {path} for {device}: {error}") from error
        self._check(device)
        self.request: Any = self.compiled.create_infer_request()

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

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        arrays = check_feeds(self.record, feeds)
        results = self.request.infer(arrays, share_inputs=True)
        # Copied: the request's buffers are overwritten by the next run.
        return {s.name: np.array(results[s.name]) for s in self.record.outputs}

    def memory(self) -> dict[str, int | None]:
        """OpenVINO does not say what it holds on a CPU; measure the process."""
        return {"weight_bytes": None}

    def close(self) -> None:
        """Drop the request and the model."""
        self.request = self.compiled = None


def compile_settings(device: str, threads: int, precision: str = "f32") -> dict[str, Any]:
    """Nothing is left to OpenVINO's defaults that would change the numbers.

    On CPUs with AMX or AVX512-BF16 the default compute type is bf16, and activations of weight-compressed layers are
    quantized in groups: both are switched off.
    """
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    if device == "CPU":
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
    return settings
