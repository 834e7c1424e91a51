"""What is special to FLUX.1: packed latents, position ids, two texts, embedded and true guidance, resolution shift."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_flux
import torch
from accelerate import init_empty_weights
from cases import HEIGHT, WIDTH, diffusers_answer

from intaglio.exporters.capture import match_parameters
from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.flux import EXPORTER, rotary_table, time_table
from intaglio.exporters.parts import SCHEDULER
from intaglio.exporters.passes import canonicalize
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.family import load_family
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.flux import image_ids
from intaglio.runtimes.packed import pack, unpack

LATENTS = 1e-5  # relative L2 to diffusers; measured 4e-7
ROTARY = 2e-5  # absolute, cos and sin at ids up to 256; measured 1.3e-5
TIME = 1e-6  # absolute, sinusoids at 0 to 5000; measured 0
STEPS, SEED, PROMPT = 2, 11, "a red cat on the moon 红心"
CASE = tiny_flux.CASES["flux dev true guidance"]


@pytest.fixture(scope="module")
def checkpoint(built_case):
    return built_case("flux dev").checkpoint


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return tiny_flux.schnell(tmp_path_factory.mktemp("flux") / "schnell")


@pytest.fixture(scope="module")
def pipeline(built_case):
    return built_case("flux dev").pipeline("onnxruntime")


@pytest.fixture(scope="module")
def theirs(built_case):
    return built_case("flux dev").theirs


def ask(pipeline, prompt=PROMPT, **changes):
    request = {**tiny_flux.DEV, "seed": SEED, "num_inference_steps": STEPS, "height": HEIGHT, "width": WIDTH}
    return pipeline(prompt, **{**request, **changes})


def test_rotary_table_equals_float64_up_to_256():
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.stack([torch.arange(257.0), torch.arange(257.0).flip(0), torch.full((257,), 256.0)], dim=1)
    wanted, found = FluxPosEmbed(10000, [16, 56, 56])(ids), rotary_table(10000, (16, 56, 56))(ids)
    for ours, diffusers in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - diffusers).abs().max()) <= ROTARY


def test_time_table_equals_diffusers():
    from diffusers.models.embeddings import Timesteps

    time = torch.cat([torch.linspace(0, 1000, 50), torch.linspace(1000, 5000, 50)])
    wanted = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(time)
    assert float((time_table(256)(time) - wanted).abs().max()) <= TIME


def test_packing_and_position_ids_equal_diffusers():
    from diffusers import FluxPipeline

    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 10)).astype(np.float32)
    tokens = FluxPipeline._pack_latents(torch.from_numpy(latents), 2, 4, 6, 10).numpy()
    assert np.array_equal(pack(latents), tokens)
    assert np.array_equal(unpack(tokens, 3, 5), latents)
    assert np.array_equal(image_ids(3, 5), FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))


@pytest.mark.parametrize("side", [256, 1024, 2048])
def test_the_shift_follows_the_resolution(pipeline, theirs, side):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = theirs.scheduler.config
    mu = calculate_shift((side // 16) ** 2, config.base_image_seq_len, config.max_image_seq_len)
    scheduler = type(theirs.scheduler).from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7), mu=mu)
    request = request_of(pipeline, height=side, width=side, num_inference_steps=7)
    found = pipeline.sampler.make_scheduler(request).timesteps
    np.testing.assert_allclose(found, scheduler.timesteps.numpy(), rtol=1e-6)


def request_of(pipeline, **changes):
    """The request that the sampler would get."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.sampler, "check", seen.append)
        pipeline.stream(PROMPT, **{**tiny_flux.DEV, **changes})
    return seen[0]


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt_2": "a blue car"},
        {"negative_prompt": "a blue car", "negative_prompt_2": "the moon", "true_cfg_scale": 2.0},
        {"negative_prompt": "", "true_cfg_scale": 2.0, "prompt_2": "night"},
    ],
    ids=["prompt_2", "negative_prompt_2", "empty negative"],
)
def test_second_prompts_go_to_t5_as_in_diffusers(pipeline, theirs, texts):
    case = dataclasses.replace(CASE, theirs={**tiny_flux.DEV, **texts})
    wanted = diffusers_answer(case, theirs, PROMPT, seed=SEED, steps=STEPS).latents
    assert relative_l2(ask(pipeline, **texts).latents, wanted) <= LATENTS
    for name in texts.keys() & {"prompt_2", "negative_prompt_2"}:  # and it matters
        without = {k: v for k, v in texts.items() if k != name}
        assert relative_l2(ask(pipeline, **without).latents, wanted) > 1e-2


def test_text_length_and_guidance_are_those_of_diffusers(pipeline, theirs):
    changes = {"max_sequence_length": 512, "guidance_scale": 1.5}
    case = dataclasses.replace(CASE, theirs=changes)
    wanted = diffusers_answer(case, theirs, PROMPT, seed=SEED, steps=STEPS).latents
    found = ask(pipeline, max_sequence_length=None, guidance_scale=1.5).latents
    assert relative_l2(found, wanted) <= LATENTS
    assert relative_l2(ask(pipeline, guidance_scale=1.5).latents, wanted) > 1e-3  # 64 tokens are another picture


