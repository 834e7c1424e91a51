"""What text encoders answered, kept by the content of what they read: a prompt that comes again is not encoded again.

Every row is encoded alone, so that what a request gets does not depend on which other texts were new with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from intaglio.runtimes.evaluation import Feeds, batch_inputs

if TYPE_CHECKING:
    from intaglio.profiles.spec import ComponentRecord
    from intaglio.runtimes.engine import Engine
    from intaglio.runtimes.loop import Components, Sampler

DEFAULT_BYTES = 512 * 2**20
ENCODERS = "text_encoder"  # how the names of components that read text begin


@dataclass(slots=True)
class EmbeddingCache:
    """Rows of outputs by digest, the least recently used dropped first.

    Attributes:
        limit: bytes that may be kept; 0 keeps nothing.
        held: bytes that are.
        hits, misses: rows found, and rows that were encoded.
    """

    limit: int = DEFAULT_BYTES
    held: int = 0
    hits: int = 0
    misses: int = 0
    rows: OrderedDict[bytes, Feeds] = field(default_factory=OrderedDict)

    def get(self, key: bytes) -> Feeds | None:
        """A kept row."""
        found = self.rows.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self.rows.move_to_end(key)
        return found

    def put(self, key: bytes, outputs: Feeds) -> None:
        """Keep a row if it is small enough, at the cost of older ones."""
        size = bytes_of(outputs)
        if key in self.rows or size > self.limit:
            return
        self.rows[key] = outputs
        self.held += size
        while self.held > self.limit:
            self.held -= bytes_of(self.rows.popitem(last=False)[1])


def bytes_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of some arrays."""
    return sum(array.nbytes for array in arrays.values())


class CachedEncoder:
    """A text encoder's engine whose rows are looked up first; see `Engine`."""

    def __init__(self, engine: Engine, record: ComponentRecord, name: str, cache: EmbeddingCache) -> None:
        self.engine, self.name, self.cache = engine, name, cache
        self.inputs = batch_inputs(record)
        self.by_row = all(spec.shape[:1] == ("batch",) for spec in record.outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`; the arrays are the caller's own."""
        if not self.by_row:
            return self.engine.run(feeds)
        count = max(len(value) for name, value in feeds.items() if name in self.inputs)
        rows = [self._row({n: v[i : i + 1] if n in self.inputs else v for n, v in feeds.items()}) for i in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _row(self, feeds: Feeds) -> Feeds:
        key = digest_of(self.name, feeds)
        found = self.cache.get(key)
        if found is None:
            found = {name: np.array(value) for name, value in self.engine.run(feeds).items()}
            self.cache.put(key, found)
        return found

    def memory(self) -> dict[str, int | None]:
        """See `Engine.memory`."""
        return self.engine.memory()

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()


def digest_of(name: str, feeds: Mapping[str, np.ndarray]) -> bytes:
    """Of everything an encoder reads."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(feeds.items()):
        digest.update(f"{key}{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()


class CachedComponents:
    """An artifact's engines (see `loop.Components`), text encoders behind a cache."""

    def __init__(self, engines: Components, sampler: Sampler, cache: EmbeddingCache) -> None:
        self.engines, self.sampler, self.cache = engines, sampler, cache

    def __getitem__(self, name: str) -> Engine:
        """The engine of a component."""
        engine = self.engines[name]
        if not name.startswith(ENCODERS):
            return engine
        return CachedEncoder(engine, self.sampler.manifest.components[name], name, self.cache)

    def release(self, *names: str) -> None:
        """Pass it on."""
        self.engines.release(*names)
