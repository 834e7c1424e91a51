"""A new build in an artifact's folder takes over as soon as it can; one that cannot be loaded is tried again later."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from intaglio.profiles.artifact import generation_of
from intaglio.runtimes.serve_model import Model

LOG = logging.getLogger("intaglio.serve")
LOOK_SECONDS = 0.5  # between looks at the folder
AGAIN_SECONDS = (5.0, 30.0, 120.0, 300.0)  # before the n-th further try of the same build, and all after the last


@dataclass(slots=True)
class Refusal:
    """The build that could not be loaded last. Its copy may not have ended, or the machine lacked something then."""

    generation: Any = None
    tries: int = 0
    due: float = 0.0

    def holds(self, generation: Any, now: float) -> bool:
        """Whether a build is not to be tried at `now` seconds of a steady clock."""
        return generation == self.generation and now < self.due

    def add(self, generation: Any, now: float) -> float:
        """It could not be loaded; seconds until it is tried again."""
        self.tries = self.tries + 1 if generation == self.generation else 1
        seconds = AGAIN_SECONDS[min(self.tries, len(AGAIN_SECONDS)) - 1]
        self.generation, self.due = generation, now + seconds
        return seconds


async def watch(model: Model, make_way: Callable[[Model], Awaitable[None]]) -> None:
    """Serve a new build as soon as it has taken the folder's place; while it cannot be loaded, the old one.

    `make_way` is asked for memory for a second worker, which there is while the old one ends what it began.
    """
    refusal = Refusal()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        found = generation_of(model.settings.folder)
        if model.process is None or found is None or found == model.generation:
            continue
        if refusal.holds(found, time.monotonic()):
            continue
        try:
            await make_way(model)
            await model.swap()
        except Exception as error:
            seconds = refusal.add(found, time.monotonic())
            said = model.said(error)
            LOG.error(  # noqa: TRY400 (the message says it)
                "%s: the new build cannot be loaded, the old one stays; tried again in %.0f s: %s",
                model.name, seconds, said,
            )  # fmt: skip
