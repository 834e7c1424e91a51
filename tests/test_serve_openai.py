"""The server to the unmodified ``openai`` package: pictures, streams, models, and its typed exceptions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import threading
import time
import typing

import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse, Model
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming, ImageGenerateParamsStreaming
from PIL import Image
from serving import serving

KEY = "a-key-of-the-test-openai"
PROMPT = "red heart"
QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0}
OWN_SIZE = (128, 128)  # of the embedded checkpoint
PLACES = 4  # that wait in the queue; two pictures are under way
LONG = {"num_inference_steps": 150}  # with guidance: some 8 s a picture, and 16 s for those that wait
SAME = 1  # of 255, where a picture shares calls with others: engines may sum in another order; measured 0
FREED_SECONDS = 3.0  # of a request of 2 steps after one that was given up; measured 0.15 to 0.18


@pytest.fixture(scope="module")
def server(emoji_artifact, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"test:{KEY}\n")
    flags = ("--backend", "openvino", "--threads", "1", "--api-key-file", keys, "--queue", PLACES, "--concurrency", 2)
    with serving(f"emoji={emoji_artifact.folder}", flags=flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def generate(client, **fields):
    """A response that the SDK's model has validated, which the SDK itself does not do."""
    fields = {"prompt": PROMPT, "extra_body": {**QUICK, **fields.pop("extra", {})}, **fields}
    raw = client.images.with_raw_response.generate(**fields)
    return ImagesResponse.model_validate_json(raw.text)


def decoded(text):
    return base64.b64decode(text, validate=True)


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def pixels(data):
    return np.asarray(opened(data).convert("RGB"), dtype=np.float64)


def apart(first, second):
    """The largest difference of two pictures' values, of 255."""
    return float(np.abs(pixels(decoded(first)) - pixels(decoded(second))).max())


def test_n_pictures_are_those_of_the_following_seeds_alone(client):
    together = generate(client, n=3, extra={"seed": 41, "num_inference_steps": 2})
    alone = [generate(client, extra={"seed": 41 + k, "num_inference_steps": 2}) for k in range(3)]
    assert [image.seed for image in together.data] == [41, 42, 43]
    for one, image in zip(alone, together.data, strict=True):
        assert apart(one.data[0].b64_json, image.b64_json) <= SAME
        assert opened(decoded(one.data[0].b64_json)).text == opened(decoded(image.b64_json)).text
    assert len({image.b64_json for image in together.data}) == 3
    assert {opened(decoded(image.b64_json)).size for image in together.data} == {OWN_SIZE}
    assert abs(together.created - time.time()) < 60
    assert together.background == "opaque"


def test_without_a_seed_every_picture_is_another_and_says_which_it_was(client):
    first, second = generate(client), generate(client)
    assert first.data[0].b64_json != second.data[0].b64_json
    again = generate(client, extra={"seed": first.data[0].seed})
    assert again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize(
    ("size", "expected"), [("auto", OWN_SIZE), (None, OWN_SIZE), ("96x160", (96, 160)), ("160x96", (160, 96))]
)
def test_size(client, size, expected):
    response = generate(client, size=size)
    assert response.size == f"{expected[0]}x{expected[1]}"
    assert opened(decoded(response.data[0].b64_json)).size == expected


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_output_format_in_base64_and_as_a_data_url(client, form):
    response = generate(client, output_format=form, extra={"seed": 5})
    data = decoded(response.data[0].b64_json)
    assert opened(data).format == form.upper()
    assert response.output_format == form
    linked = generate(client, output_format=form, response_format="url", extra={"seed": 5})
    head, _, text = linked.data[0].url.partition(",")
    assert head == f"data:image/{form};base64"
    assert decoded(text) == data
    assert linked.data[0].b64_json is None


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_a_smaller_output_compression_gives_fewer_bytes(client, form):
    sizes = [
        len(decoded(generate(client, output_format=form, output_compression=q, extra={"seed": 5}).data[0].b64_json))
        for q in (0, 50, 100)
    ]
    assert sizes == sorted(set(sizes)), sizes


