"""What Stable Diffusion XL has that other families have not: CLIP twice, sizes and scores, pictures to start from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_sdxl
from cases import HEIGHT, WIDTH

from intaglio.exporters.plan import make_plan
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.family import load_family
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES, PRESETS

LATENTS = 1e-4  # relative L2 to diffusers after all steps; measured at most 1.1e-5
APART = 1e-2  # a parameter that did nothing would not move the latents so far; measured at least 0.2
SEED = 11
PROMPT, LONG = "a red cat on the moon", "the moon, a blue car, a cat face, 月亮 and a star on the red car"
GUIDED = {"guidance_scale": 5.0, "negative_prompt": "a blue car"}
# Asked of ours and of diffusers': what each parameter is for.
TEXT_TO_IMAGE = {
    "no negative prompt: zeros": ({"negative_prompt": None}, {"negative_prompt": None}),
    "empty negative prompt: encoded": ({"negative_prompt": ""}, {"negative_prompt": ""}),
    "prompt_2": ({"prompt_2": "a star"}, {"prompt_2": "a star"}),
    "negative_prompt_2": ({"negative_prompt_2": "a star"}, {"negative_prompt_2": "a star"}),
    "clip_skip": ({"clip_skip": 1}, {"clip_skip": 1}),
    "guidance_rescale": ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
    "original_size": ({"original_size": "512x300"}, {"original_size": (300, 512)}),
    "target_size": ({"target_size": "512x300"}, {"target_size": (300, 512)}),
    "crops_coords_top_left": ({"crops_coords_top_left": "40x7"}, {"crops_coords_top_left": (40, 7)}),
    "negative sizes": (
        {
            "crops_coords_top_left": "40x7",
            "negative_original_size": "99x33",
            "negative_target_size": "300x512",
            "negative_crops_coords_top_left": "9x5",
        },
        {
            "crops_coords_top_left": (40, 7),
            "negative_original_size": (33, 99),
            "negative_target_size": (512, 300),
            "negative_crops_coords_top_left": (9, 5),
        },
    ),
}
REFINER = {
    "aesthetic_score": ({"aesthetic_score": 3.0}, {"aesthetic_score": 3.0}),
    "negative_aesthetic_score": ({"negative_aesthetic_score": 6.5}, {"negative_aesthetic_score": 6.5}),
    "original_size": ({"original_size": "512x300"}, {"original_size": (300, 512)}),
    "crops: the negative corner stays": ({"crops_coords_top_left": "40x7"}, {"crops_coords_top_left": (40, 7)}),
    "negative_original_size": ({"negative_original_size": "99x33"}, {"negative_original_size": (33, 99)}),
    "no negative prompt: encoded": ({"negative_prompt": None}, {"negative_prompt": None}),
    "strength 1": ({"strength": 1.0}, {"strength": 1.0}),
    "strength as given by default": ({"strength": None, "num_inference_steps": 10}, {"num_inference_steps": 10}),
}
STARTING = ("euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "lcm")
REFUSED = {
    "strength 0.2 of 4 steps leaves none: 0.25": {"images": "one", "strength": 0.2},
    "strength says how much of a picture": {"strength": 0.5},
    "2 reference images were given; this artifact takes at most 1": {"images": "two"},
    "clip_skip 2 is not allowed: 0 to 1": {"clip_skip": 2},
    "negative_prompt takes part with guidance above 1": {"guidance_scale": 0.0, "negative_prompt": "a car"},
    "guidance_rescale takes part with guidance above 1": {
        "guidance_scale": 1.0,
        "negative_prompt": None,
        "guidance_rescale": 0.7,
    },
    "negative_prompt_2 takes part with a negative prompt": {"negative_prompt": None, "negative_prompt_2": "a car"},
    "aesthetic_score is nothing that this artifact's UNet is told": {"aesthetic_score": 5.0},
    "original_size '512' is not WIDTHxHEIGHT": {"original_size": "512"},
    "crops_coords_top_left '-1x0' is not TOPxLEFT": {"crops_coords_top_left": "-1x0"},
    "guidance_rescale 1.5 is not allowed: 0 to 1": {"guidance_rescale": 1.5},
}
REFINER_REFUSED = {
    "this artifact starts from a picture and none was given": {"images": "none"},
    "prompt_2 has no reader": {"prompt_2": "a car"},
    "target_size is nothing that this artifact's UNet is told": {"target_size": "512x512"},
}


class Both:
    """A checkpoint, our pipeline on it, and diffusers' pipelines on it."""

    def __init__(self, built):
        self.checkpoint, self.artifact = built.checkpoint, built.artifact
        self.ours, self.theirs = built.pipeline("onnxruntime"), built.theirs

    def image_to_image(self):
        import diffusers

        made = diffusers.StableDiffusionXLImg2ImgPipeline(**self.theirs.components)
        made.set_progress_bar_config(disable=True)
        return made


