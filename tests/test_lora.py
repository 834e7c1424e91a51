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
    relative,
    written,
)
from lora_layouts import FORMATS, LAYOUTS, dora_of
from safetensors.numpy import load_file, save_file

from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.lora import fuse_module
from intaglio.profiles.errors import NumericsError

TOLERANCE = 1e-6  # largest relative L2 of a fused weight; measured 0 in most layouts, at most 8e-8
SAME = 0.999  # of the values are the same to the bit where both round float32 once; measured 0.9998


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_weights_are_those_of_diffusers(layout, tmp_path):
    family, make = LAYOUTS[layout]
    folder = folder_of(family)
    tensors = make(parts_of(folder))
    layers = sum(key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight")) for key in tensors)
    distance, changed = distances(folder, [(written(tmp_path, tensors), 0.7)])
    print(layout, f"{distance:.1e}", layers, changed)
    assert changed >= layers >= 8
    assert distance <= TOLERANCE


SEVERAL = {  # layouts of one family and weights, in order; a DoRA scales what is there before it
    "sd": (("peft text", 0.7), ("kohya", -0.4), ("attention processors", 1.3)),
    "sdxl": (("kohya", 0.5), ("kohya compvis", 0.5)),
    "sd3": (("diffusers", 1.0), ("peft", -0.25)),
    "flux": (("xlabs", 0.5), ("kohya", 0.8), ("peft text", 0.1)),
    "flux2": (("ai-toolkit", 0.5), ("kohya", 0.8)),
    "qwen_image": (("lightning", 1.0), ("diffusion_model alphas", 0.6)),
    "sd, DoRA last": (("peft", 0.7), ("dora", 0.6)),
    "flux, DoRA first": (("dora", 0.6), ("peft", 0.7)),
    "qwen_image, two DoRAs": (("dora", 0.6), ("dora", -0.3)),
    "flux2, the same file twice": (("peft", 0.6), ("peft", 0.7)),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_at_once_are_those_of_set_adapters(case, tmp_path):
    family, parts = case.split(",")[0], parts_of(folder_of(case.split(",")[0]))
    files = [
        (written(tmp_path, FORMATS[family][layout](parts), f"{layout}.safetensors"), weight)
        for layout, weight in SEVERAL[case]
    ]
    distance, changed = distances(folder_of(family), files)
    print(case, f"{distance:.1e}", changed)
    assert changed > 8
    assert distance <= TOLERANCE


@pytest.mark.parametrize("wrong", ["weight", "alpha", "rank", "transposed"])
def test_the_comparison_sees_what_could_be_wrong(wrong, tmp_path):
    """A weight, alpha or rank that is a little off is far outside of the tolerance."""
    folder = folder_of("qwen_image")
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


def test_every_layer_has_its_own_alpha_and_rank(tmp_path):
    """diffusers forgets some of them, so the formula is the reference: https://arxiv.org/abs/2106.09685, 4.1."""
    folder = folder_of("sd")
    layers = parts_of(folder)["unet"]
    tensors = lora_of(layers, flat("lora_unet_"), *KOHYA)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 0.5)])
    fused = loras.apply("unet", sources["unet"])
    for layer, shape in layers.items():
        up, down, alpha = (tensors[flat("lora_unet_")(layer) + end] for end in (KOHYA[1], KOHYA[0], KOHYA[2]))
        product = np.tensordot(up.reshape(len(up), -1), down, 1).reshape(shape)
        expected = sources["unet"][f"{layer}.weight"].read() + 0.5 * float(alpha) / len(down) * product
        np.testing.assert_allclose(fused[f"{layer}.weight"].read(), expected, atol=1e-5)


def test_locon_with_a_kernel_between_its_factors(tmp_path):
    """Three convolutions one after the other are one convolution with the fused kernel; diffusers reads none."""
    import torch

    folder = folder_of("sd")
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
def test_alpha_in_the_header_as_diffusers_writes_it(settings, tmp_path):
    folder = folder_of("flux")
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