@pytest.mark.parametrize("shown", [0, 1, 2, 3])
def test_partial_images_come_closer_to_the_picture(client, shown):
    extra = {"num_inference_steps": 6, "seed": 7}
    with client.images.generate(
        prompt=PROMPT, stream=True, partial_images=shown, output_format="png", extra_body=extra
    ) as stream:
        events = [event.to_dict() for event in stream]
    partial = [ImageGenPartialImageEvent.model_validate(event) for event in events[:-1]]
    final = ImageGenCompletedEvent.model_validate(events[-1])
    assert [event.partial_image_index for event in partial] == list(range(shown))
    assert final.size == "128x128"
    picture = pixels(decoded(final.b64_json))
    assert picture.shape[:2] == OWN_SIZE[::-1]
    views = [pixels(decoded(event.b64_json)) for event in partial]
    assert all(view.shape == picture.shape for view in views)
    far = [float(np.abs(view - picture).mean()) for view in views]
    assert far == sorted(far, reverse=True)
    assert all(a > b for a, b in itertools.pairwise(far)), far
    plain = generate(client, extra={"num_inference_steps": 6, "seed": 7, "guidance_scale": None})
    assert apart(plain.data[0].b64_json, final.b64_json) <= SAME


def test_a_stream_of_several_has_every_picture(client):
    with client.images.generate(prompt=PROMPT, n=2, stream=True, extra_body={**QUICK, "seed": 5}) as stream:
        events = [ImageGenCompletedEvent.model_validate(event.to_dict()) for event in stream]
    plain = generate(client, n=2, extra={"seed": 5})
    by_seed = {event.seed: event.b64_json for event in events}
    assert all(apart(by_seed[image.seed], image.b64_json) <= SAME for image in plain.data)


# What works of the SDK's parameters; None stands for every value, and what is not here is refused by name.
SUPPORTED = {
    "prompt": None,
    "model": {"emoji"},
    "n": None,
    "size": {"auto", "256x256"},
    "response_format": None,
    "output_format": {"png", "webp", "jpeg"},
    "output_compression": None,
    "background": {"opaque", "auto"},
    "quality": {"auto"},
    "stream": None,
    "partial_images": None,
}
# A value for those whose type does not list any, and what it needs beside it.
VALUES = {
    "prompt": ["x"],
    "n": [1],
    "output_compression": [50],
    "partial_images": [1],
    "frame_count": [3],
    "frame_duration_ms": [100],
    "safety_identifier": ["x"],
    "user": ["x"],
    "svg": [{"model": "x"}],
}
BESIDE = {"output_compression": {"output_format": "webp"}, "partial_images": {"stream": True}}


def literals(kind):
    """The values that a type lists, at any depth."""
    if typing.get_origin(kind) is typing.Literal:
        return [v for v in typing.get_args(kind) if v is not None]
    return [value for part in typing.get_args(kind) for value in literals(part)]


def sdk_parameters():
    """Every field of the SDK's parameters with every value its type lists."""
    fields = {}
    for kind in (ImageGenerateParamsNonStreaming, ImageGenerateParamsStreaming):
        for name, annotation in typing.get_type_hints(kind, include_extras=False).items():
            fields.setdefault(name, []).extend(literals(annotation) or VALUES.get(name, []))
    fields["model"] += ["emoji"]
    fields["size"] = [size for size in fields["size"] if size in ("auto", "256x256", "1792x1024")]
    return [(name, value) for name, values in fields.items() for value in dict.fromkeys(map(json.dumps, values))]


def test_every_field_of_the_sdk_has_a_value_to_try():
    fields = {**ImageGenerateParamsNonStreaming.__annotations__, **ImageGenerateParamsStreaming.__annotations__}
    assert set(fields) == {name for name, _ in sdk_parameters()}
    assert SUPPORTED.keys() <= fields.keys()


@pytest.mark.parametrize(("name", "value"), sdk_parameters())
def test_every_parameter_of_the_sdk_works_or_is_refused_by_name(client, name, value):
    value = json.loads(value)
    fields = {"prompt": PROMPT, "extra_body": QUICK, **BESIDE.get(name, {}), name: value}
    if name in SUPPORTED and (SUPPORTED[name] is None or value in SUPPORTED[name]):
        answer = client.images.generate(**fields)
        sizes = {event.size for event in answer} if fields.get("stream") else {answer.size}
        assert sizes == {"256x256" if value == "256x256" else "128x128"}
        return
    with pytest.raises(openai.NotFoundError if name == "model" else openai.BadRequestError) as caught:
        client.images.generate(**fields)
    assert caught.value.param == name
    assert name in caught.value.message


