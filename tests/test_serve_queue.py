"""Who is served when: the queue, its limit, turns, priorities, deadlines, and what a cancelled request gives back."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import itertools
import time
import weakref

import pytest
import serve_stub
from serve_stub import Live, ending, order, until

from intaglio.runtimes.serve_errors import BadRequest, Busy, Late
from intaglio.runtimes.serve_pace import Pace, Work
from intaglio.runtimes.serve_queue import PRIORITIES, FairQueue

LOW, NORMAL, HIGH = (PRIORITIES[word] for word in ("low", "normal", "high"))
STEP = 0.02  # seconds of a step of the worker below; a picture has four where not said otherwise
PLACES = 6


@dataclasses.dataclass(eq=False)
class Item:
    client: str
    priority: int = NORMAL
    number: int = 0
    stays: bool = False


def filled(*items, limit=100):
    queue = FairQueue(limit)
    for item in items:
        queue.put(item)
    return queue


def drained(queue):
    return list(iter(lambda: queue.pop(lambda item: True), None))


def test_clients_take_turns_and_each_keeps_its_order():
    items = [Item("a", number=k) for k in range(3)] + [Item("b", number=k) for k in range(2)] + [Item("c")]
    found = [(item.client, item.number) for item in drained(filled(*items))]
    assert found == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]


def test_a_client_with_a_thousand_requests_delays_another_by_one():
    queue = filled(*(Item("greedy") for _ in range(1000)), limit=2000)
    for _ in range(10):
        queue.put(Item("modest"))
        assert "modest" in [queue.pop(lambda item: True).client for _ in range(2)]


def test_priorities_come_first_and_what_does_not_fit_holds_up_nobody():
    items = [Item("a", LOW), Item("b", NORMAL), Item("c", HIGH), Item("d", NORMAL)]
    queue = filled(*items)
    assert queue.pop(lambda item: item.client not in "cb").client == "d"
    assert [item.client for item in drained(queue)] == ["c", "b", "a"]


def test_the_queue_is_bounded_and_a_removed_item_gives_its_place_back():
    first, second, third = (Item("a", number=k) for k in range(3))
    queue = filled(first, second, limit=2)
    with pytest.raises(IndexError):
        queue.put(third)
    assert queue.remove(first)
    assert not queue.remove(first)
    queue.put(third)
    assert (len(queue), queue.room()) == (2, 0)
    queue.put_back(first)  # was served in vain: it had a place before
    assert drained(queue) == [first, second, third]


def test_what_is_ahead_is_what_is_served_before():
    """For every client, priority and number: the items that `ahead` names are those a queue serves first."""
    items = [Item("abc"[k % 3], (LOW, NORMAL, NORMAL, HIGH)[k % 4], k) for k in range(24)]
    for client, priority, count in itertools.product("abd", PRIORITIES.values(), (1, 2, 5)):
        queue = filled(*items)
        ahead = set(map(id, queue.ahead(client, priority, count)))
        new = [Item(client, priority, 100 + k) for k in range(count)]
        for item in new:
            queue.put(item)
        served = drained(queue)
        before = served[: served.index(new[-1])]
        missing = [item for item in before if item not in new and id(item) not in ahead]
        early = [item for item in items if id(item) in ahead and item not in before]
        assert not missing
        # Of each other client one more may be counted: whose turn comes first in a round is not known.
        assert len(early) <= 2


DISPLACED = {  # (places of a, of b, own places, asked for) -> of whom, or None
    (6, 0, 0, 1): ["a"],
    (6, 0, 0, 3): ["a", "a", "a"],
    (6, 0, 0, 4): None,  # a would keep fewer than that
    (4, 2, 0, 2): ["a", "a"],
    (3, 3, 0, 2): ["a", "b"],
    (3, 3, 0, 1): ["a"],
    (3, 0, 3, 1): None,
    (4, 0, 2, 1): ["a"],
    (0, 0, 6, 1): None,
    (3, 2, 0, 1): [],
}


@pytest.mark.parametrize("case", DISPLACED)
def test_a_full_queue_makes_room_at_the_cost_of_who_has_most(case):
    a, b, own, count = case
    items = [Item("a", number=k) for k in range(a)] + [Item("b") for _ in range(b)] + [Item("own") for _ in range(own)]
    found = filled(*items, limit=6).displaced("own", NORMAL, count, lambda item: True)
    assert (None if found is None else [item.client for item in found]) == DISPLACED[case]
    if found and found[0].client == "a":
        assert found[0].number == a - 1, "the newest goes"


def test_neither_higher_priorities_nor_what_has_begun_make_room():
    queue = filled(*(Item("a", HIGH) for _ in range(3)), *(Item("a", number=k, stays=k > 0) for k in range(3)), limit=6)
    assert [i.number for i in queue.displaced("b", NORMAL, 1, lambda item: not item.stays)] == [0]
    assert queue.displaced("b", NORMAL, 2, lambda item: not item.stays) is None
    assert queue.displaced("b", LOW, 1, lambda item: True) is None


def test_pace_counts_work_and_neither_rest_nor_a_worker_that_is_gone():
    pace, step = Pace(), Work(1, 4, 0.25)
    assert pace.estimate(step) == 0  # nothing is known
    now = 0.0
    for rest in (0.0, 1000.0, 5000.0):
        now += rest
        pace.begin(now)
        for k in range(10):
            now += 2.0
            pace.step(step)
            pace.tick(now, busy=k < 9)
        assert pace.estimate(step.times(1.5)) == pytest.approx(3.0)
    pace.begin(now)
    pace.step(step)
    pace.pause()
    pace.begin(now + 500)
    pace.tick(now + 500, busy=True)
    assert pace.estimate(step.times(1.5)) == pytest.approx(3.0)


def test_small_pictures_do_not_make_large_ones_look_hopeless():
    """Nor the other way round: what a step costs beside its pixels is not known from one size."""
    pace = Pace()
    pace.begin(0.0)
    pace.step(Work(10, 10 * 64 * 64, 1))
    pace.tick(10.0, busy=True)
    assert pace.estimate(Work(10, 10 * 1024 * 1024, 1)) == pytest.approx(10.0)
    assert pace.estimate(Work(10, 10 * 32 * 32, 1)) == pytest.approx(2.5)


class Worker:
    """A picture has four steps, which take `seconds` each, and so many seconds without a step after them."""

    def __init__(self, decode=0.0):
        self.pace, self.now, self.decode = Pace(), 0.0, decode
        self.pace.begin(self.now)

    def work(self, seconds, pictures):
        """What the pace says of a picture after each round of the last of so many."""
        said = []
        for _ in range(pictures):
            said.clear()
            for passed, step in [(seconds, Work(1, 4, 0.25))] * 4 + [(self.decode, Work())]:
                self.now += passed
                self.pace.step(step)
                self.pace.tick(self.now, busy=True)
                said.append(self.pace.estimate(Work(4, 16, 1)))
        return said


def test_pace_follows_a_slower_machine_within_a_queue_s_length_and_no_fast_stretch():
    worker = Worker()
    assert worker.work(0.05, 600) == pytest.approx([0.2] * 5)
    assert worker.work(0.1, 15)[-1] > 0.28  # after 6 s; by the long memory alone it is 0.21
    assert worker.work(0.1, 30)[-1] > 0.38
    assert worker.work(0.05, 60)[-1] > 0.22, "what was for a minute is not forgotten for 12 seconds"
    assert worker.work(0.05, 1500) == pytest.approx([0.2] * 5, rel=0.02)


def test_pace_is_no_slower_while_a_large_picture_is_decoded():
    """A round that takes longer than a memory has seconds, and has no steps."""
    worker = Worker(decode=40.0)
    assert all(48.0 < said < 1.4 * 60.0 for said in worker.work(5.0, 100))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """One worker that makes one picture at a time, a step in STEP seconds."""
    serve_stub.findable()
    folder = serve_stub.hollow(tmp_path_factory.mktemp("queue") / "one")
    live = Live(folder, seconds=STEP, concurrency=1, hub={"queue": PLACES, "deadline": 1000.0})
    yield live
    live.stop()


@pytest.fixture
def run(live):
    """Run a coroutine of the hub; everything has ended before and after, and nothing is known of the pace."""

    def call(work):
        async def alone():
            hub = live.hub
            forget(hub)
            try:
                return await work(hub)
            finally:
                for ticket in list(hub.tickets.values()):
                    ticket.cancel()
                assert not hub.jobs
                assert not hub.tickets
                assert len(hub.queue) == 0
                assert not next(iter(hub.models.values())).running

        return live.run(alone())

    return call


def forget(hub):
    """Nothing is known of how long pictures take, so that no deadline is hopeless."""
    for model in hub.models.values():
        model.pace = Pace()


async def busy(hub):
    """A picture that never ends is under way."""
    ticket = hub.submit(order(steps=1000, client="other", parameters={"scheduler": "ddim"}))
    await until(lambda: ticket.begun is not None)
    return ticket


def test_waiting_requests_are_served_by_turns_and_priorities(run):
    async def work(hub):
        first, ended = await busy(hub), []
        names = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "low": "c", "high": "d"}
        levels = {"low": LOW, "high": HIGH}
        tickets = {
            name: hub.submit(order(client=client, priority=levels.get(name, NORMAL), steps=1))
            for name, client in names.items()
        }
        first.cancel()

        async def watch(name):
            await tickets[name].result()
            ended.append(name)

        await asyncio.gather(*map(watch, tickets))
        return ended

    assert run(work) == ["high", "a1", "b1", "a2", "a3", "low"]


def test_a_full_queue_says_when_to_come_back_and_a_cancelled_request_gives_its_place_back_at_once(run):
    async def work(hub):
        await busy(hub)
        tickets = [hub.submit(order(client="a")) for _ in range(PLACES)]
        with pytest.raises(Busy) as refused:
            hub.submit(order(client="a"))
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        with pytest.raises(BadRequest, match=f"{PLACES + 1} are the most that can run and wait"):
            hub.submit(order(client="a", count=PLACES + 2))
        tickets[3].cancel()
        assert (await ending(tickets[3])).code == "cancelled"
        hub.submit(order(client="a"))
        assert len(hub.queue) == PLACES

    run(work)


def test_who_fills_the_queue_keeps_nobody_out(run):
    async def work(hub):
        await busy(hub)
        greedy = [hub.submit(order(client="greedy")) for _ in range(PLACES)]
        modest = [hub.submit(order(client="modest")) for _ in range(PLACES // 2)]
        ended = [ticket.finished.is_set() for ticket in greedy]
        assert ended == [False] * (PLACES // 2) + [True] * (PLACES // 2), "the newest of the greedy one went"
        error = await ending(greedy[-1])
        assert (error.status, "Retry-After" in error.headers) == (429, True)
        with pytest.raises(Busy):
            hub.submit(order(client="modest"))
        assert not any(ticket.finished.is_set() for ticket in modest)

    run(work)


def test_a_deadline_counts_from_arrival_and_ends_what_waits_at_once(run):
    async def work(hub):
        await busy(hub)
        forget(hub)
        arrival = time.monotonic()
        ticket = hub.submit(order(client="a", deadline=0.2))
        error = await ending(ticket)
        passed = time.monotonic() - arrival
        assert isinstance(error, Late)
        assert error.status == 504
        assert 0.2 <= passed < 0.2 + 5 * STEP, "while the worker was busy with another one"
        assert len(hub.queue) == 0

    run(work)


def test_a_deadline_ends_what_runs_within_a_step(run):
    async def work(hub):
        late = hub.submit(order(steps=1000, client="a", deadline=0.2, parameters={"scheduler": "ddim"}))
        begin, waiting = time.monotonic(), hub.submit(order(steps=1, client="b"))
        assert (await ending(late)).status == 504
        assert len(await ending(waiting)) == 1
        assert time.monotonic() - begin < 0.2 + 10 * STEP
        steps = hub.tally.steps
        await asyncio.sleep(5 * STEP)
        assert hub.tally.steps == steps, "nobody computes for who is gone"

    run(work)


def test_a_cancelled_picture_makes_room_within_one_step(run):
    async def work(hub):
        running = await busy(hub)
        waiting = hub.submit(order(steps=1, client="b"))
        await asyncio.sleep(3 * STEP)
        assert waiting.begun is None
        running.cancel()
        cancelled = time.monotonic()
        await until(lambda: waiting.begun is not None)
        return time.monotonic() - cancelled

    assert run(work) < 4 * STEP  # measured 1.3 steps: the rest of one, and the one that begins


def test_a_request_that_cannot_be_ready_in_time_is_refused_at_once(run):
    async def work(hub):
        for seed in range(4):
            await ending(hub.submit(order(seed=seed)))
        hub.submit(order(steps=100, client="a"))
        with pytest.raises(Busy, match="more than the 1 s allowed") as refused:
            hub.submit(order(client="a", deadline=1.0))
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 10
        return await ending(hub.submit(order(steps=1, client="a", deadline=60.0, priority=HIGH, seed=7)))

    assert len(run(work)) == 1


def test_what_is_behind_in_turn_does_not_make_a_deadline_hopeless(run):
    async def work(hub):
        for seed in range(4):
            await ending(hub.submit(order(seed=seed)))
        greedy = [hub.submit(order(steps=20, client="greedy", seed=k)) for k in range(PLACES - 1)]
        with pytest.raises(Busy, match="what is ahead"):
            hub.submit(order(steps=1, client="greedy", deadline=40 * STEP))
        assert len(await ending(hub.submit(order(steps=1, client="modest", deadline=70 * STEP)))) == 1
        assert not greedy[2].finished.is_set()

    run(work)


def test_nothing_of_an_ended_request_stays(run):
    async def work(hub):
        references = []
        for seed in range(20):
            ticket = hub.submit(order(seed=seed, steps=1))  # their deadline is far away
            await ending(ticket)
            references.append(weakref.ref(ticket))
        del ticket
        gc.collect()
        return sum(reference() is not None for reference in references)

    assert run(work) == 0


def test_a_request_id_that_comes_again_gets_its_own_picture(run):
    """The first one is cancelled while its last words are on their way."""

    async def work(hub):
        alone = await ending(hub.submit(order("red heart", steps=1, seed=5)))
        large = {"width": 1024, "height": 1024}  # whose file takes a while after its last step
        for _ in range(3):
            first = hub.submit(order("pizza", steps=1, seed=4, ident="mine", parameters=large))
            await until(lambda first=first: first.steps_done == 1)
            first.cancel()
            assert await ending(hub.submit(order("red heart", steps=1, seed=5, ident="mine"))) == alone
        with pytest.raises(BadRequest, match="under way already"):
            for _ in range(2):
                hub.submit(order(ident="twice"))

    run(work)


def test_values_that_json_cannot_carry_are_refused_before_they_wait(run):
    async def work(hub):
        for value in (float("inf"), float("nan")):
            with pytest.raises(BadRequest, match="not a finite number"):
                hub.submit(order(parameters={"vae_memory": value}))

    run(work)


def test_who_counts_wrongly_stops_nobodys_picture(run):
    def broken(what, facts):
        raise ZeroDivisionError

    async def work(hub):
        hub.listeners.append(broken)
        try:
            return await ending(hub.submit(order(steps=1)))
        finally:
            hub.listeners.remove(broken)

    assert len(run(work)) == 1


def test_what_was_made_is_gone_with_its_last_reader(live):
    """Not when the garbage collector comes by, or at the deadline: a thousand large pictures may wait by then."""
    current = contextvars.ContextVar("current")

    async def request():
        ticket = live.hub.submit(order())
        current.set({"ticket": ticket})  # as frameworks do, which keep a request in the context it runs in
        assert len(await ending(ticket)) == 1
        return weakref.ref(ticket)

    async def work():
        gone = await asyncio.create_task(request())
        await asyncio.sleep(0.1)
        return gone()

    gc.disable()
    try:
        assert live.run(work()) is None
    finally:
        gc.enable()
