"""LoRAs fused at build time, in every layout of names, against diffusers' and PEFT's own loading and fusing."""

from __future__ import annotations

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from lora_cases import (
    KOHYA,
    LAYOUTS,
    PEFT,
    RANK,
    distances,
    dotted,
    factors,
    flat,
    folder_of,
    fused_by_diffusers,
    lora_of,
    loras_of,
    original,
    parts_of,
    written,
)
from safetensors.numpy import load_file, save_file

from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.lora import fuse_module
from intaglio.exporters.lora_files import parse_lora
from intaglio.profiles.errors import NumericsError

TOLERANCE = 1e-6  # largest relative L2 of a fused weight; measured 8e-8


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return lambda family: folder_of(family, root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_weights_are_those_of_diffusers(layout, tiny_folder, tmp_path):
    family, make = LAYOUTS[layout]
    folder = tiny_folder(family)
    tensors = make(parts_of(folder))
    layers = sum(key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight")) for key in tensors)
    distance, changed = distances(folder, [(written(tmp_path, tensors), 0.7)])
    print(layout, f"{distance:.1e}", layers, changed)
    assert changed >= layers >= 8
    assert distance <= TOLERANCE


def test_loras_add_up_with_their_weights(tiny_folder, tmp_path):
    folder = tiny_folder("sd")
    parts = parts_of(folder)
    one = lora_of(parts["unet"], dotted("unet."), *PEFT) | lora_of(
        parts["text_encoder"], dotted("text_encoder."), *PEFT
    )
    two = lora_of(parts["unet"], flat("lora_unet_"), *KOHYA, seed=4, steps=1)
    files = [(written(tmp_path, one, "one.safetensors"), 0.7), (written(tmp_path, two, "two.safetensors"), -0.4)]
    assert distances(folder, files)[0] <= TOLERANCE
    assert distances(folder, [(files[0][0], 1.0)])[0] <= TOLERANCE


@pytest.mark.parametrize("wrong", ["weight", "alpha", "rank", "transposed"])
def test_the_comparison_sees_what_could_be_wrong(wrong, tiny_folder, tmp_path):
    """A weight, alpha or rank that is a little off is far outside of the tolerance."""
    folder = tiny_folder("qwen_image")
    layers = parts_of(folder)["transformer"]
    tensors = lora_of(layers, dotted(""), *KOHYA)
    theirs = fused_by_diffusers(folder, [(written(tmp_path, tensors), 1.0)])["transformer"]
    changed = dict(tensors)
    for key in tensors:
        if wrong == "alpha" and key.endswith(".alpha"):
            changed[key] = np.asarray(tensors[key] * np.float32(1.001))
        if wrong == "rank" and "lora_up" in key:
            changed[key] = np.pad(tensors[key], ((0, 0), (0, 1)))
        if wrong == "rank" and "lora_down" in key:
            changed[key] = np.pad(tensors[key], ((0, 1), (0, 0)))
        if wrong == "transposed" and "lora_up" in key:
            changed[key] = tensors[key][::-1].copy()
    path = written(tmp_path, changed, "wrong.safetensors")
    sources, loras = loras_of(folder, [(path, 1.001 if wrong == "weight" else 1.0)])
    fused = loras.apply("transformer", sources["transformer"])
    errors = [np.linalg.norm(p.read() - theirs[n]) / np.linalg.norm(theirs[n]) for n, p in fused.items() if p.shape[1:]]
    assert max(errors) > 100 * TOLERANCE


def test_every_layer_has_its_own_alpha_and_rank(tiny_folder, tmp_path):
    """diffusers forgets some of them, so the formula is the reference: https://arxiv.org/abs/2106.09685, 4.1."""
    folder = tiny_folder("sd")
    layers = parts_of(folder)["unet"]
    tensors = lora_of(layers, flat("lora_unet_"), *KOHYA)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 0.5)])
    fused = loras.apply("unet", sources["unet"])
    for layer, shape in layers.items():
        up, down, alpha = (tensors[flat("lora_unet_")(layer) + end] for end in (KOHYA[1], KOHYA[0], KOHYA[2]))
        product = np.tensordot(up.reshape(len(up), -1), down, 1).reshape(shape)
        expected = sources["unet"][f"{layer}.weight"].read() + 0.5 * float(alpha) / len(down) * product
        np.testing.assert_allclose(fused[f"{layer}.weight"].read(), expected, atol=1e-5)


