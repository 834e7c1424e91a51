"""How long work takes, learned from what was done: for saying at once that a deadline cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

MEMORY_SECONDS = 60.0  # of work, after which a measurement counts 1/e


class Work(NamedTuple):
    """Steps of pictures, and the pixels of each of these steps added up."""

    steps: float = 0.0
    pixels: float = 0.0

    def times(self, factor: float) -> Work:
        """So much of it, or so often."""
        return Work(self.steps * factor, self.pixels * factor)


def total(parts: Iterable[Work]) -> Work:
    """All of it."""
    steps, pixels = 0.0, 0.0
    for part in parts:
        steps, pixels = steps + part.steps, pixels + part.pixels
    return Work(steps, pixels)


@dataclass(slots=True)
class Pace:
    """Seconds that work takes while the worker is busy.

    All sums fade with the work that is done, not with time, so that a pause forgets nothing.
    """

    seconds: float = 0.0
    done: Work = field(default_factory=Work)
    last: float | None = None
    pending: Work = field(default_factory=Work)

    def step(self, work: Work) -> None:
        """Work is done."""
        self.pending = total((self.pending, work))

    def tick(self, now: float, *, busy: bool) -> None:
        """A round is over at `now` seconds of a steady clock; `busy`: the next one begins at once."""
        if self.last is not None:
            passed = max(0.0, now - self.last)
            kept = math.exp(-passed / MEMORY_SECONDS)
            self.seconds, self.done = self.seconds * kept + passed, total((self.done.times(kept), self.pending))
        self.pending, self.last = Work(), now if busy else None

    def pause(self) -> None:
        """What passes from here until work begins, and what was done since the last round, is nobody's pace."""
        self.pending, self.last = Work(), None

    def begin(self, now: float) -> None:
        """Work begins after a pause."""
        if self.last is None:
            self.last = now

    def estimate(self, work: Work) -> float:
        """Seconds that `work` takes; 0 where nothing is known yet.

        By its pixels as by its steps, whichever is less: of pictures that are larger than those so far, a step costs
        more than one of theirs but less than their pixels' share, since a part of every step is the same for all
        sizes. Refusing a request that could have been served is worse than taking one that ends at its deadline.
        """
        if self.done.steps <= 0:
            return 0.0
        return min(work.steps * self.seconds / self.done.steps, work.pixels * self.seconds / self.done.pixels)
