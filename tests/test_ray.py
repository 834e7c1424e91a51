"""Artifacts on Ray: what Ray is told, two replicas of which one is killed under load, and batches as without Ray."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from intaglio.bench import evidence, evidence_ray
from intaglio.profiles.errors import UsageError
from intaglio.runtimes import ray_asgi, ray_serve, serve_guard

FILE = evidence.ROOT / evidence.FOLDER / "ray.json"
RETURN_SECONDS = 60.0  # until a replica that was killed is back; measured 4 to 14


def without(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed: pip install intaglio[ray]")


def options(**given):
    return ray_serve.options(ray_serve.read({"artifact": "a", "no_key": True, **given}))


def test_ray_is_told_our_own_limits():
    found = options(concurrency="3", queue=5, replicas=2, num_gpus=1, num_cpus=0.5, drain=40)
    assert found["max_ongoing_requests"] == 8
    assert found["max_queued_requests"] == 16
    assert found["backpressure_config"]["status_code"] == 429
    assert found["backpressure_config"]["retry_after_s"] > 0
    assert found["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 1.0}
    assert found["graceful_shutdown_timeout_s"] == 40
    assert found["num_replicas"] == 2
    assert "autoscaling_config" not in found


def test_more_replicas_come_when_more_is_under_way_than_one_works_on():
    found = options(replicas=1, max_replicas=4, concurrency=3)
    assert found["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3.0}
    assert "num_replicas" not in found


def test_yaml_and_the_command_line_say_the_same():
    typed = {"artifact": ["a=/x", "b=/y"], "threads": 2, "no_key": True, "allowed_host": ["h"], "limit": ["steps=9"]}
    words = ray_serve.read(typed)
    assert (words.artifact, words.threads, words.no_key, words.allowed_host) == (["a=/x", "b=/y"], 2, True, ["h"])
    assert words.limit == ["steps=9"]
    assert ray_serve.read({"artifact": "/x", "no_key": "false", "api_key_file": "k"}).no_key is False


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "artifact"),
        ({"artifact": "a", "colour": "red"}, "--colour"),
        ({"artifact": "a", "port": 1}, "--port"),
        ({"artifact": "a", "replica": 2}, "--replica"),  # not an abbreviation
        ({"artifact": "a", "threads": "many"}, "--threads"),
        ({"artifact": "a", "no_key": "perhaps"}, "no_key"),
        ({"artifact": "a", "replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"artifact": "a", "num_gpus": -1}, "num_gpus"),
        ({"artifact": "a", "concurrency": 0}, "concurrency"),
        ({"artifact": "a", "drain": -1}, "drain"),
        ({"artifact": "a", "drain": "inf"}, "drain"),
        ({"artifact": "a", "limit": ["steps=none"]}, "steps=none"),
        ({"artifact": "a", "limit": ["stepps=1"]}, "stepps"),
        ({"artifact": "a", "limit": ["connections=5"]}, "Ray's proxy"),
        ({"artifact": "a", "memory": "much"}, "--memory"),
        ({"artifact": ["x=a", "x=b"]}, "two artifacts"),
        ({"artifact": "a", "telemetry_prompts": True}, "needs telemetry"),
    ],
)
def test_what_is_not_an_argument_is_refused(given, word):
    """Before Ray makes a replica, whose own refusal comes as Ray's traceback."""
    with pytest.raises(UsageError, match=word) as caught:
        ray_serve.read({"no_key": True, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"no_key": "false"}, {"allowed_host": "example.org"}])
def test_nobody_serves_everybody_without_saying_so(given):
    """Where Ray's proxy listens is not for the application to see: http_options.host may be 0.0.0.0."""
    with pytest.raises(UsageError, match="add api_key_file=FILE, or no_key=true"):
        ray_serve.read({"artifact": "a", **given})
    for said in ({"no_key": "true"}, {"api_key_file": "/run/keys"}):
        assert ray_serve.read({"artifact": "a", **given, **said}).artifact == ["a"]


def test_a_replica_logs_a_line_a_request_as_serve_does(monkeypatch):
    """Ray gives nobody's loggers a handler, and may give the root's one: neither silence nor each line twice."""
    text, logger, root = io.StringIO(), logging.getLogger(ray_serve.LOGGER), logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(text)])
    monkeypatch.setattr(ray_serve.sys, "stderr", text)
    with pytest.raises(UsageError, match="artifact"):
        ray_serve.Replica({})
    serve_guard.LOG.info("%s GET /ready 200 0.001 s", "abc")
    assert re.fullmatch(r"[-\d]{10} [:,\d]{12} INFO abc GET /ready 200 0.001 s\n", text.getvalue())


@pytest.mark.parametrize(("given", "told"), [("af31-07", "af31-07"), ("a\tb", None), ("a" * 65, None), (None, None)])
def test_an_answer_has_one_request_id_which_is_rays(given, told):
    found, sent = [], []

    async def app(scope, receive, send):
        found.append(scope.get("state", {}).get("id"))
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"x-seed", b"1"), (b"X-Request-ID", b"o")]}
        )

    async def send(message):
        sent.append(message)

    headers = [] if given is None else [(b"x-request-id", given.encode())]
    asyncio.run(ray_asgi.under_ray(app)({"type": "http", "headers": headers}, None, send))
    assert found == [told]
    assert sent[0]["headers"] == [(b"x-seed", b"1")]