def test_locon_with_a_kernel_between_its_factors(tiny_folder, tmp_path):
    """Three convolutions one after the other are one convolution with the fused kernel."""
    import torch

    folder = tiny_folder("sd")
    rng, layer = np.random.default_rng(0), "down_blocks.0.resnets.0.conv1"
    shape = parts_of(folder)["unet"][layer]
    called = flat("lora_unet_")(layer)
    up, mid, down = (
        rng.standard_normal(s).astype(np.float32) for s in ((shape[0], 4, 1, 1), (4, 4, 3, 3), (4, shape[1], 1, 1))
    )
    tensors = {f"{called}.lora_{name}.weight": value for name, value in (("up", up), ("mid", mid), ("down", down))}
    tensors[f"{called}.alpha"] = np.array(2.0, np.float32)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 1.0)])
    stored = sources["unet"][f"{layer}.weight"].read()
    kernel = loras.apply("unet", sources["unet"])[f"{layer}.weight"].read() - stored
    picture = torch.from_numpy(rng.standard_normal((1, shape[1], 8, 8)).astype(np.float32))
    conv = torch.nn.functional.conv2d
    steps = conv(conv(conv(picture, torch.from_numpy(down)), torch.from_numpy(mid), padding=1), torch.from_numpy(up))
    whole = conv(picture, torch.from_numpy(kernel), padding=1)
    np.testing.assert_allclose(whole, steps * 0.5, atol=2e-4)  # values up to 60


@pytest.mark.parametrize("settings", [{"lora_alpha": 6}, {"lora_alpha": 6, "use_rslora": True}])
def test_alpha_in_the_header_as_diffusers_writes_it(settings, tiny_folder, tmp_path):
    folder = tiny_folder("flux")
    layers = {n: s for n, s in parts_of(folder)["transformer"].items() if n.endswith("to_q")}
    tensors = lora_of(layers, dotted("transformer."), *PEFT)
    ranks = {len(v) for k, v in tensors.items() if "lora_A" in k}
    pattern = {"alpha_pattern": {"transformer_blocks.0.attn.to_q": 9}, "target_modules": ["to_q"]}
    stated = {"r": ranks.pop(), **settings, **pattern}
    stated["rank_pattern"] = {
        k.removeprefix("transformer.").removesuffix(".lora_A.weight"): len(v) for k, v in tensors.items() if "_A" in k
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in stated.items()})}
    distance, changed = distances(folder, [(written(tmp_path, tensors, **metadata), 1.0)])
    assert changed == len(tensors) // 2
    assert distance <= TOLERANCE


def test_alpha_in_pefts_settings_beside_the_file(tiny_folder, tmp_path):
    folder = tiny_folder("qwen_image")
    layers = parts_of(folder)["transformer"]
    path = written(tmp_path, lora_of(layers, dotted("base_model.model."), *PEFT), "adapter_model.safetensors")
    alone = parse_lora(str(path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    _, loras = loras_of(folder, [(path, 1.0)])
    scales = {
        len(d.down.shape) and d.scale * d.down.shape[0] for ds in loras.deltas["transformer"].values() for d in ds
    }
    assert scales == {2 * RANK}
    assert loras.files[0].digest != alone.digest


class Lenient(dict):
    """A checkpoint that has whatever a converter asks for."""

    def pop(self, key, *_):
        import torch

        return super().pop(key, torch.zeros(7 * 3072, 1))

    def __missing__(self, key):
        return self.pop(key)


CONVERTERS = {  # by the names that tell them apart from other rows of the table
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", r"linear1|processor|embedder"),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", r"embedder"),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", r"double|single|_in|processor"),
}


@pytest.mark.parametrize("family", CONVERTERS)
def test_original_names_mean_what_diffusers_makes_of_whole_checkpoints(family, tiny_folder, tmp_path):
    """A difference in the original layout, converted as weights are, is the difference in diffusers' layout."""
    import torch
    from diffusers.loaders import single_file_utils

    folder, (converter, others) = tiny_folder(family), CONVERTERS[family]
    layers = parts_of(folder)["transformer"]
    wide, name = original("diffusion_model.", layers, separator=".", only=lambda n: not re.search(others, n))
    tensors = lora_of(wide, name, *KOHYA)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 1.0)])
    difference = {}
    for layer in wide:
        up, down, alpha = (tensors[name(layer) + end] for end in (KOHYA[1], KOHYA[0], KOHYA[2]))
        product = np.tensordot(up.reshape(len(up), -1), down, 1) * (alpha / len(down))
        difference[f"{layer}.weight"] = torch.from_numpy(product.astype(np.float32))
    converted = getattr(single_file_utils, converter)(Lenient(difference))
    fused, compared = loras.apply("transformer", sources["transformer"]), 0
    for parameter, added in loras.deltas["transformer"].items():
        stored = sources["transformer"][parameter].read()
        np.testing.assert_allclose(fused[parameter].read() - stored, converted[parameter], atol=1e-5)
        compared += len(added)
    assert compared >= len(wide) > 15


