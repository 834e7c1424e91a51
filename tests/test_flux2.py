"""FLUX.2 beyond what every family's cases say: text states, reference pictures, statistics, refusals."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import tiny_flux2
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from intaglio.exporters.capture import match_parameters
from intaglio.exporters.checkpoint import Weights, open_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.decoder_text_encoder import causal_mask, decoder_text_encoder, text_config
from intaglio.exporters.flux2 import EXPORTER, transformer_from_config
from intaglio.exporters.plan import make_plan
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.family import load_family
from intaglio.runtimes import flux2, packed
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.text import PromptTruncated

STATES = 2e-6  # relative L2 of the text states in torch; measured 0
LATENTS = 1e-4  # relative L2 of the final latents; measured 9e-7
TIME = 1e-6  # absolute, sinusoids at a guidance of 4; measured 0
PROMPTS = ["a red cat", "the moon over a city at night, 红心 and a very long blue car"]
STEPS, HEIGHT, WIDTH = 2, 64, 96


def diffusers_of(folder, name):
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return tiny_flux2.klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return tiny_flux2.dev(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def artifact(built_case, klein):
    """Distilled klein's, whose graphs klein base has as well, with klein base's settings and three references."""
    built, options = built_case("flux2-klein").artifact, {**tiny_flux2.KLEIN_OPTIONS, "reference_images": "3"}
    settings = EXPORTER.settings(dataclasses.replace(open_checkpoint(klein), options=options))
    settings = {**load_family("flux2").defaults, **settings}
    return dataclasses.replace(built, manifest=dataclasses.replace(built.manifest, settings=settings))


@pytest.fixture(scope="module")
def ours(artifact):
    pipeline = load(artifact)
    yield pipeline
    pipeline.close()


def variant(artifact, **settings):
    """A pipeline on the same graphs with other settings, nothing loaded."""
    manifest = dataclasses.replace(artifact.manifest, settings={**artifact.manifest.settings, **settings})
    return load(dataclasses.replace(artifact, manifest=manifest), residency="low")


def torch_states(folder, prompts, states):
    """The text encoder's component in torch on the prompts' own tokens, float32 [B, 512, n * D]."""
    checkpoint = open_checkpoint(folder)
    component = decoder_text_encoder(checkpoint, "text_encoder", states=states, longest=512)
    module = component.wrap(component.reference(checkpoint)).eval()
    exporter, _ = family_of(checkpoint)
    settings = exporter.settings(dataclasses.replace(checkpoint, options={}))
    tokenizer = flux2.PromptTokenizer(folder / "tokenizer")
    texts = [flux2.fill_template(settings["prompt_template"], p) for p in prompts]
    tokens = tokenizer(texts, length=512, add_special_tokens=settings["add_special_tokens"])
    with torch.no_grad():
        return module(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)).numpy()


@pytest.mark.parametrize("states", [(1, 2, 3), (0, 4), (2, 5)])
def test_qwen_states_are_diffusers(klein, states):
    theirs = diffusers_of(klein, "Flux2KleinPipeline")
    with torch.no_grad():
        wanted, ids = theirs.encode_prompt(PROMPTS, text_encoder_out_layers=states)
    assert relative_l2(torch_states(klein, PROMPTS, states), wanted.numpy()) <= STATES
    assert np.array_equal(flux2.position_ids(text=512), ids[0].numpy())


@pytest.mark.parametrize("states", [(1, 2), (0, 1, 3)])
def test_mistral_states_are_diffusers_where_padding_sees_nothing(dev, states):
    theirs = diffusers_of(dev, "Flux2Pipeline")
    assert theirs.tokenizer.padding_side == "left"
    with torch.no_grad():
        wanted, _ = theirs.encode_prompt(PROMPTS, text_encoder_out_layers=states)
    found = torch_states(dev, PROMPTS, states)
    assert relative_l2(found, wanted.numpy()) <= STATES
    assert relative_l2(found[:, :64], wanted.numpy()[:, :64]) <= STATES  # padding alone


def test_a_query_sees_earlier_tokens_and_itself_where_there_is_none():
    mask = causal_mask(torch.tensor([[0, 1, 1, 0]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


NEW_NAMES = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"))


@pytest.mark.parametrize("layout", ["old", "new"])
def test_both_layouts_of_mistral_checkpoints_are_read(dev, tmp_path, layout):
    tensors = load_file(dev / "text_encoder/model.safetensors")
    if layout == "new":
        for old, new in (*NEW_NAMES, ("vision_tower", "model.vision_tower"), ("multi_modal", "model.multi_modal")):
            tensors = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}
    tensors["language_model.lm_head.weight" if layout == "old" else "lm_head.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(dev)
    component = decoder_text_encoder(checkpoint, "text_encoder", states=(1, 2), longest=512)
    module = component.wrap(component.model(checkpoint.config("text_encoder")))
    found = match_parameters(component, module, Weights(files=[tmp_path / "model.safetensors"]))
    assert len(found) == 1 + 2 * 9  # embedding, two layers of nine


def test_layers_and_parts_that_are_not_needed_are_not_in_the_artifact(artifact, dev):
    names = set(artifact.manifest.components["text_encoder"].weights)
    assert {n.split(".")[2] for n in names if n.startswith("model.layers.")} == {"0", "1", "2"}
    assert "model.norm.weight" not in names
    plan = make_plan(dev, options={"flux2.text_encoder_out_layers": "1,2,3"})  # the last one is behind the final norm
    text = plan.components[0]
    kept = match_parameters(
        text, text.wrap(text.model(plan.checkpoint.config("text_encoder"))), plan.checkpoint.weights("text_encoder")
    )
    assert "model.norm.weight" in kept
    assert not [n for n in kept if "vision" in n or "lm_head" in n]


@pytest.mark.parametrize("size", [(64, 64), (70, 90), (1300, 1111), (2047, 600)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_reference_pixels_are_diffusers(size, mode):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = tiny_flux2.picture(*size, 5).convert(mode)
    processor, shrunk = Flux2ImageProcessor(vae_scale_factor=16), image
    if size[0] * size[1] > 1024 * 1024:
        shrunk = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 16 * 16 for side in shrunk.size)
    wanted = processor.preprocess(shrunk, height=height, width=width, resize_mode="crop").numpy()
    assert np.array_equal(flux2.reference_pixels(image, 16), wanted)


def test_reference_ids_are_diffusers():
    from diffusers import Flux2Pipeline

    latents = [torch.zeros(1, 4, 3, 5), torch.zeros(1, 4, 2, 7)]
    wanted = Flux2Pipeline._prepare_image_ids(latents)[0].numpy()
    assert np.array_equal(np.concatenate(flux2.reference_ids([x.numpy() for x in latents])), wanted)
    assert np.array_equal(flux2.position_ids(3, 5), Flux2Pipeline._prepare_latent_ids(latents[0])[0].numpy())


def test_patches_are_diffusers():
    from diffusers import Flux2Pipeline

    latents = np.random.default_rng(0).standard_normal((2, 3, 6, 8)).astype(np.float32)
    patches = packed.patchify(latents)
    assert np.array_equal(patches, Flux2Pipeline._patchify_latents(torch.from_numpy(latents)).numpy())
    assert np.array_equal(packed.unpatchify(patches), latents)
    assert np.array_equal(packed.flatten(patches), Flux2Pipeline._pack_latents(torch.from_numpy(patches)).numpy())
    assert np.array_equal(packed.unflatten(packed.flatten(patches), 3, 4), patches)


def test_statistics_are_the_batch_norms(artifact):
    settings = artifact.manifest.settings
    assert np.array_equal(np.float32(settings["latents_mean"]), tiny_flux2.BN_MEAN)
    variance = (torch.from_numpy(tiny_flux2.BN_VAR) + tiny_flux2.BN_EPS).numpy()
    # NumPy's root: torch's is MKL's, an ulp off in some values, and in others on another processor.
    assert np.array_equal(np.float32(settings["latents_std"]), np.sqrt(variance))


def test_the_system_message_and_templates_are_diffusers(klein, dev):
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    for folder, name in ((klein, "Flux2KleinPipeline"), (dev, "Flux2Pipeline")):
        tokenizer, checkpoint = diffusers_of(folder, name).tokenizer, open_checkpoint(folder)
        template = family_of(checkpoint)[0].settings(checkpoint)["prompt_template"]
        prompt = "a {red} cat"
        if folder == dev:
            wanted = tokenizer.apply_chat_template(format_input([prompt]), tokenize=False)[0]
        else:
            message, options = [{"role": "user", "content": prompt}], {"enable_thinking": False}
            wanted = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options)
        assert flux2.fill_template(template, prompt) == wanted


def test_a_negative_prompt_is_diffusers_negative_embedding(klein, ours):
    theirs, layers = diffusers_of(klein, "Flux2KleinPipeline"), (1, 2, 3)
    with torch.no_grad():
        negative, _ = theirs.encode_prompt("a blue car", text_encoder_out_layers=layers)
    wanted = theirs(
        prompt="a red cat",
        negative_prompt_embeds=negative,
        guidance_scale=3.0,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        text_encoder_out_layers=layers,
        output_type="latent",
    ).images.numpy()
    wanted = tiny_flux2.klein_latents(wanted, HEIGHT, WIDTH)
    found = ask(ours, "a red cat", negative_prompt="a blue car", guidance_scale=3.0, seed=3)
    assert relative_l2(found.latents, wanted) <= LATENTS
    plain = ask(ours, "a red cat", guidance_scale=3.0, seed=3)
    assert relative_l2(plain.latents, wanted) > 100 * LATENTS


def ask(pipeline, prompt, **request):
    request = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **request}
    return pipeline(prompt, **request)


def test_count_and_prompts_with_references_are_the_pictures_alone(ours):
    request = {"images": [tiny_flux2.picture(80, 64, 4)], "guidance_scale": 2.0}
    together = ask(ours, PROMPTS, count=2, seed=5, **request)
    alone = ask(ours, PROMPTS[1], seed=8, **request)
    assert relative_l2(together.latents[3:], alone.latents) <= LATENTS
    assert together.parameters["reference_images"] == ["80x64"]
    other = ask(ours, PROMPTS[1], seed=8, guidance_scale=2.0, images=[tiny_flux2.picture(80, 64, 9)])
    assert relative_l2(other.latents, alone.latents) > 100 * LATENTS


def test_the_first_reference_gives_the_size(ours):
    found = ours("a cat", images=[tiny_flux2.picture(90, 70, 1), tiny_flux2.picture(64, 64, 2)], num_inference_steps=1)
    assert found.images[0].size == (80, 64)
    assert ours.sampler.size([Image.new("RGB", (3000, 1500))]) == (1440, 720)


def test_a_prompt_that_is_too_long_says_what_was_cut(ours):
    with pytest.warns(PromptTruncated, match="assistant"):
        ask(ours, "a red cat " * 10, max_sequence_length=32)


def test_distilled_and_dev_refuse_what_would_have_no_effect(artifact):
    distilled = variant(artifact, guidance="none", guidance_scale=1.0)
    with pytest.raises(UsageError, match=r"guidance 4 is not allowed: the checkpoint is distilled.*it is 1$"):
        ask(distilled, "a cat", guidance_scale=4.0)
    with pytest.raises(UsageError, match="a negative prompt would have no effect: the checkpoint is distilled"):
        ask(distilled, "a cat", negative_prompt="a dog")
    dev = variant(artifact, guidance="embedded", forbidden_in_prompts=["[IMG]"])
    with pytest.raises(UsageError, match="a negative prompt would have no effect: its guidance is an input"):
        ask(dev, "a cat", negative_prompt="a dog")
    with pytest.raises(UsageError, match=r"\[IMG\] in the prompt 'a \[IMG\]' means a picture"):
        ask(dev, "a [IMG]")
    base = variant(artifact)
    with pytest.raises(UsageError, match="negative_prompt takes part with guidance above 1 only, it is 1"):
        ask(base, "a cat", negative_prompt="a dog", guidance_scale=1.0)


REFERENCES = {
    "small": ([(63, 200)], r"63 x 200 pixels; both sides need 64 or more"),
    "narrow": ([(64, 513)], r"64 x 513 pixels; one side may be 8 times the other at most"),
    "long": ([(2400, 400)], r"a reference picture's width 2400 is not allowed: 64 to 2048"),
    "many": ([(64, 64)] * 4, r"4 reference images were given; this artifact takes at most 3"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_that_cannot_be_are_refused(artifact, name):
    sizes, message = REFERENCES[name]
    with pytest.raises(UsageError, match=message):
        ask(variant(artifact), "a cat", images=[Image.new("RGB", size) for size in sizes])


def test_the_text_length_has_the_artifacts_range(artifact):
    with pytest.raises(UsageError, match="max_sequence_length 4 is not allowed: 8 to 512"):
        ask(variant(artifact), "a cat", max_sequence_length=4)


def test_fewer_references_make_a_smaller_range(klein):
    plan = make_plan(klein, options={"flux2.text_encoder_out_layers": "1,2,3", "flux2.reference_images": "3"})
    assert plan.shapes["image_tokens"].max == 16384 + 3 * 4096


def test_the_released_checkpoints_have_other_layers_than_a_small_one(klein):
    for options, message in (
        ({}, "text_encoder_out_layers '9,18,27' is not allowed: ascending numbers from 0 to 5"),
        ({"flux2.text_encoder_out_layers": "3,2,1"}, "'3,2,1' is not allowed: ascending numbers"),
        ({"flux2.text_encoder_out_layers": "1,2,x"}, "'1,2,x' is not allowed: ascending numbers"),
        ({"flux2.text_encoder_out_layers": "1,2,3", "flux2.reference_images": "11"}, "11 is not allowed: 0 to 10"),
    ):
        with pytest.raises(UsageError, match=message):
            make_plan(klein, options=options)
    with pytest.raises(CheckpointError, match=r"takes embeddings of 96, the text encoder's states .* make 64"):
        make_plan(klein, options={"flux2.text_encoder_out_layers": "1,2"})


def changed(folder, tmp_path, file, **values):
    """A copy of a checkpoint without its weights, one configuration changed."""
    for path in folder.rglob("*.json"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**config, **values}))
    return tmp_path


WRONG = {
    "guidance embedding": ("transformer/config.json", {"guidance_embeds": True}, Unsupported, "guidance_embeds = True"),
    "patches": ("transformer/config.json", {"patch_size": 2}, Unsupported, "patch_size = 1"),
    "channels": ("transformer/config.json", {"in_channels": 64}, CheckpointError, "64 channels, the VAE's"),
    "encoder": ("model_index.json", {"text_encoder": ["transformers", "T5"]}, CheckpointError, "allowed: Qwen3"),
    "window": (
        "text_encoder/config.json",
        {"sliding_window": 128, "use_sliding_window": True},
        Unsupported,
        "attends to 128 tokens only",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_checkpoints_that_would_come_out_wrong_are_refused(klein, tmp_path, name):
    file, values, error, message = WRONG[name]
    folder = changed(klein, tmp_path, file, **values)
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        make_plan(folder, options={"flux2.text_encoder_out_layers": "1,2,3"})


@pytest.mark.parametrize("key", ["text_config", "num_hidden_layers"])
def test_an_incomplete_text_configuration_is_refused(dev, tmp_path, key):
    text = json.loads((dev / "text_encoder/config.json").read_text())["text_config"]
    left = None if key == "text_config" else {k: v for k, v in text.items() if k != key}
    opened = open_checkpoint(changed(dev, tmp_path, "text_encoder/config.json", text_config=left))
    with pytest.raises(CheckpointError, match=f"config.json.* has no '{key}'"):
        text_config(opened, "text_encoder")["num_hidden_layers"]


def test_sinusoids_of_time_and_guidance_are_constants_of_diffusers(dev):
    from diffusers import Flux2Transformer2DModel

    config, given = open_checkpoint(dev).config("transformer"), torch.tensor([1000.0, 3.0, 4000.0, 3500.0])
    wanted = Flux2Transformer2DModel.from_config(config).time_guidance_embed.time_proj(given)
    found = transformer_from_config(config).time_guidance_embed.time_proj
    assert dict(found.named_buffers())["frequencies"].dtype == torch.float32
    assert float((found(given) - wanted).abs().max()) <= TIME
