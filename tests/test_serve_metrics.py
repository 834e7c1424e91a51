"""``/metrics`` and spans: the server's figures are the client's own, and nothing a client writes becomes a label."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import http.client
import http.server
import itertools
import json
import os
import signal
import threading
import time
import urllib.parse
import uuid
from pathlib import Path

import pytest
import serve_stub
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from serving import serving

from intaglio.runtimes.private_memory import tree
from intaglio.runtimes.serve_metrics import COUNTED, READ

STEPS = 2
FLAGS = ("--backend", "openvino", "--threads", "1", "--concurrency", "4", "--queue", "8")
PATH = "/v1/images/generations"
PROMPT = "a secret teapot"


@pytest.fixture(scope="module")
def server(tiny_artifact):
    with serving(f"tiny={tiny_artifact.folder}", flags=FLAGS) as running:
        yield running


def connect(server):
    return http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)


def ask(server, path=PATH, body=None, method=None, **headers):
    """The status, the headers and the body of an answer."""
    connection = connect(server)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    given = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method or ("POST" if data is not None else "GET"), path, data, given | headers)
    answer = connection.getresponse()
    with contextlib.closing(connection):
        return answer.status, dict(answer.getheaders()), answer.read()


def picture(server, headers=None, **fields):
    return ask(server, body={"prompt": PROMPT, "num_inference_steps": STEPS, **fields}, **(headers or {}))


def samples(server):
    """(name, labels) -> value, of every sample."""
    status, headers, body = ask(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(parse(body.decode()))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found, name, **labels):
    return found.get((name, frozenset(labels.items())), 0.0)


def until(server, condition, seconds=30):
    """Samples that satisfy a condition."""
    end = time.monotonic() + seconds
    while not condition(found := samples(server)):
        assert time.monotonic() < end, {k: v for k, v in found.items() if "bucket" not in k[0]}
        time.sleep(0.1)
    return found


def test_the_counters_are_the_clients_own(server):
    before = samples(server)
    sent = {"ok": 0, "400": 0, "404": 0, "405": 0, "415": 0, "429": 0, "499": 0, "504": 0}

    def expect(status, answer):
        assert answer[0] == int(status), answer
        sent["ok" if status == "200" else status] += 1

    late = {"X-Deadline-Seconds": "0.05"}  # the pace is not known yet, so that the server has to try
    expect("504", picture(server, late, num_inference_steps=150))
    expect("200", picture(server, n=2))
    expect("200", picture(server, seed=7))
    expect("200", picture(server, stream=True, partial_images=1))
    expect("400", picture(server, size="1x1"))
    expect("400", picture(server, unknown=1))
    expect("404", picture(server, model="none"))
    expect("405", ask(server, PATH))
    expect("415", ask(server, body=b"x", **{"Content-Type": "text/plain"}))
    gone = connect(server)
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 150, "n": 2})
    gone.request("POST", PATH, body, {"Content-Type": "application/json"})
    until(server, lambda now: value(now, "intaglio_running", model="tiny") == 2)
    expect("429", picture(server, {"X-Deadline-Seconds": "0.001"}, num_inference_steps=150))  # something is ahead
    gone.close()
    sent["499"] += 1
    after = until(server, lambda now: value(now, "intaglio_http_requests_total", protocol="openai", status="499"))

    def grown(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    answered = {s: grown("intaglio_http_requests_total", protocol="openai", status=s) for s in sent if s != "ok"}
    assert {"ok": grown("intaglio_http_requests_total", protocol="openai", status="200"), **answered} == sent
    duration = "intaglio_request_duration_seconds_count"
    by_outcome = {"ok": 3, "deadline_exceeded": 1, "cancelled": 1, "rate_limit_exceeded": 1, "invalid_request": 2}
    assert {o: grown(duration, protocol="openai", outcome=o) for o in by_outcome} == by_outcome
    ended = {"ok": 3, "deadline_exceeded": 1, "cancelled": 1}
    assert {o: grown("intaglio_generations_total", model="tiny", outcome=o) for o in ended} == ended
    assert grown("intaglio_pictures_total", model="tiny") == 4
    assert grown("intaglio_steps_total", model="tiny") >= 4 * STEPS
    assert grown("intaglio_step_seconds_count", model="tiny") == grown("intaglio_steps_total", model="tiny")
    assert grown("intaglio_queue_seconds_count", model="tiny") == 7  # of the 504, 4 pictures, 2 of the one that left
    assert grown("intaglio_stage_seconds_count", model="tiny", stage="denoiser") == 4
    assert grown("intaglio_refusals_total", reason="deadline") == 1
    assert grown("intaglio_refusals_total", reason="queue_full") == 0
    assert grown("intaglio_deadline_misses_total", model="tiny") == 1
    triton = {"model": "tiny", "version": "1"}
    assert grown("nv_inference_request_success", **triton) == 3
    assert sum(grown("nv_inference_request_failure", **triton, reason=r) for r in ("OTHER", "REJECTED")) == 1
    assert grown("nv_inference_request_failure", **triton, reason="CANCELED") == 1
    assert value(after, "nv_inference_pending_request_count", **triton) == 0


def test_requests_share_calls_and_prompts(server):
    time.sleep(0.5)  # for the step that a client who left has still to end
    before = samples(server)
    assert picture(server, n=4, guidance_scale=1.0)[0] == 200
    after = until(server, lambda now: value(now, "intaglio_running", model="tiny") == 0)

    def grown(name):
        return value(after, name, model="tiny") - value(before, name, model="tiny")

    assert grown("intaglio_denoiser_rows_total") == 4 * STEPS
    assert grown("intaglio_denoiser_calls_total") < 4 * STEPS
    assert grown("intaglio_prompt_cache_hits_total") >= 3
    assert value(after, "intaglio_prompt_cache_misses_total", model="tiny") >= 1
    assert value(after, "intaglio_prompt_cache_bytes", model="tiny") > 0


def test_every_name_of_the_tables_is_there_and_nothing_else(server, tiny_artifact):
    picture(server)
    found = samples(server)
    suffixes = ("_bucket", "_count", "_sum")
    names = {name for name, _ in found}
    plain = {next((n.removesuffix(s) for s in suffixes if n.removesuffix(s) in COUNTED), n) for n in names}
    assert plain == {*COUNTED, *READ}
    facts = next(dict(labels) for name, labels in found if name == "intaglio_model_info")
    assert facts["digest"] == tiny_artifact.manifest.digest
    assert (facts["model"], facts["backend"]) == ("tiny", "openvino")
    assert value(found, "intaglio_ready") == value(found, "intaglio_model_loaded", model="tiny") == 1
    assert value(found, "intaglio_queue_limit") == 8
    assert value(found, "intaglio_worker_memory_bytes", model="tiny", kind="private") > 2**20


def test_openmetrics_where_the_client_takes_it(server):
    status, headers, body = ask(server, "/metrics", Accept="application/openmetrics-text; version=bad")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = {sample.name for family in parse_openmetrics(body.decode()) for sample in family.samples}
    assert {"intaglio_pictures_total", "intaglio_info", "nv_inference_request_success"} <= found


def test_nothing_a_client_writes_becomes_a_label(server):
    def junk():
        word = uuid.uuid4().hex
        ask(server, f"/{word}")
        ask(server, f"/v1/{word}", body={"prompt": word})
        ask(server, f"/v1/models/{word}")
        ask(server, f"/metrics/{word}")
        ask(server, PATH, body={"prompt": PROMPT, "model": word})
        ask(server, PATH, body={word: 1}, **{"X-Priority": word})
        ask(server, f"/{word}", method=word[:8].upper())

    junk()
    before = samples(server)
    for _ in range(10):
        junk()
    after = samples(server)
    assert after.keys() == before.keys()
    grown = sum(after[key] - before[key] for key in after if key[0] == "intaglio_http_requests_total")
    assert grown == 10 * 7 + 1  # and /metrics itself
    text = " ".join(str(key) for key in after)
    assert "teapot" not in text
    assert str(Path.cwd()) not in text


def test_a_workers_death_is_counted_and_takes_no_count_back(server):
    before = until(server, lambda now: value(now, "intaglio_denoiser_calls_total", model="tiny") > 0)
    children = [int(place.name) for place in tree(server.process.pid)[1:]]
    assert len(children) == 1
    os.kill(children[0], signal.SIGKILL)
    after = until(
        server,
        lambda now: (
            value(now, "intaglio_worker_restarts_total", model="tiny") == 1
            and value(now, "intaglio_model_loaded", model="tiny") == 1
        ),
    )
    for name in ("intaglio_denoiser_calls_total", "intaglio_prompt_cache_misses_total", "intaglio_pictures_total"):
        assert value(after, name, model="tiny") == value(before, name, model="tiny")
    assert picture(server)[0] == 200
    until(server, lambda now: value(now, "intaglio_denoiser_calls_total", model="tiny") > value(before, "x"))


class Asgi:
    """A client of an application in this process: no sockets."""

    def __init__(self, app):
        self.app = app

    async def ask(self, path=PATH, body=None, **headers):
        """The status, the headers and the body of an answer."""
        data = b"" if body is None else json.dumps(body).encode()
        given = {"host": "localhost", **headers}
        given |= {} if body is None else {"content-type": "application/json", "content-length": str(len(data))}
        scope = {
            "type": "http", "method": "GET" if body is None else "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
            "server": ("localhost", 80), "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"},
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        }  # fmt: skip
        inbox = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": data, "more_body": False})
        sent = []

        async def send(message):
            sent.append(message)

        await self.app(scope, inbox.get, send)
        head = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:])


def hub_of(artifact):
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_model import ModelSettings

    return Hub([ModelSettings(name="tiny", folder=artifact.folder, backend="openvino", threads=1)])


def test_metrics_need_the_key(tiny_artifact, tmp_path):
    from intaglio.runtimes.serve_app import make_app
    from intaglio.runtimes.serve_keys import Keys

    key = "k" * 16
    (tmp_path / "keys").write_text(key)

    async def run():
        client = Asgi(make_app(hub_of(tiny_artifact), keys=Keys(tmp_path / "keys")))
        assert (await client.ask("/metrics"))[0] == 401
        assert (await client.ask("/metrics", authorization=f"Bearer {key}"))[0] == 200

    asyncio.run(run())


@pytest.fixture(scope="module")
def spans(tiny_artifact):
    """What was asked -> (status, headers, spans)."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from intaglio.runtimes.serve_app import make_app
    from intaglio.runtimes.serve_traces import Traces

    exporter, provider = export.InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asks = {  # the late one first: later the pace is known, and it would be refused at once
        "late": ({"body": {"prompt": PROMPT, "num_inference_steps": 150}}, {"x-deadline-seconds": "0.3"}),
        "two": ({"body": {"prompt": PROMPT, "num_inference_steps": STEPS, "n": 2}}, {"traceparent": parent}),
        "wrong": ({"body": {"prompt": PROMPT, "size": "1x1"}}, {}),
        "models": ({"path": "/v1/models"}, {"traceparent": "nonsense"}),
        "health": ({"path": "/health"}, {}),
    }

    async def run():
        hub = hub_of(tiny_artifact)
        traces, found = Traces(hub, provider), {}
        client = Asgi(make_app(hub))
        await hub.start()
        for name, (question, headers) in asks.items():
            status, head, _ = await client.ask(**question, **headers)
            found[name] = status, head, exporter.get_finished_spans()
            exporter.clear()

        async def line():
            await hub.submit(serve_stub.order(steps=1, model="tiny")).result()

        await asyncio.create_task(line(), context=contextvars.Context())
        found["line"] = 200, {}, exporter.get_finished_spans()
        exporter.clear()
        traces.prompts = True
        await client.ask(body={"prompt": PROMPT, "num_inference_steps": 1})
        found["prompt"] = 200, {}, exporter.get_finished_spans()
        await hub.close()
        return found

    return asyncio.run(run())


