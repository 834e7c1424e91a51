"""What is special to Qwen-Image: position ids, masks, one frame of a video VAE, key layouts, presets, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import tiny_qwen_image
import torch
from cases import diffusers_answer
from safetensors.numpy import load_file, save_file

from intaglio.exporters.build import build
from intaglio.exporters.capture import match_parameters
from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.parts import SCHEDULER
from intaglio.exporters.qwen_image import EXPORTER, TEMPLATE, TEMPLATE_DROP
from intaglio.exporters.qwen_image_transformer import rotary_embedding, wrap_transformer
from intaglio.exporters.qwen_image_vae import wrap_decoder, wrap_encoder
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.profiles.family import load_family
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.qwen_image import image_ids, text_ids
from intaglio.runtimes.text import PromptTruncated

EXACT = 1e-6  # same arithmetic, other order; measured 1.7e-7 (transformer), 6.5e-7 (VAE)
ANGLES = 1e-6  # cos and sin, absolute; torch's complex kernel rounds in its own way; measured 6e-8
LATENTS = 1e-4  # relative L2 to diffusers; measured 6e-7 to 1.3e-6
CASE = tiny_qwen_image.CASES["qwen_image"]
PROMPTS = ["a cat", "the moon, a blue car, a cat face, 月亮 and a star on the red car"]
SIZES = ((6, 4), (5, 7), (1, 3), (8, 8))  # rows and columns of tokens, even and odd


@pytest.fixture(scope="module")
def checkpoint(built_case):
    return built_case("qwen_image").checkpoint


@pytest.fixture(scope="module")
def theirs(built_case):
    return built_case("qwen_image").theirs


@pytest.fixture(scope="module")
def pipeline(built_case):
    return built_case("qwen_image").pipeline("onnxruntime")


def ask(pipeline, prompt, **changes):
    request = {"seed": 3, "height": 96, "width": 64, "num_inference_steps": 2, **changes}
    return pipeline(prompt, **request)


def copied(checkpoint, folder, part, change):
    """A copy of the checkpoint with another ``config.json`` of one part."""
    shutil.copytree(checkpoint, folder)
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_position_ids_give_diffusers_angles(theirs, size):
    length, embed = 9, theirs.transformer.pos_embed
    wanted = embed([[(1, *size)]], max_txt_seq_len=length, device=torch.device("cpu"))
    ids = torch.from_numpy(image_ids(*size)), torch.from_numpy(text_ids(length, *size))
    for found, complex_ in zip(rotary_embedding(embed.theta, embed.axes_dim)(ids), wanted, strict=True):
        cos, sin = found[:, :, 0]
        assert (cos - complex_.real).abs().max() <= ANGLES
        assert (sin - complex_.imag).abs().max() <= ANGLES


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)], ids=["all ones", "ragged"])
def test_the_transformer_with_position_ids_is_diffusers(checkpoint, theirs, lengths):
    module = wrap_transformer(open_and_load(checkpoint, "transformer"))
    rows, columns, text = 6, 4, max(lengths)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, rows * columns, 64, generator=generator)
    states = torch.randn(2, text, 48, generator=generator)
    mask = (torch.arange(text)[None] < torch.tensor(lengths)[:, None]).long()
    times = torch.tensor([0.9, 0.3])
    ids = torch.from_numpy(image_ids(rows, columns)), torch.from_numpy(text_ids(text, rows, columns))
    shared = {"hidden_states": hidden, "encoder_hidden_states": states, "timestep": times}
    with torch.no_grad():
        wanted = theirs.transformer(
            **shared,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, rows, columns)]] * 2,
            return_dict=False,
        )[0]
        found = module(hidden, states, mask, times, *ids)
        unmasked = module(hidden, states, torch.ones_like(mask), times, *ids)
    assert relative_l2(found.numpy(), wanted.numpy()) <= EXACT
    assert bool(mask.all()) == (relative_l2(unmasked.numpy(), wanted.numpy()) <= 1e-3)  # the mask matters


def open_and_load(checkpoint, name):
    component = next(c for c in EXPORTER.components(open_checkpoint(checkpoint)) if c.name == name)
    return component.reference(open_checkpoint(checkpoint))


def test_the_vae_on_one_frame_is_diffusers(checkpoint, theirs):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 6, 8, generator=generator)
    pixels = torch.rand(2, 3, 48, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        wanted = theirs.vae.decode(latents[:, :, None]).sample[:, :, 0]
        found = wrap_decoder(open_and_load(checkpoint, "vae_decoder"))(latents)
        assert found.abs().max() < 1  # where diffusers' clamp does nothing
        assert relative_l2(found.numpy(), wanted.numpy()) <= EXACT
        parameters = theirs.vae.encode(pixels[:, :, None]).latent_dist.parameters[:, :, 0]
        found = wrap_encoder(open_and_load(checkpoint, "vae_encoder"))(pixels)
        assert relative_l2(found.numpy(), parameters.numpy()) <= EXACT


def test_causal_kernels_are_stored_as_their_last_frame(pipeline, checkpoint):
    bindings = pipeline.artifact.manifest.components["vae_decoder"].weights
    stored = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    flat = {name for name, binding in bindings.items() if binding.transform == "last_frame"}
    assert flat == {name for name in bindings if stored[name].ndim == 5}
    assert len(flat) > 20
    assert not [name for name in bindings if "time_conv" in name]


NEW, OLD = "model.language_model.", "model."
LAYOUTS = {
    "transformers 4.51": lambda key: key.replace("model.visual.", "visual.").replace(NEW, OLD),
    "transformers 4.52": lambda key: key,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_encoders_of_every_key_layout_load(checkpoint, tmp_path, layout):
    from accelerate import init_empty_weights

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    file = folder / "text_encoder/model.safetensors"
    tensors = {as_new(key): value for key, value in load_file(file).items()}
    save_file({LAYOUTS[layout](key): value for key, value in tensors.items()}, file, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    component = EXPORTER.components(opened)[0]
    with init_empty_weights(include_buffers=False):
        module = component.wrap(component.model(opened.config("text_encoder")))
    found = match_parameters(component, module, opened.weights("text_encoder"))
    reference = dict(component.wrap(component.reference(opened)).named_parameters())
    assert found.keys() == reference.keys()
    for name, parameter in found.items():
        assert np.array_equal(parameter.read(), reference[name].detach().numpy()), name


def as_new(key):
    """A key as transformers 4.52 and newer write it."""
    if key.startswith(("visual.", "lm_head.")):
        return f"model.{key}" if key.startswith("visual.") else key
    return key if key.startswith((NEW, "model.visual.")) else NEW + key.removeprefix(OLD)


def test_the_template_is_diffusers(theirs):
    assert theirs.prompt_template_encode == TEMPLATE
    assert theirs.prompt_template_encode_start_idx == TEMPLATE_DROP


@pytest.mark.parametrize("prompt", ["a cat", PROMPTS], ids=["alone", "batch"])
def test_a_prompt_is_cut_where_diffusers_cuts_it(pipeline, theirs, prompt):
    cut = 110  # in the template's end for the short prompt, in the text for the long one
    case = dataclasses.replace(CASE, theirs={**CASE.theirs, "max_sequence_length": cut})
    answer = diffusers_answer(case, theirs, prompt, seed=3, steps=2)
    with pytest.warns(PromptTruncated):
        found = ask(pipeline, prompt, **CASE.request, max_sequence_length=cut)
    assert relative_l2(found.latents, answer.latents) <= LATENTS
    assert found.parameters["max_sequence_length"] == cut
    assert relative_l2(ask(pipeline, prompt, **CASE.request).latents, answer.latents) > 10 * LATENTS


def test_a_picture_does_not_depend_on_longer_neighbours(pipeline):
    alone = ask(pipeline, PROMPTS[0], guidance_scale=1.0).latents
    together = ask(pipeline, PROMPTS, guidance_scale=1.0).latents
    assert relative_l2(together[:1], alone) <= LATENTS


def test_guidance_needs_a_negative_prompt_and_says_so(pipeline):
    with pytest.warns(UserWarning, match="guidance 4 has no effect without a negative prompt"):
        unguided = ask(pipeline, "a cat", guidance_scale=4.0)
    assert unguided.parameters["true_cfg_scale"] == 1.0
    with pytest.raises(UsageError, match="negative_prompt takes part with guidance above 1 only, it is 1"):
        ask(pipeline, "a cat", guidance_scale=1.0, negative_prompt="a car")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided = ask(pipeline, "a cat", guidance_scale=4.0, negative_prompt="")  # empty is one
    assert guided.parameters["true_cfg_scale"] == 4.0
    assert relative_l2(guided.latents, unguided.latents) > 10 * LATENTS


def test_a_text_length_below_the_graphs_range_is_refused(pipeline):
    with pytest.raises(UsageError, match="max_sequence_length 3 is not allowed: 4 to 1058"):
        ask(pipeline, "a cat", guidance_scale=1.0, max_sequence_length=3)


def test_a_preset_brings_schedule_steps_and_guidance(checkpoint, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    wanted = dict(FlowMatchEulerDiscreteScheduler.from_config(tiny_qwen_image.LIGHTNING).config)
    for name, preset in load_family("qwen_image").presets.items():
        chosen = dataclasses.replace(open_checkpoint(checkpoint), options={"preset": name})
        settings = {**load_family("qwen_image").defaults, **EXPORTER.settings(chosen)}
        steps = int(name.removeprefix("lightning-"))
        assert (settings["num_inference_steps"], settings["guidance_scale"]) == (steps, 1.0)
        (tmp_path / name).mkdir()
        EXPORTER.copy_files(chosen, tmp_path / name)
        written = json.loads((tmp_path / name / SCHEDULER).read_text())
        assert written == preset.scheduler
        found = dict(FlowMatchEulerDiscreteScheduler.from_config(written).config)
        assert {k: v for k, v in found.items() if k[0] != "_"} == {k: v for k, v in wanted.items() if k[0] != "_"}


def test_without_a_preset_the_checkpoints_scheduler_is_kept(checkpoint, pipeline):
    assert (pipeline.artifact.folder / SCHEDULER).read_bytes() == (checkpoint / SCHEDULER).read_bytes()


def test_an_unknown_preset_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"unknown qwen_image\.preset 'lightning'; allowed: lightning-4, lightning-8"):
        build(checkpoint, tmp_path / "built", options={"qwen_image.preset": "lightning"})


REFUSED = {
    "transformer guidance_embeds": (Unsupported, "transformer", {"guidance_embeds": True}),
    "transformer zero_cond_t": (Unsupported, "transformer", {"zero_cond_t": True}),
    "transformer use_additional_t_cond": (Unsupported, "transformer", {"use_additional_t_cond": True}),
    "transformer use_layer3d_rope": (Unsupported, "transformer", {"use_layer3d_rope": True}),
    "in_channels": (CheckpointError, "transformer", {"in_channels": 128}),
    "out_channels": (CheckpointError, "transformer", {"out_channels": 17}),
    "joint_attention_dim": (CheckpointError, "transformer", {"joint_attention_dim": 64}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_fed_is_refused(checkpoint, tmp_path, key):
    error, part, values = REFUSED[key]
    opened = copied(checkpoint, tmp_path / "checkpoint", part, lambda config: config.update(values))
    with pytest.raises(error, match=key.split()[-1]):
        EXPORTER.components(opened)


def test_a_sliding_window_is_refused(checkpoint, tmp_path):
    opened = copied(
        checkpoint,
        tmp_path / "checkpoint",
        "text_encoder",
        lambda config: config["text_config"].update({"use_sliding_window": True}),
    )
    with pytest.raises(Unsupported, match="use_sliding_window"):
        EXPORTER.components(opened)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["text_config"].pop("hidden_size"), "config.json: text_config has no 'hidden_size'"),
        (lambda config: config.update({"text_config": "text.json"}), "config.json has no 'text_config' with"),
    ],
    ids=["a key", "all of it"],
)
def test_an_incomplete_text_configuration_is_refused(checkpoint, tmp_path, change, message):
    opened = copied(checkpoint, tmp_path / "checkpoint", "text_encoder", change)
    with pytest.raises(CheckpointError, match=message):
        EXPORTER.components(opened)


def test_another_text_encoder_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "text_encoder": ["transformers", "Qwen3Model"]}))
    with pytest.raises(CheckpointError, match="text_encoder is a Qwen3Model"):
        EXPORTER.components(open_checkpoint(tmp_path / "checkpoint"))
