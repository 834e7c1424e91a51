"""What a worker says of an error, and when errors say that its engines are past help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intaglio.profiles.errors import NumericsError, ToolError, Unsupported, UsageError
from intaglio.runtimes.infotext import stopped
from intaglio.runtimes.serve_errors import without_paths

NO_MEMORY = re.compile(
    r"bad.?alloc|out.?of.?memory|alloc_failed|failed to allocate|cannot allocate memory", re.IGNORECASE
)
# Errors by kind: the client's, the checkpoint's, the machine's; everything else is a defect.
KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (UsageError, "user"),
    (Unsupported, "user"),
    (NumericsError, "numerics"),
    (MemoryError, "memory"),
    (ToolError, "engine"),
)
MOST = 3  # errors of the engines in a row


def said(error: BaseException, folder: str = "") -> tuple[str, str]:
    """The kind of an error, and what a client may read of it: never a path, nothing of a defect but that it is one.

    Engines say that there is no memory in words of their own.
    """
    kind = next((word for cls, word in KINDS if isinstance(error, cls)), "internal")
    if kind in ("internal", "engine") and NO_MEMORY.search(str(error)):
        kind = "memory"
    if kind == "internal":
        return kind, "the engine failed"
    if kind == "memory":
        return kind, "there was not enough memory for this request; ask for fewer pixels or pictures"
    return kind, without_paths(str(error), folder)


def ending(parameters: Mapping[str, Any]) -> str:
    """What the text of a picture has at its end, where the denoising was ended early."""
    steps = parameters.get("stopped_after_steps")
    return stopped("", steps) if steps else ""


@dataclass(slots=True)
class Faults:
    """How many requests in a row failed in an engine while no other one made a step.

    After an illegal access every call on a GPU fails until its process ends. A client whose own request fails again
    and again, where others' get on, ends nobody's.
    """

    count: int = 0

    def step(self) -> None:
        """The engines work."""
        self.count = 0

    def failed(self, kind: str) -> None:
        """A request under way failed; `kind` is of `said`."""
        self.count += kind in ("engine", "internal")

    @property
    def hopeless(self) -> bool:
        """Whether only another process can help."""
        return self.count >= MOST
