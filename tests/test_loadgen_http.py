"""LoadGen over HTTP: a server of ours with a key, requests at once, and servers that do not do what they should."""

from __future__ import annotations

import argparse
import http.server
import json
import threading
import time

import psutil
import pytest
import serve_stub
from serving import serving

from intaglio.bench.loadgen import LoadgenError, Subject
from intaglio.bench.loadgen_cli import REPORT, configure_scenario, run_scenario
from intaglio.bench.loadgen_http import PICTURES, Server, subject_of_server
from intaglio.bench.scenarios import measure, read_rules
from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.profiles.manifest import read_manifest

pytest.importorskip("mlperf_loadgen", reason="needs pip install 'intaglio[bench]'")
pytest.importorskip("fastapi", reason="needs pip install 'intaglio[serve]'")

KEY = "a-key-of-the-tests"
PROMPTS = ("red heart", "红心", "cat face", "rocket", "pizza")
SLEEP = 0.05  # seconds of a call
OVERLAP = 0.5  # of what eight calls would take one after the other; measured 0.13


def run(*words):
    parser = argparse.ArgumentParser()
    configure_scenario(parser)
    return run_scenario(parser.parse_args([str(word) for word in words]))


def measured(scenario, folder, subject, *changes, **options):
    return measure(scenario, read_rules("short", scenario, changes), PROMPTS, subject, folder, **options)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hollow") / "artifact"
    serve_stub.hollow(folder)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# of the tests\nmeasurer:{KEY}\n")
    return file


@pytest.fixture(scope="module")
def server(artifact, keys):
    with serving(f"hollow={artifact}", flags=("--backend", "null", "--api-key-file", keys)) as found:
        yield found


def test_the_server_scenario_is_valid_through_http(server, artifact, keys, tmp_path, capsys):
    words = ["--url", server.url, "--scenario", "server", "--api-key-file", keys, "--steps", 2, "--json"]
    for attempt in range(3):  # what else runs here may come between LoadGen's clock and ours, which the verb then says
        code = run(*words, "-o", tmp_path / str(attempt))
        captured = capsys.readouterr()
        if "repeat on an idle machine" not in captured.err:
            break
    report = json.loads(captured.out)
    assert (code, captured.err) == (0, ""), report["why"]
    assert report["valid"]
    assert report == json.loads((tmp_path / str(attempt) / REPORT).read_text(encoding="utf-8"))
    assert report["artifact"] == {
        "name": "hollow", "family": "sd", "digest": read_manifest(artifact).digest,
    }  # fmt: skip
    assert report["ran"].pop("server")["backend"] == "null"
    assert report["ran"] == {"url": server.url, "clients": 16, "seed": 0, "steps": 2}
    assert report["latency_s"]["n"] >= 64
    asked = [line for line in server.log if f"POST {PICTURES} 200" in line]
    assert len(asked) >= report["latency_s"]["n"], "every sample was a request, and every request had a picture"


REFUSED = {
    (): "wants one of ARTIFACT, .* and --url URL",
    ("artifact", "--url", "http://localhost:1"): "wants one of ARTIFACT",
    ("artifact", "--clients", 2): "--clients is an option of --url URL, which is not given",
    ("artifact", "--api-key-file", "keys"): "--api-key-file is an option of --url URL",
    ("--url", "http://localhost:1", "--backend", "openvino"): "--backend is an option of ARTIFACT, which is not given",
    ("--url", "http://localhost:1", "--threads", 0): "--threads is an option of ARTIFACT",
    ("--url", "http://localhost:1", "--clients", 0): "--clients 0 is not allowed: 1 or more",
    ("--url", "localhost:8000"): "--url localhost:8000 is not allowed: http://HOST:PORT",
    ("--url", "http://localhost:eight"): "--url http://localhost:eight is not allowed",
    ("--url", "file:///etc/passwd"): "is not allowed: http://HOST:PORT",
    ("--url", "http://localhost:1", "--api-key-file", "no-such-file"): "--api-key-file no-such-file cannot be read",
    ("--url", "http://127.0.0.1:1"): r"http://127.0.0.1:1/v1/models: no answer \(.*refused",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(map(str, words)) or "nothing")
def test_what_is_refused(words):
    with pytest.raises((UsageError, LoadgenError), match=f"^[^\n]*{REFUSED[words]}[^\n]*$"):
        run(*words, "--scenario", "server")


def test_a_server_s_own_refusals_are_shown(server, keys, tmp_path):
    words = ["--url", server.url, "--scenario", "server", "-o", tmp_path / "out"]
    with pytest.raises(LoadgenError, match=r"/v1/models answered 401: .*no valid API key"):
        run(*words)
    with pytest.raises(UsageError, match="--model other is not served; allowed: hollow"):
        run(*words, "--api-key-file", keys, "--model", "other")
    with pytest.raises(LoadgenError, match=r"/v1/images/generations answered 400: .*num_inference_steps"):
        run(*words, "--api-key-file", keys, "--steps", 1000)
    assert list(tmp_path.iterdir()) == []


def test_requests_are_under_way_at_once(tmp_path):
    def make(numbers, prompts):
        time.sleep(SLEEP)
        return [None] * len(prompts)

    changes = ("min_query_count=4", "target_latency_percentile=50", "min_duration=0")
    report = measured("multi_stream", tmp_path, Subject(make=make, clients=8), *changes)
    assert report["metric"]["value"] <= OVERLAP * 8 * SLEEP
    assert report["latency_s"]["n"] == 8 * report["loadgen"]["result_query_count"]
    assert report["cross_check"]["agree"]


def test_an_error_in_a_thread_ends_a_run_of_ten_minutes_at_once(tmp_path):
    calls, before = 0, psutil.Process().children()

    def make(numbers, prompts):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise NumericsError("the picture is black")
        return [None]

    start = time.monotonic()
    with pytest.raises(NumericsError, match="the picture is black"):
        measured("server", tmp_path, Subject(make=make, clients=4), "min_duration=600000", target_qps=20.0)
    assert time.monotonic() - start < 10
    assert psutil.Process().children() == before


ANSWERS = {
    "two pictures": (200, {"data": [{"b64_json": "aGk="}] * 2}, "is not one picture"),
    "a URL": (200, {"data": [{"url": "http://localhost/1.png"}]}, "is not one picture"),
    "no base64": (200, {"data": [{"b64_json": "§"}]}, "is not one picture"),
    "nothing": (200, {"data": [{"b64_json": ""}]}, "the picture is empty"),
    "a list": (200, [], "answered 200"),
    "busy": (429, {"error": {"message": "later"}}, "answered 429: .*later"),
}


@pytest.fixture
def stub():
    """A server that answers everything with `.answer`, (status, value)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, value = self.server.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_no_picture_is_an_error(name, stub):
    *stub.answer, words = ANSWERS[name]
    subject = subject_of_server(Server(f"http://127.0.0.1:{stub.server_port}"))
    with pytest.raises(LoadgenError, match=words):
        subject.make([0], ["red heart"])