WRONG = {
    "unknown": ({"no_such_field": 1}, "no_such_field"),
    "several": ({"size": "128x128", "seed": 1, "scheduler": "none"}, "scheduler"),
    "size": ({"size": "130x128"}, "size"),
    "size, no number": ({"size": "large"}, "size"),
    "pixels": ({"size": "99999x99999"}, "size"),
    "n": ({"n": 0}, "n"),
    "n, more than allowed": ({"n": 11}, "n"),
    "n, no number": ({"n": "2"}, "n"),
    "steps": ({"num_inference_steps": 151}, "num_inference_steps"),
    "seed": ({"seed": -1}, "seed"),
    "guidance": ({"guidance_scale": "high"}, "guidance_scale"),
    "true guidance": ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
    "prompt": ({"prompt": "x" * 16_385}, "prompt"),
    "prompt, no text": ({"prompt": ["x"]}, "prompt"),
    "negative prompt": ({"negative_prompt": 5}, "negative_prompt"),
    "family's parameter": ({"parameters": {"no_such": 1}}, "parameters"),
    "parameter with a field": ({"parameters": {"seed": 1}}, "parameters"),
    "parameter of Python": ({"parameters": {"self": 1}}, "parameters"),
    "compression of png": ({"output_compression": 5}, "output_compression"),
    "compression": ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
    "previews without stream": ({"partial_images": 1}, "partial_images"),
    "previews": ({"partial_images": 4, "stream": True}, "partial_images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_a_bad_request_that_names_the_field(client, case):
    body, name = WRONG[case]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, extra_body={**QUICK, **body})
    error = caught.value
    assert error.param == name
    assert error.type == "invalid_request_error"
    assert error.code == "invalid_request"
    assert error.request_id == error.body["request_id"]


def test_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["emoji"]
    found = Model.model_validate_json(client.models.with_raw_response.retrieve("emoji").text)
    assert found.to_dict() == listed[0].to_dict()
    assert found.owned_by == "intaglio"
    assert found.intaglio["family"] == "sd"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert "emoji" in caught.value.message


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        generate(client, model="emojy")
    assert caught.value.param == "model"
    assert "did you mean" in caught.value.message.lower()


@pytest.mark.parametrize(
    "call", [lambda c: generate(c), lambda c: c.models.list(), lambda c: c.models.retrieve("emoji")]
)
def test_a_wrong_key_is_an_authentication_error_that_does_not_repeat_it(server, call):
    wrong = "another-key-of-somebody"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key=wrong, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as caught:
        call(stranger)
    assert wrong not in str(caught.value)
    assert caught.value.type == "authentication_error"


def test_a_full_queue_is_a_rate_limit_error_that_says_when(client):
    taken = client.images.generate(prompt=PROMPT, n=PLACES, stream=True, extra_body=LONG)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            generate(client, n=3)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
    finally:
        taken.close()
    assert generate(client, n=3).data


def test_a_request_that_timed_out_gives_its_place_back(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt=PROMPT, n=PLACES, extra_body=LONG)
    begin = time.monotonic()
    generate(client, extra={"num_inference_steps": 2})
    assert time.monotonic() - begin < FREED_SECONDS


@pytest.mark.parametrize("shown", [0, 3])
def test_a_stream_that_is_left_gives_its_place_back(client, shown):
    stream = client.images.generate(prompt=PROMPT, n=PLACES, stream=True, partial_images=shown, extra_body=LONG)
    stream.close()
    begin = time.monotonic()
    generate(client, extra={"num_inference_steps": 2})
    assert time.monotonic() - begin < FREED_SECONDS


def test_two_clients_at_once_get_what_each_gets_alone(server, client):
    alone = [generate(client, extra={"seed": seed, "num_inference_steps": 2}).data[0].b64_json for seed in (1, 2)]
    found = {}

    def ask(seed):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as own:
            found[seed] = generate(own, extra={"seed": seed, "num_inference_steps": 2}).data[0].b64_json

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert apart(found[1], alone[0]) <= SAME
    assert apart(found[2], alone[1]) <= SAME


def test_a_stream_whose_worker_dies_raises_what_happened(server, client):
    import psutil

    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=LONG)
    next(stream)  # before its first step the next worker would take it, and nothing would be lost
    for child in psutil.Process(server.process.pid).children():
        child.kill()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "worker_lost"
    assert "can be sent again" in caught.value.message
    assert generate(client).data


def test_a_stream_whose_client_left_before_its_first_event_ends_its_request():
    from types import SimpleNamespace

    from intaglio.runtimes.serve_stream import EventStream

    cancelled, begun = [], []

    async def events():
        begun.append(True)
        yield b""

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError  # what uvicorn raises where nobody listens any more

    async def run():
        stream = EventStream(SimpleNamespace(cancel=lambda: cancelled.append(True)), events())
        with contextlib.suppress(Exception):
            await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(run())
    assert cancelled
    assert not begun