def test_the_fused_input_of_fluxs_single_blocks(tiny_folder, tmp_path):
    """black-forest-labs/flux, ``SingleStreamBlock``: ``linear1`` makes queries, keys, values and the MLP's input."""
    folder = tiny_folder("flux")
    layers = parts_of(folder)["transformer"]
    parts = [f"single_transformer_blocks.1.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    rows = [layers[p][0] for p in parts]
    up, down = factors((sum(rows), layers[parts[0]][1]), RANK, np.random.default_rng(0))
    called = "lora_unet_single_blocks_1_linear1"
    path = written(tmp_path, {f"{called}.lora_up.weight": up, f"{called}.lora_down.weight": down})
    sources, loras = loras_of(folder, [(path, 1.0)])
    fused = loras.apply("transformer", sources["transformer"])
    added = [fused[f"{p}.weight"].read() - sources["transformer"][f"{p}.weight"].read() for p in parts]
    np.testing.assert_allclose(np.concatenate(added), up @ down, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_are_rounded_once(dtype, tiny_folder, tmp_path):
    """Fused in float32 and rounded to the checkpoint's dtype, however many LoRAs there are."""
    folder = shutil.copytree(tiny_folder("flux"), tmp_path / dtype)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.astype(kind) for k, v in load_file(file).items()}, file)
    layers = parts_of(folder)["transformer"]
    files = [
        (written(tmp_path, lora_of(layers, dotted(""), *KOHYA, seed=i), f"{i}.safetensors"), 0.5) for i in range(2)
    ]
    sources, loras = loras_of(folder, files)
    fused = loras.apply("transformer", sources["transformer"])
    once = np.float32(0)
    for path, weight in files:
        _, alone = loras_of(folder, [(path, weight)])
        delta = alone.deltas["transformer"]["proj_out.weight"][0]
        once = once + delta.read(fused["proj_out.weight"].shape)
    expected = (sources["transformer"]["proj_out.weight"].read().astype(np.float32) + once).astype(kind)
    value = fused["proj_out.weight"].read()
    assert value.dtype == kind
    assert fused["proj_out.weight"].dtype == sources["transformer"]["proj_out.weight"].dtype
    np.testing.assert_array_equal(value, expected)


def test_a_fused_weight_beyond_float16_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("flux"), tmp_path / "half")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.astype(np.float16) for k, v in load_file(file).items()}, file)
    tensors = lora_of(parts_of(folder)["transformer"], dotted(""), *KOHYA)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 1e7)])
    with pytest.raises(NumericsError, match=r"proj_out\.weight with its LoRAs is not finite in F16"):
        loras.apply("transformer", sources["transformer"])["proj_out.weight"].read()


def test_the_torch_reference_gets_the_same_weights(tiny_folder, tmp_path):
    folder = tiny_folder("sd")
    parts = parts_of(folder)
    tensors = lora_of(parts["unet"], flat("lora_unet_"), *KOHYA, steps=1)
    tensors |= lora_of(parts["text_encoder"], flat("lora_te_text_model_"), *KOHYA, seed=1, steps=1)
    files = [(written(tmp_path, tensors), 0.7)]
    theirs = fused_by_diffusers(folder, files)
    checkpoint = open_checkpoint(folder)
    sources, loras = loras_of(folder, files)
    exporter, _ = family_of(checkpoint)
    components = {c.name: c for c in exporter.components(checkpoint)}
    for part in ("unet", "text_encoder"):
        component = components[part]
        module = component.wrap(component.reference(checkpoint))
        fuse_module(module, component, loras.apply(part, sources[part]))
        for name, value in module.named_parameters():
            expected = theirs[part][name.removeprefix(component.prefix)]
            assert np.linalg.norm(value.detach().numpy() - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_nothing_of_a_lora_is_read_before_a_weight_is(tiny_folder, tmp_path):
    folder = tiny_folder("qwen_image")
    path = written(tmp_path, lora_of(parts_of(folder)["transformer"], dotted(""), *PEFT))
    sources, loras = loras_of(folder, [(path, 1.0)])
    fused = loras.apply("transformer", sources["transformer"])
    path.unlink()
    assert fused.keys() == sources["transformer"].keys()
    with pytest.raises(FileNotFoundError):
        fused["proj_out.weight"].read()
    assert loras.apply("vae", sources["vae"]) is sources["vae"]
