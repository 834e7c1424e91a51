"""No code from models: hostile checkpoints and artifacts are refused by name, and nothing of them runs or leads out.

The rows are in ``hostile.py`` and ``hostile_artifacts.py``; ``hostile_watch.py`` reads all of them in one process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hostile
import hostile_artifacts
import hostile_watch
import pytest

from intaglio.exporters.untrusted import check_index, check_keys
from intaglio.profiles.errors import ArtifactError, CheckpointError
from intaglio.profiles.paths import check_tree, is_inside, link_roots
from intaglio.profiles.strict import DEEPEST, LARGEST, parse_json

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the watch needs inotify, pipes and links")
HOUSE = Path(__file__).resolve().parent.parent
ROWS = {**hostile.ROWS, **{f"artifact, {name}": row for name, row in hostile_artifacts.ROWS.items()}}
FEWEST = 25
SECONDS = 300  # of the process; it takes 27, most of it imports and the sound rows


@pytest.fixture(scope="module")
def told(tiny_checkpoint, tiny_artifact, tmp_path_factory):
    """What happened to every row, by its name."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "cache").mkdir()
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": str(HOUSE / "tests")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, hostile_watch.__file__, place / "work", tiny_checkpoint, tiny_artifact.folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_many():
    refused = [name for name, row in ROWS.items() if row.words]
    assert len(refused) >= FEWEST
    assert len(refused) < len(ROWS), "what is harmless is taken"


@pytest.mark.parametrize("name", hostile_watch.SELF_TEST)
def test_the_watch_notices_what_it_must(name, told):
    """Done by hand: a pickle, an import, a read, a write, a process and a wait. Else silence proves nothing."""
    seen = f"{told[name]['kind']} {told[name]['events']}"
    assert all(word in seen for word in hostile_watch.SELF_TEST[name].words), seen


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.words])
def test_it_is_refused_by_name_and_nothing_of_it_ran(name, told):
    result = told[name]
    assert result["kind"] == "refused", result
    assert all(word in result["message"] for word in ROWS[name].words), result["message"]
    assert result["events"] == []


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.words])
def test_what_is_harmless_is_read_and_the_rest_left_alone(name, told):
    """Code and pickles that nothing names are not opened; a cache's links to its blobs are followed."""
    assert told[name]["kind"] is None, told[name]["message"]
    assert told[name]["events"] == []


def test_the_command_line_says_it_in_one_line(tiny_checkpoint, copy_artifact, refused, tmp_path):
    folder = copy_artifact(tiny_checkpoint, "checkpoint")
    hostile.edit("unet/config.json", auto_map={"AutoModel": "x.Y"})(hostile.Ground(folder, folder, tmp_path))
    refused("build", folder, "-o", tmp_path / "artifact", words=["unet/config.json", "'auto_map'", "no code"])
    refused("plan", folder, words=["unet/config.json", "'auto_map'"])


# --- the rules ------------------------------------------------------------------------------------------------------

