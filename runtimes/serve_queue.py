"""Who is served next: a bounded queue with priorities, fair between clients."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

PRIORITIES = {"low": 0, "normal": 1, "high": 2}


class Queued(Protocol):
    """What can wait: of a client, with a priority from PRIORITIES' values."""

    @property
    def client(self) -> str:
        """Who asks."""

    @property
    def priority(self) -> int:
        """A value of PRIORITIES."""


T = TypeVar("T", bound=Queued)


class FairQueue(Generic[T]):
    """At most `limit` waiting; the highest priority first, within it clients in turns, of a client the oldest.

    With turns a client with a thousand requests delays another one's first by one, not by a thousand.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.levels: dict[int, OrderedDict[str, deque[T]]] = {
            level: OrderedDict() for level in sorted(PRIORITIES.values(), reverse=True)
        }

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        """Everything that waits, of each client the oldest first."""
        for clients in self.levels.values():
            for line in clients.values():
                yield from line

    def room(self) -> int:
        """How many more may wait."""
        return self.limit - self.count

    def put(self, item: T, *, anyway: bool = False) -> None:
        """Let it wait; `anyway`: though the queue be full.

        Raises:
            IndexError: there is no room.
        """
        if self.count >= self.limit and not anyway:
            raise IndexError(self.limit)
        self.levels[item.priority].setdefault(item.client, deque()).append(item)
        self.count += 1

    def put_back(self, item: T) -> None:
        """Let one that was served in vain wait again, before all others of its priority, though the queue be full."""
        clients = self.levels[item.priority]
        clients.setdefault(item.client, deque()).appendleft(item)
        clients.move_to_end(item.client, last=False)
        self.count += 1

    def ahead(self, client: str, priority: int, count: int) -> Iterator[T]:
        """What would be served before the last of `count` new ones of a client, if nothing else came."""
        for level, clients in self.levels.items():
            if level > priority:
                for line in clients.values():
                    yield from line
        clients = self.levels[priority]
        turns = len(clients.get(client, ())) + count
        for other, line in clients.items():
            yield from line if other == client else itertools.islice(line, turns)

    def displaced(self, client: str, priority: int, count: int, may: Callable[[T], bool]) -> list[T] | None:
        """Who makes room for `count` more of a client: always the newest one of who has most places then.

        So a client that fills the queue keeps nobody else out of it. Nobody is left with fewer places than the client
        has then; those of a higher priority stay, and those that `may` not go. ``None``: there are not enough.
        """
        held = Counter(item.client for item in self)
        held[client] += count
        spare: dict[str, list[T]] = {}
        for level, clients in self.levels.items():  # the lowest priority's newest come last
            for other, line in clients.items():
                if level <= priority and other != client:
                    spare.setdefault(other, []).extend(item for item in line if may(item))
        chosen: list[T] = []
        while self.room() + len(chosen) < count:
            most = max((other for other in spare if spare[other]), key=lambda other: held[other], default=None)
            if most is None or held[most] <= held[client]:
                return None
            chosen.append(spare[most].pop())
            held[most] -= 1
        return chosen

    def pop(self, fits: Callable[[T], bool]) -> T | None:
        """The next one that can be served now; its client's turn is over then."""
        for clients in self.levels.values():
            for client, line in clients.items():
                found = next((item for item in line if fits(item)), None)
                if found is None:
                    continue
                line.remove(found)
                self.count -= 1
                clients.move_to_end(client)
                if not line:
                    del clients[client]
                return found
        return None

    def remove(self, item: T) -> bool:
        """It does not want to be served any more; whether it was waiting."""
        clients = self.levels[item.priority]
        line = clients.get(item.client)
        if line is None or item not in line:
            return False
        line.remove(item)
        self.count -= 1
        if not line:
            del clients[item.client]
        return True