BEYOND = {  # text encoders that diffusers leaves out of a LoRA: what its layers begin with there
    "lora_te3_": ("sd3", "text_encoder_3", "_"),
    "lora_te2_": ("flux", "text_encoder_2", "_"),
    "text_encoders.t5xxl.transformer.": ("flux", "text_encoder_2", "."),
}


@pytest.mark.parametrize("prefix", BEYOND)
def test_text_encoders_that_diffusers_leaves_out_get_the_formula(prefix, tmp_path):
    family, part, separator = BEYOND[prefix]
    layers = {n: s for n, s in parts_of(folder_of(family))[part].items() if "relative" not in n}
    tensors = lora_of(layers, lambda n: prefix + n.replace(".", separator), *KOHYA)
    sources, loras = loras_of(folder_of(family), [(written(tmp_path, tensors), 0.5)])
    fused = loras.apply(part, sources[part])
    assert len(loras.deltas[part]) == len(layers) >= 14
    for layer in layers:
        up, down, alpha = (tensors[prefix + layer.replace(".", separator) + KOHYA[i]] for i in (1, 0, 2))
        expected = sources[part][f"{layer}.weight"].read() + 0.5 * float(alpha) / len(down) * (up @ down)
        np.testing.assert_allclose(fused[f"{layer}.weight"].read(), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_a_dora_on_rows_of_several_layers_is_one_on_each(family, tmp_path):
    """A row's norm is its own, so the original's fused layers and diffusers' single ones are the same."""
    layers = parts_of(folder_of(family))["transformer"]
    wide, _ = original("diffusion_model.", layers, separator=".", only=lambda n: "processor" not in n)
    tensors = dora_of(wide, "diffusion_model.")
    whole, loras = loras_of(folder_of(family), [(written(tmp_path, tensors), 0.7)])
    single = {}
    for parameter, (delta,) in loras.deltas["transformer"].items():
        layer, up = f"transformer.{parameter.removesuffix('.weight')}", tensors[delta.up.key]
        rows = {"lora_B.weight": up, "lora_magnitude_vector": tensors[delta.magnitude.key]}
        for ending, values in rows.items():
            own = values[slice(*delta.piece.rows)]
            single[f"{layer}.{ending}"] = np.concatenate(np.split(own, 2)[::-1]) if delta.piece.swapped else own
        single[f"{layer}.lora_A.weight"] = tensors[delta.down.key]
    assert len(single) > len(tensors) > 60
    assert any(d.piece.swapped for (d,) in loras.deltas["transformer"].values())
    _, split = loras_of(folder_of(family), [(written(tmp_path, single, "single.safetensors"), 0.7)])
    ours, theirs = (made.apply("transformer", whole["transformer"]) for made in (loras, split))
    for parameter in loras.deltas["transformer"]:
        assert relative(ours[parameter].read(), theirs[parameter].read()) <= TOLERANCE


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
def test_original_names_mean_what_diffusers_makes_of_whole_checkpoints(family, tmp_path):
    """A difference in the original layout, converted as weights are, is the difference in diffusers' layout."""
    import torch
    from diffusers.loaders import single_file_utils

    folder, (converter, others) = folder_of(family), CONVERTERS[family]
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


def test_the_fused_input_of_fluxs_single_blocks(tmp_path):
    """black-forest-labs/flux, ``SingleStreamBlock``: ``linear1`` makes queries, keys, values and the MLP's input."""
    folder = folder_of("flux")
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


def halved(folder, to, kind):
    """A copy of a checkpoint in another dtype."""
    for file in shutil.copytree(folder, to).rglob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: v.astype(kind) if v.dtype == np.float32 else v for k, v in tensors.items()}, file)
    return to


def step_of(values, kind):
    """The distance between neighbours of `kind` at `values`."""
    magnitude = np.maximum(np.abs(values.astype(np.float32)), 2.0**-14)
    return np.exp2(np.floor(np.log2(magnitude))) * float(ml_dtypes.finfo(kind).eps)


