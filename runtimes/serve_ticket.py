"""A request on its way through the server, and the pictures it is made of."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from intaglio.runtimes.serve_errors import Cancelled, Late, Lost, ServeError, of_kind
from intaglio.runtimes.serve_pace import Work
from intaglio.runtimes.serve_process import log_defect

if TYPE_CHECKING:
    from intaglio.runtimes.sampling import Request
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_model import Model
    from intaglio.runtimes.serve_process import Process

NORMAL = 1  # of PRIORITIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a client wants: `count` pictures of one prompt, picture k with the seed ``seed + k``.

    Attributes:
        model: a name, or ``None`` for the server's first.
        parameters: of `Pipeline.request`, without ``count``; the seed is among them.
        form, compression: of PICTURE_FORMATS, and 0 to 100 for those that lose something.
        texts: from a picture's seed to what its PNG carries, by key.
        previews: how many of the steps are shown, evenly spread; of the first picture. Only where events are read.
        client: who asks; turns are theirs.
        priority: a value of PRIORITIES.
        deadline: seconds from arrival; ``None``: the server's.
    """

    prompt: str
    parameters: Mapping[str, Any]
    model: str | None = None
    count: int = 1
    form: str = "png"
    compression: int = 95
    texts: Callable[[int], Mapping[str, str]] = lambda seed: {}
    previews: int = 0
    client: str = ""
    priority: int = NORMAL
    deadline: float | None = None
    ident: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture: the bytes of a file, its size in pixels, and how it was made."""

    data: bytes
    seed: int
    size: tuple[int, int]
    seconds: Mapping[str, float]
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Job:
    """One picture of a ticket, which is `work` as `Pace` counts it; of its steps so many are `done`.

    `ident` is never used twice: what a worker still says of a cancelled picture is nobody else's.
    """

    ident: str
    ticket: Ticket
    index: int
    work: Work
    done: int = 0
    process: Process | None = None

    @property
    def rest(self) -> Work:
        """What is left to do."""
        return self.work.times(max(0.0, 1 - self.done / self.work.steps))

    @property
    def model(self) -> Model:
        """The artifact it is for."""
        return self.ticket.model

    @property
    def client(self) -> str:
        """Whose turn it takes."""
        return self.ticket.order.client

    @property
    def priority(self) -> int:
        """See PRIORITIES."""
        return self.ticket.order.priority

    @property
    def seed(self) -> int:
        """Of this picture."""
        return int(self.ticket.order.parameters["seed"]) + self.index

    def message(self) -> dict[str, Any]:
        """The worker's ``run`` message."""
        order, steps = self.ticket.order, self.ticket.steps
        shown = [round((k + 1) * steps / (order.previews + 1)) - 1 for k in range(order.previews)]
        return {
            "prompt": order.prompt,
            "parameters": {**order.parameters, "seed": self.seed},
            "form": order.form,
            "compression": order.compression,
            "texts": dict(order.texts(self.seed)),
            "previews": [max(0, step) for step in shown] if self.index == 0 else [],
        }

    def heard(self, event: dict[str, Any], blobs: list[bytes]) -> None:
        """The worker says something of it."""
        try:
            self.ticket.heard(self, event, blobs)
        except Exception as error:
            log_defect(f"request {self.ticket.ident}", error)
            self.ticket.fail(ServeError("the server failed"))


