"""Messages between the server and its worker processes: a JSON header and raw bytes, on pipes nobody else can open.

A message is the length of its header (4 bytes, big-endian), the header (a JSON object, UTF-8), then the blobs whose
lengths the header's ``sizes`` lists. Nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from typing import IO, Any

LENGTH = struct.Struct(">I")
LARGEST_HEADER = 16 * 2**20
LARGEST_BLOB = 2**30

Message = tuple[dict[str, Any], list[bytes]]


class WireError(RuntimeError):
    """What came is no message."""


def packed(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A message's bytes."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}, allow_nan=False).encode()
    return b"".join([LENGTH.pack(len(text)), text, *blobs])


def read_length(data: bytes) -> int:
    """The header's length.

    Raises:
        WireError: it is longer than any header is.
    """
    length: int = LENGTH.unpack(data)[0]
    if length > LARGEST_HEADER:
        raise WireError(f"a header of {length} bytes, at most {LARGEST_HEADER} are allowed")
    return length


def read_header(data: bytes) -> tuple[dict[str, Any], list[int]]:
    """The header, and the lengths of the blobs.

    Raises:
        WireError: it is no JSON object, or announces a blob that is too long.
    """
    try:
        header = json.loads(data)
        sizes = header.pop("sizes")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise WireError("a header that is not one") from error
    if not isinstance(sizes, list) or any(type(size) is not int or not 0 <= size <= LARGEST_BLOB for size in sizes):
        raise WireError("blobs of sizes that are none")
    return header, sizes


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message, ``None`` at the end of the stream, also where it ends amid one.

    Raises:
        WireError: what came is no message.
    """
    try:
        header, sizes = read_header(await reader.readexactly(read_length(await reader.readexactly(LENGTH.size))))
        return header, [await reader.readexactly(size) for size in sizes]
    except asyncio.IncompleteReadError:
        return None


def read(stream: IO[bytes]) -> Message | None:
    """`receive` on a blocking stream."""

    def exactly(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    try:
        header, sizes = read_header(exactly(read_length(exactly(LENGTH.size))))
        return header, [exactly(size) for size in sizes]
    except EOFError:
        return None
