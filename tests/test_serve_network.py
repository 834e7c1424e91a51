"""The same over a network, with a real server: slow clients, too many, bodies without end; what is said and listens."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import serve_stub
from serving import serving
from test_serve_crash import Asking, alive, worker_of

from intaglio.runtimes.private_memory import held_bytes

KEY, OTHER = "canary-key-0123456789", "another-key-0123456789"
PROMPT = "canary prompt of a red heart"
PICTURES = "/v1/images/generations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return serve_stub.hollow(tmp_path_factory.mktemp("canary-folder") / "one")


def body(**fields):
    return json.dumps({"prompt": "x", "size": "64x64", **fields}).encode()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"me:{KEY}\nyou:{OTHER}\n")
    limits = {"body_seconds": 1, "connections": 12, "header_bytes": 4000}
    flags = [word for name, value in limits.items() for word in ("--limit", f"{name}={value}")]
    queue = ("--queue", "2", "--concurrency", "1")
    with serving(folder, flags=("--backend", "null", "--api-key-file", keys, "--log", "debug", *queue, *flags)) as made:
        yield made


def address(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def ask(server, method, path, data=None, **headers):
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    whole = {"Authorization": f"Bearer {KEY}", **headers}
    if data is not None:
        whole["Content-Type"] = "application/json"
    with contextlib.closing(connection):
        connection.request(method, path, data, whole)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()


def raw(server, *parts, pause=0.0):
    """Send bytes; what came back until the server closed the connection, and after how many seconds."""
    begin = time.monotonic()
    with socket.create_connection(address(server), timeout=20) as line:
        for part in parts:
            with contextlib.suppress(OSError):
                line.sendall(part)
            time.sleep(pause)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                found += part
    return found, time.monotonic() - begin


def head(server, *lines):
    host, port = address(server)
    first = f"POST {PICTURES} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {KEY}\r\n"
    return (first + "".join(f"{line}\r\n" for line in lines)).encode()


def test_slow_clients_are_let_go(server):
    """``body_seconds``, of headers too: a byte now and then does not keep a connection."""
    kind = "Content-Type: application/json"
    found, seconds = raw(server, head(server), *[b"X"] * 8, pause=0.25)
    assert (found, seconds < 4) == (b"", True)
    found, seconds = raw(server, head(server, kind, "Content-Length: 500") + b"\r\n", *[b"{"] * 10, pause=0.2)
    assert found.startswith(b"HTTP/1.1 400")
    assert b"did not arrive within 1 s" in found
    assert seconds < 9  # with what a client may still send when it has its answer


def test_headers_that_are_too_long_and_what_is_no_http_are_answered_with_an_id(server):
    for request in (head(server, "X-Filler: " + "x" * 200_000) + b"\r\n", b"\x16\x03\x01 no http\r\n\r\n"):
        found, _ = raw(server, request)
        top, _, text = found.partition(b"\r\n\r\n")
        assert top.startswith(b"HTTP/1.1 400")
        assert json.loads(text)["error"]["request_id"] in top.decode()
    assert ask(server, "GET", "/v1/models", **{"X-Filler": "x" * 4100})[0] == 413


def test_a_gigabyte_is_refused_without_holding_it(server):
    before = sum(held_bytes(server.process.pid))
    with socket.create_connection(address(server), timeout=20) as line, contextlib.suppress(OSError):
        line.sendall(head(server, "Content-Type: application/json", "Transfer-Encoding: chunked") + b"\r\n")
        piece = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        for _ in range(1024):
            line.sendall(piece)
    assert sum(held_bytes(server.process.pid)) - before < 20 * 2**20  # measured 3 MiB
    assert ask(server, "GET", "/health")[0] == 200


def test_connections_that_ask_nothing_keep_nobody_out(server):
    """``connections``: the oldest of them is closed for who comes next."""
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            line = stack.enter_context(socket.create_connection(address(server), timeout=20))
            line.sendall(b"GET")
        time.sleep(0.2)
        assert ask(server, "GET", "/health")[0] == 200
        assert ask(server, "GET", "/v1/models")[0] == 200


def test_connections_are_limited_and_come_back(server):
    kind = "Content-Type: application/json"
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            line = stack.enter_context(socket.create_connection(address(server), timeout=20))
            line.sendall(head(server, kind, "Content-Length: 500") + b"\r\n")
        time.sleep(0.2)
        status, headers, text = ask(server, "GET", "/v1/models")
        assert (status, json.loads(text)["error"]["request_id"]) == (503, headers["x-request-id"])
        assert ask(server, "GET", "/health")[0] == ask(server, "HEAD", "/ready")[0] == 200
    time.sleep(0.3)
    assert ask(server, "GET", "/v1/models")[0] == 200


def test_turns_are_counted_by_key(server):
    pid = worker_of(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as stack:
            for k in range(3):
                line = stack.enter_context(socket.create_connection(address(server), timeout=20))
                text = body(seed=k)
                lines = ("Content-Type: application/json", f"Content-Length: {len(text)}")
                line.sendall(head(server, *lines) + b"\r\n" + text)
                time.sleep(0.1)
            status, headers, _ = ask(server, "POST", PICTURES, body())
            assert status == 429
            assert int(headers["retry-after"]) >= 1
            # Another key has its turn: who has most gives a place.
            other = {"Authorization": f"Bearer {OTHER}", "X-Deadline-Seconds": "0.3"}
            assert ask(server, "POST", PICTURES, body(), **other)[0] == 504
    finally:
        os.kill(pid, signal.SIGCONT)


def test_who_says_it_comes_from_elsewhere_is_not_believed(folder):
    """Without keys turns are counted by address; a header cannot make one client several."""
    with serving(folder, flags=("--backend", "null", "--queue", "2", "--concurrency", "1")) as server:
        pid = worker_of(server)
        os.kill(pid, signal.SIGSTOP)
        asked = []
        for address in ("10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2"):
            asked.append(Asking(server.url, {"prompt": "x"}, {"X-Forwarded-For": address}))
            time.sleep(0.1)
        time.sleep(0.3)
        waiting = [asking.result and asking.result[0] for asking in asked]
        os.kill(pid, signal.SIGCONT)
        assert waiting == [None, None, None, 429]
        assert [asking.end()[0] for asking in asked] == [200, 200, 200, 429]


def test_neither_keys_nor_prompts_nor_folders_are_in_any_answer_log_line_or_metric(server, folder):
    answers = [
        ask(server, "POST", PICTURES, body(prompt=PROMPT, size="64x64")),
        ask(server, "POST", PICTURES, body(prompt=PROMPT, parameters={"decoder": "vae_preview"})),
        ask(server, "POST", PICTURES, body(prompt=PROMPT, response_format=PROMPT)),
        ask(server, "POST", PICTURES, b"{" + PROMPT.encode()),
        ask(server, "GET", "/v1/models"),
        ask(server, "GET", f"/v1/models/{OTHER}?key={KEY}"),
        ask(server, "GET", f"/{PROMPT.replace(' ', '%20')}"),
        ask(server, "GET", "/openapi.json"),
        ask(server, "GET", "/metrics"),
        ask(server, "GET", "/ready"),
        ask(server, "POST", PICTURES, b"{}", Authorization=f"Bearer {KEY}x"),
    ]
    assert {answer[0] for answer in answers} >= {200, 400, 401, 404}
    answered = "\n".join(f"{headers} {text.decode('latin-1')}" for _, headers, text in answers)
    logged = "\n".join(server.log)
    assert answers[0][1]["x-request-id"] in logged
    for word in (KEY, OTHER, str(folder), str(folder.parent)):
        assert word not in answered
        assert word not in logged
    assert PROMPT not in logged
    assert PROMPT not in answers[8][2].decode()


def test_nothing_listens_but_the_one_port(server):
    pids = [server.process.pid, worker_of(server)]
    assert all(map(alive, pids))
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    listening = []
    for kind, states in {"tcp": ("0A",), "tcp6": ("0A",), "udp": ("07",), "udp6": ("07",)}.items():
        for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            words = row.split()
            if words[3] in states and words[9] in sockets:
                listening.append(words[1])
    for row in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = row.split()
        if words[6] in sockets and int(words[3], 16) & 0x10000:  # __SO_ACCEPTCON
            listening.append(row)
    assert listening == [f"0100007F:{address(server)[1]:04X}"]
