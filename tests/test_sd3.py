"""What Stable Diffusion 3 has that other families have not: the position table, T5 left out, skip-layer guidance."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_sd3
from cases import diffusers_answer
from partial import build_only, completed

from intaglio.exporters.checkpoint import Weights
from intaglio.exporters.parts import SCHEDULER
from intaglio.exporters.plan import make_plan
from intaglio.exporters.sd3_positions import KEY, cropped_patch_embed, position_table
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.runtimes.engine import load_engine
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load

LATENTS = 1e-4  # relative L2 to diffusers after all steps; measured at most 5e-6
VELOCITY = 2e-5  # relative L2 of one evaluation to diffusers' transformer; measured at most 4e-6
STEPS, SEED = 4, 11
PROMPT = "a red cat on the moon"
BACKENDS = ("onnxruntime", "openvino")
CASE = tiny_sd3.CASES["sd3"]
SKIPPED = "0,2"  # a block with dual attention, and the last one, which has no text output
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def plain(built_case):
    """Built without options."""
    return built_case("sd3")


@pytest.fixture(scope="module")
def checkpoint(plain):
    return plain.checkpoint


@pytest.fixture(scope="module")
def theirs(plain):
    return plain.theirs


@pytest.fixture(scope="module")
def artifact(plain, tmp_path_factory):
    """With skip-layer guidance, which is the transformer's."""
    folder, options = tmp_path_factory.mktemp("sd3") / "built", {"sd3.skip_layers": SKIPPED}
    part = build_only(plain.checkpoint, folder, "transformer", targets=("openvino",), options=options)
    return completed(part, plain.artifact, *(n for n in plain.artifact.manifest.components if n != "transformer"))


@pytest.fixture(scope="module")
def lean_artifact(plain, tmp_path_factory):
    """Built without T5, and without skip-layer guidance."""
    folder, options = tmp_path_factory.mktemp("lean") / "built", {"sd3.t5": "false"}
    names = [c.name for c in make_plan(plain.checkpoint, options=options).components]
    part = build_only(plain.checkpoint, folder, "text_encoder", options=options)
    return completed(part, plain.artifact, *(n for n in names if n != "text_encoder"))


@pytest.fixture(scope="module")
def pipeline(artifact):
    return load(artifact)


@pytest.fixture(scope="module")
def lean(lean_artifact):
    return load(lean_artifact)


def difference(pipeline, theirs, request, their_request=None, *, prompt=PROMPT, height=96, width=64):
    """Relative L2 of our final latents to diffusers'."""
    asked = {"guidance_scale": 4.5, "max_sequence_length": 40, **request}
    case = dataclasses.replace(CASE, theirs={**asked, **request} if their_request is None else their_request)
    answer = diffusers_answer(case, theirs, prompt, seed=SEED, steps=STEPS, height=height, width=width)
    found = pipeline(prompt, seed=SEED, height=height, width=width, num_inference_steps=STEPS, **asked)
    return relative_l2(found.latents, answer.latents)


# --- positions ------------------------------------------------------------------------------------------------------


def patch_embed(size, table=None):
    import torch
    from diffusers.models.embeddings import PatchEmbed

    embed = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=16, pos_embed_max_size=size)
    if table is not None:
        embed.pos_embed.copy_(torch.from_numpy(table))
    return embed


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("separable", [True, False], ids=["axes", "table"])
def test_positions_are_cropped_as_diffusers_crops_them(size, separable):
    import torch

    embed = patch_embed(size)
    table = embed.pos_embed.numpy().reshape(size, size, 16)
    parts = (table[0, :, :8].copy(), table[:, 0, 8:].copy()) if separable else (table,)
    ours = cropped_patch_embed(embed, parts)
    for rows in (1, 2, 5, size - 1, size):
        for columns in (1, 4, size):
            latents = torch.randn(2, 4, 2 * rows, 2 * columns)
            assert torch.equal(ours(latents), embed(latents)), (rows, columns)


