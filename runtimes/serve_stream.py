"""Answers that come piece by piece, of a request that does not outlive them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from intaglio.runtimes.serve_ticket import Ticket


class EventStream(StreamingResponse):
    """Server-sent events of a ticket. However they end, be it before the first one, the ticket ends with them."""

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()  # the client went away
