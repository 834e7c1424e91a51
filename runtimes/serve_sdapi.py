"""The API of AUTOMATIC1111's webui and SD.Next, ``/sdapi/v1``: text to image, progress, interrupt, and what there is.

Whose progress, whose interrupt: of the client's own oldest request here. A client is a key's owner; where there are no
keys, an address. ``POST options`` changes one thing, the model that a client's requests go to where they name none.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from intaglio.runtimes.serve_errors import BadRequest, Busy, ServeError
from intaglio.runtimes.serve_limits import LIMITS
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_room import Protocol, Room, as_json
from intaglio.runtimes.serve_sdapi_facts import (
    IDLE,
    checkpoint_of,
    digest_of,
    info_of,
    memory_of,
    picture_info,
    remaining,
    running_job,
    samplers_of,
    state_of,
    title_of,
)
from intaglio.runtimes.serve_sdapi_request import TextToImage, same, wish_of
from intaglio.runtimes.serve_ticket import Ticket

# Lists that are empty: a prompt or a field cannot name such a thing here.
EMPTY = (
    "sd-vae", "upscalers", "latent-upscale-modes", "loras", "hypernetworks", "face-restorers", "realesrgan-models",
    "prompt-styles",
)  # fmt: skip
SCHEDULES = {"automatic": "Automatic", "karras": "Karras"}
MOST_CHOICES = 1024  # clients that chose a model; a choice is never forgotten
# Fields as the other protocols, and messages from within, name them -> as they are called here.
FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "n": "batch_size",
    "size": "width",
    "model": "override_settings.sd_model_checkpoint",
}


class PngInfo(BaseModel):
    """The body of ``/sdapi/v1/png-info``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str = Field(description="a PNG in base64, or as a data: URL")


class Webui:
    """What the routes remember: each client's requests, and the model it chose."""

    def __init__(self, room: Room) -> None:
        self.room, self.hub = room, room.hub
        self.tickets: dict[Ticket, set[str]] = {}  # under way -> what was asked of it: "skipped", "interrupted"
        self.chosen: dict[str, str] = {}

    def model(self, request: Request, title: Any = None) -> Model:
        """The model of a title, a name or a hash; the client's own where there is none.

        Raises:
            BadRequest: there is no such model.
        """
        models = self.hub.models
        if title is None or title == "":
            return self.hub.model(self.chosen.get(self.room.client(request)))
        for model in models.values():
            if title in (model.name, title_of(model), digest_of(model), digest_of(model)[:10]):
                return model
        allowed = ", ".join(title_of(model) for model in models.values())
        raise BadRequest(f"sd_model_checkpoint: there is no such model; allowed: {allowed}", param="model")

    def ticket(self, request: Request) -> Ticket | None:
        """The client's oldest request that has begun, or else its oldest."""
        client = self.room.client(request)
        own = [ticket for ticket in self.tickets if ticket.order.client == client and not ticket.finished.is_set()]
        return next((ticket for ticket in own if ticket.begun), own[0] if own else None)

    async def pictures(self, request: Request, body: TextToImage) -> dict[str, Any]:
        """Make them, and say how."""
        model = self.model(request, (body.override_settings or {}).get("sd_model_checkpoint"))
        ticket = self.hub.submit(self.room.order(request, wish_of(body, model, self.room.limits)))
        request.scope.setdefault("state", {})["ticket"] = ticket
        self.tickets[ticket] = set()
        try:
            pictures = await self.room.fulfil(request, ticket)
        finally:
            del self.tickets[ticket]
        return {
            "images": [base64.b64encode(picture.data).decode() for picture in pictures],
            "parameters": body.model_dump(),
            "info": as_json(info_of(ticket, model, pictures, body)),
        }

    def options(self, request: Request) -> dict[str, Any]:
        """The settings of a webui that mean something here."""
        model = self.model(request)
        return {
            "sd_model_checkpoint": title_of(model),
            "sd_checkpoint_hash": digest_of(model),
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
            "live_previews_enable": True,
        }

    def choose(self, request: Request, given: Mapping[str, Any]) -> None:
        """Take over settings: another model; all others must be as they are.

        Raises:
            BadRequest: a setting that does not exist, or cannot be changed here.
            Busy: too many clients chose already.
        """
        now = self.options(request)
        for name, value in given.items():
            if name not in now:
                raise BadRequest(f"{name[:100]!r} is not an option of this server; leave it out", param=name)
            if name != "sd_model_checkpoint" and not same(value, now[name]):
                raise BadRequest(f"{name} cannot be changed here; it is {now[name]!r}", param=name)
        if given.get("sd_model_checkpoint"):
            client, model = self.room.client(request), self.model(request, given["sd_model_checkpoint"])
            if client not in self.chosen and len(self.chosen) >= MOST_CHOICES:
                raise Busy("too many clients chose a model; send override_settings.sd_model_checkpoint", seconds=60)
            self.chosen[client] = model.name

    def progress(self, request: Request, *, preview: bool) -> dict[str, Any]:
        """How far the client's request is; with `preview` also what it shows so far."""
        ticket = self.ticket(request)
        if ticket is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": IDLE, "current_image": None, "textinfo": None}
        if preview:
            ticket.show()
        image = base64.b64encode(ticket.preview).decode() if preview and ticket.preview else None
        text = None if ticket.begun else "Waiting in the queue"
        state = state_of(ticket, self.tickets[ticket])
        seconds = remaining(ticket, time.monotonic())
        return {
            "progress": ticket.progress, "eta_relative": seconds, "state": state, "current_image": image,
            "textinfo": text,
        }  # fmt: skip

    def interrupt(self, request: Request) -> None:
        """Have the client's pictures as they are after the next step."""
        if (ticket := self.ticket(request)) is not None:
            self.tickets[ticket].add("interrupted")
            ticket.finish_early()

    def skip(self, request: Request) -> None:
        """Have the picture that is under way as it is after the next step, and go on with the others."""
        ticket = self.ticket(request)
        job = running_job(ticket) if ticket is not None else None
        if ticket is not None and job is not None and job.process is not None:
            self.tickets[ticket].add("skipped")
            job.process.send({"do": "finish", "id": job.ident})


