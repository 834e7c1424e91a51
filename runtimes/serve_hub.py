"""The heart of the server: requests wait in one queue, and begin on the worker of their artifact when there is room.

Everything here runs in one event loop; only worker processes compute. A picture is a job of its own, though a request
asks for several: so they share calls with others', and a client with many waits no longer than one with few.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import suggestion
from intaglio.runtimes.serve_admission import check_time, checked, make_places
from intaglio.runtimes.serve_errors import BadRequest, Lost, NotFound, ServeError
from intaglio.runtimes.serve_memory import Memory
from intaglio.runtimes.serve_model import Model, ModelSettings
from intaglio.runtimes.serve_pace import Work
from intaglio.runtimes.serve_process import log_defect
from intaglio.runtimes.serve_queue import FairQueue
from intaglio.runtimes.serve_swap import watch
from intaglio.runtimes.serve_ticket import Job, Order, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """What a server does with requests.

    Attributes:
        queue: pictures that may wait.
        deadline: seconds from arrival to the picture, where the request says none; none may ask for more.
        memory: bytes that all workers together may hold; the least recently used artifact is unloaded. 0: no limit.
    """

    queue: int = 64
    deadline: float = 300.0
    memory: int = 0


@dataclass(slots=True)
class Tally:
    """What was done since the start, for ``/metrics`` and tests."""

    accepted: int = 0
    pictures: int = 0
    steps: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, outcome: str) -> None:
        """One more."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class Hub:
    """Artifacts, their workers, and the requests to them.

    Raises:
        UsageError: two artifacts of one name.
        ArtifactError, MissingDependency, Unsupported: one of them cannot be served.
    """

    def __init__(self, models: Sequence[ModelSettings], settings: HubSettings | None = None) -> None:
        self.settings = settings or HubSettings()
        self.models: dict[str, Model] = {}
        for chosen in models:
            if chosen.name in self.models:
                raise UsageError(f"two artifacts are called {chosen.name!r}; name them: NAME=FOLDER")
            # A worker that is replaced may have begun a request that has all of its time before it.
            patience = max(chosen.patience, self.settings.deadline)
            self.models[chosen.name] = Model(dataclasses.replace(chosen, patience=patience), self.pump)
        self.memory = Memory(self, self.settings.memory)
        self.queue: FairQueue[Job] = FairQueue(self.settings.queue)
        self.jobs: dict[str, Job] = {}
        self.tickets: dict[str, Ticket] = {}
        self.tally = Tally()
        self.listeners: list[Any] = []  # called with (what, facts): metrics and traces
        self.started = self.draining = False
        self.loading: asyncio.Task[None] | None = None
        self.watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the first artifact, and the others that fit in memory beside it.

        Raises:
            UsageError: the first one does not fit.
            LoadFailed: one cannot be loaded.
        """
        try:
            self.memory.check(next(iter(self.models.values())))
            for model in self.models.values():
                if self.memory.fits(model):
                    await model.load()
                    await self.memory.make_fit(model)
        except BaseException:
            await self.close(0)
            raise
        self.watchers = [asyncio.create_task(watch(m, self.memory.make_way)) for m in self.models.values()]
        self.started = True
        self.pump()

    @property
    def ready(self) -> bool:
        """Whether every artifact can serve, and new requests are taken."""
        return self.started and not self.draining and all(model.ready for model in self.models.values())

    def held(self) -> int:
        """Bytes of all workers now."""
        return self.memory.held()

    def model(self, name: str | None) -> Model:
        """The artifact of a name; the first one where there is none.

        Raises:
            NotFound: there is no such artifact.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            allowed = ", ".join(self.models)
            raise NotFound(
                f"model {name!r} is unknown; allowed: {allowed}.{suggestion(name, self.models)}", param="model"
            )
        return self.models[name]

    def submit(self, order: Order) -> Ticket:
        """Take a request, or say at once why not.

        Raises:
            NotFound, BadRequest: it cannot be done.
            Busy: there is no room, or its deadline cannot be met.
            Lost: the server is about to end.
        """
        arrival = time.monotonic()
        model = self.model(order.model)
        if self.draining:
            raise Lost("the server is about to end; ask another one", seconds=30)
        request = checked(model, order)
        if order.ident in self.tickets:
            raise BadRequest(f"request id {order.ident!r} is under way already")
        steps = request.num_inference_steps
        work = Work(steps, request.width * request.height * steps, 1)
        limit = self.settings.deadline if order.deadline is None else min(order.deadline, self.settings.deadline)
        check_time(self, model, order, work, limit)
        make_places(self, model, order)
        ticket = Ticket(order, request, model, arrival + limit, self)
        self.tickets[ticket.ident] = ticket
        self.tally.accepted += 1
        self.tell("accepted", ticket=ticket)
        for job in ticket.make_jobs(work):
            self.jobs[job.ident] = job
            self.queue.put(job, anyway=True)  # there is a place, or it begins at once
        self.pump()
        return ticket

    def pump(self) -> None:
        """Begin what can begin; load what is waited for."""
        while (job := self.queue.pop(lambda waiting: waiting.model.places() > 0)) is not None:
            process = job.model.process
            assert process is not None
            job.model.used = time.monotonic()
            job.model.pace.begin(job.model.used)
            job.process = process
            self.tell("begun", job=job)
            try:
                process.run(job.ident, job.message(), job.heard)
            except Exception as error:
                log_defect(f"request {job.ticket.ident}", error)
                job.ticket.fail(ServeError("the server failed"))
        if self.started and self.loading is None and (wanted := self.memory.wanted()) is not None:
            self.loading = asyncio.get_running_loop().create_task(self._load(wanted))

    async def _load(self, model: Model) -> None:
        """Load an artifact, and begin what waited for it."""
        try:
            await self.memory.load(model)
        finally:
            self.loading = None
            self.pump()

    def over(self, *jobs: Job) -> None:
        """Jobs ended, or were dropped: their places are free."""
        for job in jobs:
            if self.jobs.pop(job.ident, None) is not None:
                self.queue.remove(job)
                if job.process is not None:
                    job.process.cancel(job.ident)
        self.pump()

    def again(self, job: Job) -> None:
        """A worker died before it had looked at this job: the next one gets it."""
        job.process = None
        self.queue.put_back(job)
        self.pump()

    def tell(self, what: str, **facts: Any) -> None:
        """Let those who count know."""
        for listener in self.listeners:
            try:
                listener(what, facts)
            except Exception as error:  # who counts wrongly stops nobody's picture
                log_defect(f"a listener of {what!r}", error)

    def ended(self, ticket: Ticket, outcome: str) -> None:
        """A request ended."""
        if self.tickets.pop(ticket.ident, None) is not None:
            self.tally.count(outcome)
            self.tell("ended", outcome=outcome, ticket=ticket)

    async def drain(self, patience: float) -> None:
        """Take nothing new, and wait for what was taken, for `patience` seconds."""
        self.draining = True
        end = time.monotonic() + patience
        while self.tickets and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def fail_all(self) -> None:
        """Answer what is under way: the server ends."""
        for ticket in list(self.tickets.values()):
            ticket.fail(Lost("the server ended before this request did; send it again"))

    async def close(self, patience: float = 5.0) -> None:
        """End everything; what is under way then is answered with `Lost`."""
        self.draining = True
        self.fail_all()
        tasks = [*self.watchers, *([self.loading] if self.loading else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.close(patience) for model in self.models.values()))


def facts_of(model: Model) -> Mapping[str, Any]:
    """What a client may know of an artifact."""
    manifest = model.reader.artifact.manifest
    process = model.process
    return {
        "family": manifest.family,
        "backend": model.settings.backend,
        "device": model.settings.device,
        "formats": {name: record.format for name, record in manifest.components.items()},
        "digest": manifest.digest,
        "loaded": process is not None,
    }
