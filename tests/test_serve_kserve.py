"""The Open Inference Protocol with Triton's own client, as it is."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import requests
from serving import serving

from intaglio import __version__
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.serve_errors import BadRequest
from intaglio.runtimes.serve_kserve_tensors import (
    INPUTS,
    MOST_JSON_NUMBERS,
    OUTPUTS,
    check_json,
    from_bytes,
    parsed,
    values_of,
)

client = pytest.importorskip("tritonclient.http")
TYPES = {"BYTES": np.object_, "INT64": np.int64, "FP32": np.float32}
QUICK = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 5}
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["x"]}
STEPS = {"name": "num_inference_steps", "datatype": "INT64", "shape": [1], "data": [2]}


@pytest.fixture(scope="module")
def server(tiny_artifact):
    flags = ("--backend", "openvino", "--threads", "1")
    with serving(f"tiny={tiny_artifact.folder}", f"two words={tiny_artifact.folder}", flags=flags) as running:
        yield running


@pytest.fixture
def triton(server):
    with client.InferenceServerClient(server.url.removeprefix("http://")) as found:
        yield found


def inputs_of(binary=True, **values):
    found = []
    for spec in INPUTS:
        if spec.name in values:
            value = values[spec.name]
            array = np.array([value.encode() if isinstance(value, str) else value], TYPES[spec.datatype])
            tensor = client.InferInput(spec.name, [1], spec.datatype)
            found.append(tensor.set_data_from_numpy(array, binary_data=binary))
    return found


def post(server, body, path="/v2/models/tiny/infer", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return requests.post(server.url + path, data=data, headers=headers, timeout=60)


def test_health_and_metadata(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.get_server_metadata()["version"] == __version__
    for name in ("tiny", "two words"):
        assert triton.is_model_ready(name)
        assert triton.is_model_ready(name, "1")
        assert triton.get_model_metadata(name) == triton.get_model_metadata(name, "1")
        assert triton.get_model_metadata(name)["name"] == name
    assert not triton.is_model_ready("nope")
    assert not triton.is_model_ready("tiny", "2")
    index = triton.get_model_repository_index()
    assert [(model["name"], model["state"]) for model in index] == [("tiny", "READY"), ("two words", "READY")]


def test_the_configuration_is_one_of_tritons_and_agrees_with_the_metadata(triton):
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

    config, metadata = triton.get_model_config("tiny"), triton.get_model_metadata("tiny")
    message = ParseDict(config, ModelConfig())  # which refuses fields that it does not know
    assert (message.name, message.backend, message.max_batch_size) == ("tiny", "intaglio", 0)
    for key, tensors in (("input", message.input), ("output", message.output)):
        assert [(tensor.name, list(tensor.dims)) for tensor in tensors] == [
            (tensor["name"], tensor["shape"]) for tensor in metadata[f"{key}s"]
        ]
        for tensor, said in zip(tensors, metadata[f"{key}s"], strict=True):
            word = DataType.Name(tensor.data_type).removeprefix("TYPE_")
            assert {"STRING": "BYTES"}.get(word, word) == said["datatype"]
    assert [tensor.name for tensor in message.input if not tensor.optional] == ["prompt"]


@pytest.mark.parametrize("name", ["tiny", "two words"])
@pytest.mark.parametrize("binary", [True, False])
def test_pictures_are_those_of_the_pipeline(triton, tiny_artifact, name, binary):
    values = {**QUICK, "guidance_scale": 4.5, "negative_prompt": "blue", "scheduler": "euler"}
    wanted = load(tiny_artifact.folder, backend="openvino", threads=1)("red 红", count=2, **values).images
    result = triton.infer(name, inputs_of(binary, prompt="red 红", num_images_per_prompt=2, **values), request_id="7")
    image = result.as_numpy("image")
    assert (image.dtype, image.shape) == (np.uint8, (2, 64, 64, 3))
    assert np.abs(image.astype(int) - np.stack([np.asarray(one) for one in wanted])).max() <= 1
    assert result.as_numpy("seed").tolist() == [5, 6]
    facts = result.get_response()
    assert (facts["id"], facts["model_name"], facts["model_version"]) == ("7", name, "1")
    for binary_output in (True, False):
        asked = [client.InferRequestedOutput("image", binary_data=binary_output)]
        again = triton.infer(name, inputs_of(binary, prompt="red 红", **values), outputs=asked, model_version="1")
        assert np.array_equal(again.as_numpy("image"), image[:1])
        assert again.as_numpy("seed") is None


def test_everything_in_the_metadata_is_taken_and_given(triton):
    metadata = triton.get_model_metadata("tiny")
    values = {"BYTES": "euler", "INT64": 64, "FP32": 2.0}
    given = {tensor["name"]: values[tensor["datatype"]] for tensor in metadata["inputs"]}
    result = triton.infer("tiny", inputs_of(**{**given, "num_images_per_prompt": 1, "num_inference_steps": 1}))
    for tensor in metadata["outputs"]:
        found = result.as_numpy(tensor["name"])
        assert len(found.shape) == len(tensor["shape"])
        assert all(said in (-1, size) for said, size in zip(tensor["shape"], found.shape, strict=True))
        assert result.get_output(tensor["name"])["datatype"] == tensor["datatype"]


def test_what_is_not_given_is_the_models_own(server):
    answer = post(server, {"inputs": [PROMPT, STEPS], "outputs": [{"name": "seed"}, {"name": "image"}]})
    first, second = answer.json()["outputs"]
    assert (first["name"], second["name"]) == ("seed", "image")
    assert second["shape"] == [1, 64, 64, 3]
    assert len(second["data"]) == 64 * 64 * 3
    assert "id" not in answer.json()
    assert "inference-header-content-length" not in answer.headers


def test_warnings_are_in_the_answer(triton):
    result = triton.infer("tiny", inputs_of(prompt="a red heart " * 20, **QUICK))
    assert "token" in result.get_response()["parameters"]["warnings"]
    assert "parameters" not in triton.infer("tiny", inputs_of(prompt="x", **QUICK)).get_response()


def array(*values, dtype=np.int64):
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("name", "datatype", "values", "words"),
    [
        ("nope", "INT64", array(1), ("'nope' is unknown", "guidance_scale")),
        ("seed", "INT32", array(1, dtype=np.int32), ("'seed'", "INT32", "INT64")),
        ("seed", "INT64", array(1, 2), ("'seed'", "shape [2]", "[1]")),
        ("seed", "INT64", array([1]), ("'seed'", "shape [1, 1]")),
        ("seed", "INT64", array(-1), ("'seed'", "0 or more")),
        ("width", "INT64", array(0), ("'width'", "1 or more")),
        ("width", "INT64", array(65), ("65",)),
        ("num_inference_steps", "INT64", array(151), ("num_inference_steps", "150")),
        ("num_images_per_prompt", "INT64", array(11), ("num_images_per_prompt", "10")),
        ("guidance_scale", "FP64", array(1, dtype=np.float64), ("'guidance_scale'", "FP32")),
        ("guidance_scale", "FP32", array(np.nan, dtype=np.float32), ("'guidance_scale'", "finite")),
        ("scheduler", "BYTES", array(b"heun", dtype=np.object_), ("heun",)),
        ("negative_prompt", "BYTES", array(b"\xff", dtype=np.object_), ("'negative_prompt'", "UTF-8")),
        ("prompt", "BYTES", array(b"a", dtype=np.object_), ("'prompt' is there twice",)),
    ],
)
def test_an_input_that_is_not_as_the_metadata_have_it_is_refused_by_name(triton, name, datatype, values, words):
    tensor = client.InferInput(name, list(values.shape), datatype).set_data_from_numpy(values)
    with pytest.raises(client.InferenceServerException) as caught:
        triton.infer("tiny", [*inputs_of(prompt="x"), tensor])
    assert caught.value.status() == "400"
    assert all(word in caught.value.message() for word in words), caught.value.message()


def test_what_the_client_can_ask_for_and_the_server_cannot_do(triton, server):
    prompt = inputs_of(prompt="x", **QUICK)
    shared = client.InferInput("prompt", [1], "BYTES")
    shared.set_shared_memory("region", 8)
    for inputs, options, status, word in (
        ([], {}, "400", "'prompt' is missing"),
        (inputs_of(seed=1), {}, "400", "'prompt' is missing"),
        ([shared], {}, "400", "inputs.0.parameters.shared_memory"),
        (prompt, {"priority": 3}, "400", "parameters.priority"),
        (prompt, {"timeout": 3}, "400", "parameters.timeout"),
        (prompt, {"sequence_id": 3}, "400", "parameters.sequence_"),
        (prompt, {"parameters": {"mine": 1}}, "400", "parameters.mine"),
        (prompt, {"outputs": [client.InferRequestedOutput("nope")]}, "400", "output 'nope' is unknown"),
        (prompt, {"outputs": [client.InferRequestedOutput("image")] * 2}, "400", "'image' is there twice"),
        (prompt, {"outputs": [client.InferRequestedOutput("image", class_count=3)]}, "400", "classification"),
        (prompt, {"request_compression_algorithm": "gzip"}, "415", "Content-Encoding"),
        (prompt, {"model_version": "2"}, "404", "no such version"),
    ):
        with pytest.raises(client.InferenceServerException) as caught:
            triton.infer("tiny", inputs, **options)
        assert caught.value.status() == status, options
        assert word in caught.value.message()
    for call in (triton.get_model_metadata, triton.get_model_config, lambda name: triton.infer(name, prompt)):
        with pytest.raises(client.InferenceServerException, match="model 'nope' is unknown"):
            call("nope")
    for call in (triton.load_model, triton.unload_model):
        with pytest.raises(client.InferenceServerException, match=r"404|415"):
            call("tiny")
    assert triton.is_model_ready("tiny")


def test_a_response_may_be_asked_for_packed_and_comes_as_it_is(triton):
    result = triton.infer("tiny", inputs_of(prompt="x", **QUICK), response_compression_algorithm="gzip")
    assert result.as_numpy("image").shape == (1, 64, 64, 3)


def tensor(**changes):
    return {**PROMPT, **changes}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        ([], "object"),
        ({}, "inputs"),
        ({"inputs": []}, "'prompt' is missing"),
        ({"inputs": [3]}, "inputs.0"),
        ({"inputs": [tensor(data=[])]}, "'prompt'"),
        ({"inputs": [tensor(data=[3])]}, "'prompt'"),
        ({"inputs": [tensor(data=["a", "b"])]}, "'prompt'"),
        ({"inputs": [tensor(data=[["a"]])]}, "'prompt'"),
        ({"inputs": [{**PROMPT, "data": None}]}, "'prompt'"),
        ({"inputs": [tensor(parameters={"binary_data_size": 5})]}, "'prompt'"),
        ({"inputs": [tensor(shape=["1"])]}, "inputs.0.shape.0"),
        ({"inputs": [tensor(shape=[-1])]}, "'prompt'"),
        ({"inputs": [tensor(shape=[1] * 9)]}, "inputs.0.shape"),
        ({"inputs": [PROMPT] * 101}, "inputs"),
        ({"inputs": [PROMPT, {**STEPS, "data": [True]}]}, "'num_inference_steps'"),
        ({"inputs": [PROMPT, {**STEPS, "data": [2.0]}]}, "'num_inference_steps'"),
        ({"inputs": [PROMPT, {**STEPS, "data": [2**63]}]}, "'num_inference_steps'"),
        ({"inputs": [PROMPT, {**STEPS, "data": [10**400]}]}, "num"),
        ({"inputs": [PROMPT], "extra": 1}, "'extra'"),
        ({"inputs": [PROMPT], "id": 7}, "id"),
        ({"inputs": [tensor(data=["x" * 20_000])]}, "prompt"),
    ],
)
def test_a_wrong_body_is_refused(server, body, word):
    answer = post(server, body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}
    assert word in answer.json()["error"], answer.text


def behind(size, data, **changes):
    """A body with bytes behind the JSON, and its header."""
    record = {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [record, STEPS]}).encode()
    return head + data, {"Inference_Header_Content_Length": str(len(head)), "Content_Type": "application/octet-stream"}


@pytest.mark.parametrize(
    ("size", "data", "word"),
    [
        (6, b"\2\0\0\0hi!", "belong to no input"),
        (7, b"\2\0\0\0hi", "binary_data_size is more"),
        (2**62, b"\2\0\0\0hi", "binary_data_size is more"),
        (-1, b"", "binary_data_size"),
        (3, b"\2\0\0", "'prompt'"),
        (6, b"\3\0\0\0hi", "'prompt'"),
        (6, b"\xff\xff\xff\xffhi", "'prompt'"),
        (12, b"\2\0\0\0hi" * 2, "'prompt'"),
        (0, b"", "'prompt'"),
    ],
)
def test_bytes_that_are_not_what_the_json_says_are_refused(server, size, data, word):
    body, headers = behind(size, data)
    answer = post(server, body, **headers)
    assert answer.status_code == 400
    assert word in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "999999", "9" * 5000, "\u0663", ""])
def test_a_wrong_header_length_is_refused(server, length):
    body, headers = behind(6, b"\2\0\0\0hi")
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        parsed(body, length)
    if length.isascii():
        assert post(server, body, **{**headers, "Inference_Header_Content_Length": length}).status_code == 400


def test_a_body_of_another_kind_is_refused(server):
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert post(server, b"{}", Content_Type=kind).status_code == 415
    assert post(server, b"{}", "/v2/repository/index", Content_Type="application/octet-stream").status_code == 415
    assert post(server, {"ready": True}, "/v2/repository/index").json()[0]["name"] == "tiny"
    assert post(server, {"all": True}, "/v2/repository/index").status_code == 400
    assert requests.get(f"{server.url}/v2/nothing", timeout=9).json() == {"error": "there is no such path here"}


def test_a_json_answer_is_bounded_before_anything_is_made(server):
    side = int((MOST_JSON_NUMBERS / 3) ** 0.5)
    check_json({"image": False}, side * side * 3)
    check_json({"image": True}, 10**9)
    check_json({"seed": False}, 10**9)
    size = {"datatype": "INT64", "shape": [1], "data": [1024]}
    count = {**size, "name": "num_images_per_prompt", "data": [2]}
    answer = post(server, {"inputs": [PROMPT, STEPS, {**size, "name": "width"}, {**size, "name": "height"}, count]})
    assert answer.status_code == 400
    assert "binary_data" in answer.json()["error"]


def test_numbers_are_read_as_they_are_written():
    for value in (0, 1, 2**63 - 1, -(2**63)):
        assert from_bytes("INT64", struct.pack("<q", value)) == value
    assert from_bytes("FP32", struct.pack("<f", 7.5)) == 7.5
    assert from_bytes("INT64", b"\0" * 7) is None
    request, rest = parsed(json.dumps({"inputs": [PROMPT, STEPS]}).encode(), None)
    assert values_of(request, rest) == {"prompt": "x", "num_inference_steps": 2}
    assert len({spec.name for spec in (*INPUTS, *OUTPUTS)}) == len(INPUTS) + len(OUTPUTS) - 1  # seed is both
