"""Lines of a file of requests made on the hub, for the verb ``batch`` and for the server's batches.

Lines share calls of the denoiser with each other and with whatever else is under way. A line without a seed gets one
drawn from its ``custom_id``, so that one that is made again gives the same pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.batch_file import Line, RequestFile
from intaglio.runtimes.serve_app import from_validation
from intaglio.runtimes.serve_errors import BadRequest, Busy, Late, Lost, ServeError
from intaglio.runtimes.serve_openai import ImageRequest, blaming, wish_of
from intaglio.runtimes.serve_process import log_defect
from intaglio.runtimes.serve_room import RANDOM_SEEDS, Room
from intaglio.runtimes.serve_ticket import Order, Picture, Ticket

RETRY_SECONDS = 1.0  # before a line is tried again that there was no room for
ALONE_TRIES = 2  # of a line whose worker died, then without any other line beside it


def checked(body: dict[str, Any], seed: int) -> ImageRequest:
    """The request of a body, with `seed` where it has none.

    Raises:
        BadRequest: it is not one, or wants a stream.
    """
    try:
        request = ImageRequest.model_validate(body)
    except ValidationError as error:
        raise from_validation(error) from None
    if request.stream:
        raise BadRequest("a batch does not stream; leave it out", param="stream")
    return request if request.seed is not None else request.model_copy(update={"seed": seed})


def seed_of(salt: str, custom_id: str) -> int:
    """The seed of a line that names none."""
    digest = hashlib.sha256(f"{salt}\n{custom_id}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") % RANDOM_SEEDS


def count_of(body: dict[str, Any], most: int) -> int:
    """Pictures that a body asks for, which was not checked yet."""
    count = body.get("n")
    return count if type(count) is int and 1 <= count <= most else 1


def request_of(owner: str) -> Request:
    """The request that a line stands for: of its owner, and behind those that somebody waits for."""
    state = {"client": owner}
    return Request({"type": "http", "method": "POST", "headers": [(b"x-priority", b"low")], "state": state})


class Places:
    """How many pictures of batches may be under way, of all batches together; lines get theirs in turns.

    Args:
        limit: 1 or more; a line with more pictures has all of them to itself.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.free, self.turn = limit, asyncio.Semaphore(limit), asyncio.Lock()

    async def take(self, count: int) -> int:
        """Wait for that many; how many must be given back."""
        wanted, taken = min(count, self.limit), 0
        try:
            async with self.turn:  # of two that gather, each could wait for the other's
                while taken < wanted:
                    await self.free.acquire()
                    taken += 1
        except BaseException:
            self.give(taken)
            raise
        return taken

    def give(self, count: int) -> None:
        """Give places back."""
        for _ in range(count):
            self.free.release()

    @contextlib.asynccontextmanager
    async def all(self) -> AsyncIterator[None]:
        """With no other line beside."""
        taken = await self.take(self.limit)
        try:
            yield
        finally:
            self.give(taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What became of a line: pictures with their ticket and request, or an error."""

    line: Line
    ident: str
    request: ImageRequest | None = None
    ticket: Ticket | None = None
    pictures: Sequence[Picture] = ()
    error: ServeError | None = None


class Batch:
    """Lines on their way.

    Args:
        file: of the requests.
        lines: those of it that are wanted.
        owner: the client whose turns they take.
        salt: what seeds are drawn from beside the ``custom_id``.
        ident: of a line with its body, by which its result is known.
        deliver: told of every line when it is over; what it raises ends the batch.
    """

    def __init__(
        self,
        room: Room,
        places: Places,
        file: RequestFile,
        lines: list[Line],
        *,
        owner: str = "",
        salt: str = "",
        ident: Callable[[Line, dict[str, Any]], str],
        deliver: Callable[[Made], Awaitable[None]],
    ) -> None:
        self.room, self.places, self.file, self.lines = room, places, file, lines
        self.owner, self.salt, self.ident, self.deliver = owner, salt, ident, deliver
        self.lost: list[Line] = []

    async def run(self) -> None:
        """Make all lines: together, and then those alone whose worker died, as one of them may be why.

        Raises:
            Exception: that `deliver` raised.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for line in self.lines:
                    body = self.file.body(line)
                    taken = await self.places.take(count_of(body, self.room.limits["pictures"]))
                    task = group.create_task(self.one(line, body))
                    task.add_done_callback(lambda _, taken=taken: self.places.give(taken))  # type: ignore[misc]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        for line in self.lost:
            async with self.places.all():
                await self.one(line, self.file.body(line), tries=ALONE_TRIES, again=False)

    async def one(self, line: Line, body: dict[str, Any], *, tries: int = 1, again: bool = True) -> None:
        """Make a line and deliver it; one whose worker died is put aside, where it is to be made `again`.

        Raises:
            Lost: the server ends.
        """
        ident = self.ident(line, body)
        try:
            request = checked(body, seed_of(self.salt, line.custom_id))
            asked = request_of(self.owner)
            with blaming(self.room, asked, request):
                ticket, pictures = await self.pictures(self.room.order(asked, wish_of(request)), tries)
            made = Made(line=line, ident=ident, request=request, ticket=ticket, pictures=pictures)
        except ServeError as error:
            if isinstance(error, Lost) and self.room.hub.draining:
                raise
            if isinstance(error, Lost) and again:
                self.lost.append(line)
                return
            made = Made(line=line, ident=ident, error=error)
        except ToolError as error:
            made = Made(line=line, ident=ident, error=BadRequest(str(error)))
        except Exception as error:  # a defect; the other lines have nothing to do with it
            log_defect(f"request {ident}", error)
            made = Made(line=line, ident=ident, error=ServeError("the server failed"))
        await self.deliver(made)

    async def pictures(self, order: Order, tries: int) -> tuple[Ticket, list[Picture]]:
        """Have an order made, as soon as there is room for it; `tries` times where its worker dies.

        Raises:
            ServeError: it cannot be made.
        """
        hub = self.room.hub
        while True:
            ticket = None
            try:
                ticket = hub.submit(order)
                return ticket, await ticket.result()
            except Busy:
                if ticket is None and not hub.jobs:  # nothing is ahead: it is this order that takes too long
                    raise
            except Late:
                if ticket is None or ticket.begun is not None:
                    raise
            except Lost:
                tries -= 1
                if tries == 0 or hub.draining:
                    raise
            finally:
                if ticket is not None:
                    ticket.cancel()
            await asyncio.sleep(RETRY_SECONDS)


def result_line(made: Made, body: dict[str, Any]) -> dict[str, Any]:
    """A line of results in OpenAI's form; `body` is the answer to the request."""
    status = 200 if made.error is None else made.error.status
    response = {"status_code": status, "request_id": made.ident, "body": body}
    return {"id": f"batch_req_{made.ident}", "custom_id": made.line.custom_id, "response": response, "error": None}


def written(value: Any) -> bytes:
    """A line of a file of results."""
    return json.dumps(value, allow_nan=False).encode() + b"\n"
