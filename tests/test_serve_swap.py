"""Builds that take each other's place under load, and several artifacts in a memory that holds some of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from pathlib import Path

import pytest
import serve_stub
from serve_stub import ending, order, started, until

from intaglio.profiles import staging
from intaglio.profiles.artifact import generation_of
from intaglio.runtimes import serve_swap
from intaglio.runtimes.serve_errors import Lost
from intaglio.runtimes.serve_process import LoadFailed

SWAPS, CLIENTS, SEEDS = 4, 3, 3
STEP = 0.002


@pytest.fixture(scope="module", autouse=True)
def quick():
    serve_stub.findable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_swap, "LOOK_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two artifacts whose pictures differ, and the bytes of each one's pictures by seed."""
    place = tmp_path_factory.mktemp("builds")
    folders = [serve_stub.hollow(place / name, scaling_factor=factor) for name, factor in (("one", 1.0), ("two", 3.0))]

    async def work():
        async with started(*folders) as hub:
            return [[(await ending(hub.submit(order(model=f.name, seed=s))))[0] for s in range(SEEDS)] for f in folders]

    pictures = asyncio.run(work())
    assert not set(pictures[0]) & set(pictures[1])
    return folders, pictures


def replace(source, target):
    """As ``intaglio build --force`` does it."""
    temporary = Path(shutil.copytree(source, target.with_name(".building")))
    staging.swap(temporary, target)


def only(hub):
    return next(iter(hub.models.values()))


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_builds_replace_each_other_under_load_and_no_request_fails_or_mixes_them(builds, tmp_path, monkeypatch, how):
    folders, pictures = builds
    place = Path(shutil.copytree(folders[0], tmp_path / "served"))
    if how == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)

    async def client(hub, name, found, over):
        while not over.is_set():
            for seed in range(SEEDS):
                found.append((seed, await ending(hub.submit(order(seed=seed, client=name)))))

    async def work():
        found, over = [], asyncio.Event()
        async with started(place, seconds=STEP) as hub:
            clients = [asyncio.create_task(client(hub, f"client {k}", found, over)) for k in range(CLIENTS)]
            for k in range(SWAPS):
                await asyncio.to_thread(replace, folders[(k + 1) % 2], place)
                await until(lambda k=k: only(hub).swaps > k)
            await asyncio.sleep(0.1)
            over.set()
            await asyncio.gather(*clients)
            await until(lambda: not only(hub).leaving)  # the old workers' memory comes back
            assert only(hub).restarts == 0
            assert (await ending(hub.submit(order(seed=0))))[0] == pictures[SWAPS % 2][0]
        return found

    found = asyncio.run(work())
    failed = [answer for _, answer in found if not isinstance(answer, list)]
    assert not failed
    made = [[answer[0] == of[seed] for of in pictures] for seed, answer in found]
    assert all(any(row) for row in made), "a picture of neither build"
    assert all(sum(row[k] for row in made) > SEEDS for k in range(2)), "both builds were asked"


def test_a_build_that_cannot_be_loaded_leaves_the_old_one_serving(builds, tmp_path, caplog):
    folders, pictures = builds
    place = Path(shutil.copytree(folders[0], tmp_path / "served"))
    broken = Path(shutil.copytree(folders[1], tmp_path / "broken"))
    (broken / "tokenizer/tokenizer.json").write_text("{}")

    async def work():
        async with started(place, seconds=STEP) as hub:
            pid = only(hub).process.pid
            replace(broken, place)
            await until(lambda: only(hub).failures)
            await asyncio.sleep(0.3)
            assert only(hub).failures == 1, "it is not tried again and again"
            assert hub.ready
            assert (await ending(hub.submit(order(seed=0))))[0] == pictures[0][0]
            assert only(hub).process.pid == pid
            replace(folders[1], place)  # the next one is looked at
            await until(lambda: only(hub).swaps)
            assert (await ending(hub.submit(order(seed=0))))[0] == pictures[1][0]

    asyncio.run(work())
    said = [record.getMessage() for record in caplog.records if "the old one stays" in record.getMessage()]
    assert len(said) == 1
    assert str(tmp_path) not in said[0]


def test_a_swap_while_a_picture_is_made_ends_it_on_the_build_it_began_with(builds, tmp_path):
    folders, pictures = builds
    place = Path(shutil.copytree(folders[0], tmp_path / "served"))

    async def work():
        async with started(place, seconds=0.05) as hub:
            alone = await ending(hub.submit(order(steps=30, seed=1)))
            long = hub.submit(order(steps=30, seed=1))
            await until(lambda: long.steps_done)
            replace(folders[1], place)
            await until(lambda: only(hub).swaps)
            assert not long.finished.is_set(), "the new worker was there before the old one had ended"
            assert (await ending(hub.submit(order(seed=0))))[0] == pictures[1][0]
            assert await ending(long) == alone

    asyncio.run(work())