def test_every_picture_of_a_batch_is_the_one_made_alone(pipeline):
    texts = {"negative_prompt": "a blue car", "true_cfg_scale": 2.0}
    together = ask(pipeline, ["a red heart", "the moon"], count=2, **texts).latents
    for index, prompt in enumerate(["a red heart", "a red heart", "the moon", "the moon"]):
        alone = ask(pipeline, prompt, seed=SEED + index, **texts).latents
        assert relative_l2(together[index : index + 1], alone) <= LATENTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_cfg_scale": 2.0}, "needs a negative prompt"),
        ({"negative_prompt": "a blue car"}, "true_cfg_scale above 1 only"),
        ({"negative_prompt_2": "a blue car"}, "true_cfg_scale above 1 only"),
        ({"true_cfg_scale": 0.5}, "1 or more"),
        ({"max_sequence_length": 513}, "1 to 512"),
        ({"max_sequence_length": 4}, "nearest is 8"),
        ({"width": 72}, "in steps of 16"),
    ],
)
def test_what_diffusers_would_ignore_or_cut_is_refused(pipeline, changes, message):
    with pytest.raises(UsageError, match=message):
        ask(pipeline, **changes)


def test_schnell_has_no_guidance(schnell, checkpoint, pipeline, monkeypatch):
    with_guidance, without = (open_checkpoint(folder) for folder in (checkpoint, schnell))
    names = [[s.name for s in EXPORTER.components(c)[2].inputs] for c in (with_guidance, without)]
    assert set(names[0]) - set(names[1]) == {"guidance"}
    settings = {**load_family("flux").defaults, **EXPORTER.settings(without)}
    assert settings["guidance_scale"] == 0
    monkeypatch.setattr(pipeline.sampler, "settings", settings)
    with pytest.raises(UsageError, match=r"guidance 3\.5 is not allowed: this checkpoint has no guidance embedding"):
        ask(pipeline, guidance_scale=3.5)
    pipeline.sampler.check(request_of(pipeline, guidance_scale=0.0))


def test_schnells_preset_has_its_steps_guidance_text_length_and_schedule(schnell, pipeline, tmp_path, monkeypatch):
    preset = load_family("flux").presets["schnell"]
    opened = dataclasses.replace(open_checkpoint(schnell), options={"preset": "schnell"})
    settings = {**load_family("flux").defaults, **EXPORTER.settings(opened)}
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 0.0)
    EXPORTER.copy_files(opened, tmp_path)
    assert json.loads((tmp_path / SCHEDULER).read_text()) == preset.scheduler
    monkeypatch.setattr(pipeline.sampler, "settings", settings)
    lengths = [request_of(pipeline, max_sequence_length=given).options["max_sequence_length"] for given in (None, 300)]
    assert lengths == [256, 300]
    with pytest.raises(UsageError, match=r"unknown flux\.preset 'dev'; allowed: schnell"):
        EXPORTER.components(dataclasses.replace(opened, options={"preset": "dev"}))


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "UMT5EncoderModel"]}, CheckpointError, "UMT5"),
        ("vae/config.json", {"latent_channels": 16}, CheckpointError, "need 64"),
        ("transformer/config.json", {"out_channels": 8}, Unsupported, "output of 16 channels"),
    ],
)
def test_other_parts_are_refused(schnell, tmp_path, file, change, error, message):
    folder = tmp_path / "changed"
    for path in (p for p in schnell.rglob("*") if p.is_file()):
        target = folder / path.relative_to(schnell)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = {**json.loads((folder / file).read_text()), **change}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        EXPORTER.components(open_checkpoint(folder))


# Keys of black-forest-labs/FLUX.1-dev, saved by transformers 4: old to what the tiny checkpoint has today.
REAL_LAYOUT = {
    "text_encoder": lambda key: [f"text_model.{key}"],
    "text_encoder_2": lambda key: [key, "encoder.embed_tokens.weight"] if key == "shared.weight" else [key],
    "transformer": lambda key: [key],
    "vae_encoder": lambda key: [key],
    "vae_decoder": lambda key: [key],
}


def test_the_real_repositorys_parameter_names_fit(checkpoint):
    opened = open_checkpoint(checkpoint)
    for component in EXPORTER.components(opened):
        with init_empty_weights(include_buffers=False):
            module = component.wrap(component.model(opened.config(component.source)))
        for names in (REAL_LAYOUT[component.name], lambda key: [key]):
            weights = opened.weights(component.source)
            weights._entries = {new: parameter for key, parameter in weights.items() for new in names(key)}
            assert len(match_parameters(component, module, weights)) == len(dict(module.named_parameters()))


@pytest.mark.parametrize("sizes", ["symbolic", "constant"])
def test_unequal_parts_of_a_split_keep_their_sizes(sizes):
    given = ir.Value(name="x", shape=ir.Shape(["n", 2]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.Value(name="k", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    lengths = ir.node("Constant", [], {"value": ir.tensor(np.array([2, 3]))})
    split = ir.node("SplitToSequence", [given, first if sizes == "symbolic" else lengths.outputs[0]], {"axis": 0})
    places = [ir.node("Constant", [], {"value": ir.tensor(np.array(i))}) for i in range(2)]
    parts = [ir.node("SequenceAt", [split.outputs[0], p.outputs[0]]) for p in places]
    for part in parts:
        part.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    outputs = [part.outputs[0] for part in parts]
    graph = ir.Graph([given, first], outputs, nodes=[lengths, split, *places, *parts], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    canonicalize(model)
    assert not {"SplitToSequence", "SequenceAt"} & {node.op_type for node in model.graph}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    x, k = np.arange(10, dtype=np.float32).reshape(5, 2), np.array([2, 3])
    for found, wanted in zip(session.run(None, {"x": x, "k": k}), np.split(x, [2]), strict=True):
        assert np.array_equal(found, wanted)


def test_the_ir_carries_the_scale_factor_of_its_activations(built_case):
    import openvino

    model = openvino.Core().read_model(built_case("flux dev").artifact.component("transformer") / "openvino_model.xml")
    assert model.get_rt_info(["runtime_options", "ACTIVATIONS_SCALE_FACTOR"]).astype(str) == "8.0"
