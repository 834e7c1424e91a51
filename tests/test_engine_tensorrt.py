"""The TensorRT engine: which plan runs is decided without a GPU; the calls are checked on stand-ins; a GPU runs it."""

from __future__ import annotations

import ctypes
import dataclasses
import types

import numpy as np
import pytest
from signed import RECORD, manifest

from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ArtifactError, MissingDependency, ToolError, Unsupported, UsageError
from intaglio.profiles.trust import remember_engines
from intaglio.runtimes import engine_tensorrt, tensorrt_api
from intaglio.runtimes.engine import EngineOptions, load_engine
from intaglio.runtimes.engine_tensorrt import (
    TensorRtEngine,
    check_version,
    choose_engine,
    choose_profile,
    device_index,
    plans_of,
)

RTX = {"api": "tensorrt-rtx", "version": "1.7.1.116"}
PLANS = {
    "unet/tensorrt/model.sm120.engine": {"sm": "sm120", **RTX},
    "unet/tensorrt/model.sm89.engine": {"sm": "sm89", **RTX},
    "unet_2/tensorrt/model.sm86.engine": {"sm": "sm86", **RTX},
}


@pytest.fixture(autouse=True)
def private_records(tmp_path, monkeypatch):
    """What this test builds is not remembered beyond it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def artifact(folder, engines=PLANS):
    """An unsealed artifact whose engines this host built."""
    for name in engines:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"plan")
    assert remember_engines(folder, engines) == []
    return Artifact(folder=folder, manifest=manifest(engines))


def test_the_plan_of_the_gpus_compute_capability_is_chosen():
    plans = plans_of(PLANS, "unet")
    assert choose_engine(plans, "unet", "sm89") == (
        "unet/tensorrt/model.sm89.engine",
        PLANS["unet/tensorrt/model.sm89.engine"],
    )
    assert choose_engine(plans, "unet", "sm120")[0] == "unet/tensorrt/model.sm120.engine"


def test_without_a_plan_for_the_gpu_the_line_has_all_one_needs():
    with pytest.raises(Unsupported) as caught:
        choose_engine(plans_of(PLANS, "unet"), "unet", "sm86")
    assert str(caught.value) == (
        "unet has no TensorRT plan for this GPU's sm86, only for sm89, sm120; "
        "run: intaglio build CHECKPOINT -o ARTIFACT --target tensorrt --set tensorrt.sm=sm86"
    )
    with pytest.raises(ArtifactError, match="vae_decoder has no TensorRT plan; build the artifact with --target tens"):
        plans_of(PLANS, "vae_decoder")


@pytest.mark.parametrize(
    ("api", "pins"),
    [
        ("tensorrt", "tensorrt==1.7.1.116"),
        ("tensorrt-rtx", "tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116"),
    ],
)
def test_another_release_is_refused_with_both(api, pins):
    facts = {"api": api, "version": "1.7.1.116"}
    check_version("a.engine", facts, "1.7.1.116")
    with pytest.raises(Unsupported, match=rf"a.engine was built by {api} 1.7.1.116, 1.8.0.2 is installed; .*{pins}"):
        check_version("a.engine", facts, "1.8.0.2")


WHOLE = {"x": ((1, 3), (16, 3)), "timestep": ((1,), (16,))}
PROFILES = [*({"x": ((b, 3), (b, 3)), "timestep": ((b,), (b,))} for b in (1, 2)), WHOLE]


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 1), (3, 2), (16, 2)])
def test_the_narrowest_profile_is_chosen(batch, profile):
    assert choose_profile(PROFILES, {"x": (batch, 3), "timestep": (batch,)}) == profile


def test_shapes_outside_of_every_profile_are_refused():
    with pytest.raises(UsageError, match=r"no TensorRT profile takes .*\(17, 3\).*\(1, 3\) to \(16, 3\)"):
        choose_profile(PROFILES, {"x": (17, 3), "timestep": (17,)})


def test_device_names():
    assert [device_index(d) for d in ("cpu", "cuda", "cuda:0", "CUDA:3")] == [0, 0, 0, 3]
    for wrong in ("tpu:9", "cuda:x", "cpu:1", "gpu"):
        with pytest.raises(UsageError, match=f"'{wrong}' is unknown to tensorrt; allowed: cuda, cuda:N"):
            device_index(wrong)


def test_no_package_is_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_api, "APIS", {"tensorrt": "no_such_trt", "tensorrt-rtx": "no_such_rtx"})
    with pytest.raises(MissingDependency, match=r"pip install 'intaglio\[tensorrt\]'"):
        load_engine("tensorrt", artifact(tmp_path), "unet")
    with pytest.raises(MissingDependency, match="pip install tensorrt --extra-index-url"):
        tensorrt_api.load_api("tensorrt")


def test_no_driver_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_api, "DRIVER", "libno_such_driver.so.1")
    monkeypatch.setattr(engine_tensorrt, "installed_apis", lambda: ("tensorrt-rtx",))
    with pytest.raises(Unsupported, match=r"no NVIDIA GPU here: the driver's libno_such_driver.so.1 is not found"):
        load_engine("tensorrt", artifact(tmp_path), "unet")
    assert tensorrt_api.present_gpu() is None


class Driver:
    """libcuda's five calls for GPUs of given compute capabilities."""

    def __init__(self, *capabilities, cuda=13000, status=0):
        self.capabilities, self.cuda, self.status = capabilities, cuda, status

    def cuDriverGetVersion(self, out):
        out._obj.value = self.cuda
        return self.status

    def cuInit(self, flags):
        return 0 if self.capabilities else 100

    def cuDeviceGetCount(self, out):
        out._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = self.capabilities[device.value][(tensorrt_api.MAJOR, tensorrt_api.MINOR).index(attribute)]
        return 0


