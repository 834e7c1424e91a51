"""How long work takes, learned from what was done: for saying at once that a deadline cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

# A measurement counts 1/e after so many seconds of work and so many pictures, whichever come later: a round that
# decodes has no steps. What a machine has become slower by shows in the short one within a queue's length; the long one
# does not take a fast stretch of a noisy machine for its pace.
MEMORIES = ((6.0, 8.0), (60.0, 24.0))


class Work(NamedTuple):
    """Steps of pictures, the pixels of each of these steps added up, and how many pictures it is."""

    steps: float = 0.0
    pixels: float = 0.0
    pictures: float = 0.0

    def times(self, factor: float) -> Work:
        """So much of it, or so often."""
        return Work(self.steps * factor, self.pixels * factor, self.pictures * factor)


def total(parts: Iterable[Work]) -> Work:
    """All of it."""
    steps, pixels, pictures = 0.0, 0.0, 0.0
    for part in parts:
        steps, pixels, pictures = steps + part.steps, pixels + part.pixels, pictures + part.pictures
    return Work(steps, pixels, pictures)


@dataclass(slots=True)
class Measured:
    """Seconds of work, and what was done in them; both fade with the work that is done, not with time."""

    memory: tuple[float, float]
    seconds: float = 0.0
    done: Work = field(default_factory=Work)

    def add(self, seconds: float, done: Work) -> None:
        """More of both."""
        kept = math.exp(-min(seconds / self.memory[0], done.pictures / self.memory[1]))
        self.seconds, self.done = self.seconds * kept + seconds, total((self.done.times(kept), done))

    def estimate(self, work: Work) -> float:
        """Seconds that `work` takes; 0 where nothing is known yet."""
        if self.done.steps <= 0:
            return 0.0
        return min(work.steps * self.seconds / self.done.steps, work.pixels * self.seconds / self.done.pixels)


class Pace:
    """Seconds that work takes while the worker is busy.

    A pause forgets nothing, since measurements fade with work.
    """

    def __init__(self) -> None:
        self.measured = tuple(Measured(memory) for memory in MEMORIES)
        self.last: float | None = None
        self.pending = Work()

    def step(self, work: Work) -> None:
        """Work is done."""
        self.pending = total((self.pending, work))

    def tick(self, now: float, *, busy: bool) -> None:
        """A round is over at `now` seconds of a steady clock; `busy`: the next one begins at once."""
        if self.last is not None:
            for measured in self.measured:
                measured.add(max(0.0, now - self.last), self.pending)
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

        By the pace of late as by that of before, whichever is slower: a machine under more load than it can take is
        slower than it was, and what is accepted at its old pace is late all of it.
        """
        return max(measured.estimate(work) for measured in self.measured)
