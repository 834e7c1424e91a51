"""The embedded checkpoint: small, complete, licensed, reproducible, and it draws what a prompt names."""

from __future__ import annotations

import json

import pytest

from intaglio.bench.retrieval import LANGUAGES, ranks, share_within
from intaglio.exporters.checkpoint import embedded_folder
from intaglio.exporters.emoji_data import NPM_PACKAGES, read_training_set
from intaglio.runtimes.pipeline import load

LARGEST = 40_000_000  # bytes of safetensors; measured 38.8 MB
NAMES, STEPS = 9, 20  # a language: 18 names in all
# Share of right emoji among the five nearest training images; `make evidence emoji` measures 200 names a language.
TOP5 = {"en": 0.60, "zh": 0.50}


@pytest.fixture(scope="module")
def folder():
    return embedded_folder("emoji")


@pytest.fixture(scope="module")
def data(folder):
    return read_training_set(folder)


def test_it_is_a_diffusers_folder_of_at_most_40_mb_in_half_precision(folder):
    from safetensors import safe_open

    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    assert parts == {
        "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    }
    files = sorted(folder.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= LARGEST
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_its_training_set_is_the_commonest_emoji_with_both_names(data):
    assert len(data.names) >= 400
    assert len(data.names) == len(data.images)
    assert all(row["en"] and row["zh"] for row in data.names)
    keys = [[int(part, 16) for part in row["hexcode"].split("-")] for row in data.names]
    assert keys == sorted(keys)
    assert {"red heart", "pizza", "cat face"} <= {row["en"] for row in data.names}


def test_licences_of_drawings_and_names_lie_beside_the_weights(folder):
    text = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for package in NPM_PACKAGES:
        assert package in text
    assert text.count("Permission is hereby granted") >= 2
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "make evidence emoji" in card


def test_every_training_image_is_nearest_to_itself(data):
    from PIL import Image

    for index in data.spread(20):
        assert data.rank(Image.fromarray(data.images[index].astype("uint8")), index) == 0


def test_names_are_drawn_recognisably(data, emoji_artifact):
    pipeline = load(emoji_artifact, backend="openvino")
    for language in LANGUAGES:
        found = [rank for _, rank, _ in ranks(pipeline, data, data.spread(NAMES), language, steps=STEPS)]
        print(language, found)
        assert share_within(found) >= TOP5[language], found


def test_captions_cover_both_languages_and_the_empty_prompt():
    import random

    from intaglio.exporters.emoji_data import Emoji, caption, icon_name

    one = Emoji(hexcode="2764", label="red heart", zh="红心", tags=("love", "red"), zh_tags=("心", "爱"), svg_body="")
    rng = random.Random(0)
    seen = {caption(one, rng) for _ in range(300)}
    assert {"", "red heart", "a red heart", "红心"} <= seen
    assert icon_name("men’s room") == "mens-room"
    assert icon_name("piñata") == "pinata"


def test_the_training_script_resumes_from_its_last_state(tmp_path):
    import torch

    from intaglio.exporters.emoji_train import Trainer

    def trainer():
        torch.manual_seed(0)
        return Trainer({"net": torch.nn.Linear(4, 4)}, tmp_path, minutes=1, peak_lr=1e-2)

    def advance(one, steps):
        for k in range(steps):
            x = torch.full((2, 4), float(k + one.step))
            one.update(one.modules["net"](x).square().mean())

    whole = trainer()
    advance(whole, 3)
    whole.save()
    resumed = trainer()
    assert resumed.step == 3
    torch.testing.assert_close(resumed.parameters, whole.parameters)
    torch.testing.assert_close(resumed.average, whole.average)
    assert resumed.elapsed > 0
    assert len(list(tmp_path.glob("state-*.safetensors"))) == 1
