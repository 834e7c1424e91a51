"""Run a matrix of cases so that the machine's moods hit all of them alike.

Every case lives in a process of its own. Cases that make the same picture are a group: its workers load one after
another and stay, idle, until the group's end; each round asks every one of them for one image of the same prompt, in an
order drawn anew from the seed. A speed-up is the median over rounds of (reference seconds / case seconds) *within* a
round, so slow minutes of a shared machine cancel. Memory, errors and the noise floor are found in processes of their
own, apart from what is timed.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intaglio.bench.assemble import assemble
from intaglio.bench.cases import Case, unquantized
from intaglio.bench.journal import Journal
from intaglio.bench.machine import fingerprint, load_average
from intaglio.bench.memory import available_bytes
from intaglio.bench.metrics import need_metrics
from intaglio.bench.seat import Seat
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import ToolError

if TYPE_CHECKING:
    from intaglio.bench.learned import LearnedMetric

SETTLE = 0.3  # seconds; thread pools of torch (OpenMP) and OpenVINO (TBB) spin up to 0.2 s after their last work
Tell = Callable[[str], None]
PARTS = ("components", "memory", "noise")  # component errors, memory, the reference's noise floor
MARGIN = 1.2  # of what the largest case took that has to be left before another one is loaded
CALLS = "calls"  # scratch folder of what the reference's components are fed


def order_of(labels: Sequence[str], turn: int, seed: int) -> list[str]:
    """The order of the cases in round `turn`: a permutation drawn from the seed, the same on every machine."""
    shuffled = list(labels)
    random.Random(f"{seed}/{turn}").shuffle(shuffled)
    return shuffled


def groups_of(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that make the same picture, in the order of their first one."""
    found: dict[Any, list[Case]] = {}
    for case in cases:
        found.setdefault(case.picture, []).append(case)
    return list(found.values())


def reference_of(cases: Sequence[Case], artifacts: Mapping[str, Artifact]) -> tuple[int, str]:
    """Index of the reference case and the sentence that says why it is one."""
    for index, case in enumerate(cases):
        if case.backend == "torch" and unquantized(artifacts[case.artifact]):
            return index, f"{case.label}: the torch backend on an unquantized artifact"
    return 0, f"{cases[0].label}: the first case, because none is torch on an unquantized artifact"


