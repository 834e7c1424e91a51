"""OpenAI's Batch API: ``/v1/batches``, with the files of `intaglio.runtimes.serve_files`.

Lines have the priority ``low``, and of each worker's places one is left free where it has several, so that a request
that somebody waits for begins at the next step. Batches are kept in memory: none survives a restart of the server,
and a client that finds its batch gone sends it again. A batch is its sender's, as files are.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.batch import Batch, Made, Places, result_line, written
from intaglio.runtimes.batch_file import Fault, RequestFile
from intaglio.runtimes.serve_errors import BadRequest, NotFound, ServeError
from intaglio.runtimes.serve_files import MEDIA, REFUSED, add_files, page
from intaglio.runtimes.serve_openai import answer, error_body
from intaglio.runtimes.serve_room import Protocol, Room
from intaglio.runtimes.serve_store import Expiry, Store, Stored

LOG = logging.getLogger("intaglio.serve")
WINDOW = 86_400  # seconds of the completion window
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
EXPIRED = {"code": "batch_expired", "message": "the completion window was over before this request was done"}


class BatchRequest(BaseModel):
    """The body of ``POST /v1/batches``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: Literal["/v1/images/generations"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    output_expires_after: Expiry | None = None


class BatchesQuery(BaseModel):
    """Which batches are listed."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


@dataclass(slots=True, eq=False)
class Record:
    """One batch. `times` are Unix times of the states it was in, by OpenAI's names."""

    id: str
    owner: str
    asked: BatchRequest
    source: Stored
    output: Stored
    refused: Stored
    status: str = "validating"
    times: dict[str, int] = field(default_factory=lambda: {"created_at": int(time.time())})
    total: int = 0
    completed: int = 0
    failed: int = 0
    over: set[str] = field(default_factory=set)
    output_file_id: str | None = None
    error_file_id: str | None = None
    faults: list[Fault] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def state(self, status: str) -> None:
        """It is in another state from now on."""
        self.status = status
        self.times[f"{status}_at"] = int(time.time())

    def shown(self) -> dict[str, Any]:
        """OpenAI's ``batch`` object."""
        faults = [{"code": "invalid_line", **fault._asdict()} for fault in self.faults]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.asked.endpoint,
            "errors": {"object": "list", "data": faults} if faults else None,
            "input_file_id": self.source.id,
            "completion_window": self.asked.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            **self.times,
            "expires_at": self.times["created_at"] + WINDOW,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.asked.metadata,
        }


