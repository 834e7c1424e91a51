"""A case, its worker while that lives, and what it does in a run; every finding goes into the journal at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intaglio.bench.cases import Case
from intaglio.bench.journal import Journal
from intaglio.bench.worker import Client, WorkerError, to_json

Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Seat:
    """One case of a run.

    Attributes:
        failed: whether this sitting's worker failed; the case is then left alone until another sitting.
    """

    case: Case
    journal: Journal
    timeout: float
    tell: Tell = lambda _: None
    worker: Client | None = None
    failed: bool = False

    @property
    def label(self) -> str:
        """The case's."""
        return self.case.label

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace("/", "-").replace(" ", "-").replace(":", "-")

    def ask(self, do: str, **fields: Any) -> dict[str, Any] | None:
        """One request, or None if the worker is gone; a failure ends the worker and is journaled as an ``error``."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(do, **fields)
        except WorkerError as error:
            self.fail(error)
            return None

    def fail(self, error: WorkerError) -> None:
        """Journal a failure and give the case up for this sitting."""
        self.journal.write("error", case=self.label, error=str(error).replace(str(Path.home()), "~"))
        self.failed = True
        self.close()

    def close(self) -> None:
        """End the worker if it lives."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def start(self) -> dict[str, Any] | None:
        """Start and load a worker; what it says of loading, or None where it failed."""
        if self.failed:
            return None
        self.tell(f"{self.label}: load")
        self.worker = Client(self.case, timeout=self.timeout)
        return self.ask("load", case=to_json(self.case))

    def open(self) -> None:
        """`start`, and let the worker make its first picture and the warm-up's."""
        loaded = self.start()
        if loaded is None:
            return
        self.tell(f"{self.label}: first image")
        first = self.ask("run", prompt=0)
        if first is None:
            return
        warm = [self.ask("run", prompt=0) for _ in range(self.case.warmup)]
        if None in warm:
            return
        self.journal.write(
            "opened",
            case=self.label,
            load_s=loaded["seconds"],
            compile_s=loaded["compile_s"],
            first_image_s=first["seconds"],
            warmup_s=[w["seconds"] for w in warm if w],
        )

    def pictures(self) -> None:
        """A picture of every prompt that has none yet."""
        where = Path("images") / self.folder
        for index, prompt in enumerate(self.case.prompts):
            if self.journal.has("picture", case=self.label, prompt=index):
                continue
            self.tell(f"{self.label}: picture {index + 1} of {len(self.case.prompts)}")
            made = self.ask("image", prompt=index, folder=str(self.journal.folder / where), stem=str(index))
            if made is None:
                return
            self.journal.write(
                "picture",
                case=self.label,
                prompt=index,
                text=prompt,
                image=f"{where.as_posix()}/{index}.png",
                sha256=made["sha256"],
                size=made["size"],
                digest=made["digest"],
                parameters=made["parameters"],
            )

    def measure(self, turn: int) -> None:
        """One timed picture."""
        prompt = self.case.prompt(turn)
        answer = self.ask("run", prompt=prompt)
        if answer is not None:
            self.journal.write("timed", case=self.label, turn=turn, prompt=prompt, **answer)

    def wants(self, turn: int) -> bool:
        """Whether the case has this round still before it."""
        return (
            not self.failed and turn < self.case.repeats and not self.journal.has("timed", case=self.label, turn=turn)
        )

    def finished(self) -> bool:
        """Whether every round is measured and every picture there."""
        turns = {e["turn"] for e in self.journal.of("timed", case=self.label)}
        made = {e["prompt"] for e in self.journal.of("picture", case=self.label)}
        return turns >= set(range(self.case.repeats)) and made >= set(range(len(self.case.prompts)))

    def weigh(self) -> None:
        """Memory, in a process that loads and makes one picture while it is watched, and is not timed."""
        if self.journal.has("memory", case=self.label) or self.failed:
            return
        self.tell(f"{self.label}: memory")
        with Aside(self, self.case) as side:
            side.ask("watch")
            side.ask("load", case=to_json(self.case))
            side.ask("run", prompt=0)
            found = side.ask("memory")
            if found is not None:
                self.journal.write("memory", case=self.label, **found)

    def again(self, what: str, **changes: Any) -> None:
        """The same pictures computed otherwise (threads, float64), for the noise floor.

        Where it cannot be done the reason is journaled, and the case itself is unharmed.
        """
        if self.journal.has("noise", case=self.label, what=what) or self.failed:
            return
        self.tell(f"{self.label}: noise floor, {what}")
        case = replace(self.case, **changes)
        where = Path("noise") / self.folder / what.replace(" ", "-")
        made: list[str] = []
        reason = ""
        client = Client(case, timeout=self.timeout)
        try:
            client.ask("load", case=to_json(case))
            for index in range(len(case.prompts)):
                client.ask("image", prompt=index, folder=str(self.journal.folder / where), stem=str(index))
                made.append(f"{where.as_posix()}/{index}.png")
        except WorkerError as error:
            reason = str(error).replace(str(Path.home()), "~")
        finally:
            client.close()
        self.journal.write("noise", case=self.label, what=what, images=made, reason=reason)


class Aside:
    """A second worker of a seat for a while; what it says goes wrong with the seat."""

    def __init__(self, seat: Seat, case: Case) -> None:
        self.seat = Seat(case=case, journal=seat.journal, timeout=seat.timeout, tell=seat.tell)

    def __enter__(self) -> Seat:
        """The second seat, its process started."""
        self.seat.worker = Client(self.seat.case, timeout=self.seat.timeout)
        return self.seat

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.seat.close()