NAMES = {
    **dict.fromkeys(("a", "a/b.bin", "..a", "a..b/c", ".hidden", "a b", "ü"), True),
    **dict.fromkeys(("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "./a"), False),
    **dict.fromkeys(("a\\b", "..\\a", "C:", "C:a", "\\\\host\\a", "a\nb", "a\0", "a\u202eb", "a\udce9"), False),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_a_folder_on_any_system(name):
    assert is_inside(name) is NAMES[name]


def test_what_is_no_text_is_no_name():
    assert not any(map(is_inside, (None, 3, ["a"], {"a": 1}, b"a")))


def test_only_a_snapshot_of_the_cache_has_blobs(tmp_path):
    for name, is_cache in {
        "hub/models--a--b/snapshots/c": True,
        "hub/models--a--b/snapshots/c/vae": True,
        "snapshots/c": False,
        "home/snapshots/c": False,
        "models--a--b/c": False,
    }.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        assert (len(link_roots(tmp_path / name)) == 2) is is_cache, name


def test_names_that_cannot_be_printed_are_refused(tmp_path):
    (tmp_path / "a\nb").touch()
    with pytest.raises(ArtifactError, match=r"'.*a\\nb' has a name that cannot be printed"):
        check_tree(tmp_path, ArtifactError)


def test_a_circle_of_links_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert check_tree(tmp_path, ArtifactError, link_roots(tmp_path)) == [tmp_path / "a/file"]


def nested(depth):
    return b"[" * depth + b"]" * depth


def test_json_at_its_limits():
    assert parse_json(nested(DEEPEST + 1)) is not None
    assert parse_json(b'"' + b"x" * (LARGEST - 2) + b'"')
    for data in (nested(DEEPEST + 2), nested(100_000), b'"' + b"x" * (LARGEST - 1) + b'"'):
        with pytest.raises(ValueError, match=r"nested deeper|bytes, allowed"):
            parse_json(data)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e999]", '{"a": -1e999}', "\ufeff1", "{", ""])
def test_what_is_not_json(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text.encode())


KEYS = (
    *("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "_target_", "trust_remote_code"),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "_experts_implementation"),
    *("use_kernels", "kernel_config", "class_path", "__class__", "__init__"),
)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_refused_at_every_depth_and_its_absence_is_not(key, tmp_path):
    for config in ({key: "x"}, {"a": {key: "x"}}, {"a": [1, [{"b": {key: True}}]]}, {key: {}}):
        with pytest.raises(CheckpointError, match=re.escape(f"{key!r} = ")):
            check_keys(config, tmp_path)
    for config in ({key: None}, {key: False}, {"a": key}, {f"x{key}y": "x"}):
        check_keys(config, tmp_path)


REAL = {  # as published checkpoints have them
    "safety_checker": [
        ["stable_diffusion", "StableDiffusionSafetyChecker"],
        ["diffusers", "StableDiffusionSafetyChecker"],
    ],
    "feature_extractor": [["transformers", "CLIPFeatureExtractor"], ["transformers", "CLIPImageProcessor"]],
    "image_encoder": [
        ["transformers", "CLIPVisionModelWithProjection"],
        ["transformers", "SiglipVisionModel"],
        [None] * 2,
    ],
    "tokenizer": [
        ["transformers", name]
        for name in ("CLIPTokenizer", "Qwen2TokenizerFast", "PixtralProcessor", "TokenizersBackend")
    ],
    "tokenizer_3": [["transformers", "T5TokenizerFast"]],
    "text_encoder_2": [["transformers", "T5EncoderModel"], ["transformers", "CLIPTextModelWithProjection"]],
    "text_encoder": [["transformers", name] for name in ("Mistral3ForConditionalGeneration", "Qwen3ForCausalLM")],
    "transformer": [["diffusers", "QwenImageTransformer2DModel"]],
    "scheduler": [["diffusers", name] for name in ("PNDMScheduler", "FlowMatchEulerDiscreteScheduler")],
    "requires_safety_checker": [True],
    "force_zeros_for_empty_prompt": [False],
}


def test_parts_of_published_checkpoints_are_taken(tmp_path):
    for part, values in REAL.items():
        for value in values:
            check_index({"_class_name": "StableDiffusionPipeline", part: value}, tmp_path)


# --- what the documentation promises --------------------------------------------------------------------------------


def test_every_test_that_the_security_document_names_is_there():
    text = (HOUSE / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 20
    for file, function in named:
        assert (HOUSE / file).is_file(), file
        assert not function or f"def {function}(" in (HOUSE / file).read_text(encoding="utf-8"), f"{file}::{function}"


def test_every_promise_has_its_test():
    text = (HOUSE / "SECURITY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| P\d+ \|.*$", text, re.MULTILINE)
    assert len(rows) >= 15
    assert [row for row in rows if "`tests/" not in row] == []
