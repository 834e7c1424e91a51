"""LoRAs as PEFT itself writes and merges them, and FLUX.1's original names at the widths of the released model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from lora_cases import ORIGINAL, PEFT, RANK, dotted, folder_of, lora_of, loras_of, parts_of, pipeline_of, relative
from lora_layouts import dora_of
from safetensors.numpy import load_file, save_file

from intaglio.exporters.lora_files import parse_lora
from intaglio.exporters.lora_names import Catalogue, grouped, place
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError

TOLERANCE = 1e-6  # largest relative L2 of a fused weight; measured 7e-8

SETTINGS = {
    "alpha": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "lora_alpha": 6,
        "rank_pattern": {"to_q": 2, r".*\.to_v": 5},
        "alpha_pattern": {"to_k": 9, r"^[a-z_]+blocks\.0\..*to_q": 1},
    },
    "dora": {"lora_alpha": 6, "use_dora": True},
    "dora with rslora": {"lora_alpha": 2, "use_dora": True, "use_rslora": True},
}
DENOISERS = {
    "sd": "unet",
    "sdxl": "unet",
    "sd3": "transformer",
    "flux": "transformer",
    "flux2": "transformer",
    "qwen_image": "transformer",
}
TARGETS = ["to_q", "to_k", "to_v", "conv1", "proj_in", "add_k_proj"]  # what of these a model has


def saved_by_peft(module, folder, **settings):
    """Train nothing, write what PEFT would; its own merged weights, by the module's names."""
    import peft
    import torch

    targets = [t for t in TARGETS if any(n.endswith(f".{t}") for n, _ in module.named_modules())]
    model = peft.get_peft_model(module, peft.LoraConfig(r=RANK, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(torch.rand(value.shape, generator=generator) + 0.5)
            elif "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_folder_that_peft_wrote_is_what_peft_merges(family, settings, tmp_path):
    check_folder(family, SETTINGS[settings], tmp_path)


@pytest.mark.parametrize("family", DENOISERS)
def test_a_folder_that_peft_wrote_for_any_family(family, tmp_path):
    check_folder(family, SETTINGS["dora with rslora"], tmp_path)


def check_folder(family, settings, folder):
    part = DENOISERS[family]
    merged = saved_by_peft(getattr(pipeline_of(folder_of(family)), part), folder, **settings)
    assert all(k.startswith("base_model.model.") for k in load_file(folder / "adapter_model.safetensors"))
    sources, loras = loras_of(folder_of(family), [(folder, 1.0)])
    fused = loras.apply(part, sources[part])
    distances = {name: relative(fused[name].read(), merged[name]) for name in fused}
    print(family, settings, f"{max(distances.values()):.1e}", len(loras.deltas[part]))
    assert max(distances.values()) <= TOLERANCE
    changed = {n for n, p in sources[part].items() if not np.array_equal(p.read(), merged[n])}
    assert loras.deltas[part].keys() == changed
    assert len(changed) >= 8


def test_the_text_encoders_magnitudes_under_both_names_are_the_same(tmp_path):
    """diffusers 0.42.1 writes the first and, in a text encoder, reads the second alone."""
    layers = parts_of(folder_of("sd"))["text_encoder"]
    read = []
    for ending in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        save_file(dora_of(layers, "text_encoder.", ending), tmp_path / f"{ending}.safetensors")
        sources, loras = loras_of(folder_of("sd"), [(tmp_path / f"{ending}.safetensors", 0.7)])
        fused = loras.apply("text_encoder", sources["text_encoder"])
        read.append({name: fused[name].read() for name in loras.deltas["text_encoder"]})
    assert len(read[0]) == len(layers)
    for name, value in read[0].items():
        np.testing.assert_array_equal(value, read[1][name])


def test_settings_decide_about_the_digest_and_what_they_cannot_mean_is_refused(tmp_path):
    layers = parts_of(folder_of("qwen_image"))["transformer"]
    save_file(lora_of(layers, dotted("base_model.model."), *PEFT), tmp_path / "adapter_model.safetensors")
    digests = {parse_lora(str(tmp_path)).digest}
    for alpha in (3, 6):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        digests.add(parse_lora(str(tmp_path)).digest)
    assert len(digests) == 3
    for settings, error, message in (
        (
            {"lora_alpha": 6, "use_dora": True},
            CheckpointError,
            "is a DoRA, but has no lora_magnitude_vector for base",
        ),
        ({"lora_alpha": 6, "lora_bias": True}, Unsupported, "is a LoRA with lora_bias, which cannot be fused; allowed"),
        ({"lora_alpha": 6, "init_lora_weights": "pissa_niter_4"}, Unsupported, "from init_lora_weights pissa_niter_4"),
        ({"r": 6}, CheckpointError, "PEFT's settings have no lora_alpha"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(error, match=message):
            loras_of(folder_of("qwen_image"), [(tmp_path, 1.0)])


def test_a_folder_of_several_loras_is_no_lora(tmp_path):
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file({"a.lora_A.weight": np.ones((2, 2), np.float32)}, tmp_path / name)
    with pytest.raises(UsageError, match=r"is a folder; give the safetensors file in it: adapter_model\.saf"):
        parse_lora(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    assert parse_lora(f"{tmp_path}:0.5").path == tmp_path / "pytorch_lora_weights.safetensors"


FAL = r"processor|joint|embed|_in(\.|$)|adaLN"
WIDE = {  # diffusers' converter, names of its files, and the layers that it has not, or that are another model's
    "kohya": ("_convert_kohya_flux_lora_to_diffusers", "lora_unet_{}.lora_down.weight", r"processor|joint|embedder"),
    "fal": (
        "_convert_fal_kontext_lora_to_diffusers",
        "base_model.model.{}.lora_A.weight",
        FAL,
    ),
}


@pytest.mark.parametrize("converter", WIDE)
def test_the_original_names_of_flux_at_full_width_are_those_of_diffusers_converters(converter):
    """Both have the widths of the released model written in them; every row goes to the same layer, bit by bit."""
    import diffusers
    import torch
    from diffusers.loaders import lora_conversion_utils

    function, pattern, others = WIDE[converter]
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    catalogues, rng, tensors = {"transformer": Catalogue(shapes)}, np.random.default_rng(0), {}
    for original, targets in ORIGINAL:
        for n in range(38 if "{n}" in original else 1):
            inside = [f"{t.format(n=n)}.weight" for t in targets]
            if re.search(others, original) or any(t not in shapes for t in inside):
                continue
            name = original.format(n=n)
            down = pattern.format(name.replace(".", "_") if converter == "kohya" else name)
            rows, columns = sum(shapes[t][0] for t in inside), shapes[inside[0]][1]
            tensors[down] = rng.standard_normal((1, columns)).astype(np.float32)
            up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
            tensors[up] = rng.standard_normal((rows, 1)).astype(np.float32)
    theirs = getattr(lora_conversion_utils, function)({k: torch.from_numpy(v) for k, v in tensors.items()})
    theirs = {name.removeprefix("transformer."): value.numpy() for name, value in theirs.items()}
    groups, rest = grouped(tensors)
    assert not rest
    compared = 0
    for name, roles in groups.items():
        placed = place(name, catalogues)
        assert placed, name
        for piece in placed[2]:
            up = tensors[roles["up"]][slice(*piece.rows)]
            layer = piece.parameter.removesuffix(".weight")
            ours = np.concatenate(np.split(up, 2)[::-1]) if piece.swapped else up
            np.testing.assert_array_equal(ours, theirs[f"{layer}.lora_B.weight"])
            np.testing.assert_array_equal(tensors[roles["down"]], theirs[f"{layer}.lora_A.weight"])
            compared += 1
    assert 2 * compared == len(theirs) > 900
