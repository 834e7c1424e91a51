"""Files that are no checkpoint we read: each refused in one line by what it is, with what to give instead."""

from __future__ import annotations

import json
import re
import struct

import ldm
import numpy as np
import pytest

from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.single_file_layouts import INPUT_CHANNELS, OTHERS, QUANTIZED, foreign
from intaglio.profiles.errors import CheckpointError, ToolError, Unsupported

FOREIGN = {  # a name of a tensor in such a file, by what the message calls it
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0.lora_down.weight", "unet.x.to_q.lora_A.weight", "a.hada_w1_a"],
    "a ControlNet": [
        "control_model.input_blocks.0.0.weight",
        "controlnet_cond_embedding.conv_in.weight",
        "control_layers.0.adaLN_modulation.0.weight",
    ],
    "a T2I adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "an IP-Adapter": ["image_proj.proj.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "a textual inversion": ["emb_params", "clip_l"],
    "FLUX.1": [
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "model.diffusion_model.double_blocks.0.img_attn.qkv.bias",
    ],
    "FLUX.2": ["single_stream_modulation.lin.weight"],
    "Chroma": ["distilled_guidance_layer.in_proj.bias"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"],
    "Qwen-Image": ["transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_in.text_norm.weight"],
    "Lumina 2 or Z-Image": ["cap_embedder.0.weight"],
    "AuraFlow": ["double_layers.0.attn.w2q.weight"],
    "HunyuanVideo": ["txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias"],
    "Wan": ["model.diffusion_model.head.modulation"],
    "LTX-Video": ["patchify_proj.weight"],
    "HiDream": ["double_stream_blocks.0.block.adaLN_modulation.1.bias"],
    "Playground 2.5": ["edm_mean"],
    "the UNet of a diffusers folder": ["down_blocks.0.resnets.0.norm1.weight", "mid_block.attentions.0.norm.bias"],
    "the transformer of a diffusers folder": ["transformer_blocks.0.norm1.linear.weight"],
    "a VAE": ["decoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight"],
    "a text encoder": [
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "model.layers.0.input_layernorm.weight",
    ],
}


def test_every_row_of_the_table_has_a_sample():
    assert set(FOREIGN) == {what for _, what, _ in OTHERS}
    for pattern, what, _ in OTHERS:
        assert any(re.search(pattern, key) for key in FOREIGN[what]), pattern


@pytest.mark.parametrize("what", FOREIGN)
def test_other_files_are_refused_by_name(what, tmp_path):
    from safetensors.numpy import save_file

    for number, key in enumerate(FOREIGN[what]):
        file = tmp_path / f"{number}.safetensors"
        save_file({key: np.zeros((2, 2, 1), np.float32)}, file)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(file)
        assert f"{file} is {what}, not a Stable Diffusion checkpoint in one file; give " in str(caught.value)


def test_a_file_of_no_known_layout_says_what_is_allowed():
    words = foreign({"strange.weight": ("F32", (1, 2, 3)), "odd": ("F32", (4, 4))})
    assert all(word in words for word in ("odd, strange.weight", "Stable Diffusion XL", "model_index.json"))
    assert "textual inversion" in foreign({"<my-cat>": ("F32", (4, 768))})


SAMPLES = {  # a tensor name per row of QUANTIZED
    "bitsandbytes nf4 or fp4": "unet.to_q.weight.absmax",
    "bitsandbytes int8": "layers.0.fc1.SCB",
    "GPTQ, AWQ or nunchaku": "model.layers.0.q_proj.qweight",
    "nunchaku": "transformer_blocks.0.attn.to_qkv.wscales",
    "scaled fp8": "model.diffusion_model.scaled_fp8",
}


@pytest.mark.parametrize("what", [what for _, what in QUANTIZED])
def test_quantized_weights_are_refused_in_files_and_folders(what, tmp_path, tiny_checkpoint, copy_artifact):
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "model.safetensors"
    save_file({SAMPLES[what]: np.zeros(4, np.float32)}, file)
    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    part = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(part), SAMPLES[what]: np.zeros(4, np.float32)}, part)
    for refused in (lambda: open_checkpoint(file), lambda: open_checkpoint(folder).weights("unet")):
        with pytest.raises(Unsupported) as caught:
            refused()
        assert all(word in str(caught.value) for word in (what, SAMPLES[what], "--quant int8"))


def test_fp8_tensors_are_refused(tmp_path):
    file = ldm.write_header(ldm.full_size("sd1"), tmp_path / "fp8.safetensors", dtype="F8_E4M3")
    with pytest.raises(Unsupported, match=r"is quantized already \(.* is F8_E4M3\)"):
        open_checkpoint(file)


def test_a_quantization_config_is_refused(tiny_checkpoint, copy_artifact):
    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    config = json.loads((folder / "unet/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"unet/config\.json says .*\(bitsandbytes\)"):
        open_checkpoint(folder).weights("unet")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_gguf_is_refused_by_its_magic(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(Unsupported, match=r"is GGUF, which is quantized already"):
        open_checkpoint(tmp_path / name)


def without(prefix):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(prefix)}


def wider(channels):
    def change(tensors):
        import torch

        return {**tensors, "model.diffusion_model.input_blocks.0.0.weight": torch.empty(8, channels, 3, 3)}

    return change


INCOMPLETE = {
    "no VAE": (without("first_stage_model."), ["Stable Diffusion 1.x without a VAE", "give the whole checkpoint"]),
    "no text encoder": (without("cond_stage_model."), ["a UNet without a text encoder", "give the whole checkpoint"]),
    "unknown tensors": (
        lambda t: {**t, "control_model.x": t["betas"], "embedding_manager.y": t["betas"]},
        ["2 tensors that no component takes: control_model.x, embedding_manager.y"],
    ),
    "no SDXL sizes": (without("model.diffusion_model.label_emb."), ["unet does not fit", "label_emb"]),
    **{kind: (wider(n), [f"is {kind} model ({n} input channels, allowed: 4)"]) for n, kind in INPUT_CHANNELS.items()},
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_incomplete_files_and_other_kinds_are_refused(name, tmp_path):
    change, words = INCOMPLETE[name]
    file = ldm.write_header(change(ldm.full_size("sdxl" if "SDXL" in name else "sd1")), tmp_path / "x.safetensors")
    with pytest.raises(ToolError) as caught:
        open_checkpoint(file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_training_leaves_behind_is_left_out_by_name(tmp_path):
    names = ["model_ema.decay", "betas", "sqrt_recip_alphas_cumprod", "posterior_mean_coef1", "denoiser.sigmas"]
    names += ["optimizer_states.0", "first_stage_model.loss.logvar", "cond_stage_model.logit_scale", "global_step"]
    tensors = {**ldm.full_size("sd1"), **{name: ldm.full_size("sd1")["betas"] for name in names}}
    opened = open_checkpoint(ldm.write_header(tensors, tmp_path / "x.safetensors"))
    assert "EMA weights" in opened.remarks[1]
    taken = {parameter.key for weights in opened.single.parts.values() for parameter in weights.values()}
    assert not taken & set(names)
