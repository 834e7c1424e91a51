"""What a running benchmark has measured so far: one JSON line an event, on disk before the next work begins.

A report is made of the journal alone, so a run that is killed keeps what it finished and another one goes on there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case
from intaglio.bench.report import check_target
from intaglio.profiles.errors import UsageError
from intaglio.profiles.staging import swap
from intaglio.profiles.strict import parse_json

JOURNAL = "journal.jsonl"
Event = dict[str, Any]


def partial_folder(target: Path) -> Path:
    """Where a run keeps its journal and pictures until it is finished: beside its output folder."""
    target = target.absolute()
    return target.with_name(f".{target.name}.partial")


@dataclass(slots=True)
class Journal:
    """The events of a run, those of earlier sittings first.

    Attributes:
        folder: holds the journal, and pictures under ``images``.
        events: as they were written.
        sitting: number of this process among those that worked on the run, from 0.
    """

    folder: Path
    events: list[Event] = field(default_factory=list)
    sitting: int = 0

    def write(self, event: str, **facts: Any) -> Event:
        """Append one event; it is on disk when this returns."""
        line = {"event": event, "sitting": self.sitting, **facts}
        data = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with (self.folder / JOURNAL).open("ab") as file:
            file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())
        # as a reader of the file would find it: tuples are lists, keys are texts
        found: Event = json.loads(data)
        self.events.append(found)
        return found

    def of(self, event: str, **fields: Any) -> list[Event]:
        """The events of a kind whose fields have these values."""
        return [e for e in self.events if e["event"] == event and all(e.get(k) == v for k, v in fields.items())]

    def has(self, event: str, **fields: Any) -> bool:
        """Whether there is one."""
        return bool(self.of(event, **fields))


def read_events(path: Path) -> list[Event]:
    """The whole lines of a journal; a last line that a kill cut short is removed from the file.

    Raises:
        UsageError: the file cannot be read, or a whole line is no event.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); start anew without --resume") from error
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    events = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            event = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number} is damaged ({error}); start anew with --force") from error
        if not isinstance(event, dict) or "event" not in event:
            raise UsageError(f"{path}:{number} is no event; start anew with --force")
        events.append(event)
    return events


def plan_of(cases: Sequence[Case], digests: Mapping[str, str], seed: int) -> dict[str, Any]:
    """What has to be the same for a run to go on: cases, artifacts' digests, order."""
    rows = []
    for case in cases:
        facts = asdict(case)
        facts["artifact"] = digests[case.artifact]  # an artifact may have moved, not changed
        facts["settings"] = {k: Path(v).name for k, v in case.settings.items()}
        facts["checkpoint"], facts["python"] = Path(case.checkpoint).name, bool(case.python)
        rows.append(facts)
    facts = json.loads(json.dumps({"cases": rows, "seed": seed}))
    text = json.dumps(facts, sort_keys=True).encode()
    return {"digest": hashlib.sha256(text).hexdigest(), **facts}


def begin(target: Path, plan: Mapping[str, Any], *, resume: bool, force: bool) -> Journal:
    """The journal of a run that is to become `target`.

    Raises:
        UsageError: `target` exists without `force`; an unfinished run lies there and neither `resume` nor `force` is
            given; there is none to resume, or it is of another plan; the folder cannot be written.
    """
    folder = partial_folder(target)
    if not resume or not folder.exists():
        check_target(target, force=force)
    if resume:
        return _resumed(folder, target, plan)
    if folder.exists():
        if not force:
            raise UsageError(
                f"an unfinished run lies in {folder}; add --resume to finish it or --force to throw it away"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another output folder") from error
    journal = Journal(folder)
    journal.write("plan", **plan)
    return journal


def _resumed(folder: Path, target: Path, plan: Mapping[str, Any]) -> Journal:
    if not (folder / JOURNAL).exists():
        raise UsageError(f"there is no unfinished run of {target}; leave out --resume")
    events = read_events(folder / JOURNAL)
    before = next((e for e in events if e["event"] == "plan"), None)
    if before is None:
        raise UsageError(f"{folder / JOURNAL} has no plan; start anew with --force")
    if before["digest"] != plan["digest"]:
        raise UsageError(
            f"the unfinished run in {folder} is of another plan ({', '.join(unlike(before, plan))}); repeat its "
            "arguments, or start anew with --force"
        )
    return Journal(folder, events, max(e["sitting"] for e in events) + 1)


def unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two plans differ, in words."""
    old, new = ([c["label"] for c in plan["cases"]] for plan in (before, now))
    found = [f"without {label}" for label in old if label not in new]
    found += [f"with {label}" for label in new if label not in old]
    pairs = {c["label"]: c for c in before["cases"]}
    for case in now["cases"]:
        other = pairs.get(case["label"], case)
        found += [f"{case['label']}: {k}" for k in case if case[k] != other.get(k)]
    return (found or ["another seed"])[:5]


@contextlib.contextmanager
def publishing(journal: Journal, target: Path) -> Iterator[Path]:
    """Give the run's folder to write the report into; when the block ends well it becomes `target` in one step.

    Where it does not, the journal stays for ``--resume``.
    """
    yield journal.folder
    swap(journal.folder, target.absolute())