def root(spans):
    return next(span for span in spans if span.kind.name == "SERVER")


def test_a_request_is_one_span_with_its_stages_below(spans):
    status, headers, made = spans["two"]
    assert status == 200
    whole = root(made)
    assert whole.name == "generate_content tiny"
    assert format(whole.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert format(whole.parent.span_id, "016x") == "b7ad6b7169203331"
    own = f"00-{whole.context.trace_id:032x}-{whole.context.span_id:016x}-01"
    assert headers["traceparent"] == headers["traceresponse"] == own
    children = [span for span in made if span is not whole]
    assert sorted(span.name for span in children) == sorted(["queue", "encode", "denoise", "decode"] * 2)
    for span in children:
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time
    for index in (0, 1):
        own = [span for span in children if span.attributes["intaglio.picture"] == index]
        found = {span.name: (span.start_time, span.end_time) for span in own}
        times = [found[name] for name in ("queue", "encode", "denoise", "decode")]
        assert all(abs(later[0] - earlier[1]) < 5e6 for earlier, later in itertools.pairwise(times))
    wanted = {
        "gen_ai.operation.name": "generate_content", "gen_ai.provider.name": "intaglio", "gen_ai.output.type": "image",
        "gen_ai.request.model": "tiny", "gen_ai.request.choice.count": 2, "http.request.method": "POST",
        "http.route": PATH, "http.response.status_code": 200, "intaglio.steps": STEPS,
    }  # fmt: skip
    assert wanted.items() <= dict(whole.attributes).items()


def test_failures_are_said_in_the_span(spans):
    status, _, made = spans["late"]
    assert status == 504
    assert root(made).attributes["error.type"] == "deadline_exceeded"
    assert root(made).status.status_code.name == "ERROR"
    assert {span.name for span in made if span is not root(made)} == {"queue", "unfinished"}
    status, _, made = spans["wrong"]
    assert status == 400
    assert [span.name for span in made] == [f"POST {PATH}"]
    assert made[0].attributes["error.type"] == "400"
    assert made[0].status.status_code.name == "UNSET"


def test_a_line_of_a_batch_is_a_span_of_its_own(spans):
    """What asked for the batch was answered long ago."""
    made = spans["line"][2]
    (whole,) = [span for span in made if span.parent is None]
    assert whole.name == "generate_content tiny"
    assert sorted(span.name for span in made if span is not whole) == ["decode", "denoise", "encode", "queue"]
    assert {span.context.trace_id for span in made} == {whole.context.trace_id}


def test_other_requests_are_short_spans_and_health_is_none(spans):
    assert [span.name for span in spans["models"][2]] == ["GET /v1/models"]
    assert spans["models"][2][0].parent is None
    assert spans["health"][2] == ()
    assert "traceparent" not in spans["health"][1]


def test_prompts_are_in_spans_only_where_asked_for(spans):
    for name in ("two", "late", "wrong", "models"):
        assert PROMPT not in " ".join(span.to_json() for span in spans[name][2])
    assert PROMPT in root(spans["prompt"][2]).attributes["gen_ai.input.messages"]


@pytest.mark.parametrize(
    ("flags", "word"),
    [(("--telemetry",), "OTEL_EXPORTER_OTLP_ENDPOINT"), (("--telemetry-prompts",), "--telemetry")],
)
def test_nothing_is_sent_to_nowhere(refused, tiny_artifact, monkeypatch, flags, word):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    refused("serve", tiny_artifact.folder, "--port", "0", *flags, words=(word,))


def test_spans_leave_by_otlp_where_that_is_asked_for(tiny_artifact, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bodies = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # whose spans have paths that clients write
        for flags in ((), ("--telemetry",)):
            with serving(f"tiny={tiny_artifact.folder}", flags=(*FLAGS, *flags)) as running:
                assert picture(running)[0] == 200
            assert bool(bodies) == bool(flags)
        collector.shutdown()
    names, text = set(), b""
    for path, body in bodies:
        assert path == "/v1/traces"
        text += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names |= {span.name for scope in resource.scope_spans for span in scope.spans}
    assert {"queue", "encode", "denoise", "decode", "generate_content tiny"} <= names
    assert PROMPT.encode() not in text
