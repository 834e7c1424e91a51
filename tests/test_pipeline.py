"""The pictures: diffusers' own at the same seed, alone or in a batch, in English and Chinese, on every backend."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest

from intaglio.bench.evidence_pictures import GUIDANCE, SEED, STEPS, reference_image, reference_pipeline
from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.runtimes.fidelity import psnr, relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.text import PromptTruncated

BACKENDS = ("onnxruntime", "openvino")
PROMPTS = ("red heart", "红心", "slice of pizza, food")
SIZES = ((128, 128), (160, 96))
CHOSEN = ("ddim", "dpmpp_2m")
SAME_PICTURE = 50.0  # dB against diffusers in fp32; lowest measured 85.7 (make evidence pictures)
# Relative L2 of final latents, image k of a batch against the same seed alone. Batched GEMMs add up in another order.
ALONE = {"onnxruntime": 2e-5, "openvino": 2e-5, "torch": 2e-5}  # measured 0, 0 and 6.5e-7

warnings.simplefilter("ignore")


@functools.lru_cache(maxsize=1)
def reference():
    return reference_pipeline()


@functools.cache
def wanted(scheduler, prompt, size):
    return reference_image(reference(), scheduler, prompt, size)


@pytest.fixture(scope="module")
def pipelines(emoji_artifact):
    return {backend: load(emoji_artifact, backend=backend) for backend in (*BACKENDS, "torch")}


@pytest.mark.parametrize("scheduler", CHOSEN)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_match_diffusers(pipelines, backend, prompt, size, scheduler):
    result = pipelines[backend](
        prompt,
        seed=SEED,
        width=size[0],
        height=size[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        scheduler=scheduler,
    )
    assert psnr(np.asarray(result.images[0]), wanted(scheduler, prompt, size)) >= SAME_PICTURE


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.0}, {"negative_prompt": "yellow"}, {"num_inference_steps": 1}]
)
def test_guidance_off_negative_prompts_and_one_step_match_diffusers(pipelines, options):
    expected = reference_image(reference(), "ddim", "red heart", (128, 128), **options)
    ours = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options}
    found = pipelines["openvino"]("red heart", seed=SEED, scheduler="ddim", **ours)
    assert psnr(np.asarray(found.images[0]), expected) >= SAME_PICTURE


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_an_image_of_a_batch_equals_the_same_seed_alone(pipelines, backend, scheduler):
    run = functools.partial(pipelines[backend], "sun", num_inference_steps=4, scheduler=scheduler)
    together = run(seed=2**32 + 7, count=3)
    for k, seed in enumerate(together.seeds):
        alone = run(seed=seed)
        assert relative_l2(together.latents[k], alone.latents[0]) <= ALONE[backend]
    assert relative_l2(together.latents[0], together.latents[1]) > 0.1  # seeds differ, so do pictures


def test_v_prediction_and_epsilon_follow_the_checkpoints_scheduler(tiny_artifact, tiny_checkpoint):
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = load(tiny_artifact, backend="onnxruntime")
    for prediction in ("epsilon", "v_prediction"):
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, prediction_type=prediction)
        ours.sampler.scheduler_config = ours.sampler.scheduler_config.replace(prediction_type=prediction)
        expected = theirs("a cat", num_inference_steps=5, generator=torch.Generator().manual_seed(1)).images[0]
        found = ours("a cat", num_inference_steps=5, seed=1).images[0]
        assert psnr(np.asarray(found), np.asarray(expected)) >= SAME_PICTURE


def test_english_and_chinese_names_of_one_thing_give_alike_pictures(pipelines):
    run = functools.partial(pipelines["openvino"], seed=1, num_inference_steps=8)
    heart, also = (np.asarray(run(p).images[0], float) for p in ("red heart", "红心"))
    other = np.asarray(run("tree").images[0], float)
    assert np.square(heart - also).mean() < np.square(heart - other).mean()


def test_steps_are_events_and_their_latents_end_in_the_result(pipelines):
    stream = pipelines["openvino"].stream("star", num_inference_steps=3)
    events = []
    while True:
        try:
            events.append(next(stream))
        except StopIteration as stop:
            result = stop.value
            break
    assert [e.index for e in events] == [0, 1, 2]
    assert {e.total for e in events} == {3}
    np.testing.assert_array_equal(events[-1].latents, result.latents)
    assert all(e.seconds > 0 for e in events)
    assert set(result.seconds) == {"tokenize", "text_encoder", "scheduler", "denoiser", "vae_decoder", "postprocess"}


def test_given_latents_replace_the_noise(pipelines):
    from intaglio.runtimes.noise import Noise

    run = functools.partial(pipelines["onnxruntime"], "star", num_inference_steps=2)
    noise = Noise(9).randn((1, 16, 8, 8))
    np.testing.assert_array_equal(run(latents=noise, seed=1).latents, run(seed=9).latents)
    with pytest.raises(UsageError, match="latents have shape"):
        run(latents=noise[:, :3])


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(pipelines):
    with pytest.warns(PromptTruncated, match="zebra"):
        pipelines["onnxruntime"]("red heart " * 30 + "zebra", num_inference_steps=1)


@pytest.mark.parametrize(
    ("component", "output", "value", "message"),
    [
        ("unet", "out_sample", np.nan, "unet returned .* at step 0"),
        ("text_encoder", "last_hidden_state", np.inf, "text_encoder returned"),
        ("vae_decoder", "sample", np.nan, "vae_decoder returned"),
        ("vae_decoder", "sample", -1.0, "single colour"),
    ],
)
def test_nan_and_black_images_are_errors_that_name_the_component(tiny_artifact, component, output, value, message):
    pipeline = load(tiny_artifact, backend="null")
    engine = pipeline.engines[component]
    run = engine.run
    engine.run = lambda feeds: {name: np.full_like(v, value) if name == output else v for name, v in run(feeds).items()}
    with pytest.raises(NumericsError, match=message):
        pipeline("star", num_inference_steps=2)


def test_tokens_equal_transformers(tiny_artifact, tiny_checkpoint):
    from transformers import CLIPTokenizer

    from intaglio.runtimes.text import PromptTokenizer

    ours = PromptTokenizer(tiny_artifact.folder / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    prompts = ["", "a red cat", "红心 on the moon", "UPPER  and\nspaces", "café 🙂", "x" * 100]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ours(prompts).ids
    wanted = theirs(prompts, padding="max_length", truncation=True, max_length=16).input_ids
    np.testing.assert_array_equal(found, wanted)
