"""Textual inversions built into tokenizers and text encoders, against diffusers' ``load_textual_inversion``."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from intaglio.exporters.capture import capture, prepare
from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.textual_inversion import parse_embedding, read_embeddings
from intaglio.exporters.tokenizer_files import copy_tokenizer
from intaglio.profiles.errors import CheckpointError, Unsupported, UsageError
from intaglio.runtimes.text import PromptTokenizer

TOLERANCE = 1e-6  # of the text encoder's states, relative L2; measured 0
PROMPTS = (
    "a photo of <cat-toy> on the moon",
    "<cat-toy>",
    "a<cat-toy>,<cat-toy> and <CAT-TOY> (red)",
    "<cat-toy> <gta> <cat-toy>",
    "a red heart",
    "<cat-toy_1> cat-toy <cat",
)
SINGLE, SEVERAL = (64,), (4, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.CHECKPOINTS["sd"](tmp_path_factory.mktemp("inversion") / "sd")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny.CHECKPOINTS["sdxl"](tmp_path_factory.mktemp("inversion") / "sdxl")


def widths(sdxl):
    return [json.loads((sdxl / f"text_encoder{s}/config.json").read_text())["hidden_size"] for s in ("", "_2")]


def vectors(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def learned(tmp_path, tensors, name="learned_embeds.safetensors"):
    save_file(tensors, tmp_path / name)
    return tmp_path / name


def inversions_of(folder, texts):
    checkpoint = open_checkpoint(folder)
    exporter, _ = family_of(checkpoint)
    parts = {c.source: checkpoint.weights(c.source) for c in exporter.components(checkpoint)}
    classes = {part: checkpoint.component_class(part) for part in parts}
    return read_embeddings([parse_embedding(str(text)) for text in texts], parts, classes, folder), parts


def extended(folder, inversions, target):
    """Both tokenizers of the checkpoint as an artifact gets them."""
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).exists():
            copy_tokenizer(folder / name, target / name)
    inversions.extend_tokenizers(target)
    return target


def sd_pipeline(folder):
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def theirs(pipe, prompt, tokenizer="tokenizer"):
    """Ids as diffusers' pipelines make them: rewritten prompt, padded."""
    tokenizer = getattr(pipe, tokenizer)
    text = pipe.maybe_convert_prompt(prompt, tokenizer)
    length = tokenizer.model_max_length
    return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


