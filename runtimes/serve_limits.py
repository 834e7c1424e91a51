"""How much one request may ask for. Everything here is checked before anything is allocated for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick
from intaglio.runtimes.serve_errors import BadRequest, Busy, Lost, ServeError, TooLarge

LONGEST_SHOWN = 10**15  # of a whole number; what is larger is said by its digits


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: its default, what it counts, and what exceeding it is."""

    default: int
    help: str
    error: type[ServeError] = BadRequest


LIMITS: dict[str, Limit] = {
    "pixels": Limit(2048 * 2048, "width times height of a picture"),
    "steps": Limit(150, "denoising steps of a picture"),
    "guidance": Limit(100, "guidance_scale and true_cfg_scale; what is far beyond makes numbers overflow"),
    "pictures": Limit(10, "pictures of one request"),
    "prompt_bytes": Limit(16_384, "bytes of a prompt, or of a negative prompt, in UTF-8"),
    "body_bytes": Limit(2**20, "bytes of a request's body", TooLarge),
    "body_seconds": Limit(30, "seconds a client may take to send a body, or read nothing of an answer"),
    "header_bytes": Limit(32_768, "bytes of a request's headers", TooLarge),
    "connections": Limit(1024, "connections at once", Lost),
    "batch_bytes": Limit(100 * 2**20, "bytes of a file of requests", TooLarge),
    "batch_lines": Limit(50_000, "requests of one file"),
    "batch_unfinished": Limit(16, "batches of one client that have not ended", Busy),
    "batch_files": Limit(1000, "files of requests and results that are kept"),
    "batch_held_bytes": Limit(10 * 2**30, "bytes of all files of requests and results together", TooLarge),
}


class Limits:
    """The limits in force: the defaults, with some of them replaced.

    Raises:
        UsageError: an unknown limit, or a value that is not 1 or more.
    """

    def __init__(self, given: Mapping[str, str | int] | None = None) -> None:
        self.values = {name: limit.default for name, limit in LIMITS.items()}
        for name, value in (given or {}).items():
            pick(LIMITS, name, "limit")
            if not str(value).isascii() or not str(value).isdecimal() or int(value) < 1:
                raise UsageError(f"--limit {name}={value} is not allowed: a whole number, 1 or more")
            self.values[name] = int(value)

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def check(self, name: str, value: float, what: str, param: str | None = None) -> None:
        """Refuse more than is allowed.

        Raises:
            ServeError: of the limit's kind, with the value and what is allowed.
        """
        allowed = self.values[name]
        if value > allowed:
            raise LIMITS[name].error(f"{what}: {shown(value)} is more than the {allowed} allowed here", param=param)


def shown(value: float) -> str:
    """A number as people read it; JSON's whole numbers may have thousands of digits."""
    if isinstance(value, int):
        return str(value) if abs(value) < LONGEST_SHOWN else f"a number of {int(math.log10(abs(value))) + 1} digits"
    return f"{value:g}"
