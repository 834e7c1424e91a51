"""The server as an ASGI application: the protocols' routes, health, and how errors of any kind are said."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from intaglio import __version__
from intaglio.profiles.errors import ToolError
from intaglio.profiles.registry import resolve
from intaglio.runtimes.serve_body import strict
from intaglio.runtimes.serve_errors import BadRequest, NotFound, ServeError, without_paths
from intaglio.runtimes.serve_guard import Guard, shaped
from intaglio.runtimes.serve_hub import Hub
from intaglio.runtimes.serve_keys import Keys
from intaglio.runtimes.serve_limits import Limits
from intaglio.runtimes.serve_room import Protocol, Room

# Protocol -> "module:PROTOCOL". The first one's errors are those of paths that nobody has.
PROTOCOLS = {
    "openai": "intaglio.runtimes.serve_openai:PROTOCOL",
    "batches": "intaglio.runtimes.serve_batches:PROTOCOL",
    "huggingface": "intaglio.runtimes.serve_huggingface:PROTOCOL",
    "page": "intaglio.runtimes.serve_page:PROTOCOL",
    "metrics": "intaglio.runtimes.serve_metrics:PROTOCOL",
    "sdapi": "intaglio.runtimes.serve_sdapi:PROTOCOL",
    "kserve": "intaglio.runtimes.serve_kserve:PROTOCOL",
}
ANY_ERROR = {
    "description": "an error, in the shape of the route's protocol; the header x-request-id names it in the log",
    "content": {"application/json": {"schema": {"type": "object"}}},
}
NO_BODY = {"description": "an error; the header x-request-id names it in the log"}
PATIENCE = 30.0  # seconds for what is under way when the server ends


class MethodNotAllowed(ServeError):
    """The path has other methods."""

    status, code = 405, "method_not_allowed"


def make_app(
    hub: Hub,
    *,
    keys: Keys | None = None,
    hosts: Sequence[str] = ("*",),
    limits: Limits | None = None,
    begun: Callable[[Exception | None], None] = lambda error: None,
    without: Sequence[str] = (),
) -> Guard:
    """The application; its lifespan starts the workers and ends them.

    Args:
        hub: of the artifacts.
        keys: who may ask; nobody is asked for one where there are none.
        hosts: names that ``Host`` may have.
        limits: of requests.
        begun: told when the workers are loaded, or why they cannot be; ``/ready`` says no until then.
        without: names of PROTOCOLS that are left out.
    """
    limits = limits or Limits()
    protocols: list[Protocol] = [resolve(path) for name, path in PROTOCOLS.items() if name not in without]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(begin(hub, begun))
        try:
            yield
        finally:
            loading.cancel()
            await hub.close(PATIENCE)

    app = FastAPI(
        title="Intaglio",
        version=__version__,
        description="Diffusion artifacts, served to the clients there are.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(strict)],
        # Spans of its own would have what clients write. Versions that know no such argument have no spans, either.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    guarded = keys or Keys(None)
    room = Room(hub, limits, owners=len(guarded))
    for protocol in protocols:
        app.include_router(protocol.router(room))
    add_health(app, hub)

    app.openapi = lambda: described(app)  # type: ignore[method-assign]

    def answer(request: Request, error: ServeError) -> Response:
        if isinstance(error, MethodNotAllowed):
            error.headers["Allow"] = ", ".join(methods_of(app.routes, request.url.path))
        ident = request.scope.get("state", {}).get("id", "")
        body = shaped(protocols, request.url.path, error, ident)
        return JSONResponse(body, status_code=error.status, headers=error.headers)

    for kind, make in ERRORS.items():
        app.add_exception_handler(kind, lambda request, error, make=make: answer(request, make(error)))
    return Guard(app, protocols=protocols, keys=guarded, hosts=hosts, limits=limits, tell=hub.tell)


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: every route may answer with an error, and none does with FastAPI's own 422.

    A page that shares its path with an interface is mentioned there.
    """
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for name, path in document["paths"].items():
            for method in methods_of(app.routes, name):
                summary = "what GET says, without its body" if method == "HEAD" else "for browsers"
                path.setdefault(method.lower(), {"summary": summary, "responses": {"200": {"description": ""}}})
            for method, operation in path.items():
                operation["responses"].pop("422", None)
                operation["responses"].setdefault("default", NO_BODY if method == "head" else ANY_ERROR)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
    return app.openapi_schema or {}


def methods_of(routes: Iterable[Any], path: str) -> list[str]:
    """The methods that a path has; Starlette names those of one of its routes."""
    found: set[str] = set()
    for route in routes:
        inner = getattr(route, "original_router", None)  # how newer versions of FastAPI keep included ones
        if inner is not None:
            found.update(methods_of(inner.routes, path))
        elif hasattr(route, "path_regex") and route.path_regex.match(path):
            found.update(route.methods or ())
    return sorted(found)


async def begin(hub: Hub, begun: Callable[[Exception | None], None]) -> None:
    """Load what is served, while ``/health`` answers already."""
    try:
        await hub.start()
    except Exception as error:
        begun(error)
    else:
        begun(None)


def add_health(app: FastAPI, hub: Hub) -> None:
    """Whether the process lives, and whether it can serve."""

    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        """The server's process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["health"], responses={503: {"description": "a worker is being started"}})
    async def ready(response: Response) -> dict[str, Any]:
        """Every artifact can serve."""
        response.status_code = 200 if hub.ready else 503
        models: Mapping[str, str] = {
            name: "loaded" if model.process else "unloaded" if model.unloaded else "starting"
            for name, model in hub.models.items()
        }
        return {"ready": hub.ready, "models": models}

    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/ready", ready, methods=["HEAD"], include_in_schema=False)


def from_validation(error: Any) -> ServeError:
    """The first thing that is wrong with a body or a parameter: where, and what is allowed; not the value."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        return BadRequest(f"{name!r} is not a field this server supports; leave it out", param=name)
    if first["type"] == "json_invalid":
        return BadRequest("the body is not JSON")
    text = re.sub(r"\s+", " ", first["msg"])
    return BadRequest(f"{name}: {text}" if name else text, param=name or None)


def from_http(error: Any) -> ServeError:
    """Starlette's own: no such path, no such method."""
    if error.status_code == 404:
        return NotFound("there is no such path here")
    if error.status_code == 405:
        return MethodNotAllowed("this path has no such method", headers=error.headers)
    made = (BadRequest if error.status_code < 500 else ServeError)(str(error.detail), headers=error.headers)
    made.status = error.status_code
    return made


ERRORS: dict[type[Exception], Any] = {
    ServeError: lambda error: error,
    ToolError: lambda error: BadRequest(without_paths(str(error))),
    RequestValidationError: from_validation,
    HTTPException: from_http,
    Exception: lambda error: ServeError("the server failed"),
}
