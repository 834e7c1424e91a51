"""How long work takes, learned from what was done: for saying at once that a deadline cannot be met."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_SECONDS = 60.0  # of work, after which a measurement counts 1/e


@dataclass(slots=True)
class Pace:
    """Seconds a unit of work takes while the worker is busy; a unit is a step of one picture of one pixel.

    Both sums fade with the work that is done, not with time, so that a pause forgets nothing.
    """

    seconds: float = 0.0
    units: float = 0.0
    last: float | None = None
    pending: float = 0.0

    def step(self, units: float) -> None:
        """A step is done."""
        self.pending += units

    def tick(self, now: float, *, busy: bool) -> None:
        """A round is over at `now` seconds of a steady clock; `busy`: the next one begins at once."""
        if self.last is not None:
            passed = max(0.0, now - self.last)
            kept = math.exp(-passed / MEMORY_SECONDS)
            self.seconds, self.units = self.seconds * kept + passed, self.units * kept + self.pending
        self.pending, self.last = 0.0, now if busy else None

    def begin(self, now: float) -> None:
        """Work begins after a pause."""
        if self.last is None:
            self.last = now

    def estimate(self, units: float) -> float:
        """Seconds that `units` take; 0 where nothing is known yet."""
        return units * self.seconds / self.units if self.units > 0 else 0.0
