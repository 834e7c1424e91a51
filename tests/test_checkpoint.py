"""Where a checkpoint comes from and what it says of itself: Hugging Face's cache, variants, licences, missing parts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from intaglio.exporters import checkpoint_index, hub
from intaglio.exporters.checkpoint import open_checkpoint, source_digests
from intaglio.exporters.licence import licence_of
from intaglio.exporters.parts import pretrained
from intaglio.profiles.errors import CheckpointError, MissingDependency

COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}


@pytest.fixture
def cached(tiny_checkpoint, monkeypatch, tmp_path):
    """``someone/tiny`` in a cache as huggingface_hub lays it out, at two revisions; links to blobs, as there."""
    import huggingface_hub

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--tiny"
    (repository / "blobs").mkdir(parents=True)
    files = sorted(p for p in tiny_checkpoint.rglob("*") if p.is_file())
    for number, file in enumerate(files):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
    for revision, commit in COMMITS.items():
        for number, file in enumerate(files):
            link = repository / "snapshots" / commit / file.relative_to(tiny_checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(repository / "blobs" / f"{number:040x}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return cache


@pytest.mark.parametrize(
    ("name", "revision"),
    [("someone/tiny", "main"), ("someone/tiny@v1.0", "v1.0"), (f"someone/tiny@{COMMITS['v1.0']}", "v1.0")],
)
def test_a_repository_is_read_in_place_from_the_cache(name, revision, cached, tiny_checkpoint):
    opened = open_checkpoint(name)
    assert opened.folder == cached / "models--someone--tiny/snapshots" / COMMITS[revision]
    assert opened.name == "someone/tiny"
    assert source_digests(opened) == source_digests(open_checkpoint(tiny_checkpoint))
    wanted = open_checkpoint(tiny_checkpoint).weights("unet")
    found = opened.weights("unet")
    assert all(np.array_equal(found[name].read(), wanted[name].read()) for name in list(wanted)[:5])


def test_the_torch_engine_finds_a_cached_repository(cached, tiny_checkpoint):
    digest = checkpoint_index.digest_of({**source_digests(open_checkpoint("someone/tiny"))})
    provenance = {"digest": digest, "checkpoint": "someone/tiny", "options": {}, "family": "sd"}
    assert checkpoint_index.find_checkpoint(provenance).name in ("someone/tiny", tiny_checkpoint.name)
    with pytest.raises(CheckpointError, match=r"needs the checkpoint 'someone/else'; add --checkpoint FOLDER"):
        checkpoint_index.find_checkpoint({**provenance, "digest": "0", "checkpoint": "someone/else"})


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("someone/else", "hf download someone/else"),
        ("someone/tiny@v9", "hf download someone/tiny --revision v9"),
        ("someone/else@refs/pr/3", "hf download someone/else --revision refs/pr/3"),
    ],
)
def test_what_is_not_cached_is_not_fetched_but_said(name, command, cached, monkeypatch):
    import socket

    def no_network(*arguments, **options):
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    assert str(caught.value).endswith(f"fetch it: {command}")
    assert str(cached) in str(caught.value)


def test_a_local_folder_of_that_name_wins(cached, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "someone/tiny")
    assert str(open_checkpoint("someone/tiny").folder) == "someone/tiny"


def test_without_huggingface_hub_a_name_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub, "installed", lambda module: False)
    with pytest.raises(MissingDependency, match=r"someone/tiny is not a folder, and huggingface_hub is not installed"):
        open_checkpoint("someone/tiny")


@pytest.mark.parametrize("name", ["/absolute/path", "a/b/c", "./here", "just-a-name", "~/x", "a//b"])
def test_paths_are_not_names_of_repositories(name):
    assert not hub.is_repository(name)


# --- what it says of itself -----------------------------------------------------------------------------------------

CARDS = {
    "---\nlicense: apache-2.0\n---\n# A model": "apache-2.0",
    '---\ntags: [a]\nlicense: "creativeml-openrail-m"\nextra: 1\n---\n': "creativeml-openrail-m",
    "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n---\n": "flux-1-dev (LICENSE.md)",
    "---\r\nlicense: openrail++\r\nlanguage:\r\n- en\r\n---\r\n": "openrail++",
    "---\nlicense:\n- mit\n- cc-by-4.0\nlanguage: en\n---\n": "mit, cc-by-4.0",
    "---\nlicense: [mit, apache-2.0]\n---\n": "mit, apache-2.0",
    "---\ntags: [x]\n---\nlicense: not here": None,
    "# No front matter\n\nlicense: mit": None,
    "": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_licence_from_the_model_card(card, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == CARDS[card]


def test_licence_from_a_file_where_the_card_says_nothing(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE.md").write_text("\n\n# CreativeML   Open RAIL-M\n\ntext\n")
    assert licence_of(tmp_path) == "CreativeML Open RAIL-M"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == "mit"


def test_the_embedded_checkpoint_states_its_licence():
    assert open_checkpoint("emoji").licence == "mit"


# --- missing parts --------------------------------------------------------------------------------------------------


@pytest.fixture
def incomplete(tiny_checkpoint, copy_artifact):
    """A checkpoint whose index names a T5 encoder that is not there."""
    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("ask", [lambda c: c.config("text_encoder_3"), lambda c: c.weights("text_encoder_3")])
def test_a_component_that_is_named_and_missing_is_said_by_name(ask, incomplete):
    with pytest.raises(CheckpointError) as caught:
        ask(open_checkpoint(incomplete))
    assert str(caught.value) == (
        f"{incomplete / 'model_index.json'} names text_encoder_3 (T5EncoderModel), but {incomplete / 'text_encoder_3'} "
        "is missing; the checkpoint is incomplete, fetch it again; to build without it add --set sd3.t5=false"
    )


def test_a_component_without_weights_says_which_file(incomplete):
    (incomplete / "text_encoder_3").mkdir()
    (incomplete / "text_encoder_3/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"text_encoder_3/.*model\.safetensors is missing"):
        open_checkpoint(incomplete).weights("text_encoder_3")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pickled_component_says_how_to_convert_it(part, tiny_checkpoint, copy_artifact, intaglio, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    (weights,) = (folder / part).glob("*.safetensors")
    pickled = weights.with_name("pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin")
    torch.save(load_file(weights), pickled)
    before = {name: p.read() for name, p in open_checkpoint(tiny_checkpoint).weights(part).items()}
    weights.unlink()
    code, _, err = intaglio("build", folder, "-o", tmp_path / "out")
    assert code == 2
    command = err.rstrip().partition("intaglio convert ")[2].split()
    assert command == [str(pickled), "-o", str(weights)]
    assert intaglio("convert", *command)[0] == 0
    after = open_checkpoint(folder).weights(part)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name].read(), value) for name, value in before.items())


# --- variants and shards --------------------------------------------------------------------------------------------


def sharded(folder, names, index):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    half = len(tensors) // 2
    parts = (dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:]))
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def renamed(folder, name):
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / name)


SAVED = {  # how diffusers and transformers name what `save_pretrained(variant="fp16")` writes, whole and in shards
    "variant": ("unet", lambda f: renamed(f, "diffusion_pytorch_model.fp16.safetensors")),
    "shards": (
        "unet",
        lambda f: sharded(
            f,
            [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.json",
        ),
    ),
    "shards of a variant": (
        "unet",
        lambda f: sharded(
            f,
            [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
    ),
    "text encoder's variant": ("text_encoder", lambda f: renamed(f, "model.fp16.safetensors")),
    "text encoder's shards of a variant": (
        "text_encoder",
        lambda f: sharded(
            f, [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)], "model.safetensors.index.fp16.json"
        ),
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_variants_and_shards_are_read_like_the_library_does(name, tiny_checkpoint, copy_artifact):
    part, change = SAVED[name]
    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    change(folder / part)
    checkpoint = open_checkpoint(folder)
    found, wanted = checkpoint.weights(part), open_checkpoint(tiny_checkpoint).weights(part)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key].read(), wanted[key].read()) for key in wanted)
    library, kind = checkpoint.index[part]
    reference = dict(pretrained(library, kind, part)(checkpoint).named_parameters())
    stored = {key.removeprefix("text_model."): p for key, p in found.items()}
    assert all(np.array_equal(stored[key].read(), value.detach().numpy()) for key, value in reference.items())


def test_a_file_that_was_written_anew_is_read_anew(tiny_checkpoint, copy_artifact):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = copy_artifact(tiny_checkpoint, "anew")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    before = len(open_checkpoint(folder).weights("unet"))
    save_file({**load_file(file), "more": np.zeros(3, np.float32)}, file)
    assert len(open_checkpoint(folder).weights("unet")) == before + 1
