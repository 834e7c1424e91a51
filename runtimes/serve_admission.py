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
    measured, since what is taken at the brink is late as often as not.

    Raises:
        Busy: it could not.
    """
    running = (job for job in hub.jobs.values() if job.process is not None)
    waiting = hub.queue.ahead(order.client, order.priority, order.count)
    ahead = (job.rest for job in (*running, *waiting) if job.model is model)
    wait = CAUTION * model.pace.estimate(total(ahead)) + model.pace.estimate(work.times(order.count))
    if wait > limit:
        hub.tally.count("hopeless")
        raise Busy(f"what is ahead takes about {wait:.0f} s, more than the {limit:g} s allowed", seconds=wait - limit)


def make_places(hub: Hub, model: Model, order: Order) -> None:
    """See that an order can wait; where the queue is full, at the cost of who has more pictures in it.

    Raises:
        BadRequest: it has more pictures than the queue has places.
        Busy: nobody has more.
    """
    if order.count > hub.queue.limit:
        raise BadRequest(f"{order.count} pictures at once, the queue holds {hub.queue.limit}", param="n")
    seconds = model.pace.estimate(total(job.rest for job in hub.jobs.values() if job.model is model)) / 2
    others = hub.queue.displaced(order.client, order.priority, order.count, lambda job: job.ticket.waits)
    if others is None:
        hub.tally.count("full")
        raise Busy(f"{len(hub.queue)} pictures wait and no more may", seconds=seconds)
    for ticket in {job.ticket for job in others}:
        hub.tally.count("full")
        ticket.fail(Busy("the queue is full, and others have fewer pictures in it", seconds=seconds))