def run_matrix(
    cases: Sequence[Case],
    artifacts: Mapping[str, Artifact],
    journal: Journal,
    *,
    command: str,
    seed: int = 0,
    timeout: float = 900.0,
    isolation: str = "shared",
    parts: Sequence[str] = PARTS,
    grid: Sequence[str] = (),
    limits: Mapping[str, float] | None = None,
    learned: Mapping[str, LearnedMetric] | None = None,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Measure every case that the journal does not have yet and return the report; pictures go under its folder.

    Args:
        cases: at least one; labels unique.
        artifacts: opened (and verified) artifacts by `Case.artifact`; those without a case still give TensorRT rows.
        journal: of `intaglio.bench.journal.begin`.
        command: what the user typed, for the report.
        seed: of the interleaving.
        timeout: seconds one answer of a worker may take; loading a large model on a small machine needs many.
        isolation: ``shared`` or ``fresh``, see `intaglio.bench.matrix.Matrix`.
        parts: of PARTS, what is found beside speed and pictures.
        grid: axes that the report shows as a grid of pictures.
        limits: by metric, in place of the formats' own.
        learned: further metrics of pictures, by key.
        tell: called with a short text before each piece of work.

    Raises:
        MissingDependency: a metric's package is not installed.
        ToolError: no case could be measured; the message is the first case's.
    """
    need_metrics()
    began, busy = time.perf_counter(), own_cpu()
    journal.write(
        "sitting",
        machine=fingerprint(),
        command=command,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        load_average=load_average(),
        available_bytes=available_bytes(),
    )
    for number, group in enumerate(groups_of(cases)):
        seats = [Seat(case=c, journal=journal, timeout=timeout, tell=tell) for c in group]
        chosen, why = reference_of(group, artifacts)
        journal.write("group", number=number, labels=[c.label for c in group], reference=group[chosen].label, why=why)
        with contextlib.ExitStack() as stack:
            for seat in seats:
                stack.callback(seat.close)
            if isolation == "fresh":
                measure_fresh(seats, seed, tell)
            else:
                measure_shared(seats, seed, tell)
            if "components" in parts:
                errors_of_components(seats, chosen, journal)
        for seat in seats if "memory" in parts else ():
            seat.weigh()
        if "noise" in parts:
            noise_floor(seats[chosen])
    tell("fidelity")
    journal.write(
        "end",
        load_average=load_average(),
        seconds=round(time.perf_counter() - began, 3),
        parent_cpu_s=round(own_cpu() - busy, 3),
    )
    shutil.rmtree(journal.folder / CALLS, ignore_errors=True)
    if not any(journal.has("timed", case=c.label) for c in cases):
        error = next((e["error"] for e in journal.of("error", case=cases[0].label)), "nothing was measured")
        raise ToolError(f"no case could be measured; {cases[0].label}: {error}")
    return assemble(
        journal, cases, artifacts, seed=seed, isolation=isolation, grid=grid, limits=limits, learned=learned
    )


def own_cpu() -> float:
    """Seconds of processor this process itself has used, its children not counted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure_shared(seats: Sequence[Seat], seed: int, tell: Tell) -> None:
    """Load every worker that has work left, then the interleaved rounds."""
    if all(seat.finished() for seat in seats):
        return
    free, largest = available_bytes(), 0
    for number, seat in enumerate(seats):  # all of them: a ratio needs its other side measured in the same sitting
        if free is not None and free < MARGIN * largest:
            raise ToolError(
                f"{number} of {len(seats)} cases are loaded and {free / 2**30:.1f} GiB are left, where one took "
                f"{largest / 2**30:.1f}; add --isolation fresh (one process at a time), or --exclude some"
            )
        seat.open()
        seat.pictures()
        left = available_bytes()
        if free is not None and left is not None:
            free, largest = left, max(largest, free - left)
    rounds(seats, seed, tell, lambda seat, turn: seat.measure(turn))


def measure_fresh(seats: Sequence[Seat], seed: int, tell: Tell) -> None:
    """A process for every timed picture; the first one also makes the pictures that are kept."""

    def once(seat: Seat, turn: int) -> None:
        seat.open()
        seat.pictures()
        time.sleep(SETTLE)
        seat.measure(turn)
        seat.close()

    rounds(seats, seed, tell, once)


def rounds(seats: Sequence[Seat], seed: int, tell: Tell, measure: Callable[[Seat, int], None]) -> None:
    """Interleave; a round that an earlier sitting began is measured whole again in this one."""
    by_label = {s.label: s for s in seats}
    total = max(s.case.repeats for s in seats)
    for turn in range(total):
        if not any(s.wants(turn) for s in seats):
            continue
        order = order_of(list(by_label), turn, seed)
        seats[0].journal.write("round", turn=turn, order=order)
        for label in order:
            seat = by_label[label]
            if seat.failed or turn >= seat.case.repeats:
                continue
            tell(f"round {turn + 1} of {total}: {label}")
            time.sleep(SETTLE)
            measure(seat, turn)


def errors_of_components(seats: Sequence[Seat], chosen: int, journal: Journal) -> None:
    """Feed every case's components what the reference's were fed."""
    wanted = [s for s in seats if not journal.has("components", case=s.label) and not s.failed]
    if not wanted:
        return
    folder = journal.folder / CALLS
    shutil.rmtree(folder, ignore_errors=True)
    reference = seats[chosen]
    kept = asked_once(reference, "record", prompt=0, folder=str(folder))
    for seat in wanted if kept is not None else ():
        if kept and kept["reason"]:
            reason = f"{reference.label}: {kept['reason']}"
            journal.write("components", case=seat.label, calls=None, loop=None, reason=reason)
            continue
        seat.tell(f"{seat.label}: components")
        answer = asked_once(seat, "replay", prompt=0, folder=str(folder))
        if answer is not None:
            journal.write("components", case=seat.label, **answer)


def asked_once(seat: Seat, do: str, **fields: Any) -> dict[str, Any] | None:
    """A request to the seat's worker; where there is none, one is started for it and ended again."""
    if seat.worker is not None:
        return seat.ask(do, **fields)
    seat.start()
    try:
        return seat.ask(do, **fields)
    finally:
        seat.close()


def noise_floor(reference: Seat) -> None:
    """The reference against itself: on another number of threads, and in float64 where it can compute so."""
    case = reference.case
    if case.device == "cpu":
        reference.again(f"threads {2 if case.threads == 1 else 1}", threads=2 if case.threads == 1 else 1)
    if case.backend == "torch":
        reference.again("float64", settings={**case.settings, "dtype": "float64"})