@pytest.fixture(scope="module")
def base(built_case):
    return Both(built_case("sdxl"))


@pytest.fixture(scope="module")
def refiner(built_case):
    return Both(built_case("sdxl refiner"))


def latents_of(pipeline, prompt, **asked):
    """Final latents of a diffusers pipeline; picture k has the generator of ``SEED + k``."""
    import torch

    count = (1 if isinstance(prompt, str) else len(prompt)) * asked.get("num_images_per_prompt", 1)
    asked = {
        k: [v] * len(prompt) if isinstance(v, str) and not isinstance(prompt, str) else v for k, v in asked.items()
    }
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(count)]
    return pipeline(prompt=prompt, generator=generators, output_type="latent", **asked).images.numpy()


SMALL = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, **GUIDED}


@pytest.mark.parametrize("asked", TEXT_TO_IMAGE)
def test_text_to_image_parameters_do_what_they_do_in_diffusers(base, asked):
    ours, theirs = TEXT_TO_IMAGE[asked]
    found = base.ours(PROMPT, seed=SEED, **{**SMALL, **ours}).latents
    assert relative_l2(found, latents_of(base.theirs, PROMPT, **{**SMALL, **theirs})) <= LATENTS
    assert relative_l2(found, base.ours(PROMPT, seed=SEED, **SMALL).latents) > APART


@pytest.mark.parametrize("asked", REFINER)
def test_refiner_parameters_do_what_they_do_in_diffusers(refiner, asked):
    ours, theirs = REFINER[asked]
    common = {"num_inference_steps": 4, "strength": 0.75, **GUIDED}
    mine = {**common, "images": [tiny_sdxl.picture()], **ours}
    yours = {**common, "image": tiny_sdxl.picture(), **theirs}
    if mine["strength"] is None:
        del yours["strength"]
    result = refiner.ours(PROMPT, seed=SEED, **mine)
    assert relative_l2(result.latents, latents_of(refiner.theirs, PROMPT, **yours)) <= LATENTS
    plain = refiner.ours(PROMPT, seed=SEED, **common, images=[tiny_sdxl.picture()])
    assert relative_l2(result.latents, plain.latents) > APART
    assert result.parameters["strength"] == (0.3 if mine["strength"] is None else mine["strength"])


def test_every_scheduler_that_can_start_from_a_picture_does_so_as_in_diffusers(base):
    import diffusers

    theirs, worst = base.image_to_image(), {}
    names = {ours: name for name, ours in DIFFUSERS_CLASSES.items()} | {
        "dpmpp_2m_karras": "DPMSolverMultistepScheduler"
    }
    config = base.theirs.scheduler.config
    common = {"strength": 0.7, "num_inference_steps": 6, **GUIDED}
    for name in STARTING:
        theirs.scheduler = getattr(diffusers, names[name]).from_config({**config, **PRESETS.get(name, {})})
        wanted = latents_of(theirs, [PROMPT, LONG], image=tiny_sdxl.picture(), **common)
        found = base.ours([PROMPT, LONG], seed=SEED, images=[tiny_sdxl.picture()], scheduler=name, **common)
        worst[name] = relative_l2(found.latents, wanted)
        assert found.latents.shape[2:] == (12, 8), "the picture's own size, rounded down"
    assert max(worst.values()) <= LATENTS, worst


