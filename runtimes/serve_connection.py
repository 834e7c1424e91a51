"""HTTP/1.1 connections: uvicorn's, which wait for no client for ever and say errors as the routes do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from intaglio.runtimes.serve_errors import BadRequest, ServeError
from intaglio.runtimes.serve_limits import Limits

LINGER_SECONDS = 2.0  # for what a client still sends when it has its answer; cut off at once it might not read that


def connection_class(limits: Limits, said: Callable[[ServeError], tuple[bytes, str]]) -> type[H11Protocol]:
    """What uvicorn makes one of for every connection.

    Args:
        limits: ``body_seconds`` is for a request's headers, too.
        said: the body of an error and the request's id.
    """

    class Connection(H11Protocol):
        """Closed where a request's headers, or what is left of an answered request, take too long."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.allow(limits["body_seconds"])

        def connection_lost(self, exc: Exception | None) -> None:
            self.allow(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                if self.timer is None:
                    self.allow(limits["body_seconds"])
            elif not self.answered():
                self.allow(None)  # `Guard` bounds the body's time

        def on_response_complete(self) -> None:
            unread = self.answered()
            super().on_response_complete()
            if unread:
                self.allow(LINGER_SECONDS)

        def answered(self) -> bool:
            """Whether the client still sends a body that was answered already."""
            return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

        def allow(self, seconds: float | None) -> None:
            """Close after so many seconds, whatever comes in them; ``None``: not."""
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)

        def send_400_response(self, msg: str) -> None:
            error = BadRequest(f"this is not HTTP/1.1, or its headers are longer than {limits['header_bytes']} bytes")
            body, ident = said(error)
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "x-content-type-options": "nosniff",
                "x-request-id": ident,
                "connection": "close",
            }
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            for event in (h11.Response(status_code=400, headers=pairs), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Connection
