"""Which artifacts are loaded: all workers together stay within ``--memory``, as far as that can be."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.serve_errors import Lost

if TYPE_CHECKING:
    from intaglio.runtimes.serve_hub import Hub
    from intaglio.runtimes.serve_model import Model

LOG = logging.getLogger("intaglio.serve")


class Memory:
    """Loads what is waited for and unloads what was not used for longest.

    Attributes:
        allowed: bytes; 0: any.
    """

    def __init__(self, hub: Hub, allowed: int) -> None:
        self.hub, self.allowed = hub, allowed

    def check(self, model: Model) -> None:
        """Refuse a budget that not even this artifact fits in.

        Raises:
            UsageError: it does not.
        """
        if model.estimate > self.allowed > 0:
            raise UsageError(
                f"{model.name} needs about {model.estimate / 2**20:.0f} MiB and --memory is {self.allowed / 2**20:.0f}"
            )

    def held(self) -> int:
        """Bytes of all workers now, those that leave or load too."""
        return sum(model.held() for model in self.hub.models.values())

    def fits(self, model: Model) -> bool:
        """Whether one more worker of an artifact can be started beside those there are."""
        return not self.allowed or self.held() + model.size() <= self.allowed

    def others(self, model: Model) -> list[Model]:
        """The other artifacts that are loaded, the one that was not used for longest first."""
        found = (m for m in self.hub.models.values() if m is not model and not m.unloaded)
        return sorted(found, key=lambda m: m.used)

    def urgent(self, model: Model) -> set[Model]:
        """Artifacts that wait for pictures of a higher priority than any that waits for this one."""
        own = max((job.priority for job in self.hub.queue if job.model is model), default=0)
        return {job.model for job in self.hub.queue if job.priority > own}

    def reachable(self, model: Model) -> bool:
        """Whether an artifact can be loaded without unloading one that more urgent pictures wait for."""
        staying = self.urgent(model).intersection(self.others(model)) if self.allowed else ()
        return not staying or sum(m.held() for m in staying) + model.size() <= self.allowed

    def wanted(self) -> Model | None:
        """The artifact to be loaded next: that of the most urgent picture that waits for one and can have it."""
        waiting = dict.fromkeys(job.model for job in self.hub.queue)
        missing = (model for model in waiting if model.process is None and model.unloaded)
        return next((model for model in missing if self.reachable(model)), None)

    async def load(self, model: Model) -> None:
        """Load an artifact, unloading others until it fits; who waits for one that cannot be loaded is told.

        Only what lies on the disk says that it never fits: a worker's size in the end is that of its requests too.
        """
        try:
            await model.look()
            if model.estimate > self.allowed > 0:
                self.give_up(model, f"model {model.name} does not fit in the memory this server may use")
                return
            while not self.fits(model):
                urgent = self.urgent(model)
                if (oldest := next((m for m in self.others(model) if m not in urgent), None)) is None:
                    break
                await oldest.unload()
            if not self.reachable(model):  # more urgent ones have come for what would have had to go
                return
            await model.load()
            await self.make_fit(model)
        except Exception as error:
            LOG.error("%s: cannot be loaded: %s", model.name, model.said(error))  # noqa: TRY400 (the message says it)
            model.unloaded = True
            self.give_up(model, f"model {model.name} cannot be loaded now ({type(error).__name__})")

    async def make_fit(self, model: Model) -> None:
        """Unload others where an artifact took more memory than it was thought to."""
        while 0 < self.allowed < self.held() and (others := self.others(model)):
            await others[0].unload()
        if 0 < self.allowed < self.held():
            LOG.warning("%s takes %.0f MiB, more than --memory", model.name, self.held() / 2**20)

    async def make_way(self, model: Model) -> None:
        """Unload artifacts that do nothing, so that an artifact's new build can be loaded beside the old one.

        Where that is not enough the build is loaded all the same: the old worker leaves, and its memory with it.

        Raises:
            ToolError: the new build cannot be read.
        """
        if not self.allowed:
            return
        await model.look()
        while not self.fits(model):
            busy = {job.model for job in self.hub.queue}
            idle = [m for m in self.others(model) if not (m.running or m.lock.locked() or m in busy)]
            if not idle:
                total = (self.held() + model.size()) / 2**20
                LOG.warning("%s: two builds for now, all take about %.0f MiB, more than --memory", model.name, total)
                return
            await idle[0].unload()

    def give_up(self, model: Model, said: str) -> None:
        """End everything that waits for an artifact."""
        for job in [job for job in self.hub.queue if job.model is model]:
            job.ticket.fail(Lost(said))