def test_a_scheduler_that_cannot_start_from_a_picture_says_so(base, monkeypatch):
    config = base.ours.sampler.scheduler_config.replace(skip_prk_steps=True)
    monkeypatch.setattr(base.ours.sampler, "scheduler_config", config)
    with pytest.raises(Unsupported, match="PNDM cannot start from a picture"):
        base.ours(PROMPT, images=[tiny_sdxl.picture()], scheduler="pndm")


def test_a_picture_is_resized_to_the_size_asked_for_as_diffusers_does(refiner):
    from intaglio.runtimes.sdxl import to_pixels

    for picture in (tiny_sdxl.picture(), tiny_sdxl.picture(200, 40), tiny_sdxl.picture(64, 96)):
        wanted = refiner.theirs.image_processor.preprocess(picture, height=96, width=72).numpy()
        assert np.array_equal(to_pixels(picture, 72, 96), wanted)
    small = refiner.ours(PROMPT, images=[tiny_sdxl.picture(300, 300)], width=72, height=64, num_inference_steps=4)
    assert small.images[0].size == (72, 64)


def test_count_makes_the_pictures_diffusers_makes(base):
    asked = {**SMALL, "num_inference_steps": 2}
    found = base.ours([PROMPT, LONG], seed=SEED, count=2, **asked)
    wanted = latents_of(base.theirs, [PROMPT, LONG], num_images_per_prompt=2, **asked)
    assert relative_l2(found.latents, wanted) <= LATENTS
    alone = base.ours(LONG, seed=SEED + 3, **asked)
    assert relative_l2(found.latents[3:], alone.latents) <= LATENTS


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("preset", ["turbo", "lightning-4", "lightning-1"])
def test_distilled_schedules_equal_diffusers(base, monkeypatch, preset, steps):
    import diffusers

    from intaglio.runtimes.schedulers import SchedulerConfig

    config = load_family("sdxl").presets[preset].scheduler
    theirs = diffusers.StableDiffusionXLPipeline(**base.theirs.components)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    monkeypatch.setattr(base.ours.sampler, "scheduler_config", SchedulerConfig.from_dict(config))
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": steps, "guidance_scale": 0.0}
    found = base.ours([PROMPT, LONG], seed=SEED, **asked)
    assert relative_l2(found.latents, latents_of(theirs, [PROMPT, LONG], **asked)) <= LATENTS


def test_a_preset_gives_its_schedule_steps_and_guidance(base):
    plan = make_plan(base.checkpoint, options={"sdxl.preset": "lightning-4"})
    settings = plan.exporter.settings(plan.checkpoint)
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 0.0)
    with pytest.raises(UsageError, match="lightning-4"):
        make_plan(base.checkpoint, options={"sdxl.preset": "lightning-5"})


def test_a_preset_replaces_the_scheduler(base, tmp_path):
    plan = make_plan(base.checkpoint, options={"sdxl.preset": "turbo"})
    plan.exporter.copy_files(plan.checkpoint, tmp_path)
    written = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert (written["_class_name"], written["timestep_spacing"]) == ("EulerAncestralDiscreteScheduler", "trailing")


def test_latents_with_mean_and_deviation_as_in_diffusers(base, monkeypatch):
    mean, deviation = [0.3, -0.2, 0.1, 0.4], [1.5, 0.8, 1.2, 0.9]
    theirs = base.image_to_image()
    for name, values in {"latents_mean": mean, "latents_std": deviation}.items():
        monkeypatch.setitem(base.ours.sampler.settings, name, values)
    theirs.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    try:
        asked = {"strength": 0.7, "num_inference_steps": 4, **GUIDED}
        wanted = latents_of(theirs, PROMPT, image=tiny_sdxl.picture(), **asked)
        found = base.ours(PROMPT, seed=SEED, images=[tiny_sdxl.picture()], **asked)
    finally:
        theirs.vae.register_to_config(latents_mean=None, latents_std=None)
    assert relative_l2(found.latents, wanted) <= LATENTS
    sampler = base.ours.sampler
    assert relative_l2(sampler.unscale(sampler.scale(found.latents)), found.latents) <= 1e-6


