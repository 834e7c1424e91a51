"""Connections of clients that read nothing, ask nothing, or send what is no HTTP."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import serve_stub
import uvicorn
from uvicorn.server import ServerState

from intaglio.runtimes.serve_connection import connection_class
from intaglio.runtimes.serve_limits import Limits


@contextlib.asynccontextmanager
async def listening(app, **limits):
    """The server's connections around an application; yields a function that opens one, and the set of them."""
    found = Limits({"body_seconds": 1, **limits})
    kind = connection_class(found, lambda error: (b"{}", "0" * 32))
    config, state = uvicorn.Config(app, http=kind, ws="none", log_config=None, proxy_headers=False), ServerState()
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: kind(config, state, {}), "127.0.0.1", 0)
    lines = []

    async def connect(data, limit=2**16):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=limit)
        lines.append(writer)
        writer.write(data)
        await asyncio.sleep(0.05)
        return reader, writer

    async with server:
        yield connect, state.connections
        for writer in lines:
            writer.transport.abort()
        await asyncio.sleep(0)


def answering(size, stream=False):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000 if stream else 0):
            await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        await send({"type": "http.response.body", "body": b"x" * size})

    return app


ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("app", "asks"),
    [(answering(2**25), ASK), (answering(2**25), CLOSING), (answering(2**20, stream=True), ASK)],
    ids=["kept open", "to be closed", "a stream"],
)
def test_who_reads_nothing_of_an_answer_is_cut_off(app, asks):
    """``body_seconds``; the answer, or the stream that waits, would be held for as long as the client likes."""

    async def run():
        async with listening(app) as (connect, connections):
            await connect(asks, limit=1)
            assert len(connections) == 1
            await serve_stub.until(lambda: not connections, seconds=8)

    asyncio.run(run())


def test_who_reads_slowly_gets_all_of_it():
    async def run():
        async with listening(answering(2**24)) as (connect, _):
            reader, _ = await connect(CLOSING, limit=1)
            taken = 0
            while piece := await reader.read(2**20):
                taken += len(piece)
                await asyncio.sleep(0.03 * len(piece) / 2**18)  # twice as long as nothing may be read
            return taken

    assert asyncio.run(run()) > 2**24


def test_of_too_many_connections_the_oldest_that_asks_nothing_goes():
    waiting = asyncio.Event()

    async def app(scope, receive, send):
        await waiting.wait()

    async def run():
        async with listening(app, connections=3, body_seconds=20) as (connect, connections):
            busy, *others = [(await connect(data))[0] for data in (ASK, b"", b"GET", b"")]
            await asyncio.sleep(0.05)
            assert len(connections) == 3
            assert [reader.at_eof() for reader in (busy, *others)] == [False, True, False, False]
            for _ in range(3):
                await connect(ASK)
            await asyncio.sleep(0.05)
            assert not busy.at_eof(), "somebody waits for an answer there"
            waiting.set()

    asyncio.run(run())


def test_what_is_no_chunk_after_the_answer_ends_the_connection_quietly():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def run():
        defects = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: defects.append(context))
        async with listening(app) as (connect, _):
            reader, writer = await connect(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"zz\r\n")
            return await asyncio.wait_for(reader.read(), 5), defects

    found, defects = asyncio.run(run())
    assert found.startswith(b"HTTP/1.1 401")
    assert found.count(b"HTTP/1.1") == 1
    assert defects == []
