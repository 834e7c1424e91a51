"""Batches on Ray without Ray: which Ray is joined, what it must have room for, and when a batch is given up."""

from __future__ import annotations

import argparse
import asyncio
import json
from types import SimpleNamespace

import pytest

from intaglio.profiles.errors import ToolError, UsageError
from intaglio.runtimes import batch_cli, ray_batch


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


class FakeRay:
    """Ray as `begin` sees it: `nodes` with CPUs and GPUs."""

    def __init__(self, *nodes, error=None):
        self.found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
        self.error, self.asked, self.running = error, None, False

    def is_initialized(self):
        return self.running

    def init(self, **flags):
        self.asked = flags
        if self.error:
            raise self.error
        self.running = True

    def nodes(self):
        return self.found

    def shutdown(self):
        self.running = False


def test_a_batch_joins_no_ray_that_it_was_not_told_of(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray = FakeRay((1, 0))
    assert ray_batch.begin(ray, ray_batch.Pool())
    assert ray.asked["address"] == "local"
    assert ray.asked["include_dashboard"] is False
    ray = FakeRay((1, 0))
    assert ray_batch.begin(ray, ray_batch.Pool(address="auto"))
    assert ray.asked["address"] == "auto"


@pytest.mark.parametrize("address", ["auto", "local", "127.0.0.1:1"])
def test_a_ray_that_is_not_there_is_one_line(address):
    """HOST:PORT is tried first: Ray itself tries for ever."""
    ray = FakeRay((1, 0), error=ConnectionError("Traceback\n  of many lines\nCould not find any running Ray instance."))
    with pytest.raises(ToolError, match="--ray without an address") as caught:
        ray_batch.begin(ray, ray_batch.Pool(address=address))
    assert "\n" not in str(caught.value)
    assert (ray.asked is None) == (":" in address)


@pytest.mark.parametrize(
    ("nodes", "wanted", "room"),
    [
        ([(2, 0)], {"replicas": 2}, 2),
        ([(2, 0)], {"replicas": 3}, 2),
        ([(2, 0), (2, 0)], {"num_cpus": 4}, 0),  # no actor is on two nodes
        ([(8, 1), (8, 0)], {"replicas": 2, "num_gpus": 1}, 1),
        ([(8, 1)], {"replicas": 4, "num_gpus": 0.25}, 4),
        ([(1, 0)], {"replicas": 10, "num_cpus": 0.1}, 10),
        ([(1, 0)], {"replicas": 3, "num_cpus": 0}, 3),
    ],
)
@pytest.mark.parametrize("address", ["local", "auto"])
def test_actors_that_no_node_has_room_for_are_refused(nodes, wanted, room, address):
    ray, pool = FakeRay(*nodes), ray_batch.Pool(address=address, **wanted)
    if room >= pool.replicas:
        assert ray_batch.begin(ray, pool)
        return
    with pytest.raises(UsageError, match=f"the {room} that"):
        ray_batch.begin(ray, pool)
    assert not ray.running


def test_a_batch_ends_whose_artifact_cannot_be_loaded_again(monkeypatch):
    """Its lines would wait for a worker for ever; the plain batch looks, too."""
    model = SimpleNamespace(name="emoji", process=None, unloaded=False, failures=batch_cli.MOST_FAILURES)
    maker = ray_batch.Maker.__new__(ray_batch.Maker)
    maker.hub, maker.room, maker.at_once = SimpleNamespace(models={"emoji": model}), None, 1
    ended = []

    async def run(self):
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    monkeypatch.setattr("intaglio.runtimes.batch.Batch.run", run)
    monkeypatch.setattr(batch_cli, "REFRESH", 0.01)
    rows = {"number": [1], "line": [json.dumps(["a", {"prompt": "x"}])]}

    async def made():
        model.failures = 0
        work = asyncio.create_task(maker.made(rows))
        await asyncio.sleep(0.05)
        assert not work.done()
        model.failures = batch_cli.MOST_FAILURES
        await asyncio.wait_for(work, 10)

    with pytest.raises(ToolError, match="emoji could not be loaded 3 times; what is done is kept"):
        asyncio.run(made())
    assert ended == [True]