def test_the_driver_tells_the_compute_capability(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 9), (12, 0)))
    assert [tensorrt_api.capability_of_gpu(i) for i in (0, 1)] == ["sm89", "sm120"]
    with pytest.raises(Unsupported, match="no GPU cuda:2; allowed: cuda:0 to cuda:1"):
        tensorrt_api.capability_of_gpu(2)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    with pytest.raises(Unsupported, match=r"no NVIDIA GPU here: .* returns 100 and counts 0"):
        tensorrt_api.capability_of_gpu(0)


@pytest.mark.parametrize(
    ("cuda", "words"),
    [(12080, "for CUDA 12.8, TensorRT needs 13.0; install driver 580 or newer"), (13000, ""), (13010, "")],
)
def test_an_old_driver_is_refused_with_both_releases(cuda, words, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 9), cuda=cuda))
    if not words:
        tensorrt_api.check_driver()
        return
    with pytest.raises(Unsupported, match=words):
        tensorrt_api.check_driver()


def test_a_driver_that_does_not_tell_its_version_is_refused(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 9), status=3))
    with pytest.raises(Unsupported, match="returns 3 for its version"):
        tensorrt_api.check_driver()


class FakeCuda:
    """cuda.bindings.runtime with host memory as the device's; counts what is alive."""

    cudaError_t = types.SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self):
        self.memory = {}
        self.streams = 0

    def cudaSetDevice(self, index):
        return (0,)

    def cudaStreamCreate(self):
        self.streams += 1
        return 0, 77

    def cudaStreamDestroy(self, stream):
        self.streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream):
        assert stream == 77
        return (0,)

    def cudaMalloc(self, size):
        if size > 1 << 20:
            return 2, None
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaGetErrorString(self, error):
        return 0, b"out of memory"


class FakeContext:
    """Computes ``y = x + timestep`` on the addresses it was given."""

    active_optimization_profile = 0

    def __init__(self):
        self.shapes, self.addresses, self.profiles = {}, {}, []

    def set_optimization_profile_async(self, index, stream):
        self.profiles.append(index)
        return stream == 77

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name):
        return self.shapes["x"]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        def view(name, shape):
            pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(pointer, shape)

        shape = self.shapes["x"]
        view("y", shape)[:] = view("x", shape) + view("timestep", shape[:1])[:, None]
        return True


class FakeEngine:
    num_optimization_profiles = 3
    device_memory_size_v2 = 100

    def __init__(self):
        self.context = FakeContext()

    def get_tensor_profile_shape(self, name, index):
        low, high = PROFILES[index][name]
        return [low, low, high]

    def create_execution_context(self):
        return self.context

    def get_engine_stat(self, stat):
        return 1000


class FakeTrt(types.SimpleNamespace):
    class ILogger:
        ERROR, WARNING = 1, 2

    EngineStat = types.SimpleNamespace(TOTAL_WEIGHTS_SIZE=0)
    __version__ = "1.7.1.116"

    def Runtime(self, log):
        def load(plan):
            if plan == b"plan":
                return FakeEngine()
            log.log(self.ILogger.ERROR, "not a\nplan")
            return None

        return types.SimpleNamespace(deserialize_cuda_engine=load)


