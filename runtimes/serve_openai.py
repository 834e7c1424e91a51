"""OpenAI's Images API: ``/v1/images/generations``, with streaming, and ``/v1/models``.

Shapes are those of the ``openai`` package's types; further fields have the names that vLLM-Omni and SGLang agree on:
``negative_prompt``, ``num_inference_steps``, ``guidance_scale``, ``true_cfg_scale``, ``seed``.
"""

from __future__ import annotations

import base64
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.picture_files import QUALITY
from intaglio.runtimes.sampling import LARGEST_SEED
from intaglio.runtimes.serve_errors import BadRequest, NotFound, ServeError
from intaglio.runtimes.serve_hub import facts_of
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_room import Protocol, Room, Wish, as_json
from intaglio.runtimes.serve_stream import EventStream
from intaglio.runtimes.serve_ticket import Picture, Ticket

MOST_PARTIAL_IMAGES = 3
NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # which the streaming events must have; a diffusion server counts none
# The word that OpenAI's clients sort errors by, where it is not "server_error".
ERROR_TYPES = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
Scalar = str | int | float | bool


class ImageRequest(BaseModel):
    """The body of ``/v1/images/generations``. What is not here is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="what the pictures show")
    model: str | None = Field(None, description="a served artifact's name; the first one where not given")
    n: int | None = Field(1, ge=1, description="how many pictures")
    size: str | None = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT")
    response_format: Literal["b64_json", "url"] | None = Field("b64_json", description="url: a data: URL")
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of webp and jpeg")
    background: Literal["opaque", "auto"] | None = "auto"
    quality: Literal["auto"] | None = Field("auto", description="num_inference_steps is what changes it here")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=MOST_PARTIAL_IMAGES, description="with stream")
    negative_prompt: str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    true_cfg_scale: float | None = Field(None, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED, description="picture k equals the one of seed + k alone")
    scheduler: str | None = Field(None, description="the checkpoint's own where not given")
    parameters: dict[str, Scalar] | None = Field(None, description="further ones, of the model's family")


def wish_of(body: ImageRequest) -> Wish:
    """What a body asks for.

    Raises:
        BadRequest: fields that do not go together.
    """
    size = body.size or "auto"
    width, height = (None, None) if size == "auto" else map(int, size.split("x"))
    form = body.output_format or "png"
    if body.output_compression is not None and form == "png":
        raise BadRequest("output_compression is of webp and jpeg; png loses nothing", param="output_compression")
    if body.partial_images and not body.stream:
        raise BadRequest("partial_images needs stream: true", param="partial_images")
    return Wish(
        prompt=body.prompt,
        model=body.model,
        negative_prompt=body.negative_prompt,
        count=body.n or 1,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        true_cfg_scale=body.true_cfg_scale,
        scheduler=body.scheduler,
        seed=body.seed,
        form=form,
        compression=QUALITY if body.output_compression is None else body.output_compression,
        previews=body.partial_images or 0,
        parameters=body.parameters or {},
    )


@contextlib.contextmanager
def blaming(room: Room, request: Request, body: ImageRequest) -> Iterator[None]:
    """Name the field in errors of the artifact, which knows parameters and no fields."""
    try:
        yield
    except BadRequest as error:
        name = blamed(room, request, body) if error.param is None else None
        if name is None:
            raise
        raise BadRequest(f"{name}: {error.message}", param=name) from error


def blamed(room: Room, request: Request, body: ImageRequest) -> str | None:
    """The one field without which a body that is refused would be taken, where there is one."""

    def taken(tried: ImageRequest) -> bool:
        try:
            order = room.order(request, wish_of(tried))
            room.hub.model(order.model).reader.request(order.prompt, **order.parameters)
        except (ServeError, ToolError):
            return False
        return True

    if taken(body):
        return None
    fields = [name for name in type(body).model_fields if name in body.model_fields_set - {"prompt", "model"}]
    return next((name for name in fields if taken(body.model_copy(update={name: None}))), None)


def common(ticket: Ticket) -> dict[str, Any]:
    """What every answer says of its pictures."""
    size = f"{ticket.size[0]}x{ticket.size[1]}"
    return {"background": "opaque", "output_format": ticket.order.form, "size": size}


def in_base64(picture: Picture) -> dict[str, Any]:
    """A picture's content in its element of ``data``."""
    return {"b64_json": base64.b64encode(picture.data).decode()}


