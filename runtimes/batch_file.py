"""Files of requests in OpenAI's Batch format: what their lines are, and what is wrong with them.

A line is ``{"custom_id": …, "method": "POST", "url": "/v1/images/generations", "body": {…}}``, where ``method`` and
``url`` may be left out. Bodies are not looked into here: what is wrong with one is its line's own result.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.serve_body import unique
from intaglio.runtimes.serve_errors import BadRequest, ServeError
from intaglio.runtimes.serve_limits import Limits

LONGEST_ID = 512  # characters of a custom_id
MOST_FAULTS = 100  # that are listed of a file


class Fault(NamedTuple):
    """What is wrong with a file: the line, counted from 1, or the whole of it."""

    line: int | None
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file: `place` and `size` in bytes, so that bodies need not be held."""

    number: int
    custom_id: str
    place: int
    size: int


class BatchLine(BaseModel):
    """What a line is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1, max_length=LONGEST_ID)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/images/generations"] = "/v1/images/generations"
    body: dict[str, Any]


class RequestFile:
    """A file of requests: its `lines`, and the `faults` that keep it from being used. It stays open until `close`.

    `limits` are those it was read with.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.file, self.limits = path.open("rb"), limits
        self.lines, self.faults = list[Line](), list[Fault]()
        first: dict[str, int] = {}
        for number, place, raw in raw_lines(self.file, limits["body_bytes"]):
            try:
                limits.check("batch_lines", number, "lines")
                limits.check("body_bytes", len(raw), "bytes of the line")
                custom_id = parsed(raw).custom_id
                if first.setdefault(custom_id, number) != number:
                    raise BadRequest(f"custom_id {custom_id!r} is line {first[custom_id]}'s too", param="custom_id")
            except ServeError as error:
                self.faults.append(Fault(number, error.message, error.param))
                if len(self.faults) == MOST_FAULTS or number > limits["batch_lines"]:
                    return
            else:
                self.lines.append(Line(number, custom_id, place, len(raw)))
        if not self.lines and not self.faults:
            self.faults.append(Fault(None, "the file has no requests"))

    def body(self, line: Line) -> dict[str, Any]:
        """The body of a line, which need not be one of a request.

        Raises:
            UsageError: the file is not what it was.
        """
        self.file.seek(line.place)
        with contextlib.suppress(BadRequest):
            found = parsed(self.file.read(line.size))
            if found.custom_id == line.custom_id:
                return found.body
        raise UsageError("the file of requests was changed while it was worked on")

    def close(self) -> None:
        """Give the file back."""
        self.file.close()


def raw_lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of every line that is not empty; of one longer than `limit` bytes the first of them."""
    number = place = 0
    while raw := file.readline(limit + 1):
        number, begin, rest = number + 1, place, raw
        place += len(raw)
        while not rest.endswith(b"\n") and (rest := file.readline(limit + 1)):
            place += len(rest)
        if raw.strip():
            yield number, begin, raw


def parsed(raw: bytes) -> BatchLine:
    """A line.

    Raises:
        BadRequest: it is not one.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=not_json, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise BadRequest("not a JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise BadRequest("not a JSON object")
    try:
        return BatchLine.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{name}: {first['msg']}", param=name) from None


def not_json(name: str) -> NoReturn:
    """Refuse ``NaN`` and infinities, which Python would read.

    Raises:
        ValueError: always.
    """
    raise ValueError(name)
