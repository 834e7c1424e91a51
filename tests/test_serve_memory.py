"""Which artifact is loaded at whose cost, and who is refused: a hub whose workers are imagined, of 100 bytes each."""

from __future__ import annotations

import asyncio

import pytest
import serve_stub
from serve_stub import Worker, ending, imagined, order, until

from intaglio.runtimes.serve_errors import BadRequest, Busy, Lost
from intaglio.runtimes.serve_pace import Pace, Work
from intaglio.runtimes.serve_queue import PRIORITIES

LOW, NORMAL, HIGH = (PRIORITIES[word] for word in ("low", "normal", "high"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("memory")
    return [serve_stub.hollow(place / name) for name in "abc"]


def loaded(hub):
    return "".join(name for name, model in hub.models.items() if model.process is not None)


def pace_of(seconds):
    """What is known where a step took so many."""
    pace = Pace()
    pace.begin(0.0)
    pace.step(Work(1, 1, 0.25))
    pace.tick(seconds, busy=False)
    return pace


def begun(ticket):
    return all(job.process is not None for job in ticket.jobs.values())


async def settled(hub):
    """Nothing is being loaded or unloaded."""
    for _ in range(5):
        await until(lambda: hub.loading is None and not any(m.leaving for m in hub.models.values()))
        await asyncio.sleep(0.01)


def test_an_artifact_whose_requests_made_it_grow_is_loaded_again(folders):
    """Allocators keep what large pictures took: what a worker held in the end says nothing of the next one."""

    async def work():
        async with imagined(*folders[:2], loaded=1, hub={"memory": 150}) as hub:
            hub.models["a"].process.size = 1000
            other = hub.submit(order(model="b"))
            await until(lambda: begun(other))
            assert loaded(hub) == "b"
            other.cancel()
            again = hub.submit(order(model="a"))
            await until(lambda: begun(again))
            assert (loaded(hub), hub.held()) == ("a", 100)

    asyncio.run(work())


def test_an_artifact_that_is_too_large_on_the_disk_is_refused(folders):
    async def work():
        async with imagined(*folders[:2], loaded=1, hub={"memory": 150}) as hub:
            hub.models["b"].estimate = 151
            error = await ending(hub.submit(order(model="b")))
            assert isinstance(error, Lost)
            assert "does not fit" in error.message
            assert loaded(hub) == "a"

    asyncio.run(work())


def test_a_worker_that_leaves_or_loads_counts(folders):
    async def work():
        async with imagined(*folders[:2], hub={"memory": 1000}) as hub:
            a, b = hub.models.values()
            old = a.process
            old.gone.clear()  # it has a picture to end
            await a.swap()
            assert hub.held() == 300
            b.starting = Worker(150)
            assert hub.held() == 450
            b.starting = None
            old.gone.set()
            await settled(hub)
            assert hub.held() == 200

    asyncio.run(work())


@pytest.mark.parametrize("busy", [False, True])
def test_a_new_build_gets_the_memory_of_artifacts_that_do_nothing(folders, caplog, busy):
    """While it takes over there are two workers. Where nobody can give anything, that is said and done all the same."""

    async def work():
        async with imagined(*folders, hub={"memory": 350}) as hub:
            hub.models["c"].used = -1.0  # for longest
            tickets = [hub.submit(order(model=name)) for name in ("abc" if busy else "ab")]
            await hub.memory.make_way(hub.models["a"])
            assert loaded(hub) == ("abc" if busy else "ab")
            assert ("more than --memory" in caplog.text) == busy
            assert all(map(begun, tickets))

    asyncio.run(work())


def test_what_is_less_urgent_does_not_unload_what_is_waited_for(folders):
    async def work():
        async with imagined(*folders, loaded=2, concurrency=1, hub={"memory": 250}) as hub:
            tickets = [hub.submit(order(model="a", priority=HIGH, client=str(k))) for k in range(3)]
            hub.models["b"].used, hub.models["a"].used = 2.0, 1.0  # a was not used for longest
            low = hub.submit(order(model="c", priority=LOW))
            await until(lambda: begun(low))
            assert loaded(hub) == "ac"
            for ticket in [*tickets, low]:
                ticket.cancel()

    asyncio.run(work())


def test_what_is_less_urgent_waits_without_effort_until_it_may_have_the_memory(folders, monkeypatch):
    async def work():
        async with imagined(*folders[:2], loaded=1, concurrency=1, hub={"memory": 150}) as hub:
            tickets = [hub.submit(order(model="a", priority=HIGH, client=str(k))) for k in range(3)]
            looks = []
            monkeypatch.setattr(hub.models["b"], "look", lambda: looks.append(0) or asyncio.sleep(0))
            low = hub.submit(order(model="b", priority=LOW))
            for ticket in tickets[:2]:
                await asyncio.sleep(0.05)
                assert loaded(hub) == "a"
                assert not low.finished.is_set()
                ticket.cancel()
            assert not looks, "nothing is tried in vain"
            tickets[2].cancel()  # nobody waits for it any more
            await until(lambda: begun(low))
            assert (loaded(hub), len(looks)) == ("b", 1)

    asyncio.run(work())


def test_a_more_urgent_picture_that_comes_while_memory_is_made_keeps_its_artifact(folders):
    async def work():
        async with imagined(*folders, loaded=2, concurrency=1, hub={"memory": 250}) as hub:
            b, c = hub.models["b"], hub.models["c"]
            c.estimate = 250  # both others have to go
            b.used = -1.0
            b.process.gone.clear()
            low = hub.submit(order(model="c", priority=LOW))
            await until(lambda: b.leaving)
            first, second = [hub.submit(order(model="a", priority=HIGH, client=str(k))) for k in range(2)]
            next(iter(b.leaving)).gone.set()
            await settled(hub)
            assert (loaded(hub), begun(first), low.finished.is_set()) == ("a", True, False)
            second.cancel()
            first.cancel()
            await until(lambda: begun(low))

    asyncio.run(work())


def test_a_worker_that_is_replaced_may_take_as_long_as_a_request(folders):
    async def work():
        async with imagined(folders[0], hub={"deadline": 5000.0}) as hub:
            assert hub.models["a"].settings.patience == 5000
        async with imagined(folders[0], hub={"deadline": 5.0}) as hub:
            assert hub.models["a"].settings.patience == 600

    asyncio.run(work())


# Who may wait.


def test_pictures_that_wait_for_a_dead_artifact_do_not_keep_others_from_one_at_rest(folders):
    async def work():
        async with imagined(*folders[:2], concurrency=2, hub={"queue": 3}) as hub:
            hub.models["b"].process.alive = False
            stuck = [hub.submit(order(model="b", client="x")) for _ in range(3)]
            fine = [hub.submit(order(model="a", client="x")) for _ in range(2)]
            assert all(map(begun, fine))
            with pytest.raises(Busy):
                hub.submit(order(model="a", client="x"))
            assert not any(ticket.finished.is_set() for ticket in stuck), "nobody gave up a place for them"
            assert len(hub.queue) == 3

    asyncio.run(work())


def test_a_request_for_more_pictures_than_the_queue_has_places_begins_where_they_can(folders):
    async def work():
        async with imagined(folders[0], concurrency=4, hub={"queue": 1}) as hub:
            ticket = hub.submit(order(count=5))
            assert len(hub.queue) == 1
            with pytest.raises(Busy):  # another time it is taken
                hub.submit(order(count=2))
            with pytest.raises(BadRequest, match="6 pictures at once, 5 are the most"):
                hub.submit(order(count=6))
            ticket.cancel()
            with pytest.raises(BadRequest, match="6 pictures at once, 5 are the most"):
                hub.submit(order(count=6))

    asyncio.run(work())


def test_a_full_queue_says_to_come_back_when_those_that_fill_it_are_done(folders):
    async def work():
        async with imagined(*folders[:2], concurrency=1, hub={"queue": 2, "deadline": 1000.0}) as hub:
            a, b = hub.models.values()
            a.pace = pace_of(1.0)  # a step takes a second, a picture has four
            for _ in range(3):
                hub.submit(order(model="a", client="x"))
            b.process.alive = False
            with pytest.raises(Busy) as refused:
                hub.submit(order(model="b", client="x"))
            return float(refused.value.headers["Retry-After"])

    assert asyncio.run(work()) == 6  # half of what three pictures take


def test_nothing_is_refused_by_its_time_where_nothing_is_ahead_of_it(folders):
    """A spell in which the machine was slow would else be remembered for ever: only work shows that it is over."""

    async def work():
        async with imagined(folders[0], concurrency=1) as hub:
            (model,) = hub.models.values()
            model.pace = pace_of(1e6)
            first = hub.submit(order())
            assert begun(first)
            with pytest.raises(Busy, match="what is ahead"):
                hub.submit(order())
            first.cancel()
            assert begun(hub.submit(order()))

    asyncio.run(work())


def test_previews_are_kept_for_those_who_read_them_and_else_only_the_last_one(folders):
    """Who polls for progress has one made at every step, and reads no events."""

    async def work():
        async with imagined(folders[0]) as hub:
            held = {}
            for previews in (0, 2):
                ticket = hub.submit(order(steps=50, previews=previews))
                (job,) = ticket.jobs.values()
                for step in range(50):
                    job.heard({"event": "preview", "index": step}, [bytes([step])])
                assert ticket.preview == bytes([49])
                held[previews] = ticket.events.qsize()
                ticket.cancel()
            return held

    assert asyncio.run(work()) == {0: 0, 2: 50}
