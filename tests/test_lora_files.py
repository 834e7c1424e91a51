"""What is refused of LoRA files, and how they are named."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from lora_cases import KOHYA, PEFT, dotted, flat, folder_of, layers_of, lora_of, loras_of, parts_of, written
from lora_layouts import LAYOUTS, dora_of
from safetensors.numpy import save_file

from intaglio.exporters.lora_files import parse_lora
from intaglio.exporters.lora_origin import made_for
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError


def good(layers):
    return lora_of(layers, dotted("unet."), *PEFT)


ZEROS = np.zeros((4, 4), np.float32)
REFUSALS = {
    "another model": (
        CheckpointError,
        lambda u: lora_of({"transformer_blocks.0.img_mlp.net.0.proj": (8, 8)}, dotted(""), *KOHYA),
        r"3 of 3 keys match no layer of this checkpoint's text_encoder, unet \(0 match\), the first: "
        r"transformer_blocks\.0\.img_mlp\.net\.0\.proj; it seems to be for Qwen-Image",
    ),
    "another size": (
        CheckpointError,
        lambda u: lora_of({n: (s[0], 768) for n, s in u.items() if n.endswith("attn2.to_k")}, dotted("unet."), *PEFT),
        r"4 of 4 layers have another shape than the checkpoint's \(0 fit\), the first: unet\.down_blocks.*attn2\.to_k\."
        r"lora_A\.weight \[3, 768\] and .*, but unet's .* has \[32, 64\]; it seems to be for Stable Diffusion 1",
    ),
    "a layer too many": (
        CheckpointError,
        lambda u: good(u) | lora_of({"down_blocks.7.resnets.0.conv1": (8, 8, 3, 3)}, flat("lora_unet_"), *PEFT),
        r"2 of 168 keys match no .* \(166 match\), the first: lora_unet_down_blocks_7_resnets_0_conv1; it seems",
    ),
    "half a pair": (
        CheckpointError,
        lambda u: {k: v for k, v in good(u).items() if "lora_A" in k or "conv_in" not in k},
        r"has unet\.conv_in\.lora_A\.weight without its other half",
    ),
    "another tensor": (
        CheckpointError,
        lambda u: good(u) | {"unet.bias": ZEROS},
        r"1 tensors are of no LoRA.*unet\.bias",
    ),
    "twice": (
        CheckpointError,
        lambda u: good(u) | lora_of({"conv_in": u["conv_in"]}, flat("lora_unet_"), *KOHYA),
        r"has unet\.conv_in\.weight twice: lora_unet_conv_in and unet\.conv_in",
    ),
    "input channels": (
        Unsupported,
        lambda u: lora_of({"conv_in": (u["conv_in"][0], 8, 3, 3)}, dotted("unet."), *PEFT),
        r"changes the input channels \(8, unet's conv_in\.weight has \[32, 4, 3, 3\]\)",
    ),
    "LoHa": (Unsupported, lambda u: {"lora_unet_conv_in.hada_w1_a": ZEROS}, "is a LoHa"),
    "LoKr": (Unsupported, lambda u: {"lora_unet_conv_in.lokr_w1": ZEROS}, "is a LoKr"),
    "kohya's DoRA": (
        Unsupported,
        lambda u: good(u) | {"unet.conv_in.dora_scale": ZEROS},
        r"magnitudes are called dora_scale.*\(unet\.conv_in\.dora_scale\).*allowed: LoRA, LoCon, and DoRA with PEFT's",
    ),
    "half a DoRA": (
        CheckpointError,
        lambda u: {k: v for k, v in dora_of(u, "unet.").items() if k != "unet.conv_in.lora_magnitude_vector"},
        r"is a DoRA, but has no lora_magnitude_vector for unet\.conv_in",
    ),
    "a DoRA of another size": (
        CheckpointError,
        lambda u: dora_of(u, "unet.") | {"unet.conv_in.lora_magnitude_vector": np.ones(8, np.float32)},
        r"1 of 83 layers have another shape .* \(82 fit\).*conv_in\.lora_magnitude_vector \[8\] is not one for each",
    ),
    "two alphas": (
        CheckpointError,
        lambda u: good(u) | {"unet.conv_in.alpha": np.ones(2, np.float32)},
        r"unet\.conv_in\.alpha is nan, not one finite number",
    ),
    "no rank": (
        CheckpointError,
        lambda u: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in good(u).items()},
        r"83 of 83 layers have another shape",
    ),
    "zeros": (
        CheckpointError,
        lambda u: {k: np.zeros_like(v) if "lora_B" in k else v for k, v in good(u).items()},
        r"at weight 1 changes nothing: 83 tensors of the checkpoint stay as they are",
    ),
    "alphas of zero": (
        CheckpointError,
        lambda u: {
            k: np.zeros_like(v) if "alpha" in k else v for k, v in lora_of(u, flat("lora_unet_"), *KOHYA).items()
        },
        r"at weight 1 changes nothing",
    ),
    "too small": (
        CheckpointError,
        lambda u: {k: v * np.float32(1e-30) for k, v in good(u).items()},
        r"at weight 1 changes nothing: .* products are zero or too small",
    ),
    "zero differences alone": (CheckpointError, lambda u: {"lora_unet_conv_in.diff": ZEROS * 0}, "changes nothing"),
    "biases": (Unsupported, lambda u: good(u) | {"unet.conv_in.lora_B.bias": ZEROS}, "has biases"),
    "differences": (Unsupported, lambda u: good(u) | {"lora_unet_conv_in.diff_b": ZEROS + 1}, "has whole differences"),
    "control": (Unsupported, lambda u: good(u) | {"single_blocks.0.norm.query_norm.scale": ZEROS}, "FLUX Control LoRA"),
    "textual inversion": (Unsupported, lambda u: {"emb_params": ZEROS}, "textual inversion; give it with --embedding"),
    "embeddings": (
        Unsupported,
        lambda u: lora_of({"text_model.embeddings.token_embedding": (514, 64)}, flat("lora_te_"), *KOHYA),
        "changes embeddings",
    ),
    "float8": (Unsupported, lambda u: {k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in good(u).items()}, "F8_E4M3"),
    "alpha": (
        CheckpointError,
        lambda u: good(u) | {"unet.conv_in.alpha": np.array(np.nan, np.float32)},
        r"unet\.conv_in\.alpha is nan, not one finite number",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_fused_is_refused_by_name(name, tmp_path):
    folder = folder_of("sd")
    error, make, message = REFUSALS[name]
    path = written(tmp_path, make(parts_of(folder)["unet"]))
    with pytest.raises(error, match=message) as raised:
        loras_of(folder, [(path, 1.0)])
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_single_layers_of_zeros_are_no_reason_to_refuse(tmp_path):
    """Trainers leave layers as they started; one that changes is enough."""
    folder = folder_of("sd")
    tensors = {k: v * ("lora_B" not in k or "conv_in" in k) for k, v in good(parts_of(folder)["unet"]).items()}
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 1.0)])
    fused = loras.apply("unet", sources["unet"])
    assert [n for n, p in fused.items() if not np.array_equal(p.read(), sources["unet"][n].read())] == [
        "conv_in.weight"
    ]


def test_differences_that_are_all_zero_are_no_reason_to_refuse(tmp_path):
    folder = folder_of("sd")
    tensors = good(parts_of(folder)["unet"]) | {"lora_unet_conv_in.diff_b": ZEROS}
    assert loras_of(folder, [(written(tmp_path, tensors), 1.0)])[1].deltas["unet"]


def test_path_and_weight(tmp_path):
    plain_path = written(tmp_path, {"a.lora_A.weight": ZEROS})
    odd = written(tmp_path, {"a.lora_A.weight": ZEROS}, "odd:0.5.safetensors")
    assert (parse_lora(str(plain_path)).weight, parse_lora(f"{plain_path}:-0.25").weight) == (1.0, -0.25)
    assert parse_lora(str(odd)).path == parse_lora(f"{odd}:2").path == odd
    assert parse_lora(f"{odd}:2").weight == 2.0
    assert parse_lora(str(odd)).digest == parse_lora(str(plain_path)).digest


def test_what_is_no_lora_file(tmp_path):
    path = written(tmp_path, {"a.lora_A.weight": ZEROS})
    (tmp_path / "pickled.pt").write_bytes(b"\x80\x02")
    (tmp_path / "text.safetensors").write_text("not one")
    save_file({}, tmp_path / "empty.safetensors")
    for text, error, message in (
        (f"{path}:much", UsageError, "the weight 'much' is not a number; for example"),
        (f"{path}:", UsageError, "the weight '' is not a number"),
        (f"{path}:nan", UsageError, "the weight 'nan' is not a number"),
        (f"{path}:inf", UsageError, "the weight 'inf' is not a number"),
        (f"{path}:0", UsageError, "a LoRA of weight 0 changes nothing; leave it out, or for example"),
        (f"{path}:-0.0", UsageError, "a LoRA of weight 0 changes nothing"),
        (f"{tmp_path}/none.safetensors:1", UsageError, "there is no such file"),
        (
            str(tmp_path),
            UsageError,
            "is a folder; give the safetensors file in it: empty.safetensors, lora.safetensors",
        ),
        (f"{tmp_path}/pickled.pt:1", CheckpointError, "is a pickle"),
        (f"{tmp_path}/text.safetensors", CheckpointError, "not a safetensors file"),
        (f"{tmp_path}/empty.safetensors", CheckpointError, "has no tensors in it"),
    ):
        with pytest.raises(error, match=message):
            parse_lora(text)


def test_the_command_line_refuses_in_one_line(refused, tmp_path):
    flux = written(tmp_path, LAYOUTS["flux peft"][1](parts_of(folder_of("flux"))))
    start = ("build", folder_of("sd"), "-o", tmp_path / "artifact", "--lora")
    words = ("72 of 72 keys match no layer", "(0 match)", "context_embedder", "it seems to be for FLUX.1")
    refused(*start, f"{flux}:0.8", words=words)
    refused(*start, f"{flux}:0", words=("a LoRA of weight 0 changes nothing",))
    refused(*start, f"{flux}:1e999", words=("the weight '1e999' is not a number",))


MODELS = {
    "sd": "Stable Diffusion 1.x or 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
}
UNCERTAIN = {  # whose names several families have; widths tell, but not those of tiny models: see below
    "sd kohya te1": "",
    "sdxl attention processors": "a UNet such as Stable Diffusion's",
    "sd3 attention processors": "a transformer such as Stable Diffusion 3's, FLUX's or Qwen-Image's",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_of_another_family_is_refused_with_counts_and_its_family(layout, tmp_path):
    family, make = LAYOUTS[layout]
    tensors = make(parts_of(folder_of(family)))
    path = written(tmp_path, tensors)
    for other in MODELS.keys() - {family}:
        with pytest.raises(CheckpointError) as raised:
            loras_of(folder_of(other), [(path, 1.0)])
        message = str(raised.value)
        counts = re.search(
            r"(\d+) of (\d+) keys match no layer of this checkpoint's .*?\((\d+) match\), the first: (.*)", message
        )
        if counts:
            unmatched, total, matched = (int(counts[i]) for i in (1, 2, 3))
            assert total == len(tensors) == unmatched + matched
            assert unmatched > 0
            assert any(key.startswith(counts[4].split(",")[0].split(";")[0]) for key in tensors)
        else:
            assert re.search(r"\d+ of \d+ layers have another shape than the checkpoint's \(\d+ fit\)", message), (
                message
            )
        name = UNCERTAIN.get(layout, MODELS[family])
        assert message.endswith(f"; it seems to be for {name}") if name else "seems" not in message
        assert "\n" not in message


def released(family):
    """Shapes of a released denoiser's linear layers and convolutions, from its class's configuration; no values."""
    import diffusers
    import torch

    made = {
        "sd": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
        "sd2": ("UNet2DConditionModel", {"cross_attention_dim": 1024}),
        "sdxl": ("UNet2DConditionModel", SDXL),
        "sd3": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 8}),
        "flux": ("FluxTransformer2DModel", {}),
        "flux2": ("Flux2Transformer2DModel", {}),
        "qwen_image": ("QwenImageTransformer2DModel", {}),
    }
    name, config = made[family]
    with torch.device("meta"):
        return layers_of(getattr(diffusers, name)(**config))


SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
RELEASED = {
    "sd": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
}


@pytest.mark.parametrize("names", ["dotted", "flat"])
@pytest.mark.parametrize("model", RELEASED)
def test_a_lora_on_the_attention_of_a_released_model_is_told_by_its_names_and_widths(model, names):
    """What most trainers change, and Qwen-Image's and Stable Diffusion 3's names alone are also FLUX.1's."""
    layers = {
        n: s for n, s in released(model).items() if re.search(r"attn\d?\.(to_[qkv]|add_[qkv]|to_out|to_add_out)", n)
    }
    header = {}
    for layer, shape in layers.items():
        called = f"transformer.{layer}" if names == "dotted" else "lora_unet_" + layer.replace(".", "_")
        header[f"{called}.lora_A.weight"] = ("F32", (4, *shape[1:]))
        header[f"{called}.lora_B.weight"] = ("F32", (shape[0], 4))
    assert made_for(header, {}) == RELEASED[model]
    assert (
        made_for(header, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
        == "stable-diffusion-xl-v1-base/lora"
    )