def test_a_client_that_hangs_up_is_heard_though_ray_cancels_its_request():
    """Cancelled, a request would be counted as one that the server ended: 503."""
    found = []

    async def app(scope, receive, send):
        try:
            found.append((await receive())["type"])
            found.append((await receive())["type"])
        except asyncio.CancelledError:
            found.append("cancelled")
            raise

    async def ask():
        messages = asyncio.Queue()
        messages.put_nowait({"type": "http.request"})
        work = asyncio.create_task(ray_asgi.under_ray(app)({"type": "http", "headers": []}, messages.get, None))
        await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(ask())
    assert found == ["http.request", "http.disconnect"]


@without("ray")
def test_what_is_refused_is_one_line_to_those_who_type_it():
    """``serve run`` is click's: it prints click's errors, and the traceback of others."""
    import click

    with pytest.raises(UsageError, match="api_key_file") as caught:
        ray_serve.app({"artifact": "a"})
    assert isinstance(caught.value, click.ClickException)
    assert caught.value.format_message() == str(caught.value)


@without("ray")
def test_on_ray_a_client_that_hangs_up_frees_its_place_and_the_log_says_so(once, tiny_artifact):
    command = [sys.executable, Path(__file__).with_name("ray_replica.py"), tiny_artifact.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ids"]) == 1
    assert dict(found["statuses"])["499"] == "1.0"
    assert found["waiting"] == ["0.0"]
    assert found["after"] == 200
    log = "\n".join(found["log"])
    assert [re.search(r"images/generations (\d+) ", line)[1] for line in found["log"]] == ["400", "499", "200"]
    assert found["said"]["error"]["request_id"] in log
    assert "secret" not in log


def test_every_flag_of_serve_is_an_argument_but_for_its_socket():
    from intaglio.runtimes import serve_cli

    parser = argparse.ArgumentParser()
    serve_cli.configure(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert flags - set(ray_serve.parser()._option_string_actions) == {"--host", "--port", "--log"}


def test_a_worker_that_is_started_again_is_no_reason_to_give_a_replica_up(monkeypatch):
    replica = ray_serve.Replica.__new__(ray_serve.Replica)
    replica.hub, replica.start, replica.unready = SimpleNamespace(ready=True), time.monotonic(), None
    now = [1000.0]

    async def checks():
        replica.loaded = asyncio.Event()
        replica.begun(None)
        monkeypatch.setattr(ray_serve.time, "monotonic", lambda: now[0])
        await replica.check_health()
        replica.hub.ready = False
        for now[0] in (1000.0, 1000.0 + replica.patience):
            await replica.check_health()
        now[0] += 1
        with pytest.raises(RuntimeError, match="31 s"):
            await replica.check_health()
        replica.hub.ready = True
        await replica.check_health()
        replica.begun(UsageError("no such artifact"))
        with pytest.raises(UsageError, match="no such artifact"):
            await replica.check_health()

    asyncio.run(checks())


def check_serving(found):
    """What Ray Serve is held to, measured here or on file."""
    assert found["dashboard"] is False
    assert found["let_in"] == {"friend": True, "stranger": False}
    assert found["different_pictures"] == 1, "the same seed on both replicas, before and after"
    assert set(found["full"]) == {"200", "429"}
    assert found["full"]["200"] >= found["replicas"] * found["held_by_a_replica"]
    assert all(int(seconds) >= 1 for seconds in found["retry_after"])
    assert set(found["killed"]) == {"200", "500"}
    assert sum(found["killed"].values()) == found["asked"]
    assert 1 <= found["killed"]["500"] <= found["held_by_a_replica"]
    assert found["failed_that_began_after_the_kill"] == 0
    assert found["back_seconds"] < RETURN_SECONDS
    assert found["orphans"] == 0
    assert set(found["after"]) == {"200"}


def check_batch(found):
    """What a batch on Ray is held to."""
    assert found["same_pictures"]
    assert found["same_results"]
    assert found["in_order"]
    assert found["made"] == {"plain": [11, 0, 1], "ray": [11, 0, 1], "resumed": [2, 9, 1]}
    assert found["pictures"] == found["lines"]  # one line is wrong, one has two


@pytest.fixture
def once(request):
    """Half a minute each: they run where the figures on file are older than the sources, or all is asked for."""
    if evidence.status()["ray"] == "fresh" and not request.config.getoption("--all-cases"):
        pytest.skip("the figures on file are as new as the sources; --all-cases measures again")


@without("ray")
def test_only_requests_of_a_killed_replica_fail_and_it_returns(once, tiny_artifact):
    check_serving(evidence_ray.part("serve", str(tiny_artifact.folder)))


@without("ray", "pandas", "pyarrow")
def test_a_batch_on_ray_is_the_plain_batch(once, tiny_artifact):
    check_batch(evidence_ray.part("batch", str(tiny_artifact.folder)))


@pytest.mark.parametrize(("name", "check"), [("serve", check_serving), ("batch", check_batch)])
def test_the_figures_on_file_hold_too(name, check):
    if not FILE.exists():
        pytest.skip("evidence 'ray' is missing; run: make evidence ray")
    check(json.loads(FILE.read_text(encoding="utf-8"))["figures"][name])