@pytest.mark.parametrize("message", REFUSED)
def test_a_base_artifact_refuses_what_would_do_nothing(base, message):
    refuse(base, message, {**SMALL, **REFUSED[message]})


@pytest.mark.parametrize("message", REFINER_REFUSED)
def test_a_refiner_artifact_refuses_what_would_do_nothing(refiner, message):
    refuse(refiner, message, {"images": "one", "num_inference_steps": 4, **GUIDED, **REFINER_REFUSED[message]})


def refuse(both, message, asked):
    pictures = {"none": 0, "one": 1, "two": 2}.get(asked.get("images"), 0)
    with pytest.raises(UsageError) as error:
        both.ours(PROMPT, **{**asked, "images": [tiny_sdxl.picture()] * pictures})
    assert message in str(error.value)


def test_the_vae_encoder_is_loaded_when_a_picture_comes(base):
    fresh = load(base.artifact)
    assert set(fresh.engines.loaded) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    fresh(PROMPT, images=[tiny_sdxl.picture()], num_inference_steps=4)
    assert "vae_encoder" in fresh.engines.loaded
    fresh.close()


def test_the_vae_stays_out_of_float16(base):
    plan = make_plan(base.checkpoint, dtype=["fp16"])
    assert {p: plan.dtypes["onnx"][p] for p in ("unet", "vae_encoder", "vae_decoder")} == {
        "unet": "float16",
        "vae_encoder": "float32",
        "vae_decoder": "float32",
    }
    assert any("vae_decoder" in remark and "candle#1060" in remark for remark in plan.remarks)
    assert base.artifact.manifest.settings["force_upcast"] is True


WRONG = {
    "time_cond_proj_dim = 256": (Unsupported, "unet/config.json", {"time_cond_proj_dim": 256}),
    "addition_embed_type = None": (Unsupported, "unet/config.json", {"addition_embed_type": None}),
    "takes 9 channels": (Unsupported, "unet/config.json", {"in_channels": 9}),
    "cross_attention_dim = 64": (CheckpointError, "unet/config.json", {"cross_attention_dim": 64}),
    "the text encoders and sizes give 72": (CheckpointError, "model_index.json", {"requires_aesthetics_score": True}),
    "only one of text_encoder and tokenizer": (CheckpointError, "model_index.json", {"tokenizer": [None, None]}),
    "text_encoder_2 is a CLIPTextModel": (
        CheckpointError,
        "model_index.json",
        {"text_encoder_2": ["transformers", "CLIPTextModel"]},
    ),
    "vae/config.json is a AutoencoderTiny; allowed: AutoencoderKL": (
        CheckpointError,
        "vae/config.json",
        {"_class_name": "AutoencoderTiny"},
    ),
    "vae is a AutoencoderTiny": (CheckpointError, "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}),
    "take [20, 77] tokens": (CheckpointError, "text_encoder/config.json", {"max_position_embeddings": 20}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_checkpoint_this_family_cannot_feed_is_refused(base, copy_artifact, message):
    kind, name, changes = WRONG[message]
    folder = copy_artifact(base.checkpoint, "checkpoint")
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))
    with pytest.raises(kind) as error:
        make_plan(folder)
    assert message in str(error.value)


def test_weights_and_long_prompts_are_read_in_chunks_by_both_encoders(base):
    def ask(prompt, **changes):
        return base.ours(prompt, seed=SEED, **{**SMALL, "negative_prompt": "a blue car", **changes}).latents

    plain, weighted = ask("a cat"), ask("a cat", prompt_weights=True)
    assert relative_l2(weighted, plain) <= LATENTS
    assert relative_l2(ask("a (cat:1.5)", prompt_weights=True), weighted) > APART
    words = "a red cat on the moon and a blue car on the star, " * 3
    assert relative_l2(ask(words + "a cat", prompt_weights=True), ask(words + "a face", prompt_weights=True)) > APART
    with pytest.raises(UsageError, match=r"chunks: context_tokens .* is not allowed"):
        ask(words * 9, prompt_weights=True)
