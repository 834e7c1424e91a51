"""The Open Inference Protocol, version 2, of KServe and Triton: ``/v2``, with Triton's binary tensor data.

A served artifact is a model of version 1, which takes one prompt as BYTES and gives pictures as UINT8 [n, H, W, 3].
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from intaglio import __version__
from intaglio.runtimes.serve_errors import Lost, NotFound, ServeError, WrongMedia
from intaglio.runtimes.serve_kserve_tensors import (
    CONFIG_TYPES,
    INPUTS,
    OUTPUTS,
    InferRequest,
    Spec,
    answer,
    check_json,
    check_seeds,
    parsed,
    values_of,
    wanted,
)
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_room import Protocol, Room, Wish

VERSION = "1"
HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
INFER = r"/v2/models/[^/]+(/versions/[^/]+)?/infer"


class IndexRequest(BaseModel):
    """The body of ``/v2/repository/index``, which may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ready: bool | None = None


def tensor_facts(spec: Spec) -> dict[str, Any]:
    """A tensor as metadata have it."""
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def metadata_of(model: Model) -> dict[str, Any]:
    """What a model takes and gives; `config_of` says which inputs may be left out."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": f"intaglio_{model.settings.backend}",
        "inputs": [tensor_facts(spec) for spec in INPUTS],
        "outputs": [tensor_facts(spec) for spec in OUTPUTS],
    }


def config_of(model: Model) -> dict[str, Any]:
    """The same as Triton's ``ModelConfig``."""

    def facts(spec: Spec) -> dict[str, Any]:
        return {"name": spec.name, "data_type": CONFIG_TYPES[spec.datatype], "dims": list(spec.shape)}

    return {
        "name": model.name,
        "backend": "intaglio",
        "max_batch_size": 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [{**facts(spec), "optional": spec.optional} for spec in INPUTS],
        "output": [facts(spec) for spec in OUTPUTS],
    }


def inlined(schema: dict[str, Any]) -> Any:
    """A JSON schema without ``$defs``, which OpenAPI would look for at its own root."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            return walk(definitions[name]) if name else {key: walk(value) for key, value in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    return walk(schema)


class Models:
    """The served artifacts, as the routes see them."""

    def __init__(self, room: Room) -> None:
        self.room, self.hub = room, room.hub

    def named(self, name: str, version: str = VERSION) -> Model:
        """One of them.

        Raises:
            NotFound: there is no such model, or no such version of it.
        """
        model = self.hub.model(name)
        if version != VERSION:
            raise NotFound(f"model {name!r} has no such version; allowed: {VERSION}", param="version")
        return model

    def up(self, model: Model) -> bool:
        """Whether a request to it is served."""
        return self.hub.started and not self.hub.draining and model.ready

    async def infer(self, request: Request, name: str, version: str = VERSION) -> Response:
        """Make pictures."""
        model = self.named(name, version)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise WrongMedia("Content-Encoding: bodies are taken as they are, not packed", param="Content-Encoding")
        asked, rest = parsed(await request.body(), request.headers.get(HEADER_LENGTH))
        values, outputs = values_of(asked, rest), wanted(asked)
        count = values.get("count", 1)
        self.room.limits.check("pictures", count, "num_images_per_prompt", "num_images_per_prompt")
        order = self.room.order(request, Wish(model=model.name, **values))
        check_seeds(outputs, order.parameters["seed"], count)
        check_json(outputs, count * order.parameters["width"] * order.parameters["height"] * 3)
        ticket = self.hub.submit(order)
        request.scope.setdefault("state", {})["ticket"] = ticket
        pictures = await self.room.fulfil(request, ticket)
        facts: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
        if asked.id is not None:
            facts["id"] = asked.id
        if notes := list(dict.fromkeys(note for picture in pictures for note in picture.warnings)):
            facts["parameters"] = {"warnings": "\n".join(notes)}
        body, end = await asyncio.to_thread(answer, facts, pictures, outputs)
        if end is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(end)})


def error_body(error: ServeError, ident: str) -> dict[str, str]:
    """The protocol's error object has one line; the request's id is in the header ``X-Request-ID``."""
    return {"error": error.message}


Name = Annotated[str, Path(description="a served artifact's name")]
Version = Annotated[str, Path(description=VERSION)]


def add_server(routes: APIRouter, models: Models) -> None:
    """The routes about the server and its list of models."""

    @routes.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "intaglio", "version": __version__, "extensions": EXTENSIONS}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """The server's process lives."""
        return {"live": True}

    @routes.get("/health/ready", responses={503: {"description": "a worker is being started"}})
    async def ready() -> Response:
        """Every artifact can serve."""
        return JSONResponse({"ready": models.hub.ready}, status_code=200 if models.hub.ready else 503)

    @routes.post("/repository/index")
    async def index(body: IndexRequest | None = None) -> list[dict[str, str]]:
        """The served artifacts."""
        states = {True: {"state": "READY", "reason": ""}, False: {"state": "UNAVAILABLE", "reason": "being started"}}
        found = [(model.name, models.up(model)) for model in models.hub.models.values()]
        only = bool(body and body.ready)
        return [{"name": name, "version": VERSION, **states[up]} for name, up in found if up or not only]


def add_models(routes: APIRouter, models: Models, base: str) -> None:
    """The routes about one model; `base` has its version or not."""

    @routes.get(base)
    async def metadata(name: Name, version: str = VERSION) -> dict[str, Any]:
        """What a model takes and gives."""
        return metadata_of(models.named(name, version))

    @routes.get(f"{base}/config")
    async def config(name: Name, version: str = VERSION) -> dict[str, Any]:
        """The same as Triton's model configuration."""
        return config_of(models.named(name, version))

    @routes.get(f"{base}/ready", responses={503: {"description": "its worker is being started"}})
    async def ready(name: Name, version: str = VERSION) -> dict[str, Any]:
        """A model can serve."""
        if not models.up(models.named(name, version)):
            raise Lost(f"model {name!r} is being started")
        return {"name": name, "ready": True}

    schema = inlined(InferRequest.model_json_schema())
    media = {kind: {"schema": schema} for kind in ("application/json", "application/octet-stream")}
    refused: dict[int | str, dict[str, Any]] = {
        400: {"description": "an input is not as the metadata have it; `error` names it"}
    }

    @routes.post(
        f"{base}/infer",
        response_class=Response,
        responses=refused,
        openapi_extra={"requestBody": {"required": True, "content": media}},
    )
    async def infer(request: Request, name: Name, version: str = VERSION) -> Response:
        """Make pictures."""
        return await models.infer(request, name, version)


def router(room: Room) -> APIRouter:
    """The routes."""
    routes, models = APIRouter(prefix="/v2", tags=["kserve"]), Models(room)
    add_server(routes, models)
    for base in ("/models/{name}", "/models/{name}/versions/{version}"):
        add_models(routes, models, base)
    return routes


# tritonclient sends infer's bodies without a Content-Type: that is what the empty word allows.
PROTOCOL = Protocol(
    prefixes=("/v2",),
    router=router,
    error=error_body,
    media={INFER: "application/octet-stream", f"(?:{INFER})": ""},
)
