"""What users get wrong about quantization: refused in one line before anything is written, as `test_bad_input`."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from intaglio.exporters.store import GRAPH

QUICK = ("--set", "certificate.prompts=0")
TEXT = "text_encoder/model.safetensors"

ARGUMENTS = {  # more arguments of a build of the tiny checkpoint, and what the message must hold
    ("--quant", "in8"): ["'in8'", "allowed: fp8, fp8-weight-only, int4", "Did you mean 'int8'?"],
    ("--quant", "unet=w8a9"): ["'w8a9'", "Did you mean 'w8a8'?"],
    ("--quant", "int4", "--set", "quantize.methd=awq"): ["--set quantize.methd", "{activations,method,range,"],
    ("--quant", "int4", "--set", "quantize.unett.rank=8"): ["quantize.unett.rank", "components: text_encoder, unet"],
    ("--quant", "int4", "--set", "quantize.method=best"): ["method 'best'", "rtn, mse, awq"],
    ("--quant", "int4", "--set", "quantize.rank=many"): ["quantize.rank=many", "not a number"],
    ("--quant", "int4", "--set", "quantize.rank=-1"): ["rank -1", "0 to 1024"],
    ("--quant", "int4", "--set", "quantize.rank=2000"): ["rank 2000", "0 to 1024"],
    ("--quant", "w8a8", "--set", "quantize.smoothquant=1.2"): ["smoothquant 1.2", "0 to 1, or -1"],
    ("--quant", "w8a8", "--set", "quantize.smoothquant=-3"): ["smoothquant -3", "0 to 1, or -1"],
    ("--quant", "w8a8", "--set", "quantize.range=minmax"): ["range 'minmax'", "absmax, percentile, mse"],
    ("--quant", "unet=int4", "--set", "quantize.unet.activations=static"): ["unet: activations 'static'", "int4"],
    ("--quant", "unet=w8a8", "--set", "quantize.unet.activations=exact"): ["unet: activations 'exact'", "static"],
    ("--quant", "w8a8", "--set", "calibration.count=0"): ["calibration.count=0", "1 or more"],
    ("--quant", "w8a8", "--set", "calibration.count=100000"): ["calibration.count 100000", "prompts"],
    ("--quant", "w8a8", "--set", "calibration.records=few"): ["calibration.records=few", "1 or more"],
    ("--quant", "w8a8", "--set", "calibration.prompts=nowhere.txt"): ["nowhere.txt", "cannot be read"],
    ("--quant", "w8a8", "--set", "calibration.promts=x.txt"): ["calibration.promts", "is unknown here"],
    ("--quant", "int8", "--set", "calibration.count=4"): ["calibration.count", "is unknown here"],
    ("--profile", "nowhere.toml"): ["nowhere.toml", "cannot be read", "recipe.X.toml"],
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_wrong_argument(arguments, tiny_checkpoint, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", *arguments, words=ARGUMENTS[arguments])


def test_a_calibration_set_without_a_prompt(tiny_checkpoint, refused, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# a red cat\n\n   \n# the moon\n", encoding="utf-8")
    command = ("build", tiny_checkpoint, "-o", tmp_path / "artifact", "--quant", "w8a8")
    words = [str(file), "has no prompt", "the calibration set is empty", "one prompt a line"]
    refused(*command, "--set", f"calibration.prompts={file}", words=words)


def with_nan(file):
    """Put a NaN into one weight of a safetensors file; its name."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if n.endswith("fc1.weight"))
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[5] = np.nan
    save_file(tensors, file, {"format": "pt"})
    return name


def test_a_weight_that_is_not_finite(tiny_checkpoint, copy_artifact, refused, tmp_path):
    checkpoint = copy_artifact(tiny_checkpoint, "checkpoint")
    name = with_nan(checkpoint / TEXT)
    words = [str(checkpoint / TEXT), name, "NaN or infinity", "fetch the checkpoint again"]
    refused("build", checkpoint, "-o", tmp_path / "artifact", "--quant", "int8", *QUICK, words=words)


PATTERNS = {
    '"*.to_out.weight" = "int8"': ["the layer pattern '*.to_out.weight' matches none of 14 weights", "named like"],
    '"encoder.layers.0.self_attn.k_proj.weight" = "int8"': ["text_encoder: the format would apply to", "under 5%"],
    '"*" = "int9"': ["'int9'", "allowed", "Did you mean 'int8'?"],
}


@pytest.mark.parametrize("line", PATTERNS)
def test_layers_of_a_recipe(line, tiny_checkpoint, tiny_artifact, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(  # spares the capture
        "intaglio.exporters.build_component.captured",
        lambda prepared: ir.load(tiny_artifact.component(prepared.component.name) / GRAPH),
    )
    file = tmp_path / "recipe.toml"
    file.write_text(f'[component.text_encoder]\nformat = "none"\n[component.text_encoder.layers]\n{line}\n')
    command = ("build", tiny_checkpoint, "-o", tmp_path / "artifact", "--profile", file)
    refused(*command, *QUICK, words=PATTERNS[line])


def test_a_recipe_for_another_family(tiny_checkpoint, refused, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[component.transformer]\nformat = "int8"\n')
    words = [str(file), "'transformer'", "allowed: text_encoder, unet"]
    refused("build", tiny_checkpoint, "-o", tmp_path / "artifact", "--profile", file, words=words)


def test_an_artifact_in_the_place_of_a_checkpoint(tiny_artifact, refused, tmp_path):
    words = [f"{tiny_artifact.folder} is an artifact, not a checkpoint", "intaglio build CHECKPOINT -o"]
    refused("build", tiny_artifact.folder, "-o", tmp_path / "again", "--quant", "int8", words=words)