class Ticket:
    """One request that was taken. One reader reads its events; it ends when all pictures are there, or by an error.

    Attributes:
        deadline: of a steady clock.
        progress: share of the steps that are done, of all pictures.
        preview: the last one that came, the bytes of a file.
        begun: when the first picture began, ``None`` while all wait.
        error: why it ended without pictures.
    """

    def __init__(self, order: Order, request: Request, model: Model, deadline: float, hub: Hub) -> None:
        self.ident = order.ident or uuid.uuid4().hex
        self.order, self.model, self.deadline, self.hub = order, model, deadline, hub
        self.arrival = time.monotonic()
        # In no context: the request's leads back here, and the loop keeps cancelled timers until they are due.
        alone = contextvars.Context()
        self.timer = asyncio.get_running_loop().call_later(deadline - self.arrival, self.expire, context=alone)
        self.begun: float | None = None
        self.over: float | None = None
        self.steps, self.size = request.num_inference_steps, (request.width, request.height)
        self.jobs: dict[int, Job] = {}
        self.pictures: dict[int, Picture] = {}
        self.steps_done = 0
        self.preview: bytes | None = None
        self.error: ServeError | None = None
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.finished = asyncio.Event()

    def make_jobs(self, work: Work) -> list[Job]:
        """One a picture."""
        for index in range(self.order.count):
            self.jobs[index] = Job(uuid.uuid4().hex, self, index, work)
        return list(self.jobs.values())

    @property
    def waits(self) -> bool:
        """Whether no picture of it has begun."""
        return not self.pictures and all(job.process is None for job in self.jobs.values())

    @property
    def progress(self) -> float:
        """0 to 1."""
        return min(1.0, self.steps_done / (self.steps * self.order.count))

    def heard(self, job: Job, event: dict[str, Any], blobs: list[bytes]) -> None:
        """A worker's event about one of its pictures."""
        if self.finished.is_set():
            return
        kind = event["event"]
        if kind == "step":
            self.begun = self.begun or time.monotonic()
            self.steps_done += 1
            job.done += 1
            self.model.pace.step(job.work.times(1 / job.work.steps))
            self.hub.tally.steps += 1
            self.hub.tell("step", ticket=self, seconds=event["seconds"])
            self.events.put_nowait({"event": "step", "picture": job.index, **event, "progress": self.progress})
        elif kind == "preview":
            self.preview = blobs[0]
            if self.order.previews:  # else it was asked for by `show`, and nobody may read the events
                told = {"event": "preview", "picture": job.index, "index": event["index"], "data": blobs[0]}
                self.events.put_nowait(told)
        elif kind == "done":
            self._done(job, event, blobs)
        elif event["kind"] == "unseen":
            self.hub.again(job)
        else:
            lost = event["kind"] == "lost"
            self.fail(Lost(event["message"]) if lost else of_kind(event["kind"], event["message"]))

    def _done(self, job: Job, event: Mapping[str, Any], blobs: list[bytes]) -> None:
        self.pictures[job.index] = Picture(
            data=blobs[0],
            seed=job.seed,
            size=(event["size"][0], event["size"][1]),
            seconds=event["seconds"],
            parameters=event["parameters"],
            warnings=tuple(event["warnings"]),
        )
        self.hub.tally.pictures += 1
        self.hub.tell("picture", ticket=self, picture=self.pictures[job.index])
        self.events.put_nowait({"event": "picture", "picture": job.index})
        self.hub.over(job)
        if len(self.pictures) == self.order.count:
            self._finish("ok")

    def _finish(self, outcome: str) -> None:
        self.over = time.monotonic()
        self.timer.cancel()  # which holds the ticket and all its pictures
        self.finished.set()
        self.events.put_nowait(None)
        self.hub.over(*self.jobs.values())
        self.hub.ended(self, outcome)
        self.jobs.clear()  # each names the ticket: the pictures of both would wait for the garbage collector

    def fail(self, error: ServeError) -> None:
        """End it without pictures."""
        if not self.finished.is_set():
            self.error = error
            self._finish(error.code)

    def cancel(self) -> None:
        """The client does not want it any more."""
        self.fail(Cancelled("the request was cancelled"))

    def expire(self) -> None:
        """Its time is over."""
        seconds = self.deadline - self.arrival
        self.fail(Late(f"the picture was not ready within {seconds:.3g} s of the request's arrival"))

    def finish_early(self) -> None:
        """Have the pictures as they are after the next step; those that wait are not made.

        A picture that is not under way yet ends the whole request, where none is.
        """
        waiting = [job for job in self.jobs.values() if job.process is None and job.index not in self.pictures]
        running = [job for job in self.jobs.values() if job.process is not None and job.index not in self.pictures]
        if not running and not self.pictures:
            self.cancel()
            return
        for job in running:
            assert job.process is not None
            job.process.send({"do": "finish", "id": job.ident})
        self.hub.over(*waiting)
        for job in waiting:
            del self.jobs[job.index]
        self.order = dataclasses.replace(self.order, count=len(self.jobs))
        if len(self.pictures) == self.order.count:
            self._finish("ok")

    def show(self) -> None:
        """Have a preview of the first picture's next step."""
        for job in self.jobs.values():
            if job.process is not None and job.index not in self.pictures:
                job.process.send({"do": "preview", "id": job.ident})
                return

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Its events: ``step``, ``preview`` with ``data``, ``picture``.

        Raises:
            ServeError: it ended without pictures.
        """
        while (event := await self.events.get()) is not None:
            yield event
        if self.error is not None:
            raise self.error

    async def result(self) -> list[Picture]:
        """The pictures in their order.

        Raises:
            ServeError: it ended without them.
        """
        await self.finished.wait()
        if self.error is not None:
            raise self.error
        return [self.pictures[index] for index in sorted(self.pictures)]
