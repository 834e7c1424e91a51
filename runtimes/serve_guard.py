"""What stands before every route: who may ask, how much may come in, and that nothing leaks out with an error."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from intaglio.runtimes.serve_errors import BadRequest, Forbidden, Lost, ServeError, TooLarge, Unauthorized, WrongMedia
from intaglio.runtimes.serve_keys import Keys
from intaglio.runtimes.serve_limits import Limits
from intaglio.runtimes.serve_process import log_defect
from intaglio.runtimes.serve_room import Protocol, as_json

LOG = logging.getLogger("intaglio.serve")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})  # without a key
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
SINGLE = frozenset({"host", "origin", "authorization", "content-type", "content-length", "transfer-encoding"})
FORM = "multipart/form-data"
LONGEST_LENGTH = 18  # digits of Content-Length
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        protocols: whose paths have which errors and bodies.
        keys: who may ask; none: everybody.
        hosts: names in ``Host`` that are this server's; ``*``: all. Others are pages that rebind their name to it.
        limits: of bodies.
        tell: told when a request comes and when it is answered, for those who count; see `Hub.tell`.

    Attributes:
        connections: how many there are; whoever listens sets it.

    Nothing is believed of ``X-Forwarded-For``: a client behind a proxy has a key of its own.
    """

    def __init__(
        self,
        app: App,
        *,
        protocols: Sequence[Protocol],
        keys: Keys,
        hosts: Sequence[str],
        limits: Limits,
        tell: Callable[..., None] = lambda what, **facts: None,
    ) -> None:
        self.app, self.protocols, self.keys, self.limits, self.tell = app, protocols, keys, limits, tell
        self.hosts = frozenset(host.lower() for host in hosts)
        self.connections: Callable[[], int] = lambda: 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        ident, start = state.get("id") or uuid.uuid4().hex, time.perf_counter()  # a proxy's, where one has given it
        state["id"] = ident
        self.tell("asked", scope=scope)
        sent: list[int] = []
        broken: list[ServeError] = []  # what the body broke: the answer then, whatever the route makes of it

        async def answer(message: Message) -> None:
            if broken and not sent:
                return
            if message["type"] == "http.response.start":
                sent.append(message["status"])
                given = {name.lower() for name, _ in message.get("headers", [])}
                extra = [(name, value) for name, value in HEADERS if name not in given]
                extra += [*state.get("headers", ()), (b"x-request-id", ident.encode())]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        try:
            headers = single(scope)
            self.admit(scope, headers)
            await self.app(scope, self.bounded(scope["path"], receive, headers, broken), answer)
        except ServeError as error:
            broken[:] = broken[:1] or [error]
        except asyncio.CancelledError:
            broken[:] = [Lost("the server ended before this request did; send it again")]
            raise
        except Exception as error:
            if not broken:
                log_defect(f"request {ident}", error)
                broken.append(ServeError("the server failed"))
        finally:
            if broken and not sent:
                refusal = broken.pop()
                broken.clear()
                await self.refuse(scope, refusal, ident, answer)
            route = scope.get("route")
            path = getattr(route, "path", "unknown path")
            seconds = time.perf_counter() - start
            self.tell("answered", scope=scope, status=sent[0] if sent else None, seconds=seconds)
            LOG.info("%s %s %s %s %.3f s", ident, scope["method"], path, sent[0] if sent else "-", seconds)

    def admit(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuse who may not ask, and bodies of another kind.

        Raises:
            ServeError: with the reason.
        """
        path, method = scope["path"], scope["method"]
        if path not in OPEN and self.connections() > self.limits["connections"]:
            raise Lost("there are more connections than this server takes", seconds=5)
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        self.limits.check("header_bytes", size, "headers")
        host = headers.get("host", "").lower()
        name = re.sub(r":\d+$", "", host)
        if "*" not in self.hosts and name not in self.hosts:
            raise Forbidden("this server does not go by the name in Host; allow it with --allowed-host NAME")
        origin = headers.get("origin")
        if method not in SAFE and origin is not None and origin.lower().partition("://")[2] != host:
            raise Forbidden("requests from other sites' pages are not taken")
        if self.keys and path not in OPEN:
            owner = self.keys.owner(headers.get("authorization", ""))
            if owner is None:
                raise Unauthorized(
                    "no valid API key: send Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": 'Basic realm="intaglio", charset="UTF-8"'},
                )
            scope["state"]["client"] = owner
        if "content-length" in headers or "transfer-encoding" in headers:
            self.check_media(path, headers)

    def check_media(self, path: str, headers: Mapping[str, str]) -> None:
        """Bodies are JSON, but where a protocol says otherwise.

        Raises:
            WrongMedia, TooLarge, BadRequest: it is not, or too long.
        """
        length = headers.get("content-length", "")
        if length == "0":
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        allowed = self.media_of(path)
        if kind not in allowed:
            raise WrongMedia(f"a body here is {' or '.join(allowed)}; say so in Content-Type")
        if length:
            if not length.isascii() or not length.isdecimal() or len(length) > LONGEST_LENGTH:
                raise BadRequest("Content-Length is not a number")
            self.limits.check(self.size_limit(path, kind), int(length), "body")

    def media_of(self, path: str) -> list[str]:
        """The kinds of body that a path takes."""
        others = [kind for protocol in self.protocols for at, kind in protocol.media.items() if re.fullmatch(at, path)]
        return ["application/json", *others]

    def size_limit(self, path: str, kind: str) -> str:
        """The name of the limit of a body's bytes: files of requests are longer, where there are any."""
        return "batch_bytes" if kind == FORM and FORM in self.media_of(path) else "body_bytes"

    def bounded(self, path: str, receive: Receive, headers: Mapping[str, str], broken: list[ServeError]) -> Receive:
        """`receive` that counts bytes, and does not wait for them for ever; `broken` gets what is raised."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        allowed, seconds = self.limits[self.size_limit(path, kind)], self.limits["body_seconds"]
        end, taken, whole = time.monotonic() + seconds, 0, False

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now is the client's farewell
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                broken.append(BadRequest(f"the body did not arrive within {seconds} s"))
                raise broken[0] from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > allowed:
                broken.append(TooLarge(f"body: more than the {allowed} bytes allowed here"))
                raise broken[0]
            return message

        return bounded

    def first_error(self, error: ServeError) -> tuple[bytes, str]:
        """The body of an error on no path at all, and the request's id."""
        ident = uuid.uuid4().hex
        return as_json(shaped(self.protocols, "", error, ident)).encode(), ident

    async def refuse(self, scope: Scope, error: ServeError, ident: str, send: Send) -> None:
        """Answer with an error in the shape of the path's protocol."""
        body = as_json(shaped(self.protocols, scope["path"], error, ident)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def single(scope: Scope) -> dict[str, str]:
    """The headers by name.

    Raises:
        BadRequest: one that decides something is there twice, or two say how long the body is; who stands before or
            behind might read the other one.
    """
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in SINGLE:
            raise BadRequest(f"the header {key} is there twice")
        found[key] = value.decode("latin-1")
    if "content-length" in found and "transfer-encoding" in found:
        raise BadRequest("Content-Length and Transfer-Encoding exclude each other; send one of them")
    return found


def shaped(protocols: Sequence[Protocol], path: str, error: ServeError, ident: str) -> dict[str, Any]:
    """An error as the protocol of a path has it, by the longest prefix; the first protocol's where it is nobody's."""
    own = [(len(prefix), protocol) for protocol in protocols for prefix in protocol.prefixes if within(path, prefix)]
    return max(own, key=lambda pair: pair[0], default=(0, protocols[0]))[1].error(error, ident)


def within(path: str, prefix: str) -> bool:
    """Whether a path is a prefix, or below it."""
    return path == prefix or path.startswith(f"{prefix}/")
