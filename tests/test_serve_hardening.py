"""What a client could do to others with one request that is well formed or nearly so, and what is refused of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import serve_stub
from test_serve_guard import KEY, PICTURES, call

from intaglio.runtimes.batch import Batch, Places, checked
from intaglio.runtimes.batch_file import Line, RequestFile, parsed
from intaglio.runtimes.batch_folder import Folder
from intaglio.runtimes.sampling import Parameter
from intaglio.runtimes.serve_app import make_app
from intaglio.runtimes.serve_errors import BadRequest
from intaglio.runtimes.serve_hub import Hub, HubSettings
from intaglio.runtimes.serve_huggingface import NotAcceptable, form_of
from intaglio.runtimes.serve_keys import Keys
from intaglio.runtimes.serve_limits import LIMITS, Limits
from intaglio.runtimes.serve_model import ModelSettings
from intaglio.runtimes.serve_room import Room, Wish, check_further

FORM = "multipart/form-data; boundary=x"
HUGE = 10**400  # a float has no room for it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return serve_stub.hollow(tmp_path_factory.mktemp("hollow") / "one")


@pytest.fixture
def made(folder, tmp_path):
    """A function: the application with a key, and a hub whose worker is not started."""
    (tmp_path / "keys").write_text(f"me:{KEY}\n")

    def make(**limits):
        hub = Hub([ModelSettings(name="one", folder=folder, backend="null")], HubSettings(queue=4))
        return make_app(hub, keys=Keys(tmp_path / "keys"), limits=Limits(limits))

    return make


def upload(size, kind="text/plain"):
    head = 'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    named = f'Content-Disposition: form-data; name="file"; filename="f"\r\nContent-Type: {kind}\r\n\r\n'
    return f"--x\r\n{head}{named}".encode() + b"x" * size + b"\r\n--x--\r\n"


# How long a body is.


def test_two_lengths_of_one_body_are_refused(made):
    """The server would believe one of them, and whoever stands before it the other."""
    guard = made()
    for path, kind in ((PICTURES, "application/json"), ("/v1/files", FORM), ("/v2/models/one/infer", FORM)):
        for length in ("0", "1", "5"):
            lengths = {"content_length": length, "transfer_encoding": "chunked"}
            answer = call(guard, "POST", path, chunks=[b"{}"], content_type=kind, **lengths)
            assert (answer.status, "exclude each other" in answer.body.decode()) == (400, True), (path, length)
            assert answer.taken == 0


def test_a_form_is_longer_than_other_bodies_only_where_forms_are_taken(made):
    guard = made(body_bytes=1000, batch_bytes=10_000)
    assert [guard.size_limit(path, "multipart/form-data") for path in ("/v1/files", PICTURES)] == [
        "batch_bytes", "body_bytes",
    ]  # fmt: skip


def test_a_file_is_no_longer_than_room_was_kept_for_it(made):
    assert call(made(), "POST", "/v1/files", upload(300), content_type=FORM).status == 200
    short = call(made(), "POST", "/v1/files", upload(300), content_type=FORM, content_length="200")
    assert (short.status, "300 bytes came" in short.body.decode()) == (413, True)
    chunked = call(made(batch_held_bytes=500), "POST", "/v1/files", chunks=[upload(300)], content_type=FORM)
    assert (chunked.status, "files kept" in chunked.body.decode()) == (413, True)
    for length in ("9" * 5000, "1" * 19):
        assert call(made(), "POST", PICTURES, b"{}", content_length=length).status == 400


def test_a_form_in_no_charset_is_the_clients_mistake(made):
    guard = made()
    for charset in ("undefined", "no-such-charset", "idna"):
        answer = call(guard, "POST", "/v1/files", upload(5), content_type=f"{FORM}; charset={charset}")
        assert answer.status in (200, 400), (charset, answer.body)


# What is in it.


def test_names_that_come_twice_are_refused_everywhere(made):
    guard = made()
    bodies = {
        PICTURES: b'{"prompt": "x", "prompt": "y"}',
        "/generate": b'{"inputs": "x", "parameters": {"seed": 1, "seed": 2}}',
        "/sdapi/v1/txt2img": b'{"prompt": "x", "steps": 1, "steps": 2}',
        "/ui/pictures": b'{"prompt": "x", "n": 1, "n": 1}',
        "/v1/batches": b'{"metadata": {"a": "x", "a": "y"}}',
        "/v2/models/one/infer": b'{"id": "1", "id": "2", "inputs": []}',
    }
    for path, body in bodies.items():
        answer = call(guard, "POST", path, body)
        assert (answer.status, "is there twice in one object" in answer.body.decode()) == (400, True), path
    body = b'{"id": "1", "id": "2", "inputs": []}'
    kind = {"content_type": "application/octet-stream", "inference_header_content_length": str(len(body))}
    assert b"there twice" in call(guard, "POST", "/v2/models/one/infer", body + b"....", **kind).body
    with pytest.raises(BadRequest, match="'seed' is there twice"):
        parsed(b'{"custom_id": "x", "body": {"prompt": "x", "seed": 1, "seed": 2}}')


def test_queries_that_nothing_reads_are_refused_by_name(made):
    guard = made()

    def ask(path, query, body=b"{}"):
        async def asked(scope, receive, send):
            await guard({**scope, "query_string": query}, receive, send)

        return call(asked, "POST", path, body)

    for path in (PICTURES, "/generate", "/sdapi/v1/txt2img", "/v1/batches", "/v2/models/one/infer", "/sdapi/v1/skip"):
        answer = ask(path, b"stepps=3&x=%ff")
        assert (answer.status, "'stepps' is not a query parameter" in answer.body.decode()) == (400, True), path
    assert "inputs" in ask("/v2/models/one/infer", b"version=1").body.decode(), "which that route has"


@pytest.mark.parametrize(
    "fields",
    [
        {"num_inference_steps": HUGE}, {"n": HUGE}, {"guidance_scale": HUGE}, {"seed": HUGE},
        {"parameters": {"clip_skip": HUGE}}, {"parameters": {"prompt_weights": HUGE}},
    ],
)  # fmt: skip
def test_numbers_of_hundreds_of_digits_are_refused_in_few_words(made, fields):
    answer = call(made(), "POST", PICTURES, json.dumps({"prompt": "x", **fields}).encode())
    assert answer.status == 400, answer.body
    if "parameters" not in fields:
        assert len(answer.body) < 600, answer.body
    body = json.dumps({"prompt": "x", "width": 10**4000, "height": 10**4000}).encode()
    answer = call(made(), "POST", "/sdapi/v1/txt2img", body)
    assert (answer.status, "a number of 8001 digits is more than" in answer.body.decode()) == (400, True)


def test_further_prompts_are_no_longer_than_prompts_and_numbers_are_not_true():
    kinds = {"prompt_2": str, "clip_skip": int, "strength": float, "prompt_weights": bool}
    declared = {name: Parameter(kind=kind, default=None, help="") for name, kind in kinds.items()}
    sampler, limits = SimpleNamespace(all_parameters=declared), Limits({"prompt_bytes": 6})

    def check(**parameters):
        check_further(Wish(prompt="x", parameters=parameters), sampler, limits)

    check(prompt_2="éäö", clip_skip=1, strength=0.5, prompt_weights=True)
    for name, value in {"prompt_2": "éäöx", "clip_skip": True, "strength": False}.items():
        with pytest.raises(BadRequest) as caught:
            check(**{name: value})
        assert caught.value.param == f"parameters.{name}"
        assert caught.value.param in caught.value.message


def test_seeds_that_have_no_room_are_refused_before_the_work(made):
    one = {"shape": [1], "datatype": "INT64"}
    guard, prompt = made(), {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}

    def infer(seed, count):
        inputs = [
            prompt,
            {**one, "name": "seed", "data": [seed]},
            {**one, "name": "num_images_per_prompt", "data": [count]},
        ]
        body = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        return call(guard, "POST", "/v2/models/one/infer", body, waits=0.05)

    assert infer(2**63 - 1, 1).status == infer(2**63 - 2, 2).status == 499  # taken; then this client goes away
    refused = infer(2**63 - 1, 2)
    assert (refused.status, "seed" in refused.body.decode()) == (400, True)
    body = json.dumps({"prompt": "x", "seed": 2**64 - 1, "n": 2}).encode()
    refused = call(guard, "POST", PICTURES, body, waits=0.05)
    assert (refused.status, refused.json["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize(
    "accept",
    [" " * 32_000, "image/png" + " " * 32_000 + "x", "a/b;" + " ;" * 16_000, ",".join(["*/*"] * 8_000), "a" * 32_000],
)
def test_a_long_accept_holds_up_nobody(accept):
    begin = time.process_time()
    with contextlib.suppress(NotAcceptable):
        form_of(accept)
    assert time.process_time() - begin < 0.1


def test_connections_over_the_limit_are_refused_but_health_is_told(made):
    guard = made(connections=5)
    guard.connections = lambda: 6
    assert call(guard, "GET", "/v1/models").status == LIMITS["connections"].error.status == 503
    for method in ("GET", "HEAD"):
        assert call(guard, method, "/health", authorization=None).status == 200


def test_head_says_what_get_says(made):
    guard = made()
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        got, told = (call(guard, method, path) for method in ("GET", "HEAD"))
        assert (told.status, told.headers["content-type"]) == (got.status, got.headers["content-type"])
        assert "HEAD" in call(guard, "DELETE", path).headers["allow"]
        assert {"get", "head"} <= call(guard, "GET", "/openapi.json").json["paths"][path].keys()


# Lines of batches.


def test_a_line_for_too_many_pictures_fails_by_itself(tmp_path, folder):
    lines = [{"custom_id": ident, "body": {"prompt": "x", "n": n}} for ident, n in (("many", 50_000), ("two", 2))]
    (tmp_path / "f").write_text("\n".join(map(json.dumps, lines)))
    requests = RequestFile(tmp_path / "f", Limits({"pictures": 2}))
    with contextlib.closing(requests):
        hub = Hub([ModelSettings(name="one", folder=folder, backend="null")])
        assert Folder(tmp_path / "out", requests, hub, force=False).names == {
            "many": [], "two": ["two-0.png", "two-1.png"],
        }  # fmt: skip


def test_a_defect_in_a_line_is_that_lines_alone(folder, caplog, monkeypatch):
    room = Room(Hub([ModelSettings(name="one", folder=folder, backend="null")]), Limits())
    secret, ends = "a secret teapot", {}

    def order(request, wish):
        raise KeyError(secret) if wish.prompt == "bad" else BadRequest("as it must be")

    async def deliver(ended):
        ends[ended.line.custom_id] = ended.error

    monkeypatch.setattr(room, "order", order)
    file = SimpleNamespace(body=lambda line: {"prompt": line.custom_id})
    lines = [Line(k, name, 0, 0) for k, name in enumerate(("good", "bad", "also good"))]
    asyncio.run(Batch(room, Places(1), file, lines, ident=lambda line, body: line.custom_id, deliver=deliver).run())
    assert {name: error.status for name, error in ends.items()} == {"good": 400, "bad": 500, "also good": 400}
    assert "request bad: KeyError" in caplog.text
    assert secret not in ends["bad"].message + caplog.text
    assert checked({"prompt": "x"}, 3).seed == 3