KINDS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("dtype", KINDS)
def test_half_precision_checkpoints_are_rounded_once(dtype, family, tmp_path):
    """However many LoRAs there are, DoRAs too: what diffusers fuses in float32 from the same weights, then rounded."""
    import torch

    parts, kind = parts_of(folder_of(family)), KINDS[dtype]
    folder = halved(folder_of(family), tmp_path / dtype, kind)
    files = [
        (written(tmp_path, FORMATS[family][layout](parts), f"{layout}.safetensors"), weight)
        for layout, weight in (("peft", 0.7), ("dora", 0.6), ("diffusers", -0.4))
    ]
    theirs = fused_by_diffusers(folder, files, torch_dtype=torch.float32)
    sources, loras = loras_of(folder, files)
    same, total = 0, 0
    for part, deltas in loras.deltas.items():
        fused = loras.apply(part, sources[part])
        for name in deltas:
            value = fused[name].read()
            expected = theirs[part][name if name in theirs[part] else name.removeprefix("text_model.")].astype(kind)
            assert value.dtype == kind
            assert fused[name].dtype == sources[part][name].dtype
            error = np.abs(value.astype(np.float32) - expected.astype(np.float32))
            assert (error <= np.maximum(step_of(expected, kind), TOLERANCE * np.abs(expected).max())).all()
            same, total = same + (value == expected).sum(), total + value.size
    print(family, dtype, same / total)
    assert same / total >= SAME


@pytest.mark.parametrize("dtype", KINDS)
def test_diffusers_in_half_precision_is_one_rounding_away(dtype, tmp_path):
    """It rounds the product too, before it is added: at most one step of the largest value that is rounded."""
    import torch

    folder = halved(folder_of("flux"), tmp_path / dtype, KINDS[dtype])
    tensors = {k: v.astype(KINDS[dtype]) for k, v in FORMATS["flux"]["peft"](parts_of(folder_of("flux"))).items()}
    files = [(written(tmp_path, tensors), 0.7)]
    theirs = fused_by_diffusers(folder, files, torch_dtype=getattr(torch, dtype))["transformer"]
    sources, loras = loras_of(folder, files)
    for name in loras.deltas["transformer"]:
        stored = sources["transformer"][name].read().astype(np.float32)
        ours = loras.apply("transformer", sources["transformer"])[name].read().astype(np.float32)
        largest = np.maximum(np.abs(theirs[name]), np.abs(theirs[name] - stored))
        assert (
            np.abs(ours - theirs[name]) <= step_of(largest, KINDS[dtype])
        ).all()  # measured: 1 step at most, 0.74 of the values are equal


def test_a_fused_weight_beyond_float16_is_refused(tmp_path):
    folder = shutil.copytree(folder_of("flux"), tmp_path / "half")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({k: v.astype(np.float16) for k, v in load_file(file).items()}, file)
    tensors = lora_of(parts_of(folder)["transformer"], dotted(""), *KOHYA)
    sources, loras = loras_of(folder, [(written(tmp_path, tensors), 1e7)])
    with pytest.raises(NumericsError, match=r"proj_out\.weight with its LoRAs is not finite in F16"):
        loras.apply("transformer", sources["transformer"])["proj_out.weight"].read()


@pytest.mark.parametrize("layout", ["kohya", "dora text"])
def test_the_torch_reference_gets_the_same_weights(layout, tmp_path):
    folder = folder_of("sd")
    files = [(written(tmp_path, FORMATS["sd"][layout](parts_of(folder))), 0.7)]
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


def test_nothing_of_a_lora_is_read_before_a_weight_is(tmp_path):
    folder = folder_of("qwen_image")
    path = written(tmp_path, lora_of(parts_of(folder)["transformer"], dotted(""), *PEFT))
    sources, loras = loras_of(folder, [(path, 1.0)])
    fused = loras.apply("transformer", sources["transformer"])
    path.unlink()
    assert fused.keys() == sources["transformer"].keys()
    with pytest.raises(FileNotFoundError):
        fused["proj_out.weight"].read()
    assert loras.apply("vae", sources["vae"]) is sources["vae"]