def stored(folder, table):
    from safetensors.numpy import save_file

    file = folder / f"{'missing' if table is None else 'table'}.safetensors"
    save_file({KEY: table} if table is not None else {"other": np.zeros(1, np.float32)}, file)
    return Weights(files=[file])


def test_the_table_is_the_checkpoints_in_its_precision_and_stored_as_its_axes(tmp_path):
    table = patch_embed(12).pos_embed.numpy().astype(np.float16)
    across, down = position_table(stored(tmp_path, table), 12)
    whole = np.concatenate([np.broadcast_to(across, (12, 12, 8)), np.broadcast_to(down[:, None], (12, 12, 8))], axis=-1)
    assert across.dtype == np.float32
    assert np.array_equal(whole.reshape(table.shape), table.astype(np.float32))


def test_a_table_that_is_not_its_axes_is_kept_whole(tmp_path):
    table = patch_embed(12).pos_embed.numpy().copy()
    table[0, 77, 3] += 0.5
    (kept,) = position_table(stored(tmp_path, table), 12)
    assert np.array_equal(kept.reshape(table.shape), table)


def test_a_table_that_is_missing_or_too_small_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"pos_embed\.pos_embed is missing"):
        position_table(stored(tmp_path, None), 12)
    with pytest.raises(CheckpointError, match="13 x 13"):
        position_table(stored(tmp_path, patch_embed(12).pos_embed.numpy()), 13)


def velocities(theirs, feeds, skip_layers=None):
    import torch

    with torch.inference_mode():
        tensors = {name: torch.from_numpy(values) for name, values in feeds.items() if name != "skip_layers"}
        return theirs.transformer(**tensors, skip_layers=skip_layers, return_dict=False)[0].numpy()


