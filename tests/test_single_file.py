"""Checkpoints in one file: what is read is what diffusers reads, and the bundled configurations fit."""

from __future__ import annotations

import json

import ldm
import numpy as np
import pytest
import tiny_sd
import tiny_sdxl
from partial import QUICK

from intaglio.exporters import checkpoint_index
from intaglio.exporters.build import build
from intaglio.exporters.capture import match_parameters
from intaglio.exporters.checkpoint import open_checkpoint, source_digests
from intaglio.exporters.component import family_of
from intaglio.exporters.parts import pretrained
from intaglio.exporters.single_file_config import bundled_folder, configured
from intaglio.exporters.single_file_layouts import LAYOUTS
from intaglio.profiles.errors import CheckpointError, UsageError
from intaglio.runtimes.pipeline import load

PICTURE = 1  # steps of 255; measured 1: float32 sums in another order
TINY = {"sd1": tiny_sd.stable_diffusion, "sd2": tiny_sd.stable_diffusion} | {
    "sdxl": tiny_sdxl.base,
    "sdxl_refiner": tiny_sdxl.refiner,
}
BUNDLED = {name: layout for layout in LAYOUTS for name in layout.configurations.values()}
PARAMETERS = {  # as published, by bundled configuration and component
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2_epsilon": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd2_v_prediction": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sdxl_refiner": {"vae": 83_653_863, "text_encoder_2": 694_659_840},
}
# The `params` of the original repositories' YAML files (v1-inference, v2-inference, sd_xl_base, sd_xl_refiner).
ORIGINAL = {
    "sd1": {
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "transformer_depth": 1,
        "context_dim": 768,
    },
    "sd2_epsilon": {
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 1024,
    },
    "sdxl": {
        "model_channels": 320,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "sdxl_refiner": {
        "model_channels": 384,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 4,
        "context_dim": [1280, 1280, 1280, 1280],
        "num_classes": "sequential",
        "adm_in_channels": 2560,
    },
}


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """A function: layout and dtype to a tiny single file and a folder with its configuration, made once."""
    made, place = {}, tmp_path_factory.mktemp("single")

    def make(layout, dtype="float32"):
        if layout not in made:
            made[layout] = TINY[layout](place / layout)
            ldm.configuration(made[layout], place / f"{layout}-config")
        file = place / f"{layout}-{dtype}.safetensors"
        if not file.exists():
            ldm.write_ldm(made[layout], layout, file, dtype=dtype)
        return file, place / f"{layout}-config"

    return make


def plain(name, kind):
    return name.removeprefix("text_model.") if kind == "CLIPTextModel" else name


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", TINY)
def test_every_parameter_is_what_diffusers_reads(layout, dtype, single):
    file, config = single(layout, dtype)
    checkpoint = open_checkpoint(file, config=config)
    assert checkpoint.single.layout.name == layout
    for part in checkpoint.single.parts:
        library, kind = checkpoint.index[part]
        reference = pretrained(library, kind, part)(checkpoint)
        wanted = {name: p.detach().numpy() for name, p in reference.named_parameters()}
        found = {plain(name, kind): p for name, p in checkpoint.weights(part).items()}
        assert found.keys() - {"embeddings.position_ids", "text_model.embeddings.position_ids"} == wanted.keys()
        for name, value in wanted.items():
            read = found[name].read()
            assert read.shape == found[name].shape == value.shape
            assert read.dtype == dtype, "the file's own dtype"
            assert value.dtype == np.float32
            assert np.array_equal(read.astype(np.float32), value), name


def test_a_converted_folder_and_its_file_hold_the_same_values(single, tmp_path):
    """The layout's writer in these tests knows nothing of diffusers' conversion: both must agree with the folder."""
    file, config = single("sdxl")
    folder = file.parent / "sdxl"
    ours, source = open_checkpoint(file, config=config), open_checkpoint(folder)
    for part in ours.single.parts:
        wanted = {n: p.read() for n, p in source.weights(part).items()}
        found = {n: p.read() for n, p in ours.weights(part).items() if "position_ids" not in n}
        kind = ours.component_class(part)
        assert {plain(n, kind) for n in found} == {plain(n, kind) for n in wanted}
        assert all(np.array_equal(found[n], wanted.get(n, wanted.get(plain(n, kind)))) for n in found)


@pytest.fixture(scope="module")
def built(single, tmp_path_factory):
    file, config = single("sd1", "float16")
    folder = tmp_path_factory.mktemp("single") / "built"
    return build(file, folder, config=config, options=QUICK), file, config


def test_picture_is_diffusers_own_from_single_file(built):
    import diffusers
    import torch

    artifact, file, config = built
    request = {"num_inference_steps": 4, "guidance_scale": 7.5, "height": 96, "width": 64}
    ours = np.asarray(load(artifact)("a red cat", seed=5, **request).images[0]).astype(int)
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, safety_checker=None, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    picture = theirs("a red cat", generator=torch.Generator().manual_seed(5), **request).images[0]
    difference = np.abs(ours - np.asarray(picture).astype(int))
    assert difference.max() <= PICTURE
    assert ours.std() > 10, "a picture without content compares with anything"


def test_weights_keep_the_file_s_half_precision(built):
    artifact, file, _ = built
    assert (artifact.folder / "unet/model.onnx.data").stat().st_size < file.stat().st_size
    assert all(t["dtype"] == "float16" for t in tensors_of(artifact) if t["bytes"] > 4096)


def tensors_of(artifact):
    import onnx

    model = onnx.load(artifact.folder / "unet/model.onnx", load_external_data=False)
    names = {1: "float32", 10: "float16"}
    for tensor in model.graph.initializer:
        yield {"dtype": names.get(tensor.data_type), "bytes": 2 * int(np.prod(tensor.dims))}


def test_the_torch_engine_finds_the_file_again_with_its_configuration(built, tmp_path):
    artifact, file, config = built
    provenance = artifact.manifest.provenance
    again = checkpoint_index.find_checkpoint(provenance)
    assert (again.location, again.folder) == (file, config)
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(file.read_bytes())
    assert checkpoint_index.find_checkpoint(provenance, str(moved)).location == moved
    other = tmp_path / "other.safetensors"
    other.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not the checkpoint this artifact was built from"):
        checkpoint_index.find_checkpoint(provenance, str(other))


def test_digests_cover_the_file_and_its_configuration_and_no_place(single, tmp_path):
    file, config = single("sd1")
    digests = source_digests(open_checkpoint(file, config=config))
    assert {"checkpoint.safetensors", "config/unet/config.json", "config/tokenizer/vocab.json"} <= digests.keys()
    bundled = open_checkpoint(ldm.write_header(ldm.full_size("sd1"), tmp_path / "mine.safetensors")).single.sources()
    assert {"checkpoint.safetensors", "sd1/model_index.json", "clip_merges.txt.gz"} <= bundled.keys()
    assert all(path.is_file() for path in bundled.values())


# --- bundled configurations -----------------------------------------------------------------------------------------


def options_for(name):
    return {"checkpoint.prediction_type": name.removeprefix("sd2_")} if name.startswith("sd2_") else {}


@pytest.mark.parametrize("name", BUNDLED)
def test_a_full_size_file_opens_with_its_bundled_configuration_and_fits_the_exporter(name, tmp_path):
    from accelerate import init_empty_weights

    file = ldm.write_header(
        ldm.full_size(name), tmp_path / "model.safetensors"
    )  # names, shapes and a hole of gigabytes
    checkpoint = open_checkpoint(file, options=options_for(name))
    assert checkpoint.single.bundled == name
    assert BUNDLED[name].title in checkpoint.remarks[0]
    exporter, _ = family_of(checkpoint)
    for component in exporter.components(checkpoint):
        with init_empty_weights():
            module = component.wrap(component.model(checkpoint.config(component.source)))
        assert match_parameters(component, module, checkpoint.weights(component.source))
    for part, published in PARAMETERS[name].items():
        found = {k: p for k, p in checkpoint.weights(part).items() if not k.endswith("position_ids")}
        assert sum(int(np.prod(p.shape)) for p in found.values()) == published, part


VAE = {"ch": 128, "ch_mult": [1, 2, 4, 4], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 2}
SCALES = {"sd1": 0.18215, "sd2_epsilon": 0.18215, "sdxl": 0.13025, "sdxl_refiner": 0.13025}


def normal(value):
    return tuple(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ORIGINAL)
def test_bundled_configurations_are_the_original_ones(name):
    from diffusers.loaders import single_file_utils as library

    unet = {"in_channels": 4, "out_channels": 4, "num_res_blocks": 2, **ORIGINAL[name]}
    params = {"unet_config": {"params": unet}, "first_stage_config": {"params": {"ddconfig": VAE}}}
    original = {"model": {"params": {**params, "scale_factor": SCALES[name]}}}
    wanted = {
        "unet": library.create_unet_diffusers_config_from_ldm(original, {}),
        "vae": library.create_vae_diffusers_config_from_ldm(original, {}),
    }
    for part, config in wanted.items():
        bundled = json.loads((bundled_folder(name) / part / "config.json").read_text())
        del config["sample_size"]  # the library guesses it from tensors, and there are none
        absent = {"use_linear_projection": False, "transformer_layers_per_block": 1}
        for key, value in config.items():
            assert normal(bundled.get(key, absent.get(key))) == normal(value), (part, key)


KNOWN = {  # token ids that anybody with CLIP's tokenizer finds
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "hello world": [3306, 1002],
    "An astronaut riding a horse": [550, 18376, 6765, 320, 4558],
}


@pytest.mark.parametrize(("name", "part", "padding"), [("sd1", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)])
def test_bundled_tokenizers_are_clip_s(name, part, padding):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(configured(bundled_folder(name), "{}") / part)
    assert len(tokenizer) == 49408
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == [49406, *ids, 49407]
    padded = tokenizer("", padding="max_length", truncation=True).input_ids
    assert padded == [49406, 49407] + [padding] * 75


# --- what the tensors do not tell -----------------------------------------------------------------------------------


def test_stable_diffusion_2_is_asked_about(tmp_path):
    file = ldm.write_header(ldm.full_size("sd2_epsilon"), tmp_path / "two.safetensors")
    with pytest.raises(UsageError) as caught:
        open_checkpoint(file)
    for kind in ("epsilon", "v_prediction"):
        assert f"--set checkpoint.prediction_type={kind}" in str(caught.value)
        opened = open_checkpoint(file, options={"checkpoint.prediction_type": kind, "tensorrt.sm": "sm89"})
        assert opened.config("scheduler", "scheduler_config.json")["prediction_type"] == kind
        assert opened.config("unet")["sample_size"] == {"epsilon": 64, "v_prediction": 96}[kind]


@pytest.mark.parametrize(("stated", "kind"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_a_file_may_say_what_it_predicts(stated, kind, tmp_path):
    named = {"modelspec.prediction_type": stated, "modelspec.license": "CreativeML Open RAIL++-M"}
    file = ldm.write_header(ldm.full_size("sd2_epsilon"), tmp_path / "two.safetensors", **named)
    opened = open_checkpoint(file)
    assert opened.single.bundled == f"sd2_{kind}"
    assert opened.licence == "CreativeML Open RAIL++-M"


def test_v_prediction_marks_of_sdxl_are_obeyed(tmp_path):
    marks = {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}
    tensors = {**ldm.full_size("sdxl"), **{k: ldm.full_size("sdxl")["betas"][:0] for k in marks}}
    opened = open_checkpoint(ldm.write_header(tensors, tmp_path / "noob.safetensors"))
    scheduler = opened.config("scheduler", "scheduler_config.json")
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "v_prediction" in opened.remarks[0]


WRONG_OPTIONS = {
    "prediction_type": ("checkpoint.prediction_type", "v", ["v is not allowed: epsilon, v_prediction"]),
    "a typo": ("checkpoint.predicton_type", "epsilon", ["unknown", "Did you mean 'prediction_type'?"]),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options(name, single):
    key, value, words = WRONG_OPTIONS[name]
    file, config = single("sd1")
    with pytest.raises(UsageError) as caught:
        open_checkpoint(file, config=config, options={key: value})
    assert all(word in str(caught.value) for word in words)


def test_an_option_overrules_the_configuration_given(single):
    file, config = single("sd1")
    opened = open_checkpoint(file, config=config, options={"checkpoint.prediction_type": "v_prediction"})
    assert opened.config("scheduler", "scheduler_config.json")["prediction_type"] == "v_prediction"
    assert json.loads((config / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    assert source_digests(opened) == source_digests(open_checkpoint(file, config=config))


def test_a_configuration_that_does_not_fit(single, tmp_path):
    file, config = single("sd1")
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        open_checkpoint(file, config=tmp_path)
    with pytest.raises(UsageError, match=r"--config .* goes with a single file"):
        open_checkpoint("emoji", config=config)
    with pytest.raises(UsageError, match=r"--set checkpoint\.prediction_type goes with a single file"):
        open_checkpoint("emoji", options={"checkpoint.prediction_type": "epsilon"})
