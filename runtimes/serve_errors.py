"""What a server answers when it cannot do what was asked: a status, a stable code, one line without a secret."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?")


def without_paths(text: str, *known: object) -> str:
    """One line without the paths in it; those that are `known` are found though they have spaces."""
    for path in sorted({str(path) for path in known if str(path)}, key=len, reverse=True):
        text = text.replace(path, "…")
    return PATH.sub("…", " ".join(text.split()))


def writable(text: str) -> str:
    """Text that UTF-8 can write: halves of surrogate pairs, which a client may have sent, become question marks."""
    return text.encode("utf-8", "replace").decode()


class ServeError(Exception):
    """An answer that is no picture.

    Attributes:
        status: of HTTP.
        code: a word for programs, which stays the same.
        message: one line for people: no path, no address, no traceback.
        param: the field it is about, where it is about one.
        headers: further ones, ``Retry-After`` among them.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.headers = writable(message), dict(headers or {})
        self.param = None if param is None else writable(param)


class BadRequest(ServeError):
    """The request is wrong."""

    status, code = 400, "invalid_request"


class Unauthorized(ServeError):
    """No key, or a wrong one."""

    status, code = 401, "invalid_api_key"


class Forbidden(ServeError):
    """From a page or a host that may not ask."""

    status, code = 403, "forbidden"


class NotFound(ServeError):
    """No such model, file or batch."""

    status, code = 404, "not_found"


class TooLarge(ServeError):
    """The body has more bytes than are allowed."""

    status, code = 413, "request_too_large"


class WrongMedia(ServeError):
    """The body is not JSON."""

    status, code = 415, "unsupported_media_type"


class Cancelled(ServeError):
    """The client did not want it any more; 499 is what nginx writes for that."""

    status, code = 499, "cancelled"


class Later(ServeError):
    """Another time it may be done; `seconds` from now, says ``Retry-After``."""

    def __init__(self, message: str, *, param: str | None = None, seconds: float = 2) -> None:
        super().__init__(message, param=param, headers={"Retry-After": str(max(1, math.ceil(seconds)))})


class Busy(Later):
    """The queue is full, or what waits in it would take longer than the deadline."""

    status, code = 429, "rate_limit_exceeded"


class Lost(Later):
    """The worker died, hung, or is being started again."""

    status, code = 503, "worker_lost"


class Late(ServeError):
    """The deadline passed."""

    status, code = 504, "deadline_exceeded"


class NoPicture(ServeError):
    """The checkpoint returned NaN, or a picture without content."""

    status, code = 500, "no_picture"


# The kinds of `intaglio.runtimes.serve_faults.KINDS`.
OF_KIND: dict[str, type[ServeError]] = {
    "user": BadRequest,
    "numerics": NoPicture,
    "engine": ServeError,
    "internal": ServeError,
}


def of_kind(kind: str, message: str) -> ServeError:
    """The error a worker's message stands for."""
    return Lost(message) if kind == "memory" else OF_KIND[kind](message)