@pytest.mark.parametrize("shape", [SINGLE, (1, 64), SEVERAL], ids=["vector", "row", "rows"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_diffusers(prompt, shape, folder, tmp_path):
    files = [
        learned(tmp_path, {"<cat-toy>": vectors(shape)}, "cat.safetensors"),
        learned(tmp_path, {"<gta>": vectors((2, 64), 1)}, "gta.safetensors"),
    ]
    pipe = sd_pipeline(folder)
    for file in files:
        pipe.load_textual_inversion(file)
    inversions, _ = inversions_of(folder, files)
    tokenizer = PromptTokenizer(extended(folder, inversions, tmp_path / "artifact") / "tokenizer")
    expected = theirs(pipe, prompt)
    if "CAT" in prompt and shape == SEVERAL:
        # diffusers rewrites the exact spelling alone; tokens of one vector are found in any, and ours all are.
        expected = theirs(pipe, prompt.replace("CAT-TOY", "cat-toy"))
    np.testing.assert_array_equal(tokenizer([prompt]).ids, expected)


def test_the_text_encoder_gets_the_vectors_as_in_diffusers(folder, tmp_path):
    import torch

    file = learned(tmp_path, {"<cat-toy>": vectors(SEVERAL)})
    pipe = sd_pipeline(folder)
    pipe.load_textual_inversion(file)
    inversions, parts = inversions_of(folder, [file])
    checkpoint = open_checkpoint(folder)
    component = next(c for c in family_of(checkpoint)[0].components(checkpoint) if c.name == "text_encoder")
    config = inversions.config("text_encoder", checkpoint.config("text_encoder"))
    assert config["vocab_size"] == checkpoint.config("text_encoder")["vocab_size"] + 4
    weights = inversions.apply("text_encoder", parts["text_encoder"])
    model = component.model(config)
    state = {n: torch.from_numpy(p.read()) for n, p in weights.renamed(component.rename).items()}
    model.load_state_dict(state, strict=True)
    reference = component.reference(checkpoint)
    inversions.extend_model("text_encoder", reference)
    ids = torch.from_numpy(theirs(pipe, "a <cat-toy> on the moon"))
    assert ids.max() == config["vocab_size"] - 1
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
        for ours in (model.eval()(ids), reference.eval()(ids)):
            assert (ours.last_hidden_state - expected).norm() <= TOLERANCE * expected.norm()
        state["embeddings.token_embedding.weight"][-1] *= 1.01
        model.load_state_dict(state)
        assert (model(ids).last_hidden_state - expected).norm() > 100 * TOLERANCE * expected.norm()


def test_capture_takes_the_larger_vocabulary(folder, tmp_path):
    inversions, parts = inversions_of(folder, [learned(tmp_path, {"<cat-toy>": vectors(SEVERAL)})])
    checkpoint = open_checkpoint(folder)
    exporter, profile = family_of(checkpoint)
    component = next(c for c in exporter.components(checkpoint) if c.name == "text_encoder")
    config = inversions.config("text_encoder", checkpoint.config("text_encoder"))
    weights = inversions.apply("text_encoder", parts["text_encoder"])
    model = capture(prepare(component, config, weights, exporter.shapes(checkpoint, profile)))
    table = next(v for n, v in model.graph.initializers.items() if n.endswith("token_embedding.weight"))
    np.testing.assert_array_equal(table.const_value.numpy()[-4:], vectors(SEVERAL))


def test_sdxl_has_vectors_for_both_encoders(sdxl, tmp_path):
    import diffusers
    import torch

    one, two = widths(sdxl)
    tensors = {"clip_l": vectors((3, one)), "clip_g": vectors((3, two), 1)}
    file = learned(tmp_path, tensors, "style.safetensors")
    inversions, parts = inversions_of(sdxl, [f"{file}:<style>"])
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipe, "text_encoder" + suffix), getattr(pipe, "tokenizer" + suffix)
        pipe.load_textual_inversion(
            {"<style>": torch.from_numpy(tensors[key])}, text_encoder=encoder, tokenizer=tokenizer
        )
    artifact = extended(sdxl, inversions, tmp_path / "artifact")
    prompt = "a photo in <style>, light"
    for suffix in ("", "_2"):
        ours = PromptTokenizer(artifact / f"tokenizer{suffix}")([prompt]).ids
        np.testing.assert_array_equal(ours, theirs(pipe, prompt, "tokenizer" + suffix))
        part = "text_encoder" + suffix
        table = next(p for n, p in inversions.apply(part, parts[part]).items() if n.endswith("token_embedding.weight"))
        expected = getattr(pipe, part).get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(table.read(), expected)
        assert table.shape == expected.shape
    configs = {
        part: json.loads((sdxl / part / "config.json").read_text()) for part in ("text_encoder", "text_encoder_2")
    }
    (remark,) = inversions.remarks(configs)  # the outdated eos_token_id, as SDXL's own has
    assert remark.startswith("text_encoder_2 takes its pooled state at the largest id")


def test_the_webuis_files_are_called_as_the_file(folder, tmp_path):
    file = learned(tmp_path, {"emb_params": vectors(SEVERAL)}, "easynegative.safetensors")
    assert inversions_of(folder, [file])[0].provenance()[0] == {
        "file": "easynegative.safetensors",
        "sha256": parse_embedding(str(file)).digest,
        "token": "easynegative",
        "vectors": 4,
    }
    inversions, _ = inversions_of(folder, [f"{file}:<bad>"])
    assert inversions.items[0].token == "<bad>"
    tokenizer = PromptTokenizer(extended(folder, inversions, tmp_path / "artifact") / "tokenizer")
    size = open_checkpoint(folder).config("text_encoder")["vocab_size"]
    assert tokenizer(["<bad>"]).ids[0, 1:5].tolist() == list(range(size, size + 4))


def test_triggers_within_triggers_keep_apart(folder, tmp_path):
    files = [
        learned(tmp_path, {name: vectors((n, 64))}, f"{i}.safetensors")
        for i, (name, n) in enumerate([("toy", 2), ("<toy>", 3), ("518", 2), ("toys", 1)])
    ]
    inversions, _ = inversions_of(folder, files)
    tokenizer = PromptTokenizer(extended(folder, inversions, tmp_path / "artifact") / "tokenizer")
    size = open_checkpoint(folder).config("text_encoder")["vocab_size"]
    assert tokenizer.content_ids("toy") == [size, size + 1]
    assert tokenizer.content_ids("<toy>") == [size + 2, size + 3, size + 4]
    assert tokenizer.content_ids("<toy>518toys") == [size + i for i in (2, 3, 4, 5, 6, 7)]


REFUSALS = {
    "width": ({"<cat>": vectors((2, 32))}, CheckpointError, "is 32 wide, text_encoder takes 64"),
    "sdxl": ({"clip_l": vectors((2, 64)), "clip_g": vectors((2, 48))}, CheckpointError, "text_encoder_2, which is not"),
    "taken": ({"cat</w>": vectors((64,))}, CheckpointError, r"'cat</w>' is in the vocabulary of .*; add :TOKEN"),
    "special": ({"endoftext": vectors((64,))}, CheckpointError, r"a part of '<\|endoftext\|>'"),
    "private": ({"\ue001": vectors((64,))}, UsageError, "private use"),
    "several tensors": ({"<a>": vectors((64,)), "<b>": vectors((64,))}, CheckpointError, "is no textual inversion"),
    "shape": ({"<a>": vectors((1, 2, 64))}, CheckpointError, r"has shape \[1, 2, 64\], a textual inversion"),
    "dtype": ({"<a>": vectors((64,)).astype(np.int32)}, Unsupported, "is I32; allowed"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(name, folder, tmp_path):
    tensors, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        inversions_of(folder, [learned(tmp_path, tensors)])


def test_other_refusals(folder, sdxl, tmp_path):
    file = learned(tmp_path, {"<cat>": vectors((2, 64))})
    one, two = widths(sdxl)
    narrow = learned(tmp_path, {"<cat>": vectors((2, one))}, "narrow.safetensors")
    uneven = learned(tmp_path, {"clip_l": vectors((2, one)), "clip_g": vectors((3, two))}, "uneven.safetensors")
    left = learned(tmp_path, {"clip_l": vectors((2, one))}, "left.safetensors")
    (tmp_path / "learned_embeds.bin").write_bytes(b"\x80\x02")
    for checkpoint, texts, error, message in (
        (folder, [file, file], UsageError, "'<cat>' is given twice"),
        (folder, [tmp_path / "learned_embeds.bin"], CheckpointError, "is a pickle"),
        (folder, [f"{file}:"], UsageError, "the token is empty"),
        (folder, [tmp_path / "none.safetensors"], UsageError, "no such file"),
        (sdxl, [narrow], CheckpointError, "vectors for one text encoder"),
        (sdxl, [left], CheckpointError, "has no vectors for text_encoder_2"),
        (sdxl, [uneven], CheckpointError, "different numbers of vectors"),
    ):
        with pytest.raises(error, match=message):
            inversions_of(checkpoint, texts)


def test_text_encoders_that_are_not_clips_are_refused(tmp_path):
    flux = tiny.CHECKPOINTS["flux"](tmp_path / "flux")
    with pytest.raises(Unsupported, match=r"this checkpoint has text_encoder_2 \(T5EncoderModel\)"):
        inversions_of(flux, [learned(tmp_path, {"<cat>": vectors((32,))})])


def test_a_matrix_of_another_size_than_the_vocabulary_is_refused(folder, tmp_path):
    import transformers

    copy = shutil.copytree(folder, tmp_path / "copy")
    model = transformers.CLIPTextModel.from_pretrained(copy / "text_encoder")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(copy / "text_encoder")
    with pytest.raises(CheckpointError, match=r"tokens, its text encoder \d+; none can be added"):
        inversions_of(copy, [learned(tmp_path, {"<cat>": vectors((64,))})])