def in_data_url(picture: Picture, form: str) -> dict[str, Any]:
    """The same for ``response_format: url``: nothing is kept here that a link could lead to."""
    return {"url": f"data:image/{form};base64,{base64.b64encode(picture.data).decode()}"}


def notes(picture: Picture) -> dict[str, Any]:
    """What an element of ``data`` says beside the content."""
    return {"seed": picture.seed, **({"warnings": list(picture.warnings)} if picture.warnings else {})}


def answer_of(ticket: Ticket, pictures: list[Picture], contents: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a request without ``stream``; `contents` are the pictures'."""
    data = [{**content, **notes(picture)} for picture, content in zip(pictures, contents, strict=True)]
    return {"created": int(time.time()), "data": data, **common(ticket)}


def answer(ticket: Ticket, pictures: list[Picture], response_format: str | None) -> dict[str, Any]:
    """The same with the contents in the answer itself."""
    form = ticket.order.form
    as_url = response_format == "url"
    return answer_of(ticket, pictures, [in_data_url(p, form) if as_url else in_base64(p) for p in pictures])


def event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {kind}\ndata: {as_json({'type': kind, **fields})}\n\n".encode()


async def events(ticket: Ticket, ident: str) -> AsyncIterator[bytes]:
    """The events of a request with ``stream``: partial images, then every picture; ``error`` where there is none."""
    facts = {**common(ticket), "quality": "auto"}
    partial = 0
    try:
        async for happened in ticket.stream():
            now = {"created_at": int(time.time()), **facts}
            if happened["event"] == "preview":
                text = base64.b64encode(happened["data"]).decode()
                yield event("image_generation.partial_image", {"b64_json": text, "partial_image_index": partial, **now})
                partial += 1
            elif happened["event"] == "picture":
                picture = ticket.pictures[happened["picture"]]
                content = {**in_base64(picture), **notes(picture)}
                yield event("image_generation.completed", {**content, **now, "usage": NO_TOKENS})
    except ServeError as error:
        yield event("error", error_body(error, ident))
    finally:
        ticket.cancel()


def model_facts(model: Model) -> dict[str, Any]:
    """One element of ``/v1/models``; what is more than OpenAI's is under ``intaglio``."""
    generation = model.reader.artifact.generation  # the folder may be another build's by now
    created = generation[3] // 10**9 if generation else 0
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "intaglio",
        "intaglio": facts_of(model),
    }


def error_body(error: ServeError, ident: str) -> dict[str, Any]:
    """OpenAI's error object; ``request_id`` names the request in the server's log."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
            "request_id": ident,
        }
    }


def router(room: Room) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/images/generations", responses={400: {"description": "a value is not allowed; `param` names it"}})
    async def generate(request: Request, body: ImageRequest) -> Response:
        """Make pictures."""
        wish = wish_of(body)
        with blaming(room, request, body):
            if body.stream:
                ticket = room.hub.submit(room.order(request, wish))
                ident = request.scope["state"]["id"]
                return EventStream(ticket, events(ticket, ident))
            ticket, pictures = await room.make(request, wish)
        return JSONResponse(answer(ticket, pictures, body.response_format))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served artifacts."""
        return {"object": "list", "data": [model_facts(model) for model in room.hub.models.values()]}

    routes.add_api_route("/v1/models", models, methods=["HEAD"], include_in_schema=False)

    @routes.get("/v1/models/{name}")
    async def model(name: Annotated[str, "a served artifact's name"]) -> dict[str, Any]:
        """One served artifact."""
        if not re.fullmatch(r"[^/\x00]+", name) or name not in room.hub.models:
            raise NotFound(f"there is no such model; allowed: {', '.join(room.hub.models)}", param="model")
        return model_facts(room.hub.models[name])

    return routes


PROTOCOL = Protocol(prefixes=("/v1",), router=router, error=error_body)
