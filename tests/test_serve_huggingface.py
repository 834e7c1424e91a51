"""Hugging Face's inference API with its own client, as it is."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import requests
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from serving import serving

from intaglio.runtimes.infotext import parse
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES
from intaglio.runtimes.serve_huggingface import NotAcceptable, answer_of, form_of
from intaglio.runtimes.serve_ticket import Picture

QUICK = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 5}
FITTING = {word: name for word, name in DIFFUSERS_CLASSES.items() if name not in ("pndm", "flow_match_euler")}


@pytest.fixture(scope="module")
def server(tiny_artifact):
    flags = ("--backend", "openvino", "--threads", "1")
    with serving(f"tiny={tiny_artifact.folder}", f"other={tiny_artifact.folder}", flags=flags) as running:
        yield running


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The other tests' word to this library that it may reach nobody would hold for our own server, too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def ask(server, body, path="/generate", **headers):
    return requests.post(server.url + path, json=body, headers=headers, timeout=60)


@pytest.mark.parametrize("token", [None, "hf_anything"])
@pytest.mark.parametrize(
    ("path", "model"),
    [("", "tiny"), ("/", "tiny"), ("/generate", "tiny"), ("/models/tiny", "tiny"), ("/models/other", "other")],
)
def test_the_client_takes_any_of_these_addresses(server, path, model, token):
    client = InferenceClient(token=token)
    image = client.text_to_image("red heart", model=server.url + path, **QUICK)
    assert image.size == (64, 64)
    found = parse(image.info["parameters"])
    assert (found["model"], found["seed"], found["prompt"]) == (model, 5, "red heart")


def test_the_picture_is_that_of_the_pipeline(server, tiny_artifact):
    parameters = {**QUICK, "guidance_scale": 4.5, "negative_prompt": "blue", "scheduler": "euler"}
    image = InferenceClient(model=server.url).text_to_image("red heart", **parameters)
    wanted = load(tiny_artifact.folder, backend="openvino", threads=1)("red heart", **parameters).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).max() <= 1


@pytest.mark.parametrize("word", FITTING)
def test_schedulers_by_the_names_of_diffusers(server, word):
    image = InferenceClient(model=server.url).text_to_image("x", scheduler=word, **QUICK)
    assert parse(image.info["parameters"])["scheduler"] == FITTING[word]


def test_the_client_says_what_was_wrong(server):
    client = InferenceClient(model=f"{server.url}/models/tiny")
    for parameters, word in (
        ({"num_inference_steps": 151}, "num_inference_steps: 151 is more than the 150 allowed here"),
        ({"extra_body": {"strength": 0.5}}, "'parameters.strength' is not a field"),
        ({"extra_body": {"num_images_per_prompt": 2}}, "parameters.num_images_per_prompt"),
        ({"scheduler": "Heun"}, "Heun"),
        ({"width": 65}, "65"),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale"),
    ):
        known = {name: value for name, value in parameters.items() if name != "true_cfg_scale"}
        extra = {"extra_body": {"true_cfg_scale": 3.0}} if "true_cfg_scale" in parameters else {}
        with pytest.raises(HfHubHTTPError, match=word) as caught:
            client.text_to_image("x", **known, **extra)
        assert caught.value.response.status_code == 400
    with pytest.raises(HfHubHTTPError, match="model 'nope' is unknown") as caught:
        InferenceClient(model=f"{server.url}/models/nope").text_to_image("x")
    assert caught.value.response.status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": ["x"]}, "inputs"),
        ({"inputs": "x" * 20_000}, "prompt"),
        ({"inputs": "x", "options": {"wait_for_model": True}}, "options"),
        ({"inputs": "x", "parameters": {"seed": -1}}, "parameters.seed"),
        ({"inputs": "x", "parameters": {"width": "64"}}, "parameters.width"),
        ({"inputs": "x", "parameters": {"width": 0}}, "parameters.width"),
        ({"inputs": "x", "parameters": {"target_size": {"width": 64}}}, "parameters.target_size"),
        ({"inputs": "x", "parameters": {"width": 2**31, "height": 2**31}}, "pixels"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate", "/models/tiny"])
def test_what_cannot_be_done_is_refused_by_name(server, body, field, path):
    answer = ask(server, body, path)
    assert answer.status_code == 400
    assert field in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("image/png", "png"),
        ("*/*", "png"),
        ("image/*;q=0.5", "png"),
        ("image/jpeg", "jpeg"),
        ("image/webp, image/png;q=0.5", "webp"),
        ("image/png;q=0, */*", "jpeg"),
        ("text/html, image/webp;q=0.1", "webp"),
        ("IMAGE/WEBP".lower(), "webp"),
        ("", "png"),
    ],
)
def test_the_form_is_the_one_that_is_asked_for(server, accept, form):
    answer = ask(server, {"inputs": "x", "parameters": QUICK}, Accept=accept)
    assert answer.headers["content-type"] == f"image/{form}"
    assert answer.headers["x-seed"] == "5"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == (form.upper(), (64, 64))


@pytest.mark.parametrize(
    "accept", ["text/html", "application/json", "image/gif", "image/png;q=0", "nonsense", "a" * 9000]
)
def test_no_other_form_is_given(server, accept):
    answer = ask(server, {"inputs": "x", "parameters": QUICK}, Accept=accept)
    assert answer.status_code == 406
    assert "image/png, image/jpeg, image/webp" in answer.json()["error"]
    with pytest.raises(NotAcceptable):
        form_of(accept)


def test_a_random_seed_is_told(server):
    quick = {name: value for name, value in QUICK.items() if name != "seed"}
    answers = [ask(server, {"inputs": "x", "parameters": quick}) for _ in range(3)]
    assert len({answer.headers["x-seed"] for answer in answers}) == 3
    again = ask(server, {"inputs": "x", "parameters": {**quick, "seed": int(answers[0].headers["x-seed"])}})
    assert again.content == answers[0].content


def test_warnings_come_as_a_header(server):
    words = "a red heart " * 20  # more tokens than the text encoder reads
    answer = ask(server, {"inputs": words, "parameters": QUICK})
    (note,) = json.loads(answer.headers["x-warnings"])
    assert "token" in note
    assert "x-warnings" not in ask(server, {"inputs": "x", "parameters": QUICK}).headers
    long = Picture(b"", 1, (1, 1), {}, {}, ("红" * 9000, "b\nc"))
    header = answer_of(long, "png").headers["x-warnings"]
    assert json.loads(header) == ["红" * 500 + "…", "b\nc"]
    assert header.isascii()
