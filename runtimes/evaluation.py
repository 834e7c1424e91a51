"""The denoiser's evaluations: what a request asks of it at a step, and how several requests are answered by one call.

Rows of a batch do not see each other: every input that has a ``batch`` axis has one row a picture, the timestep too, so
that pictures at different steps share a call. Inputs without that axis (position ids) must be the same to share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from intaglio.profiles.spec import ComponentRecord
    from intaglio.runtimes.engine import Engine
    from intaglio.runtimes.sampling import Result, StepEvent

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One step of one request: the denoiser's feeds, a set a branch of guidance, the conditional one first.

    `together`: whether the branches alone make one batch where their shapes allow it.
    """

    feeds: tuple[Feeds, ...]
    together: bool = True


Work = Generator["Evaluation | StepEvent", Any, "Result"]  # see `Sampler.work`


def batch_inputs(record: ComponentRecord) -> frozenset[str]:
    """The inputs of a component that have one row a picture."""
    return frozenset(spec.name for spec in record.inputs if spec.shape[0] == "batch")


def kind_of(feeds: Mapping[str, np.ndarray], rows: frozenset[str]) -> tuple[Any, ...]:
    """What two sets of feeds must have in common to be rows of one batch."""

    def fact(name: str, value: np.ndarray) -> Any:
        if name in rows:
            return value.shape[1:]
        return value.shape, hashlib.sha256(np.ascontiguousarray(value).data).digest()

    return tuple((name, fact(name, value)) for name, value in sorted(feeds.items()))


def height(feeds: Mapping[str, np.ndarray], rows: frozenset[str]) -> int:
    """How many rows a set of feeds has."""
    return max((len(value) for name, value in feeds.items() if name in rows), default=1)


def run_joined(engine: Engine, record: ComponentRecord, sets: Sequence[Feeds]) -> list[np.ndarray]:
    """One call for sets of one kind; its first output, split as the sets were."""
    output, rows = record.outputs[0].name, batch_inputs(record)
    if len(sets) == 1:
        return [engine.run(sets[0])[output]]
    joined = {n: np.concatenate([s[n] for s in sets]) if n in rows else v for n, v in sets[0].items()}
    ends = np.cumsum([height(s, rows) for s in sets])[:-1]
    return list(np.split(engine.run(joined)[output], ends))


def evaluate(engine: Engine, record: ComponentRecord, wanted: Evaluation) -> list[np.ndarray]:
    """The denoiser's first output for every branch of one request, by one call where that can be."""
    rows = batch_inputs(record)
    if wanted.together and len({kind_of(f, rows) for f in wanted.feeds}) == 1:
        return run_joined(engine, record, wanted.feeds)
    return [output for feeds in wanted.feeds for output in run_joined(engine, record, [feeds])]


def batches(wanted: Sequence[Evaluation], record: ComponentRecord, limit: int) -> list[list[tuple[int, int]]]:
    """Which branches of which requests run together: lists of (request, branch), at most `limit` rows each.

    Those of one request stay in one list where they fit, in the first that has room; also where alone they would be
    separate calls. Only a branch that has more rows than `limit` by itself is in a list that has more, alone.
    """
    rows = batch_inputs(record)
    lists: dict[tuple[Any, ...], list[list[tuple[int, int]]]] = {}
    filled: dict[int, int] = {}

    def put(kind: tuple[Any, ...], number: int, sizes: dict[int, int]) -> None:
        size, found = sum(sizes.values()), lists.setdefault(kind, [])
        if (batch := next((batch for batch in found if filled[id(batch)] + size <= limit), None)) is None:
            found.append(batch := [])
        batch.extend((number, branch) for branch in sizes)
        filled[id(batch)] = filled.get(id(batch), 0) + size

    for number, evaluation in enumerate(wanted):
        parts: dict[tuple[Any, ...], dict[int, int]] = {}
        for branch, feeds in enumerate(evaluation.feeds):
            parts.setdefault(kind_of(feeds, rows), {})[branch] = height(feeds, rows)
        for kind, sizes in parts.items():
            if sum(sizes.values()) <= limit:
                put(kind, number, sizes)
                continue
            for branch, size in sizes.items():
                put(kind, number, {branch: size})
    return [batch for of_kind in lists.values() for batch in of_kind]