def error_body(error: ServeError, ident: str) -> dict[str, Any]:
    """A webui's error object; ``request_id`` names the request in the server's log."""
    message = re.sub("|".join(rf"\b{name}\b" for name in ("num_inference_steps", "guidance_scale")),
                     lambda match: FIELDS[match[0]], error.message)  # fmt: skip
    param = None if error.param is None else FIELDS.get(error.param, error.param).encode(errors="replace").decode()
    return {"error": error.code, "detail": message, "body": "", "errors": "", "param": param, "request_id": ident}


def add_lists(routes: APIRouter, webui: Webui) -> None:
    """The routes that say what there is."""

    @routes.get("/samplers")
    async def samplers(request: Request) -> list[dict[str, Any]]:
        """Those that fit the client's model."""
        return samplers_of(webui.model(request))

    @routes.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """``karras`` goes with DPM++ 2M."""
        return [{"name": name, "label": label, "aliases": []} for name, label in SCHEDULES.items()]

    @routes.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The served artifacts."""
        return [checkpoint_of(model) for model in webui.hub.models.values()]

    @routes.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """None."""
        return {"txt2img": [], "img2img": []}

    @routes.get("/memory")
    async def memory() -> dict[str, Any]:
        """Of the workers, in bytes."""
        return memory_of(webui.hub)

    @routes.get("/cmd-flags")
    async def flags() -> dict[str, Any]:
        """That this is an API alone, and the limits of requests."""
        return {"api": True, "nowebui": True, **{f"limit_{name}": webui.room.limits[name] for name in LIMITS}}

    async def nothing() -> list[Any]:
        """None: a prompt or a field cannot name such a thing here."""
        return []

    for name in EMPTY:
        routes.add_api_route(f"/{name}", nothing, name=name)


def router(room: Room) -> APIRouter:
    """The routes."""
    routes, webui = APIRouter(prefix="/sdapi/v1", tags=["sdapi"]), Webui(room)

    @routes.post("/txt2img", responses={400: {"description": "a value is not allowed; `detail` names the field"}})
    async def txt2img(request: Request, body: TextToImage) -> Response:
        """Make pictures; their PNGs say how they were made."""
        return JSONResponse(await webui.pictures(request, body))

    @routes.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        """Of the client's oldest request; a preview is made at its next step, and is in the answer after that."""
        return webui.progress(request, preview=not skip_current_image)

    @routes.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        """End the client's oldest request: it answers with its pictures as they are after the next step."""
        webui.interrupt(request)
        return {}

    @routes.post("/skip")
    async def skip(request: Request) -> dict[str, Any]:
        """End the picture that is under way likewise, and go on with the request's others."""
        webui.skip(request)
        return {}

    @routes.get("/options")
    async def options(request: Request) -> dict[str, Any]:
        """The settings there are."""
        return webui.options(request)

    @routes.post("/options")
    async def choose(request: Request, body: Annotated[dict[str, Any], "settings"]) -> dict[str, Any]:
        """Choose the client's model by ``sd_model_checkpoint``; nothing else can be changed."""
        webui.choose(request, body)
        return {}

    @routes.post("/png-info")
    async def png_info(body: PngInfo) -> Response:
        """Read how a PNG was made."""
        return JSONResponse(picture_info(body.image))

    add_lists(routes, webui)
    return routes


PROTOCOL = Protocol(prefixes=("/sdapi",), router=router, error=error_body)
