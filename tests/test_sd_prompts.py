"""What people expect of prompts with Stable Diffusion: clip_skip, weights, prompts of any length; inpainting UNets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from partial import build_only, completed

from intaglio.exporters.plan import make_plan
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.text import PromptTruncated

SAME = 1e-4  # relative L2 of final latents; measured 1.5e-6
STEPS = 3
LONG = "a red cat, " * 40 + "the moon"


@pytest.fixture(scope="module")
def pipeline(tiny_artifact):
    return load(tiny_artifact, backend="onnxruntime")


def latents(pipeline, prompt, **options):
    return pipeline(prompt, num_inference_steps=STEPS, seed=3, **options)


def test_clip_skip_is_diffusers(pipeline, tiny_checkpoint):
    import diffusers

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    # diffusers 0.42 still looks for the norm where transformers 4 had it.
    norm = SimpleNamespace(final_layer_norm=theirs.text_encoder.final_layer_norm)
    object.__setattr__(theirs.text_encoder, "text_model", norm)
    wanted = theirs(
        "a red cat",
        num_inference_steps=STEPS,
        clip_skip=1,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images.numpy()
    found = latents(pipeline, "a red cat", clip_skip=1)
    assert relative_l2(found.latents, wanted) <= SAME
    assert found.parameters["clip_skip"] == 1
    assert relative_l2(latents(pipeline, "a red cat").latents, wanted) > 1e-2


def test_clip_skip_beyond_the_layers_is_refused(pipeline):
    with pytest.raises(UsageError, match="clip_skip 2 is not allowed: 0 to 1"):
        latents(pipeline, "a cat", clip_skip=2)


def test_brackets_are_text_unless_weights_are_asked_for(pipeline):
    plain, asked = latents(pipeline, "a (cat:1.4)"), latents(pipeline, "a (cat:1.4)", prompt_weights=True)
    assert relative_l2(plain.latents, asked.latents) > 1e-3
    assert "prompt_weights" not in plain.parameters and asked.parameters["prompt_weights"] is True


def test_a_short_prompt_without_weights_is_the_same_either_way(pipeline):
    plain, asked = latents(pipeline, "a cat"), latents(pipeline, "a cat", prompt_weights=True)
    assert relative_l2(asked.latents, plain.latents) <= SAME


def test_a_weight_moves_the_picture_away_from_the_unweighted_one(pipeline):
    base = latents(pipeline, "a cat", prompt_weights=True).latents
    near, far = (latents(pipeline, f"a (cat:{w})", prompt_weights=True).latents for w in (1.1, 1.6))
    assert 1e-4 < relative_l2(near, base) < relative_l2(far, base)


def test_long_prompts_are_read_to_the_end_in_chunks(pipeline, recwarn):
    whole = latents(pipeline, "a red cat on the blue moon", prompt_weights=True)
    other = latents(pipeline, "a red cat on the blue star", prompt_weights=True)
    assert relative_l2(whole.latents, other.latents) > 1e-4  # 16 tokens: the last word lies in the second chunk
    assert not [w for w in recwarn if issubclass(w.category, PromptTruncated)]
    with pytest.warns(PromptTruncated):
        latents(pipeline, "a red cat on the blue moon")


def test_a_prompt_beyond_the_unets_context_is_refused(pipeline):
    with pytest.raises(UsageError, match=r"chunks: context_tokens .* is not allowed: .* to 64"):
        latents(pipeline, LONG, prompt_weights=True)


def test_an_inpainting_unet_exports_and_says_that_it_has_no_loop(
    tiny_checkpoint, tiny_artifact, copy_artifact, tmp_path
):
    from diffusers import UNet2DConditionModel

    checkpoint = copy_artifact(tiny_checkpoint, "inpainting")
    config = json.loads((checkpoint / "unet/config.json").read_text())
    torch.manual_seed(1)
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(checkpoint / "unet")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    part = build_only(checkpoint, tmp_path / "built", "unet")  # it equals torch, or the build fails
    artifact = completed(part, tiny_artifact, "text_encoder", "vae_decoder")
    assert artifact.manifest.components["unet"].inputs[0].shape[1] == 9
    with pytest.raises(Unsupported, match="takes 9 channels, so it paints into a masked picture"):
        load(artifact, backend="onnxruntime")("a cat")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "unet is a UNet3DConditionModel",
        ),
        ("unet/config.json", {"cross_attention_dim": 96}, "cross_attention_dim = 96; the text encoder's states are 64"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused(tiny_checkpoint, copy_artifact, file, change, message):
    checkpoint = changed(copy_artifact(tiny_checkpoint, "changed"), file, change)
    with pytest.raises(CheckpointError, match=message):
        make_plan(checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"_diffusers_version": "0.8.1"},
        {"_diffusers_version": "0.6.0.dev0", "sample_size": 96},
        {"_diffusers_version": "0.9.0"},
        {},
    ],
    ids=str,
)
def test_the_size_of_old_fine_tunes_is_the_one_diffusers_takes(tiny_checkpoint, copy_artifact, config):
    import diffusers

    checkpoint = changed(copy_artifact(tiny_checkpoint, "changed"), "unet/config.json", config)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    assert make_plan(checkpoint).shapes["height"].opt == theirs.unet.config.sample_size * theirs.vae_scale_factor


def changed(checkpoint, file, change):
    config = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps({**config, **change}))
    return checkpoint


def test_a_negative_prompt_without_guidance_is_refused(pipeline):
    message = r"negative_prompt takes part with guidance above 1 only, it is 1; leave it out"
    with pytest.raises(UsageError, match=message):
        latents(pipeline, "a cat", negative_prompt="a car", guidance_scale=1.0)
    plain = latents(pipeline, "a cat", guidance_scale=1.0)
    empty = latents(pipeline, "a cat", guidance_scale=1.0, negative_prompt="")
    np.testing.assert_array_equal(plain.latents, empty.latents)


def test_parameters_that_no_family_part_knows_are_refused(pipeline):
    with pytest.raises(UsageError, match=r"'clip_skp' is not a parameter of the family sd.*Did you mean 'clip_skip'"):
        latents(pipeline, "a cat", clip_skp=1)
    with pytest.raises(UsageError, match=r"clip_skip '1\.5' is not a whole number"):
        latents(pipeline, "a cat", clip_skip="1.5")


def test_low_residency_gives_the_same_picture_and_unloads_what_is_done(tiny_artifact, pipeline):
    low = load(tiny_artifact, backend="onnxruntime", residency="low")
    assert not low.engines.loaded
    held = []
    steps = low.stream("a cat", num_inference_steps=STEPS, seed=3)
    while True:
        try:
            next(steps)
            held.append(set(low.engines.loaded))
        except StopIteration as stop:
            result = stop.value
            break
    assert held == [{"unet"}] * STEPS
    assert not low.engines.loaded
    np.testing.assert_array_equal(result.latents, latents(pipeline, "a cat").latents)
