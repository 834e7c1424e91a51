"""One contract for every engine in the table. Those that need a GPU are skipped with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from intaglio.exporters.parity import random_feeds, relative_error
from intaglio.profiles.errors import ArtifactError, ToolError, UsageError
from intaglio.runtimes.engine import ENGINES, EngineOptions, load_engine

FIXED_TOLERANCE = 2e-5  # between the plugin's fused and unfused layers; measured 1e-6

SIZES = {"batch": 2, "height": 64, "width": 72, "tokens": 16, "context_tokens": 16}
EXACT = 2e-5  # relative L2 to torch in fp32; measured at most 2.9e-6
COMPUTING = [name for name in ENGINES if name not in ("null", "tensorrt")]


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.needs_gpu) if n == "tensorrt" else n for n in ENGINES])
def backend(request):
    return request.param


@pytest.fixture
def artifact(request, backend):
    """What the backend runs: TensorRT needs plans for the GPU that is there."""
    return request.getfixturevalue("tiny_artifact_tensorrt" if backend == "tensorrt" else "tiny_artifact")


@pytest.fixture
def feeds(tiny_artifact):
    return random_feeds(tiny_artifact.manifest.components["unet"].inputs, SIZES)


def test_outputs_have_the_names_dtypes_and_shapes_of_the_record(backend, artifact):
    for name, record in artifact.manifest.components.items():
        engine = load_engine(backend, artifact, name)
        outputs = engine.run(random_feeds(record.inputs, SIZES))
        assert list(outputs) == [s.name for s in record.outputs]
        for spec in record.outputs:
            assert outputs[spec.name].shape == spec.sizes(SIZES)
            assert outputs[spec.name].dtype == np.dtype(spec.dtype)
            assert np.isfinite(outputs[spec.name]).all()
        engine.close()


def test_a_second_run_does_not_change_the_first_result(backend, artifact, feeds):
    engine = load_engine(backend, artifact, "unet")
    first = engine.run(feeds)["out_sample"]
    kept = first.copy()
    engine.run({**feeds, "sample": feeds["sample"] * 2})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(engine.run(feeds)["out_sample"], kept)


def test_feeds_are_left_alone_and_may_be_views(backend, artifact, feeds):
    wide = np.repeat(feeds["sample"], 2, axis=3)
    before = wide.copy()
    engine = load_engine(backend, artifact, "unet")
    view = engine.run({**feeds, "sample": wide[..., ::2]})["out_sample"]
    np.testing.assert_array_equal(wide, before)
    np.testing.assert_array_equal(view, engine.run(feeds)["out_sample"])


def test_wrong_feeds_are_refused(backend, artifact, feeds):
    engine = load_engine(backend, artifact, "unet")
    with pytest.raises(UsageError, match="needed"):
        engine.run({"sample": feeds["sample"]})
    with pytest.raises(UsageError, match="needed"):
        engine.run({**feeds, "surprise": feeds["sample"]})
    with pytest.raises(UsageError, match="sample has shape"):
        engine.run({**feeds, "sample": feeds["sample"][:, :3]})


def test_memory_is_a_number_or_none(backend, artifact):
    engine = load_engine(backend, artifact, "vae_decoder")
    assert all(value is None or value >= 0 for value in engine.memory().values())


def test_unknown_settings_devices_and_components_are_refused(backend, artifact):
    with pytest.raises(UsageError, match="surprise"):
        load_engine(backend, artifact, "unet", EngineOptions(settings={"surprise": "1"}))
    with pytest.raises(ArtifactError, match="no component 'transformer'"):
        load_engine(backend, artifact, "transformer")
    if backend != "null":
        with pytest.raises((ToolError, RuntimeError)):
            load_engine(backend, artifact, "unet", EngineOptions(device="tpu:9"))


@pytest.mark.parametrize("name", COMPUTING)
def test_threads_do_not_change_the_numbers(name, tiny_artifact, feeds):
    one = load_engine(name, tiny_artifact, "unet", EngineOptions(threads=1)).run(feeds)["out_sample"]
    two = load_engine(name, tiny_artifact, "unet", EngineOptions(threads=2)).run(feeds)["out_sample"]
    assert relative_error(one, two) <= EXACT


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("fixture", ["tiny_artifact", "tiny_artifact_int8"])
def test_every_engine_gives_the_references_numbers(request, name, fixture):
    artifact = request.getfixturevalue(fixture)
    for component, record in artifact.manifest.components.items():
        feeds = random_feeds(record.inputs, SIZES, seed=5)
        wanted = load_engine("torch", artifact, component).run(feeds)
        found = load_engine(name, artifact, component).run(feeds)
        assert all(relative_error(found[k], v) <= EXACT for k, v in wanted.items()), component


def test_openvino_computes_in_float32_even_where_bf16_is_faster(tiny_artifact):
    pytest.importorskip("openvino")
    compiled = load_engine("openvino", tiny_artifact, "unet").compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 0


def test_openvino_with_fixed_shapes_gives_the_same_and_follows_another_size(tiny_artifact):
    pytest.importorskip("openvino")
    from intaglio.exporters.parity import untraced_sizes

    record = tiny_artifact.manifest.components["unet"]
    free = load_engine("openvino", tiny_artifact, "unet")
    fixed = load_engine("openvino", tiny_artifact, "unet", EngineOptions(settings={"shapes": "fixed"}))
    assert fixed.compiled is None, "there is nothing to compile before the first shapes are known"
    seen = []
    for sizes in untraced_sizes(tiny_artifact.manifest.shapes)[:2]:
        feeds = random_feeds(record.inputs, sizes)
        wanted = free.run(feeds)
        for _ in range(2):
            found = fixed.run(feeds)
            assert all(relative_error(found[k], v) < FIXED_TOLERANCE for k, v in wanted.items())
            seen.append(fixed.compile_seconds)
    assert 0 < seen[0] == seen[1] < seen[2] == seen[3], "one compilation for each set of shapes"
    assert all(not d.is_dynamic for p in fixed.compiled.inputs for d in p.partial_shape)
    with pytest.raises(UsageError, match=r"openvino\.shapes"):
        load_engine("openvino", tiny_artifact, "unet", EngineOptions(settings={"shapes": "square"}))
