"""Artifacts on Ray: what Ray is told, two replicas of which one is killed under load, and batches as without Ray."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import time
from types import SimpleNamespace

import pytest

from intaglio.bench import evidence, evidence_ray
from intaglio.profiles.errors import UsageError
from intaglio.runtimes import batch_cli, ray_batch, ray_serve

FILE = evidence.ROOT / evidence.FOLDER / "ray.json"
RETURN_SECONDS = 60.0  # until a replica that was killed is back; measured 4 to 14


def without(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed: pip install intaglio[ray]")


def options(**given):
    return ray_serve.options(ray_serve.read({"artifact": "a", **given}))


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
    assert ray_serve.read({"artifact": "/x", "threads": "2", "no_key": "false"}).no_key is False


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
        ({"artifact": "a", "allowed_host": "example.org"}, "api_key_file"),
    ],
)
def test_what_is_not_an_argument_is_refused(given, word):
    with pytest.raises(UsageError, match=word):
        ray_serve.read(given)


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


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--ray-replicas", "2"], "--ray-replicas"),
        (["--ray", "--ray-replicas", "0"], "1 or more"),
        (["--ray", "--ray-gpus", "-1"], "0 or more"),
    ],
)
def test_flags_of_batches_on_ray_that_are_not_allowed(flags, word):
    parser = argparse.ArgumentParser()
    batch_cli.configure(parser)
    with pytest.raises(UsageError, match=word):
        ray_batch.pool_of(parser.parse_args(["r.jsonl", "a", "-o", "d", *flags]))


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
