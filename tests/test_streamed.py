"""The reference that holds one layer at a time is the reference; a build's comparison takes it where memory ends."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from intaglio.exporters import parity
from intaglio.exporters.derive import contract_of, derive
from intaglio.exporters.parity import check_component, random_feeds, untraced_sizes
from intaglio.exporters.streamed import StreamedTorchEngine
from intaglio.profiles.errors import ParityError
from intaglio.profiles.recipe import ComponentRecipe
from intaglio.runtimes.engine import load_engine
from intaglio.runtimes.private_memory import PrivatePeak, held_bytes

TOLERANCE = 2e-5  # measured 1.1e-6


@pytest.fixture(scope="module")
def artifacts(tiny_artifact, tmp_path_factory):
    """The tiny checkpoint in float32, with int4 weights, and with static activations on made-up scales."""
    from intaglio.exporters.quantization import calibrate_component
    from intaglio.quantize.feeds import Recorder
    from intaglio.runtimes.probe import Place

    folder = tmp_path_factory.mktemp("streamed")
    recorder = Recorder(folder / "feeds.zip")
    sizes = untraced_sizes(tiny_artifact.manifest.shapes)[0]
    recorder.add("unet", Place(step=0), random_feeds(tiny_artifact.manifest.components["unet"].inputs, sizes))
    recorder.close()
    recipe = ComponentRecipe(format="w8a8", activations="static")
    contract = contract_of(tiny_artifact, "unet")
    scales = calibrate_component(tiny_artifact, "unet", recipe, contract, folder / "feeds.zip", lambda text: None)
    int4 = ComponentRecipe(format="int4", activations="exact")
    return {
        "none": tiny_artifact,
        "int4": derive(tiny_artifact, folder / "int4", {"unet": int4}, {}, ("onnx",)),
        "w8a8": derive(tiny_artifact, folder / "w8a8", {"unet": recipe}, {"unet": scales}, ("onnx",)),
    }


@pytest.mark.parametrize("name", ["none", "int4", "w8a8"])
def test_layer_by_layer_is_the_whole_model(name, artifacts):
    artifact = artifacts[name]
    feeds = random_feeds(artifact.manifest.components["unet"].inputs, untraced_sizes(artifact.manifest.shapes)[1])
    whole, parts = load_engine("torch", artifact, "unet"), StreamedTorchEngine(artifact, "unet")
    assert whole.memory()["weight_bytes"]
    assert not parts.memory()["weight_bytes"]
    assert all(p.is_meta for p in parts.module.parameters())
    wanted = whole.run(feeds)
    for _ in range(2):  # weights go and come again
        found = parts.run(feeds)
        assert all(np.array_equal(found[key], value) for key, value in wanted.items())
        assert all(p.is_meta for p in parts.module.parameters())


def test_a_component_beyond_the_limit_is_compared_in_parts(artifacts):
    for name in ("none", "int4"):
        whole = check_component(artifacts[name], "unet", TOLERANCE)
        parts = check_component(artifacts[name], "unet", TOLERANCE, limit=100_000)
        assert set(parts) == {"onnxruntime"}, "OpenVINO cannot run a part of a model"
        assert parts["onnxruntime"] == pytest.approx(whole["onnxruntime"], abs=TOLERANCE)


def test_parts_that_differ_are_refused(artifacts, monkeypatch):
    class Wrong(StreamedTorchEngine):
        def run(self, feeds):
            return {name: value * 1.001 for name, value in super().run(feeds).items()}

    monkeypatch.setattr(parity, "torch_in_parts", Wrong)
    with pytest.raises(ParityError, match=r"unet on onnxruntime differs from torch by .\...e-0[34], allowed 2e-05"):
        check_component(artifacts["none"], "unet", TOLERANCE, limit=100_000)


def test_private_memory_is_seen_and_forgotten():
    peak = PrivatePeak().start()
    size = 64 << 20
    before = held_bytes()[0]
    held = mmap.mmap(-1, size)  # of no allocator: a heap keeps what it is given back
    np.frombuffer(held, np.uint8)[:] = 1
    peak.sample()
    assert peak.private >= before + size * 0.9
    held.close()
    peak.reset()
    assert peak.private < before + size * 0.5
    peak.stop()


def test_children_are_counted():
    import subprocess
    import sys

    before = held_bytes()[0]
    code = "import sys; held = bytearray(64 << 20); print(1, flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert held_bytes()[0] >= before + (60 << 20)
    finally:
        child.communicate()
