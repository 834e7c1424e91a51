"""Whether a request is taken: what is wrong with it, whether its deadline can be met, and whether it can wait."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.serve_errors import BadRequest, Busy, without_paths
from intaglio.runtimes.serve_pace import Work, total
from intaglio.runtimes.serve_queue import PRIORITIES

if TYPE_CHECKING:
    from intaglio.runtimes.sampling import Request
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_model import Model
    from intaglio.runtimes.serve_ticket import Order

CAUTION = 1.25  # on what is ahead: later ones share calls with a picture, and take some of its time


def checked(model: Model, order: Order) -> Request:
    """One picture of an order, as the family takes it.

    Raises:
        BadRequest: the family, or this artifact, cannot do it.
    """
    if order.priority not in PRIORITIES.values():
        raise BadRequest(f"priority {order.priority} is not allowed: {', '.join(map(str, PRIORITIES.values()))}")
    for name, value in order.parameters.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRequest(f"{name} is not a finite number", param=name)
    try:
        return model.reader.request(order.prompt, **order.parameters)
    except ToolError as error:
        raise BadRequest(without_paths(str(error), model.settings.folder)) from error


def check_time(hub: Hub, model: Model, order: Order, work: Work, limit: float) -> None:
    """Refuse at once what could not be ready within `limit` seconds; `work` is that of one of its pictures.

    What counts is what goes before it by priority and turns, at the pace of late; of that rather more than was
    measured, since what is taken at the brink is late as often as not. Where nothing goes before it, it is tried: what
    was slow need not be slow any more, and only work shows that.

    Raises:
        Busy: it could not.
    """
    running = (job for job in hub.jobs.values() if job.process is not None)
    waiting = hub.queue.ahead(order.client, order.priority, order.count)
    ahead = [job.rest for job in (*running, *waiting) if job.model is model]
    if not ahead:
        return
    wait = CAUTION * model.pace.estimate(total(ahead)) + model.pace.estimate(work.times(order.count))
    if wait > limit:
        hub.tally.count("hopeless")
        raise Busy(f"what is ahead takes about {wait:.0f} s, more than the {limit:g} s allowed", seconds=wait - limit)


def begin_now(hub: Hub, model: Model) -> int:
    """How many pictures of an artifact need no place in the queue: they begin at once."""
    return 0 if any(job.model is model for job in hub.queue) else model.places()


def relief(hub: Hub) -> float:
    """Seconds until places in a full queue are free: about half of what the artifact that gets on best has to do."""
    parts: dict[Model, list[Work]] = {job.model: [] for job in hub.queue}
    for job in hub.jobs.values():
        if job.model in parts:
            parts[job.model].append(job.rest)
    return min((model.pace.estimate(total(rest)) / 2 for model, rest in parts.items()), default=0.0)


def make_places(hub: Hub, model: Model, order: Order) -> None:
    """See that those of an order's pictures that have to wait can; in a full queue at the cost of who has more in it.

    Raises:
        BadRequest: it has more pictures than can run and wait, whenever it came.
        Busy: nobody has more.
    """
    most = hub.queue.limit + model.settings.concurrency
    if order.count > most:
        raise BadRequest(f"{order.count} pictures at once, {most} are the most that can run and wait", param="n")
    waiting = order.count - begin_now(hub, model)
    if waiting <= 0:
        return
    seconds = relief(hub)
    others = hub.queue.displaced(order.client, order.priority, waiting, lambda job: job.ticket.waits)
    if others is None:
        hub.tally.count("full")
        raise Busy(f"{len(hub.queue)} pictures wait and no more may", seconds=seconds)
    for ticket in {job.ticket for job in others}:
        hub.tally.count("full")
        ticket.fail(Busy("the queue is full, and others have fewer pictures in it", seconds=seconds))
