"""HTTP/1.1 connections: uvicorn's, which wait for no client for ever and say errors as the routes do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from intaglio.runtimes.serve_errors import BadRequest, ServeError
from intaglio.runtimes.serve_limits import Limits

LOG = logging.getLogger("intaglio.serve")
LINGER_SECONDS = 2.0  # for what a client still sends when it has its answer; cut off at once it might not read that


class Connection(H11Protocol):
    """Closed where headers, what is left of an answered request, or reading an answer take too long.

    Attributes:
        limits, said: see `connection_class`.
    """

    limits: Limits
    said: Callable[[ServeError], tuple[bytes, str]]
    timer: asyncio.TimerHandle | None = None
    unread_timer: asyncio.TimerHandle | None = None
    unread = 0  # bytes of answers that wait for the client, when they were last looked at
    begun = 0.0

    def connection_made(self, transport: Any) -> None:
        """It begins."""
        super().connection_made(transport)
        self.begun = self.loop.time()
        self.allow(self.limits["body_seconds"])
        if len(self.connections) > self.limits["connections"]:
            self.make_room()

    def make_room(self) -> None:
        """Close one that asks nothing: those that never asked first, the oldest of them.

        Idle connections need no key, and this one might be a health check's.
        """
        idle = [other for other in self.connections if isinstance(other, Connection) and other.idle()]
        if others := [other for other in idle if other is not self]:
            min(others, key=lambda other: (other.cycle is not None, other.begun)).transport.close()
            LOG.info("more than %s connections: one that asked nothing was closed", self.limits["connections"])

    def idle(self) -> bool:
        """Whether nothing is asked here, nor answered."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.is_closing() and not self.transport.get_write_buffer_size()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended."""
        self.allow(None)
        self.watch(0)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than there is to send."""
        super().pause_writing()
        self.watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has read most of it."""
        super().resume_writing()
        whole = self.cycle is None or self.cycle.response_complete  # or more comes, and is watched then
        self.watch(self.transport.get_write_buffer_size() if whole else 0)

    def watch(self, unread: int) -> None:
        """Look again whether the client has read something of so many bytes; 0: there is nothing to read."""
        if self.unread_timer is not None:
            self.unread_timer.cancel()
        self.unread = unread
        self.unread_timer = self.loop.call_later(self.limits["body_seconds"], self.look) if unread else None

    def look(self) -> None:
        """Cut off a client that has read nothing: the answer, or the stream's work, would be held for it."""
        left = self.transport.get_write_buffer_size()
        if left < self.unread:
            self.watch(left)
            return
        LOG.info("a client read nothing of its answer for %s s and was cut off", self.limits["body_seconds"])
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """The client sent something."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self.timer is None:
                self.allow(self.limits["body_seconds"])
        elif not self.answered():
            self.allow(None)  # `Guard` bounds the body's time

    def on_response_complete(self) -> None:
        """An answer is written, which is not yet sent."""
        unsent = self.answered()
        self.watch(self.transport.get_write_buffer_size())
        super().on_response_complete()
        if unsent:
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
        """Say what is no HTTP, where that can still be said, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the request has its answer, or part of it
            self.transport.close()
            return
        error = BadRequest(f"this is not HTTP/1.1, or its headers are longer than {self.limits['header_bytes']} bytes")
        body, ident = self.said(error)
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


def connection_class(limits: Limits, said: Callable[[ServeError], tuple[bytes, str]]) -> type[H11Protocol]:
    """What uvicorn makes one of for every connection.

    Args:
        limits: ``body_seconds`` is for a request's headers, too, and for a client that reads nothing of its answer;
            of more than ``connections`` the oldest goes that asks nothing.
        said: the body of an error and the request's id.
    """
    return type("Served", (Connection,), {"limits": limits, "said": staticmethod(said)})