class Batches:
    """The batches of all clients."""

    def __init__(self, room: Room, store: Store) -> None:
        self.room, self.store = room, store
        self.records: dict[str, Record] = {}
        at_once = sum(max(1, model.settings.concurrency - 1) for model in room.hub.models.values())
        self.places = Places(at_once)
        # One thread of its own: files are long, and answers to others are written in asyncio's.
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def create(self, asked: BatchRequest, owner: str) -> Record:
        """Take a batch, and begin to check its file.

        Raises:
            NotFound: there is no such file.
            BadRequest: it is no file of requests, or there is no room for another batch.
            Busy: too many of this client's have not ended.
        """
        source = self.store.of(owner, asked.input_file_id, "input_file_id")
        if source.purpose != "batch":
            raise BadRequest("input_file_id names a file of results; send one of requests", param="input_file_id")
        self.forget()
        own = [record for record in self.records.values() if record.owner == owner]
        unfinished = sum(record.status not in ENDED for record in own) + 1
        self.room.limits.check("batch_unfinished", unfinished, "your batches that have not ended, with this one")
        what = "batches kept, delete their files: with this one"
        self.store.check_share("batch_files", len(self.records) + 1, len(own) + 1, what)
        self.store.check(owner, 2, 0)
        ident, expires = f"batch_{uuid.uuid4().hex}", asked.output_expires_after
        output = self.store.begin(owner, f"{ident}_output.jsonl", expires)
        refused = self.store.begin(owner, f"{ident}_error.jsonl", expires)
        source.users += 1
        record = self.records[ident] = Record(ident, owner, asked, source, output, refused)
        # In no context: what its lines do is not this request's, which is answered by then.
        work, context = self.work(record), contextvars.Context()
        record.task = asyncio.get_running_loop().create_task(work, context=context)
        return record

    def forget(self) -> None:
        """Batches that ended go with the last of their files."""
        for record in list(self.records.values()):
            idents = (record.source.id, record.output_file_id, record.error_file_id)
            if record.status in ENDED and not any(ident in self.store.files for ident in idents):
                del self.records[record.id]

    def of(self, owner: str, ident: str) -> Record:
        """A client's batch.

        Raises:
            NotFound: it has no such batch.
        """
        found = self.records.get(ident)
        if found is None or found.owner != owner:
            raise NotFound("there is no such batch", param="batch_id")
        return found

    def cancel(self, record: Record) -> None:
        """End a batch; what is done is kept.

        Raises:
            BadRequest: it has ended already.
        """
        if record.status in ENDED:
            raise BadRequest(f"the batch is {record.status} already", param="batch_id")
        if record.status != "cancelling":
            record.state("cancelling")
            assert record.task is not None
            record.task.cancel()

    async def work(self, record: Record) -> None:
        """A batch from its file to its results."""
        status = "failed"
        try:
            status = await self.made(record)
        except asyncio.CancelledError:
            status = "cancelled"
        except (ServeError, ToolError) as error:
            record.faults.append(Fault(None, getattr(error, "message", str(error))))
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("%s failed:\n%s%s", record.id, frames, type(error).__name__)  # noqa: TRY400 (it may quote a prompt)
            record.faults.append(Fault(None, "the server failed"))
        finally:
            record.source.users -= 1
            record.output_file_id, record.error_file_id = map(self.store.end, (record.output, record.refused))
            record.state(status)
            LOG.info("%s %s, %s of %s lines", record.id, status, record.completed, record.total)

    async def made(self, record: Record) -> str:
        """How it ended.

        Raises:
            ServeError: there is no room for its results.
        """
        loop = asyncio.get_running_loop()
        file = await loop.run_in_executor(self.reader, RequestFile, record.source.path, self.room.limits)
        try:
            if file.faults:
                record.faults = file.faults
                return "failed"
            record.total = len(file.lines)
            record.state("in_progress")

            async def deliver(made: Made) -> None:
                await self.deliver(record, made)

            batch = Batch(
                self.room, self.places, file, file.lines, owner=record.owner, salt=record.id,
                ident=lambda line, body: uuid.uuid4().hex, deliver=deliver,
            )  # fmt: skip
            try:
                async with asyncio.timeout(record.times["created_at"] + WINDOW - time.time()):
                    await batch.run()
            except TimeoutError:
                self.expire(record, file)
                return "expired"
            record.state("finalizing")
            return "completed"
        finally:
            file.close()

    async def deliver(self, record: Record, made: Made) -> None:
        """Write a line's result."""
        if made.error is None:
            assert made.ticket is not None
            assert made.request is not None
            body = answer(made.ticket, list(made.pictures), made.request.response_format)
        else:
            body = error_body(made.error, made.ident)
        data = await asyncio.to_thread(lambda: written(result_line(made, body)))
        self.store.append(record.output if made.error is None else record.refused, data)
        record.over.add(made.line.custom_id)
        record.completed += made.error is None
        record.failed += made.error is not None

    def expire(self, record: Record, file: RequestFile) -> None:
        """Say of the lines that are left that it is too late for them."""
        for line in file.lines:
            if line.custom_id not in record.over:
                ident = f"batch_req_{uuid.uuid4().hex}"
                result = {"id": ident, "custom_id": line.custom_id, "response": None, "error": EXPIRED}
                self.store.append(record.refused, written(result))
                record.failed += 1


def router(room: Room) -> APIRouter:
    """The routes of files and batches."""
    routes, store = APIRouter(tags=["openai"]), Store(room.limits, owners=room.owners)
    add_files(routes, room, store)
    batches = Batches(room, store)
    owner: Callable[[Request], str] = room.client

    @routes.post("/v1/batches", responses=REFUSED)
    async def create(request: Request, body: BatchRequest) -> dict[str, Any]:
        """Have a file of requests worked through."""
        return batches.create(body, owner(request)).shown()

    @routes.get("/v1/batches", responses=REFUSED)
    async def listed(request: Request, query: Annotated[BatchesQuery, Query()]) -> dict[str, Any]:
        """Your batches, the newest first."""
        own = [record for record in batches.records.values() if record.owner == owner(request)][::-1]
        return page(own, after=query.after, limit=query.limit, ident=lambda record: record.id, shown=Record.shown)

    @routes.get("/v1/batches/{batch_id}", responses=REFUSED)
    async def retrieve(request: Request, batch_id: str) -> dict[str, Any]:
        """How far a batch is."""
        return batches.of(owner(request), batch_id).shown()

    @routes.post("/v1/batches/{batch_id}/cancel", responses=REFUSED)
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        """End a batch; what is done is kept."""
        record = batches.of(owner(request), batch_id)
        batches.cancel(record)
        return record.shown()

    return routes


PROTOCOL = Protocol(prefixes=("/v1/files", "/v1/batches"), router=router, error=error_body, media=MEDIA)
