"""TensorRT: an ahead-of-time plan on the NVIDIA GPU it was built for.

A plan is native code. It is given to TensorRT only where `intaglio.profiles.trust` vouches for its bytes and where
compute capability, driver and release are the ones it was built for.
Which file runs is decided by pure functions (`choose_engine`, `choose_profile`) that need no GPU. Device memory and
copies go through ``cuda.bindings.runtime`` (package ``cuda-bindings``): no torch, no compiled code of ours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ArtifactError, MissingDependency, ToolError, Unsupported, UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.trust import check_engines, read_engine
from intaglio.runtimes.engine import EngineOptions, check_feeds, refuse_leftovers
from intaglio.runtimes.tensorrt_api import (
    EXTRA,
    capability_of_gpu,
    check_driver,
    installed_apis,
    load_api,
    make_logger,
)

FOLDER = "tensorrt"
Shapes = Mapping[str, tuple[int, ...]]
Bounds = Mapping[str, tuple[Sequence[int], Sequence[int]]]  # name -> (min, max) of one optimization profile


class TensorRtEngine:
    """One deserialized plan with its execution context, stream and device buffers.

    Raises:
        MissingDependency: the API that built the plan, or cuda-bindings, is not installed.
        ArtifactError: the artifact was built without ``--target tensorrt``, or nobody vouches for its plans here.
        Unsupported: no NVIDIA GPU, no plan for it, an old driver, or a plan of another release.
    """

    def __init__(self, artifact: Artifact, component: str, options: EngineOptions) -> None:
        refuse_leftovers("tensorrt", options.settings, ("public_key",))
        if not installed_apis():
            load_api("tensorrt-rtx")  # raises with the pip line
        index = device_index(options.device)
        plans = plans_of(artifact.manifest.engines, component)
        digests = check_engines(artifact, plans, options.settings.get("public_key"))
        name, facts = choose_engine(plans, component, capability_of_gpu(index))
        check_driver()
        self.trt = load_api(facts["api"])
        check_version(name, facts, self.trt.__version__)
        plan = read_engine(artifact.folder / name, digests[name])
        self.record = artifact.manifest.components[component]
        self.cuda = Cuda(index)
        self.log = make_logger(self.trt)
        self.runtime: Any = self.trt.Runtime(self.log)
        start = time.perf_counter()
        self.engine: Any = self.runtime.deserialize_cuda_engine(plan)
        self.context: Any = make_context(self.trt, self.engine) if self.engine is not None else None
        if self.context is None:
            self.cuda.close()
            raise ToolError(f"TensorRT cannot load {name}: {self._reason()}")
        self.compile_seconds = time.perf_counter() - start
        self.profiles = [self._bounds(i) for i in range(self.engine.num_optimization_profiles)]
        self.profile = self.context.active_optimization_profile

    def _reason(self) -> str:
        return self.log.errors[-1] if self.log.errors else "it gives no reason"

    def _bounds(self, index: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        shapes = {s.name: self.engine.get_tensor_profile_shape(s.name, index) for s in self.record.inputs}
        return {name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`; the copies to and from the GPU are part of it.

        Raises:
            UsageError: the feeds do not fit the record or any optimization profile.
            ToolError: TensorRT refuses a shape or fails to run; with its last error.
        """
        arrays = check_feeds(self.record, feeds)
        cuda, stream = self.cuda, self.cuda.stream
        cuda.use()
        profile = choose_profile(self.profiles, {name: a.shape for name, a in arrays.items()})
        if profile != self.profile:
            self._must(self.context.set_optimization_profile_async(profile, stream), f"profile {profile}")
            self.profile = profile
        for name, array in arrays.items():
            self._must(self.context.set_input_shape(name, tuple(array.shape)), f"{name} of shape {array.shape}")
            self._must(self.context.set_tensor_address(name, cuda.upload(name, array)), f"the address of {name}")
        outputs: dict[str, np.ndarray] = {}
        for spec in self.record.outputs:
            shape = tuple(self.context.get_tensor_shape(spec.name))
            if any(d < 0 for d in shape):
                raise ToolError(f"TensorRT does not know the shape of {spec.name}: {shape}")
            outputs[spec.name] = np.empty(shape, spec.dtype)
            address = cuda.buffer(spec.name, outputs[spec.name].nbytes)
            self._must(self.context.set_tensor_address(spec.name, address), f"the address of {spec.name}")
        self._must(self.context.execute_async_v3(stream), "to run")
        for name, array in outputs.items():
            cuda.download(name, array)
        cuda.wait()
        return outputs

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise ToolError(f"TensorRT refuses {what}: {self._reason()}")

    def memory(self) -> dict[str, int | None]:
        """Bytes on the GPU: the plan's weights, its scratch memory, and the buffers of inputs and outputs."""
        weights = int(self.engine.get_engine_stat(self.trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        return {"device_bytes": weights + int(self.engine.device_memory_size_v2) + self.cuda.held}

    def close(self) -> None:
        """Give context, engine and buffers back, in this order."""
        self.context = self.engine = self.runtime = None
        self.cuda.close()


class Cuda:
    """One GPU's stream and named device buffers that only grow.

    Raises:
        MissingDependency: cuda-bindings is not installed.
        ToolError: a CUDA call failed; with CUDA's own words.
    """

    def __init__(self, index: int) -> None:
        try:
            self.rt: Any = need("cuda.bindings.runtime", extra=EXTRA)
        except MissingDependency as error:
            line = f"cuda-bindings is not installed; run: pip install 'intaglio[{EXTRA}]'"
            raise MissingDependency(line) from error
        self.index = index
        self.buffers: dict[str, tuple[int, int]] = {}
        self.use()
        self.handle: Any = self.call("cudaStreamCreate")
        self.stream = int(self.handle)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime API and return its value; cuda-bindings returns (status, values…)."""
        status, *values = getattr(self.rt, function)(*arguments)
        if status != self.rt.cudaError_t.cudaSuccess:
            words = self.rt.cudaGetErrorString(status)[1]
            raise ToolError(f"{function} failed on cuda:{self.index}: {words.decode()}")
        return values[0] if values else None

    def use(self) -> None:
        """Make this GPU current; CUDA keeps that per thread, and a server runs requests on several."""
        self.call("cudaSetDevice", self.index)

    def buffer(self, name: str, size: int) -> int:
        """Address of a device buffer of at least `size` bytes."""
        address, capacity = self.buffers.get(name, (0, 0))
        if capacity < size or not address:
            if address:
                del self.buffers[name]
                self.call("cudaFree", address)
            address = int(self.call("cudaMalloc", max(size, 1)))
            self.buffers[name] = (address, size)
        return address

    def upload(self, name: str, array: np.ndarray) -> int:
        """Copy an array into the buffer `name`; returns its address. The array must live until `wait`."""
        address = self.buffer(name, array.nbytes)
        kind = self.rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.handle)
        return address

    def download(self, name: str, array: np.ndarray) -> None:
        """Copy the buffer `name` into an array that must live until `wait`."""
        kind = self.rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, self.buffers[name][0], array.nbytes, kind, self.handle)

    def wait(self) -> None:
        """Until everything on the stream is done."""
        self.call("cudaStreamSynchronize", self.handle)

    @property
    def held(self) -> int:
        """Bytes in buffers."""
        return sum(size for _, size in self.buffers.values())

    def close(self) -> None:
        """Free buffers and stream."""
        for address, _ in self.buffers.values():
            self.call("cudaFree", address)
        self.buffers = {}
        if self.handle is not None:
            self.call("cudaStreamDestroy", self.handle)
            self.handle = None


def make_context(trt: Any, engine: Any) -> Any:
    """An execution context whose numbers do not change between runs; ``None`` when TensorRT fails.

    TensorRT-RTX by default runs fallback kernels until ones for a new shape are compiled in the background, so the
    second run may differ from the first in its last bits. EAGER compiles before the first run of a shape instead.
    """
    strategy = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategy is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
    return engine.create_execution_context(config)


def device_index(device: str) -> int:
    """The GPU's index of ``cuda:1``; ``cuda`` and ``cpu``, the default of every engine, are the first GPU.

    Raises:
        UsageError: another name.
    """
    kind, _, index = device.lower().partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UsageError(f"device {device!r} is unknown to tensorrt; allowed: cuda, cuda:N")
    return int(index or 0)


def plans_of(engines: Mapping[str, Mapping[str, Any]], component: str) -> dict[str, Mapping[str, Any]]:
    """The plans of one component: path in the artifact to recorded facts.

    Args:
        engines: ``Manifest.engines``; keys such as ``unet/tensorrt/model.sm89.engine``.
        component: for example ``unet``.

    Raises:
        ArtifactError: it has none.
    """
    own = {n: f for n, f in engines.items() if PurePosixPath(n).parent == PurePosixPath(component, FOLDER)}
    if not own:
        raise ArtifactError(f"{component} has no TensorRT plan; build the artifact with --target tensorrt")
    return own


def choose_engine(plans: Mapping[str, Mapping[str, Any]], component: str, sm: str) -> tuple[str, Mapping[str, Any]]:
    """The plan for a compute capability: its path in the artifact and its recorded facts.

    Args:
        plans: of `plans_of`.
        component: whose they are.
        sm: the GPU's, such as ``sm89``.

    Raises:
        Unsupported: none for this GPU, with those that exist and the command that builds it.
    """
    for name, facts in plans.items():
        if facts["sm"] == sm:
            return name, facts
    have = ", ".join(sorted((str(f["sm"]) for f in plans.values()), key=lambda s: (len(s), s)))
    raise Unsupported(
        f"{component} has no TensorRT plan for this GPU's {sm}, only for {have}; "
        f"run: intaglio build CHECKPOINT -o ARTIFACT --target tensorrt --set tensorrt.sm={sm}"
    )


def check_version(name: str, facts: Mapping[str, Any], version: str) -> None:
    """A plan runs on the release that built it, on no other.

    Raises:
        Unsupported: with both releases and what to install.
    """
    if facts["version"] != version:
        packages = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings"}
        pins = " ".join(f"{p}=={facts['version']}" for p in packages[facts["api"]].split())
        raise Unsupported(
            f"{name} was built by {facts['api']} {facts['version']}, {version} is installed; "
            f"run: pip install {pins}, or build the artifact again"
        )


def choose_profile(profiles: Sequence[Bounds], shapes: Shapes) -> int:
    """The first optimization profile that takes these shapes; fixed batches come before the whole range.

    Raises:
        UsageError: none does; with the shapes and the widest profile.
    """
    for index, bounds in enumerate(profiles):
        if all(
            len(shape) == len(bounds[n][0])
            and all(low <= d <= high for low, d, high in zip(bounds[n][0], shape, bounds[n][1], strict=True))
            for n, shape in shapes.items()
        ):
            return index
    widest = {n: f"{tuple(low)} to {tuple(high)}" for n, (low, high) in profiles[-1].items()}
    raise UsageError(f"no TensorRT profile takes {dict(shapes)}; allowed: {widest}")
