"""What stands before every route: keys, names, limits that are checked first, and errors that say nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import time
from pathlib import Path

import pytest
import serve_stub

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.serve_app import PROTOCOLS, make_app
from intaglio.runtimes.serve_guard import OPEN, Keys
from intaglio.runtimes.serve_hub import Hub, HubSettings
from intaglio.runtimes.serve_limits import LIMITS, Limits
from intaglio.runtimes.serve_model import ModelSettings

KEY, OTHER = "canary-key-0123456789", "another-key-0123456789"
PROMPT = "canary prompt of a red heart"
HOST = "127.0.0.1:8000"
PICTURES = "/v1/images/generations"
IDENT = "[0-9a-f]{32}"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    serve_stub.findable()
    return serve_stub.hollow(tmp_path_factory.mktemp("canary-folder") / "one")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# of the tests\nme:{KEY}\n\nyou:{OTHER}\n")
    return file


@pytest.fixture
def made(folder, keys):
    """A function: the application with a key, and a hub whose worker is not started."""

    def make(*, key=True, hosts=("127.0.0.1", "[::1]"), **limits):
        hub = Hub([ModelSettings(name="one", folder=folder, backend="null")], HubSettings(queue=4))
        return make_app(hub, keys=Keys(keys if key else None), hosts=hosts, limits=Limits(limits))

    return make


class Answer:
    def __init__(self):
        self.status, self.headers, self.body, self.taken = None, {}, b"", 0

    @property
    def json(self):
        return json.loads(self.body)


def call(app, method, path, body=b"", *, chunks=None, waits=60, **headers):
    """One request, without a network: header names with ``_`` for ``-``; ``None`` leaves a usual one out.

    `chunks` come one after the other in the place of a body; a client waits so many seconds with the last one.
    """
    whole = {"host": HOST, "authorization": f"Bearer {KEY}"}
    if body or chunks is not None:
        whole["content_type"] = "application/json"
        whole.update({"transfer_encoding": "chunked"} if chunks is not None else {"content_length": str(len(body))})
    whole.update(headers)
    pairs = [(n.replace("_", "-").encode(), v.encode("latin-1")) for n, v in whole.items() if v is not None]
    answer, parts = Answer(), iter([body] if chunks is None else chunks)
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": pairs, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip

    async def receive():
        part = next(parts, None)
        if part is None:
            await asyncio.sleep(waits)
            return {"type": "http.disconnect"}
        answer.taken += len(part)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": part, "more_body": chunks is not None}

    async def send(message):
        if message["type"] == "http.response.start":
            assert answer.status is None
            answer.status = message["status"]
            answer.headers = {n.decode().lower(): v.decode() for n, v in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    return answer


def walked(routes):
    for route in routes:
        if hasattr(route, "original_router"):  # how newer versions of FastAPI keep included ones
            yield from walked(route.original_router.routes)
        elif getattr(route, "path", None):
            yield route


def places(guard):
    """(method, path) of every route, with something in the place of its parameters."""
    found = [
        (method, re.sub(r"{[^}]+}", "one", route.path))
        for route in walked(guard.app.routes)
        for method in sorted(route.methods or {"GET"})
    ]
    assert len(found) >= 4 + len(PROTOCOLS)
    return found


def test_every_route_but_health_needs_a_key_also_one_that_is_added_later(made):
    guard = made()

    @guard.app.get("/later")
    async def later():
        return {}

    others = [("GET", "/nowhere"), ("OPTIONS", PICTURES), ("TRACE", "/v1"), ("GET", "/health/"), ("GET", "/HEALTH")]
    open_ones = set()
    for method, path in [*places(guard), *others]:
        for authorization in (None, "", KEY, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY} {KEY}", f"Digest {KEY}"):
            answer = call(guard, method, path, authorization=authorization)
            if path in OPEN:
                assert answer.status != 401
                open_ones.add(path)
                continue
            assert answer.status == 401, (method, path, authorization)
            assert "Basic" in answer.headers["www-authenticate"]
            assert re.fullmatch(IDENT, answer.headers["x-request-id"])
    assert open_ones <= OPEN
    assert call(guard, "GET", "/later").status == 200
    assert len(OPEN) == 4


def test_a_key_is_taken_as_bearer_and_as_the_password_of_basic(made):
    guard = made()
    basic = base64.b64encode(f"anybody:{OTHER}".encode()).decode()
    broken = base64.b64encode(b"\xff\xfe:x").decode()
    for authorization in (f"Bearer {KEY}", f"bearer {OTHER}", f"Basic {basic}", f"basic {basic}"):
        assert call(guard, "GET", "/v1/models", authorization=authorization).status == 200
    for authorization in (f"Basic {KEY}", f"Basic {basic}=x", f"Basic {broken}", f"Basic {basic[:-8]}"):
        assert call(guard, "GET", "/v1/models", authorization=authorization).status == 401


KEY_FILES = {
    "short": ("me:too-short", "line 1: a key of 9 characters"),
    "empty": ("# nothing\n\n", "has no key"),
    "of other letters": ("me:ключ-ключ-ключ-ключ", "ASCII"),
    "with spaces": ("me:a key with some spaces", "no spaces"),
}


@pytest.mark.parametrize("what", KEY_FILES)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, what):
    text, words = KEY_FILES[what]
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match=words):
        Keys(tmp_path / "keys")
    with pytest.raises(UsageError, match="cannot be read"):
        Keys(tmp_path / "missing")


HOSTS = {
    HOST: 200, "127.0.0.1": 200, "[::1]:9": 200, "127.0.0.1:x": 403, "evil.example": 403, "127.0.0.1.evil.example": 403,
    "": 403, None: 403, "localhost@evil.example": 403,
}  # fmt: skip
ORIGINS = {
    f"http://{HOST}": True, None: True, "null": False, "http://evil.example": False, "http://127.0.0.1:9000": False,
    "http://127.0.0.1": False, f"http://{HOST}.evil.example": False, "": False,
}  # fmt: skip


def test_other_names_in_host_are_refused(made):
    """A page whose name was bound anew to this address would send its own."""
    guard = made()
    for host, status in HOSTS.items():
        assert call(guard, "GET", "/v1/models", host=host).status == status, host
        assert call(guard, "GET", "/health", host=host).status == status, host


def test_pages_of_other_sites_cannot_ask(made):
    guard = made()
    for origin, allowed in ORIGINS.items():
        if allowed:
            assert call(guard, "POST", PICTURES, b"{}", origin=origin).status == 400
            continue
        for method, path in places(guard):
            if method in ("POST", "PUT", "PATCH", "DELETE"):
                assert call(guard, method, path, b"{}", origin=origin).status == 403, (method, path, origin)


def test_a_header_that_decides_something_may_not_be_there_twice(made):
    for name in ("host", "origin", "authorization", "content_type", "content_length"):
        twice = {name: f"http://{HOST}" if name == "origin" else "2", name.upper(): "3"}
        assert call(made(), "POST", PICTURES, b"{}", **twice).status == 400, name


def test_bodies_are_json_but_where_a_protocol_says_otherwise(made):
    guard = made()
    elsewhere = [pattern for protocol in guard.protocols for pattern in protocol.media]
    tried = 0
    for method, path in places(guard):
        if method != "POST" or any(re.fullmatch(pattern, path) for pattern in elsewhere):
            continue
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", None):
            answer = call(guard, method, path, b'{"prompt": "x"}', content_type=kind)
            assert answer.status == 415, (path, kind)
        tried += 1
    assert tried >= 4
    assert call(guard, "POST", PICTURES, b"{}", content_type="application/json; charset=utf-8").status == 400


def test_no_answer_allows_other_sites_and_all_forbid_guessing_types(made):
    guard = made()
    asked = {"origin": "http://evil.example", "access_control_request_method": "POST"}
    for method, path in [*places(guard), ("OPTIONS", PICTURES), ("GET", "/nowhere")]:
        answer = call(guard, method, path, **asked)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert re.fullmatch(IDENT, answer.headers["x-request-id"])


# Limits, each at the limit and one past it: name -> (the limit, what is asked for at it, one past it, status past it).


def body(**fields):
    return json.dumps({"prompt": "x", "size": "64x64", **fields}).encode()


AT_THE_LIMIT = {
    "pixels": (64 * 80, {"body": body(size="64x80")}, {"body": body(size="80x80")}, 400),
    "steps": (7, {"body": body(num_inference_steps=7)}, {"body": body(num_inference_steps=8)}, 400),
    "pictures": (3, {"body": body(n=3)}, {"body": body(n=4)}, 400),
    "prompt_bytes": (6, {"body": body(prompt="éäö")}, {"body": body(prompt="éäöx")}, 400),
    "body_bytes": (300, {"body": body().ljust(300)}, {"body": body().ljust(301)}, 413),
    "header_bytes": (400, {"x_filler": "x" * 170}, {"x_filler": "x" * 400}, 413),
    "guidance": (9, {"body": body(guidance_scale=9.0)}, {"body": body(guidance_scale=9.5)}, 400),
}
ELSEWHERE = {  # name -> where it is tested
    "body_seconds": "test_serve_network.py",
    "connections": "test_serve_network.py",
    **{name: "test_serve_batches.py" for name in LIMITS if name.startswith("batch_")},
}


def test_every_limit_is_tested():
    assert set(LIMITS) <= set(AT_THE_LIMIT) | set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        assert re.search(rf"\b{name}\b", (HERE / file).read_text(encoding="utf-8")), f"{name} is not in {file}"


@pytest.mark.parametrize("name", [name for name in AT_THE_LIMIT if name in LIMITS])
def test_a_limit_allows_what_is_at_it_and_nothing_more(made, name):
    value, fits, exceeds, status = AT_THE_LIMIT[name]
    guard = made(**{name: value})
    below, above = ask_without_worker(guard, fits), ask_without_worker(guard, exceeds)
    assert below.status == 499, below.body  # taken; then this client goes away
    assert above.status == status
    assert str(value) in above.body.decode(), "what is allowed is said"
    if status == 413 and "body" in exceeds:  # a body that does not say its length
        chunked = call(guard, "POST", PICTURES, chunks=[exceeds["body"][:200], exceeds["body"][200:]])
        assert (chunked.status, chunked.json["error"]["code"]) == (413, "request_too_large")
    if status == 400:
        assert above.json["error"]["param"] is not None


def ask_without_worker(guard, what):
    """A request that waits in the queue until its client goes away."""
    what = {"body": body(), **what}
    return call(guard, "POST", PICTURES, waits=0.05, **what)


HUGE = {
    "a picture of 10^9 pixels": body(size="99999x10000"),
    "10^9 steps": body(num_inference_steps=10**9),
    "10^9 pictures": body(n=10**9),
    "a seed of 4000 digits": b'{"prompt": "x", "seed": 1' + b"0" * 4000 + b"}",
    "a number that Python will not read": b'{"prompt": "x", "seed": 1' + b"0" * 9000 + b"}",
    "half a million brackets": b"[" * 500_000,
    "half a million keys": b'{"prompt": "x"' + b"".join(b',"k%d":1' % k for k in range(90_000)) + b"}",
    "infinite guidance": b'{"prompt": "x", "guidance_scale": 1e999}',
    "half of a surrogate pair": b'{"prompt": "\\ud800"}',
    "a key of half a surrogate pair": b'{"prompt": "x", "\\ud800": 1}',
}


@pytest.mark.parametrize("what", HUGE)
def test_what_is_too_much_is_refused_before_anything_is_made_of_it(made, what):
    begin = time.monotonic()
    answer = call(made(), "POST", PICTURES, HUGE[what])
    assert answer.status == 400, answer.body
    assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
    assert time.monotonic() - begin < 3  # measured 0.3 for the longest


def test_a_body_without_end_is_not_read_to_its_end(made):
    answer = call(made(), "POST", PICTURES, chunks=(b"x" * 65536 for _ in range(2**14)))
    assert answer.status == 413
    assert answer.taken <= LIMITS["body_bytes"].default + 65536


def test_a_body_that_does_not_come_is_not_waited_for(made):
    answer = call(made(body_seconds=1), "POST", PICTURES, chunks=[b'{"prompt":'])
    assert (answer.status, "within 1 s" in answer.body.decode()) == (400, True)


# Errors.


def test_errors_of_every_kind_have_an_id_and_say_nothing_of_the_inside(made, folder, caplog):
    caplog.set_level(logging.DEBUG)
    guard = made(body_bytes=2000)
    secret = f"{PROMPT} {folder} {KEY}"

    @guard.app.get("/v1/defect")
    async def defect():
        raise KeyError(secret)

    @guard.app.get("/v1/tool")
    async def tool():
        raise UsageError(f"{folder}/unet/model.onnx cannot be read")

    preview = body(prompt=PROMPT, parameters={"decoder": "vae_preview"})
    cases = {
        400: [
            ("POST", PICTURES, {"body": preview}),
            ("POST", PICTURES, {"body": body(prompt=PROMPT, scheduler=PROMPT)}),
            ("POST", PICTURES, {"body": body(prompt=PROMPT, parameters={"no": PROMPT})}),
            ("POST", PICTURES, {"body": b"{" + PROMPT.encode()}),
            ("GET", "/v1/tool", {}),
        ],
        401: [("GET", "/v1/models", {"authorization": f"Bearer {KEY}x"})],
        403: [("GET", "/v1/models", {"host": "evil.example"})],
        404: [
            ("GET", f"/v1/{KEY}", {}),
            ("POST", PICTURES, {"body": body(model="two")}),
            ("GET", "/v1/models/two", {}),
        ],
        405: [("DELETE", PICTURES, {})],
        413: [("POST", PICTURES, {"body": body(prompt=PROMPT * 100)})],
        415: [("POST", PICTURES, {"body": body(prompt=PROMPT), "content_type": "text/plain"})],
        500: [("GET", "/v1/defect", {})],
    }
    for status, requests in cases.items():
        for method, path, options in requests:
            answer = call(guard, method, path, **options)
            assert answer.status == status, (path, answer.body)
            text = answer.body.decode()
            assert answer.headers["x-request-id"] in text
            for word in (KEY, str(folder), str(folder.parent), "Traceback", "KeyError", "site-packages", ".py"):
                assert word not in text, (status, word)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "KeyError" in logged, "whose frames are in the log, for those who mend it"
    for word in (KEY, str(folder), PROMPT):
        assert word not in logged


def test_values_that_are_wrong_are_not_said_back(made):
    """Only what is allowed, and where: values may be prompts."""
    for fields in ({"n": PROMPT}, {"size": PROMPT}, {"quality": PROMPT}, {"seed": PROMPT}, {"stream": PROMPT}):
        answer = call(made(), "POST", PICTURES, body(**fields))
        assert answer.status == 400
        assert PROMPT not in answer.body.decode()
        assert answer.json["error"]["param"] == next(iter(fields))


def test_further_parameters_are_the_familys_own(made):
    """Not a way around the limits of pictures, nor to what no route takes."""
    guard = made()
    for name in ("count", "seed", "images", "latents", "width", "prompt", "guidance_scale"):
        answer = call(guard, "POST", PICTURES, body(parameters={name: 3}))
        assert (answer.status, answer.json["error"]["param"] in (name, "parameters")) == (400, True)
        assert name in answer.json["error"]["message"]


def test_other_machines_are_not_served_without_a_key(folder, refused):
    refused("serve", str(folder), "--backend", "null", "--host", "0.0.0.0", words=("--api-key-file", "--no-key"))