def denoiser_feeds(height, width, flags):
    rng = np.random.default_rng(height + width)
    shapes = {
        "hidden_states": (len(flags), 16, height // 8, width // 8),
        "encoder_hidden_states": (len(flags), 40, tiny_sd3.T5_WIDTH),
        "pooled_projections": (len(flags), sum(tiny_sd3.WIDTHS.values())),
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**feeds, "timestep": np.float32([730.5, 12.25][: len(flags)]), "skip_layers": np.float32(flags)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transformer_equals_diffusers_up_to_the_tables_size(artifact, theirs, backend):
    engine = load_engine(backend, artifact, "transformer")
    for height, width in [(64, 64), (80, 208), (208, 96), (176, 144), (208, 208)]:
        feeds = denoiser_feeds(height, width, [0, 0])
        error = relative_l2(engine.run(feeds)["out_hidden_states"], velocities(theirs, feeds))
        assert error <= VELOCITY, (height, width, error)
    engine.close()


def test_a_size_beyond_the_table_is_refused_with_the_range(pipeline):
    assert pipeline.artifact.manifest.shapes["height"].max == 16 * tiny_sd3.POSITIONS
    with pytest.raises(UsageError, match=r"height 224 is not allowed: 64 to 208 in steps of 16; the nearest is 208"):
        pipeline(PROMPT, height=224, width=64)


# --- skip-layer guidance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_are_left_out_in_the_samples_that_ask_for_it(artifact, theirs, backend):
    engine = load_engine(backend, artifact, "transformer")
    feeds = denoiser_feeds(80, 144, [0, 1])
    found = engine.run(feeds)["out_hidden_states"]
    plain, skipping = velocities(theirs, feeds), velocities(theirs, feeds, [0, 2])
    assert relative_l2(found[0], plain[0]) <= VELOCITY
    assert relative_l2(found[1], skipping[1]) <= VELOCITY
    assert relative_l2(plain[1], skipping[1]) > 100 * VELOCITY
    neighbour = engine.run({**feeds, "skip_layers": np.zeros(2, np.float32)})["out_hidden_states"]
    assert np.array_equal(found[0], neighbour[0])
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "a blue heart and a star"]], ids=["alone", "batch"])
def test_skip_layer_guidance_equals_diffusers(artifact, theirs, backend, prompt):
    window = {"skip_layer_guidance_scale": 2.0, "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
    asked = {"guidance_scale": 4.5, "max_sequence_length": 40}
    with_it = {**asked, **window, "skip_guidance_layers": [0, 2]}
    pipeline = load(artifact, backend=backend)
    assert difference(pipeline, theirs, {**asked, **window}, with_it, prompt=prompt) <= LATENTS
    assert difference(pipeline, theirs, asked, with_it, prompt=prompt) > 100 * LATENTS
    later = {**window, "skip_layer_guidance_start": 0.3}  # one step fewer
    assert difference(pipeline, theirs, {**asked, **later}, with_it, prompt=prompt) > 100 * LATENTS
    pipeline.close()


def test_skip_layer_guidance_has_diffusers_defaults(pipeline, theirs):
    asked = {"guidance_scale": 4.5, "max_sequence_length": 40}
    case = dataclasses.replace(CASE, theirs={**asked, "skip_guidance_layers": [0, 2]})
    answer = diffusers_answer(case, theirs, PROMPT, seed=SEED, steps=8, height=64, width=64)
    found = pipeline(
        PROMPT, seed=SEED, height=64, width=64, num_inference_steps=8, skip_layer_guidance=True, **asked
    ).latents
    without = pipeline(PROMPT, seed=SEED, height=64, width=64, num_inference_steps=8, **asked).latents
    assert relative_l2(found, answer.latents) <= LATENTS
    assert relative_l2(without, answer.latents) > 100 * LATENTS


def test_the_signature_is_optimums_without_the_option(artifact, lean_artifact):
    base = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert [s.name for s in lean_artifact.manifest.components["transformer"].inputs] == base
    assert [s.name for s in artifact.manifest.components["transformer"].inputs] == [*base, "skip_layers"]


# --- texts ----------------------------------------------------------------------------------------------------------

REQUESTS = {
    "second and third prompt": {"prompt_2": "a blue car", "prompt_3": "the night in a city, a painting"},
    "negative prompts": {"negative_prompt": "a car", "negative_prompt_2": "light", "negative_prompt_3": "a star"},
    "negative prompt for all": {"negative_prompt": "a car"},
    "clip_skip, of the prompt alone": {"clip_skip": 1, "negative_prompt": "a car"},
    "long text": {"max_sequence_length": 256},
    "guidance off": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_texts_reach_the_encoders_as_in_diffusers(pipeline, theirs, request_):
    assert difference(pipeline, theirs, request_) <= LATENTS
    plain = {} if "guidance_scale" not in request_ else {"guidance_scale": 4.5}
    base = {"guidance_scale": 4.5, "max_sequence_length": 40}
    assert difference(pipeline, theirs, plain, {**base, **request_}) > 100 * LATENTS


def test_without_t5_diffusers_zeros_take_its_place(lean, checkpoint):
    import diffusers
    import torch

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, **absent)
    theirs.set_progress_bar_config(disable=True)
    for length in (40, 256):
        assert difference(lean, theirs, {"max_sequence_length": length, "negative_prompt": "a car"}) <= LATENTS
    folder = lean.artifact.folder
    assert "text_encoder_3" not in lean.artifact.manifest.components
    assert not (folder / "text_encoder_3").exists()
    assert not (folder / "tokenizer_3").exists()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED = {
    "no such blocks in the graph": ("lean", {"skip_layer_guidance": True}, "--set sd3.skip_layers=7,8,9"),
    "by its scale too": ("lean", {"skip_layer_guidance_scale": 2.0}, "--set sd3.skip_layers=7,8,9"),
    "off and given": ("pipeline", {"skip_layer_guidance": False, "skip_layer_guidance_stop": 0.5}, "leave one"),
    "skipping without guidance": ("pipeline", {"skip_layer_guidance": True, "guidance_scale": 1.0}, "guidance above 1"),
    "no step": ("pipeline", {"skip_layer_guidance": True, "num_inference_steps": 4}, "no step of 4 lies between"),
    "stop before start": (
        "pipeline",
        {"skip_layer_guidance_start": 0.5, "skip_layer_guidance_stop": 0.5, "num_inference_steps": 8},
        "start 0.5 and skip_layer_guidance_stop 0.5",
    ),
    "batch of three": ("pipeline", {"skip_layer_guidance": True, "count": 6}, "need a batch of 18"),
    "layers": ("pipeline", {"clip_skip": 2}, "clip_skip 2 is not allowed: 0 to 1"),
    "no T5": ("lean", {"prompt_3": "a cat"}, "prompt_3 is what T5 reads"),
    "no T5 for the negative": ("lean", {"negative_prompt_3": "a cat"}, "negative_prompt_3 is what T5 reads"),
    "nobody reads it": ("pipeline", {"negative_prompt_2": "a cat", "guidance_scale": 0.0}, "guidance above 1 only"),
    "nobody reads this": ("pipeline", {"negative_prompt": "a cat", "guidance_scale": 0.0}, "guidance above 1 only"),
    "too long": ("pipeline", {"max_sequence_length": 513}, "max_sequence_length 513"),
    "too short": ("pipeline", {"max_sequence_length": 2}, "max_sequence_length 2 is not allowed: 8 to 512"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(request, case):
    name, asked, words = case
    with pytest.raises(UsageError, match=words):
        request.getfixturevalue(name)(PROMPT, **{"height": 64, "width": 64, "num_inference_steps": 1, **asked})


OPTIONS = {
    "t5=perhaps": "true, false",
    "skip_layers=7,8,9": "different numbers from 0 to 2",
    "skip_layers=1,1": "different numbers",
    "skip_layers=": "different numbers",
    "skip_layers=-1": "different numbers",
    "layers=1": "unknown",
    "preset=schnell": "unknown sd3.preset 'schnell'; allowed: turbo",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_build_options_are_checked(checkpoint, option):
    key, _, value = option.partition("=")
    with pytest.raises(UsageError, match=OPTIONS[option]):
        make_plan(checkpoint, options={f"sd3.{key}": value})


def test_turbo_has_its_steps_no_guidance_and_the_checkpoints_own_schedule(checkpoint, tmp_path):
    plan = make_plan(checkpoint, options={"sd3.preset": "turbo"})
    settings = plan.exporter.settings(plan.checkpoint)
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 0.0)
    plan.exporter.copy_files(plan.checkpoint, tmp_path)
    assert (tmp_path / SCHEDULER).read_bytes() == (checkpoint / SCHEDULER).read_bytes()


def without_t5(index, folder):
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    return {"sd3.t5": "true"}


def with_image_encoder(index, folder):
    index["image_encoder"] = ["transformers", "SiglipVisionModel"]


def other_text_encoder(index, folder):
    index["text_encoder_2"] = ["transformers", "CLIPTextModel"]


def other_width(index, folder):
    path = folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooled_projection_dim": 81}))


SPOILED = {
    without_t5: (UsageError, "has no text_encoder_3"),
    with_image_encoder: (Unsupported, "IP-Adapter"),
    other_text_encoder: (CheckpointError, "text_encoder_2 is a CLIPTextModel, allowed: CLIPTextModelWithProjection"),
    other_width: (CheckpointError, "pooled_projection_dim = 81.* 80 wide"),
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_checkpoint_that_would_fail_later_is_refused(checkpoint, tmp_path, spoil):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    options = spoil(index, folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    error, words = SPOILED[spoil]
    with pytest.raises(error, match=words):
        make_plan(folder, options=options)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_t5s_second_linear_is_a_float32_island(artifact):
    import onnx_ir as ir

    from intaglio.exporters.cast import cast_to_contract
    from intaglio.profiles.family import load_family

    contract = load_family("sd3").contract["text_encoder_3"]
    for dtype in ("float16", "bfloat16"):
        model = ir.load(artifact.folder / "text_encoder_3/model.onnx")
        cast_to_contract(model, dtype, contract)
        products = {}
        for node in model.graph:
            if node.op_type == "MatMul":
                products.setdefault(".wo." in node.inputs[1].name, set()).add(node.outputs[0].dtype.name.lower())
        assert products == {True: {"float"}, False: {dtype}}
