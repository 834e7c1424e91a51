"""A worker that dies, hangs or has no memory takes its own requests with it and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import serve_stub
from serve_stub import ending, order, started, until
from serving import serving

from intaglio.runtimes import serve_faults, serve_model
from intaglio.runtimes.serve_errors import Lost
from intaglio.runtimes.serve_process import LoadFailed

STEP = 0.02
WATCHDOG = 8.0  # seconds; a new worker takes a tenth for its first step, on a machine that is busy more than one
LONG = {"scheduler": "ddim"}  # which allows as many steps as training had
NULL = ("--backend", "null", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    serve_stub.findable()
    return serve_stub.hollow(tmp_path_factory.mktemp("crash") / "one")


def only(hub):
    return next(iter(hub.models.values()))


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("act", "status"), [("memory", 503), ("starved", 503), ("defect", 500)])
def test_a_request_that_fails_alone_leaves_its_neighbours_their_pictures(folder, act, status):
    async def work():
        async with started(folder, seconds=STEP) as hub:
            alone = [await ending(hub.submit(order("heart", seed=seed))) for seed in range(2)]
            pid = only(hub).process.pid
            beside = [hub.submit(order("heart", seed=0)), hub.submit(order(act)), hub.submit(order("heart", seed=1))]
            first, error, second = [await ending(ticket) for ticket in beside]
            assert error.status == status
            assert serve_stub.SECRET not in error.message
            assert [first, second] == alone
            assert (only(hub).process.pid, only(hub).restarts, hub.ready) == (pid, 0, True)

    asyncio.run(work())


def kill(hub):
    os.kill(only(hub).process.pid, signal.SIGKILL)


DEATHS = {  # how -> (the first word of a prompt in the worker, what is done from outside, words of the answer)
    "kill -9": ("heart", kill, "died"),
    "native abort": ("abort", lambda hub: None, "died"),
    "hang": ("hang", lambda hub: None, "did not answer"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_dead_worker_fails_what_was_in_it_and_the_next_one_serves_what_waited(folder, how):
    word, deed, said = DEATHS[how]

    async def work():
        async with started(folder, seconds=STEP, concurrency=2, watchdog=WATCHDOG) as hub:
            alone = await ending(hub.submit(order("heart", seed=9)))
            inside = [hub.submit(order("heart 0", steps=200, seed=0))]
            await until(lambda: inside[0].steps_done)
            inside.append(hub.submit(order(f"{word} 1", steps=200, seed=1)))  # acts when the other is under way
            waiting = [hub.submit(order("heart", seed=9)) for _ in range(3)]
            await until(lambda: inside[1].steps_done)
            deed(hub)
            errors = [await ending(ticket) for ticket in inside]
            assert not hub.ready, "no worker is there"
            assert [error.status for error in errors] == [503, 503]
            assert all(said in error.message and "Retry-After" in error.headers for error in errors)
            assert [await ending(ticket) for ticket in waiting] == [alone] * 3
            assert hub.ready
            assert only(hub).restarts == 1
            assert not hub.jobs

    asyncio.run(work())


def test_a_request_that_a_dying_worker_had_not_looked_at_is_served_by_the_next_one(folder):
    async def work():
        async with started(folder, seconds=0.5) as hub:
            inside = hub.submit(order("heart", steps=50))
            await until(lambda: inside.steps_done == 1)
            late = [hub.submit(order("heart", seed=seed, steps=1)) for seed in range(2)]
            assert [len(ticket.jobs) for ticket in late] == [1, 1]
            assert len(hub.queue) == 0, "the worker has them, and computes a step of the first one"
            kill(hub)
            assert (await ending(inside)).status == 503
            assert [len(await ending(ticket)) for ticket in late] == [1, 1]

    asyncio.run(work())


def test_a_server_that_was_held_up_does_not_take_its_worker_for_dead(folder):
    async def work():
        async with started(folder, seconds=STEP, watchdog=1.0) as hub:
            ticket = hub.submit(order("heart", steps=40))
            await until(lambda: ticket.steps_done)
            time.sleep(1.5)  # nothing in this process runs meanwhile
            assert len(await ending(ticket)) == 1
            await asyncio.sleep(1.5)  # a worker at rest is not overdue either
            assert only(hub).restarts == 0

    asyncio.run(work())


def test_a_worker_that_hangs_is_found_though_nobody_waits_for_long_and_sigterm_is_the_servers(folder):
    """Deadlines earlier than the watchdog must not hide it: each would end before the worker was late.

    systemd sends SIGTERM to every process of a service, and the server lets what is under way end.
    """

    async def work():
        async with started(folder, seconds=STEP, watchdog=1.0) as hub:
            pid = only(hub).process.pid
            ticket = hub.submit(order("heart", steps=10))
            await until(lambda: ticket.steps_done)
            os.kill(pid, signal.SIGTERM)
            assert len(await ending(ticket)) == 1
            assert (only(hub).process.pid, only(hub).restarts) == (pid, 0)
            os.kill(pid, signal.SIGSTOP)
            end = time.monotonic() + 20
            while not only(hub).restarts:
                assert (await ending(hub.submit(order("heart", deadline=0.3)))).status in (503, 504)
                assert time.monotonic() < end, "it was not found"
            assert len(await ending(hub.submit(order("heart")))) == 1

    asyncio.run(work())


def test_a_worker_whose_engine_fails_every_request_is_made_anew(folder):
    """After an illegal access every call on a GPU fails until the process ends. Too little memory is not that."""

    async def work():
        async with started(folder, seconds=STEP, concurrency=1) as hub:
            pid = only(hub).process.pid
            for word in ("memory", "memory", "memory", "defect", "defect", "heart", "defect"):
                await ending(hub.submit(order(word)))
            assert only(hub).process.pid == pid
            for _ in range(serve_faults.MOST):
                assert (await ending(hub.submit(order("broken")))).status == 500
            await until(lambda: only(hub).restarts == 1)
            assert len(await ending(hub.submit(order("heart")))) == 1

    asyncio.run(work())


def test_a_worker_comes_back_as_soon_as_it_can_be_loaded_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve_model, "RESTART_SECONDS", (0.0, 0.05))
    place = serve_stub.hollow(tmp_path / "one")

    async def work():
        async with started(place, seconds=STEP) as hub:
            place.rename(tmp_path / "away")
            kill(hub)
            await until(lambda: only(hub).failures >= 2)
            assert not hub.ready
            waiting = hub.submit(order("heart"))
            late = hub.submit(order("heart", deadline=0.1))
            assert (await ending(late)).status == 504
            (tmp_path / "away").rename(place)
            assert len(await ending(waiting)) == 1
            assert hub.ready

    asyncio.run(work())


def test_the_time_without_a_worker_is_not_taken_for_its_pace(folder, monkeypatch):
    monkeypatch.setattr(serve_model, "RESTART_SECONDS", (1.0,))

    async def work():
        async with started(folder, seconds=STEP) as hub:
            for seed in range(3):
                await ending(hub.submit(order("heart", seed=seed)))
            hub.submit(order("heart", steps=50))
            await until(lambda: hub.tally.steps > 15)
            kill(hub)
            await until(lambda: only(hub).process is not None and only(hub).process.alive)
            for seed in range(3):
                assert len(await ending(hub.submit(order("heart", seed=seed)))) == 1
            return only(hub).pace

    pace = asyncio.run(work())
    assert max(measured.seconds for measured in pace.measured) < 1.0  # of some thirty steps


def loading_badly(tmp_path, name, code):
    """A loader, as ``module:function``, in a module of its own."""
    (tmp_path / f"{name}.py").write_text(f"import os, time\n\ndef load(folder, **options):\n    {code}\n")
    return f"{name}:load"


STARTS = {  # how -> (the loader's code, words of the error)
    "dies": ("os.abort()", r"died while loading \(exit code -6\)"),
    "hangs": ("time.sleep(600)", "did not load its artifact within 1 s"),
    "refuses": ("raise MemoryError", "not enough memory"),
}


@pytest.mark.parametrize("how", STARTS)
def test_a_server_whose_worker_cannot_load_says_why_and_leaves_nothing_behind(folder, tmp_path, monkeypatch, how):
    code, words = STARTS[how]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(serve_stub, "LOADER", loading_badly(tmp_path, f"loader_{how}", code))
    before = children()

    async def work():
        async with started(folder, loading=1.0):
            raise AssertionError("it was loaded")

    with pytest.raises(LoadFailed, match=words):
        asyncio.run(work())
    assert children() <= before


def children():
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in found if alive(pid)}


def test_a_hub_that_ends_answers_everybody_and_ends_its_workers(folder):
    async def work():
        async with started(folder, seconds=STEP, concurrency=1) as hub:
            pid = only(hub).process.pid
            tickets = [hub.submit(order("heart", steps=900, seed=k, parameters=LONG)) for k in range(3)]
            await until(lambda: tickets[0].steps_done)
            await hub.close(1.0)
            errors = [await ending(ticket) for ticket in tickets]
            assert [error.status for error in errors] == [503] * 3
            with pytest.raises(Lost, match="about to end"):
                hub.submit(order("heart"))
            assert not alive(pid)
            assert only(hub).restarts == 0

    asyncio.run(work())


# Over HTTP, with real processes.


def ask(url, body=None, path="/v1/images/generations", headers=(), timeout=60):
    """(status, headers, JSON)."""
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **dict(headers)})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, json.loads(answer.read())
    finally:
        connection.close()


class Asking(threading.Thread):
    """A request under way; `result` is (status, headers, JSON)."""

    def __init__(self, url, body, headers=()):
        super().__init__(daemon=True)
        self.url, self.body, self.headers, self.result = url, body, headers, None
        self.start()

    def run(self):
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server was killed
            self.result = ask(self.url, self.body, headers=self.headers)

    def end(self):
        self.join(60)
        return self.result


# Of the null backend: many steps of a large picture take seconds, a small one milliseconds.
LARGE = {"prompt": "heart", "size": "1024x1024", "num_inference_steps": 150}
SMALL = {"prompt": "heart", "seed": 1}


def worker_of(server):
    """The process id of the server's one worker."""
    found = []
    for task in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        found += task.read_text().split()
    (pid,) = (int(pid) for pid in found if alive(pid))
    return pid


