"""What is refused of LoRA files, and how they are named."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from lora_cases import KOHYA, PEFT, dotted, flat, folder_of, lora_of, loras_of, parts_of, written
from safetensors.numpy import save_file

from intaglio.exporters.lora_files import parse_lora
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return lambda family: folder_of(family, root)


def good(layers):
    return lora_of(layers, dotted("unet."), *PEFT)


ZEROS = np.zeros((4, 4), np.float32)
REFUSALS = {
    "another model": (
        CheckpointError,
        lambda u: lora_of({"transformer_blocks.0.img_mlp.net.0.proj": (8, 8)}, dotted(""), *KOHYA),
        r"is for another model: no component takes any of its layers \(.*unet.*\), the first is "
        r"transformer_blocks\.0\.img_mlp\.net\.0\.proj\.alpha; it seems to be for Qwen-Image",
    ),
    "another size": (
        CheckpointError,
        lambda u: lora_of({n: (s[0], 768) for n, s in u.items() if n.endswith("attn2.to_k")}, dotted("unet."), *PEFT),
        r"unet\.down_blocks.*attn2\.to_k\.lora_A\.weight \[3, 768\] and .* do not fit: unet's .* has \[32, 64\]; "
        r"the LoRA seems to be for Stable Diffusion 1",
    ),
    "a layer too many": (
        CheckpointError,
        lambda u: good(u) | lora_of({"down_blocks.7.resnets.0.conv1": (8, 8, 3, 3)}, flat("lora_unet_"), *PEFT),
        r"has 1 of 84 layers that no component takes .*, the first is lora_unet_down_blocks_7_resnets_0_conv1",
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
    "DoRA": (Unsupported, lambda u: good(u) | {"unet.conv_in.dora_scale": ZEROS}, "is a DoRA"),
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
def test_what_cannot_be_fused_is_refused_by_name(name, tiny_folder, tmp_path):
    folder = tiny_folder("sd")
    error, make, message = REFUSALS[name]
    path = written(tmp_path, make(parts_of(folder)["unet"]))
    with pytest.raises(error, match=message) as raised:
        loras_of(folder, [(path, 1.0)])
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_differences_that_are_all_zero_are_no_reason_to_refuse(tiny_folder, tmp_path):
    folder = tiny_folder("sd")
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