@pytest.fixture
def stand_ins(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(engine_tensorrt, "installed_apis", lambda: ("tensorrt-rtx",))
    monkeypatch.setattr(engine_tensorrt, "capability_of_gpu", lambda index: "sm89")
    monkeypatch.setattr(engine_tensorrt, "check_driver", lambda: None)
    monkeypatch.setattr(engine_tensorrt, "load_api", lambda name: FakeTrt())
    monkeypatch.setattr(engine_tensorrt, "need", lambda module, extra: cuda)
    return cuda


def feeds(batch):
    return {"x": np.arange(batch * 3, dtype=np.float32).reshape(batch, 3), "timestep": np.arange(batch) * 10.0}


def test_a_run_sets_profile_shapes_and_addresses_and_results_are_the_callers(tmp_path, stand_ins):
    engine = load_engine("tensorrt", artifact(tmp_path), "unet", EngineOptions(device="cuda:0"))
    first = engine.run(feeds(1))["y"]
    kept = first.copy()
    for batch in (2, 3, 2, 1):
        given = feeds(batch)
        np.testing.assert_array_equal(engine.run(given)["y"], given["x"] + given["timestep"][:, None])
    np.testing.assert_array_equal(first, kept)
    assert engine.context.profiles == [1, 2, 1, 0]
    assert engine.memory() == {"device_bytes": 1000 + 100 + 36 + 12 + 36}  # x, timestep, y at batch 3
    assert len(stand_ins.memory) == 3
    engine.close()
    assert not stand_ins.memory and stand_ins.streams == 0


def test_failures_are_one_line_with_the_librarys_reason(tmp_path, stand_ins):
    whole = artifact(tmp_path)
    with pytest.raises(UsageError, match="surprise"):
        load_engine("tensorrt", whole, "unet", EngineOptions(settings={"surprise": "1"}))
    engine = load_engine("tensorrt", whole, "unet")
    with pytest.raises(UsageError, match="no TensorRT profile"):
        engine.run(feeds(17))
    with pytest.raises(ToolError, match="cudaMalloc failed on cuda:0: out of memory"):
        engine.cuda.buffer("huge", 1 << 21)
    engine.context.execute_async_v3 = lambda stream: False
    with pytest.raises(ToolError, match="TensorRT refuses to run: it gives no reason"):
        engine.run(feeds(1))
    (whole.folder / "unet/tensorrt/model.sm89.engine").write_bytes(b"damaged")
    remember_engines(whole.folder, PLANS)  # a damage that neither list nor record tells
    with pytest.raises(ToolError, match=r"TensorRT cannot load unet/tensorrt/model.sm89.engine: not a plan"):
        load_engine("tensorrt", whole, "unet")
    assert stand_ins.streams == 1  # the first engine's; the one that failed gave its stream back


def test_a_plan_of_another_release_is_not_loaded(tmp_path, stand_ins):
    engines = {n: {**f, "version": "1.6.0.1"} for n, f in PLANS.items()}
    with pytest.raises(Unsupported, match=r"built by tensorrt-rtx 1.6.0.1, 1.7.1.116 is installed"):
        load_engine("tensorrt", artifact(tmp_path, engines), "unet")


@pytest.mark.needs_gpu
def test_a_plan_runs_on_the_gpu_and_is_near_onnxruntime(tmp_path):
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (extra tensorrt)")
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (extra tensorrt)")
    ort = pytest.importorskip("onnxruntime")
    import test_lower_tensorrt as recipes

    from intaglio.exporters.lower_tensorrt import LOWERING, RTX_SMS
    from intaglio.exporters.parity import relative_error

    sm = tensorrt_api.capability_of_gpu(0)
    if sm not in RTX_SMS:
        pytest.skip(f"TensorRT-RTX {rtx.__version__} does not build for this GPU's {sm}")
    folder = recipes.attention(tmp_path / "unet")
    lowered = LOWERING.lower(recipes.job(folder, recipes.ATTENTION_IN, recipes.ATTENTION_OUT, "int8", sm=sm))
    made = artifact(tmp_path, {})
    remember_engines(tmp_path, [f"unet/{name}" for name in lowered.engines])
    record = dataclasses.replace(RECORD, inputs=recipes.ATTENTION_IN, outputs=recipes.ATTENTION_OUT)
    engines = {f"unet/{name}": facts for name, facts in lowered.engines.items()}
    built = dataclasses.replace(made.manifest, engines=engines, components={"unet": record})
    engine = TensorRtEngine(dataclasses.replace(made, manifest=built), "unet", EngineOptions(device="cuda:0"))
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 4):
        given = {"x": np.random.default_rng(batch).standard_normal((batch, 16, 80)).astype(np.float32)}
        found, wanted = engine.run(given)["y"], session.run(None, given)[0]
        assert relative_error(found, wanted) < 1e-2
        np.testing.assert_array_equal(engine.run(given)["y"], found)
    assert engine.memory()["device_bytes"] > 0
    engine.close()