def test_a_picture_under_way_needs_nothing_of_the_folder(builds, tmp_path):
    """Which may be another build by then, or for a moment none."""
    folders, pictures = builds
    place = Path(shutil.copytree(folders[0], tmp_path / "served"))

    async def work():
        async with started(place, seconds=0.05) as hub:
            running = hub.submit(order(seed=0))
            await until(lambda: running.steps_done)
            place.rename(tmp_path / "away")
            assert (await ending(running))[0] == pictures[0][0]
            assert (await ending(hub.submit(order(seed=1))))[0] == pictures[0][1]

    asyncio.run(work())


def test_a_build_that_could_not_be_loaded_is_tried_again_ever_more_rarely(builds, monkeypatch, caplog):
    """Its copy had not ended, or there was no memory for it: no newer build comes then, though this one can be loaded.

    Until it can, the log does not fill with it.
    """
    monkeypatch.setattr(serve_swap, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(serve_swap, "AGAIN_SECONDS", (0.05, 0.1))
    folders, _ = builds
    tries = []

    class Served:
        name, process, generation = "one", object(), "an earlier one"
        settings = type("Settings", (), {"folder": folders[0]})

        async def swap(self):
            tries.append(time.monotonic())
            if len(tries) < 5:
                raise LoadFailed("the worker died while loading")
            Served.generation = generation_of(folders[0])

        def said(self, error):
            return str(error)

    async def make_way(model):
        pass

    async def work():
        watcher = asyncio.create_task(serve_swap.watch(Served(), make_way))
        await until(lambda: len(tries) == 5)
        await asyncio.sleep(0.15)
        watcher.cancel()

    asyncio.run(work())
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[0] >= 0.05
    assert min(pauses[1:]) >= 0.1
    assert len(tries) == 5, "once loaded it is not loaded again"
    assert [record.getMessage().rpartition("tried")[2] for record in caplog.records][:1] == [
        " again in 0 s: the worker died while loading"
    ]
    assert len(caplog.records) == 4


@contextlib.asynccontextmanager
async def three(tmp_path, fits):
    """A hub of artifacts a, b and c, of which `fits` have room at once."""
    folders = [serve_stub.hollow(tmp_path / name, scaling_factor=1.0 + k) for k, name in enumerate("abc")]
    async with started(folders[0]) as hub:
        await ending(hub.submit(order()))
        size = only(hub).held()
    async with started(*folders, seconds=STEP, hub={"memory": int(size * (fits + 0.3))}) as hub:
        yield hub


def loaded(hub):
    return "".join(name for name, model in hub.models.items() if model.process is not None)


def test_the_least_recently_used_artifact_makes_room_and_is_loaded_again(tmp_path):
    async def work():
        async with three(tmp_path, 2) as hub:
            assert loaded(hub) == "ab"
            first = {name: await ending(hub.submit(order(model=name))) for name in "ba"}
            for name, expected in {"c": "ac", "b": "bc", "c ": "bc", "a": "ac"}.items():
                found = await ending(hub.submit(order(model=name.strip())))
                assert first.setdefault(name.strip(), found) == found
                assert loaded(hub) == expected, f"after {name}"
                assert hub.ready, "what is not loaded is loaded when it is asked for"
                assert hub.held() <= hub.settings.memory

    asyncio.run(work())


def test_artifacts_that_do_not_fit_together_are_all_served_under_load(tmp_path):
    async def work():
        async with three(tmp_path, 1) as hub:
            tickets = [hub.submit(order(model=name, seed=k, client=name)) for k in range(2) for name in "abc"]
            answers = [await ending(ticket) for ticket in tickets]
            assert [type(answer) for answer in answers] == [list] * len(tickets)
            assert len(loaded(hub)) == 1
            assert not any(model.restarts for model in hub.models.values())

    asyncio.run(work())


def test_an_artifact_that_cannot_be_loaded_when_it_is_asked_for_fails_its_requests_alone(tmp_path):
    async def work():
        async with three(tmp_path, 1) as hub:
            away = (tmp_path / "b").rename(tmp_path / "away")
            failing, fine = hub.submit(order(model="b")), hub.submit(order(model="a"))
            error = await ending(failing)
            assert isinstance(error, Lost)
            assert str(tmp_path) not in error.message
            assert len(await ending(fine)) == 1
            assert len(await ending(hub.submit(order(model="a")))) == 1
            away.rename(tmp_path / "b")
            assert len(await ending(hub.submit(order(model="b")))) == 1

    asyncio.run(work())


def test_a_dead_worker_of_several_is_replaced_within_the_memory(tmp_path):
    async def work():
        async with three(tmp_path, 2) as hub:
            hub.models["a"].process.kill_group()
            tickets = [hub.submit(order(model=name, client=name)) for name in "cab"]
            assert [type(await ending(ticket)) for ticket in tickets] == [list] * 3
            await until(lambda: hub.loading is None and not any(m.leaving for m in hub.models.values()))
            assert len(loaded(hub)) <= 2

    asyncio.run(work())
