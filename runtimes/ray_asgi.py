"""ASGI middleware between Ray's proxy and the application: what Ray does unlike a server of its own."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.runtimes.serve_guard import App, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
FAREWELL = 5.0  # seconds for the end of a request whose client is gone


def under_ray(app: App) -> App:
    """The application as Ray calls it.

    ``X-Request-ID`` is Ray's alone, whose proxy adds its own to every answer. The application is told it, as
    ``state["id"]``, where it is fit for a log: clients may choose it.

    Ray cancels a request whose client hangs up. To the application that would be the server's end; it hears the
    client's farewell instead, as from a server that listens itself.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = dict(scope.get("headers", ())).get(REQUEST_ID, b"").decode("latin-1")
        if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII):
            scope.setdefault("state", {})["id"] = given
        gone = asyncio.Event()

        async def heard() -> Message:
            message, farewell = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
            try:
                await asyncio.wait({message, farewell}, return_when=asyncio.FIRST_COMPLETED)
                return message.result() if message.done() else {"type": "http.disconnect"}
            finally:
                message.cancel()
                farewell.cancel()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message.get("headers", ()) if pair[0].lower() != REQUEST_ID]
            await send(message)

        work = asyncio.ensure_future(app(scope, heard, answer))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.wait({work}, timeout=FAREWELL)
            work.cancel()
            raise

    return wrapped