def ready(server):
    return ask(server.url, path="/ready")[0] == 200


def running(server):
    """Pictures under way, by the server's own count."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        found = re.search(r"^intaglio_running\S* (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1])


def come(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_over_http_kill_9_fails_one_request_with_an_id_and_the_server_serves_on(folder):
    with serving(folder, flags=(*NULL, "--concurrency", "1")) as server:
        before = ask(server.url, SMALL)
        large = Asking(server.url, LARGE)
        come(lambda: running(server) == 1)
        waiting = Asking(server.url, SMALL)
        time.sleep(0.1)
        os.kill(worker_of(server), signal.SIGKILL)
        status, headers, body = large.end()
        assert (status, body["error"]["code"]) == (503, "worker_lost")
        assert int(headers["retry-after"]) >= 1
        assert body["error"]["request_id"] == headers["x-request-id"]
        assert waiting.end()[0] == 200
        assert waiting.result[2]["data"] == before[2]["data"]
        come(lambda: ready(server))
        server.wait_for(f"{headers['x-request-id']} POST /v1/images/generations 503")

        # One that the worker had not looked at is not lost.
        pid = worker_of(server)
        os.kill(pid, signal.SIGSTOP)
        unseen = Asking(server.url, SMALL)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        assert unseen.end()[0] == 200

        # Who hangs up gives up the place.
        come(lambda: ready(server))
        host, port = server.url.removeprefix("http://").split(":")
        text = json.dumps(LARGE).encode()
        with socket.create_connection((host, int(port))) as line:
            head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            time.sleep(0.3)
        begin = time.monotonic()
        assert ask(server.url, SMALL)[0] == 200
        assert time.monotonic() - begin < 1.0  # measured 0.1; the large one takes several

        pid, large = worker_of(server), Asking(server.url, LARGE)
        time.sleep(0.3)
        server.process.kill()
        server.process.wait()
        come(lambda: not alive(pid), 2)  # though it computes
        large.join(5)


def test_sigterm_ends_what_is_under_way_and_then_the_server(folder):
    with serving(folder, flags=NULL) as server:
        pid, large = worker_of(server), Asking(server.url, {**LARGE, "num_inference_steps": 60})
        come(lambda: running(server) == 1)
        begin = time.monotonic()
        server.process.terminate()
        assert large.end()[0] == 200
        assert server.process.wait(20) == 0
        assert time.monotonic() - begin < 15
        assert not alive(pid)


def test_what_does_not_end_within_the_drain_is_answered_too(folder):
    with serving(folder, flags=(*NULL, "--drain", "0.2")) as server:
        large = Asking(server.url, LARGE)
        come(lambda: running(server) == 1)
        server.process.terminate()
        status, _, body = large.end()
        assert (status, body["error"]["code"]) == (503, "worker_lost")
        assert server.process.wait(20) == 0
