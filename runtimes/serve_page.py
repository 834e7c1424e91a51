"""The page at ``/``: one document with its style and script inside, and the routes it alone speaks to.

The document's policy allows exactly these bytes of style and script, by their digests, no other origin, and no text
that becomes markup (Trusted Types). Where the server has keys the browser asks for one (any user name, the key as the
password) and sends it along with what the page fetches.

Seeds are text here: a browser's numbers are float64, which holds none above 2^53.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.infotext import SAMPLER_NAMES
from intaglio.runtimes.previews import PREVIEW
from intaglio.runtimes.schedulers import PROCESSES, default_name, make_scheduler
from intaglio.runtimes.serve_errors import ServeError
from intaglio.runtimes.serve_hub import Hub, facts_of
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_openai import event
from intaglio.runtimes.serve_room import Protocol, Room, Wish
from intaglio.runtimes.serve_stream import EventStream
from intaglio.runtimes.serve_ticket import Job, Ticket

HERE = Path(__file__).parent
DOCUMENT, STYLE = "serve_page.html", "serve_page.css"
# One script, in this order; all share one scope.
SCRIPTS = tuple(f"serve_page{part}.js" for part in ("_words", "_keep", "_form", "_gallery", "_stage", ""))
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data: blob:; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_PREVIEWS = 24
LOOK_SECONDS = 0.25  # between looks at the place of a request that waits
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: nginx would keep events back


class PicturesRequest(BaseModel):
    """The body of ``/ui/pictures``; what is not given is the model's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    negative_prompt: str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    true_cfg_scale: float | None = Field(None, allow_inf_nan=False)
    scheduler: str | None = None
    seed: str | None = Field(None, pattern=r"^[0-9]{1,20}$")
    previews: int = Field(0, ge=0, le=MOST_PREVIEWS, description="of the first picture")

    def wish(self) -> Wish:
        """What it asks for."""
        given = self.model_dump(exclude={"n", "seed"})
        return Wish(**given, count=self.n, seed=None if self.seed is None else int(self.seed))


def digest(text: str) -> str:
    """A source expression of a Content-Security-Policy, https://www.w3.org/TR/CSP3/#grammardef-hash-source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def document() -> tuple[str, str]:
    """The page, and the policy it is sent with."""
    html, style = ((HERE / name).read_text(encoding="utf-8") for name in (DOCUMENT, STYLE))
    parts = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\n}})();\n'
    policy = POLICY.format(script=digest(script), style=digest(style))
    for name, text in (("STYLE", style), ("SCRIPT", script)):
        before, _, after = html.partition(f"<!--{name}-->")
        html = before + text + after
    return html, policy


def schedulers_of(model: Model) -> list[str]:
    """Those that can sample the checkpoint as it is configured."""
    config, found = model.reader.sampler.scheduler_config, []
    for name in PROCESSES[config.process]:
        with contextlib.suppress(ValueError):  # it wants the shift of a size, and fits
            try:
                make_scheduler(name, config, 2)
            except ToolError:
                continue
        found.append(name)
    return found


def own_scheduler(model: Model) -> str | None:
    """The checkpoint's; ``None`` where it has to be chosen."""
    try:
        return default_name(model.reader.sampler.scheduler_config)
    except ToolError:
        return None


def form_of(model: Model) -> dict[str, Any]:
    """What the page must know to ask an artifact for pictures."""
    manifest, sampler = model.reader.artifact.manifest, model.reader.sampler
    return {
        "name": model.name,
        **facts_of(model),
        "sizes": {
            axis: {"min": axes.min, "default": axes.opt, "max": axes.max, "multiple": axes.multiple}
            for axis, axes in manifest.shapes.items()
            if axis in ("width", "height")
        },
        "steps": manifest.settings["num_inference_steps"],
        "guidance": manifest.settings["guidance_scale"],
        "true_cfg": sampler.guidance_parameter == "true_cfg_scale",
        "scheduler": own_scheduler(model),
        "schedulers": [{"name": name, "shown": SAMPLER_NAMES.get(name, name)} for name in schedulers_of(model)],
        "preview_vae": PREVIEW in manifest.components,  # without it a preview costs what a picture does
    }


def ahead(hub: Hub, job: Job) -> int:
    """How many pictures of the same artifact begin before one that waits, as `FairQueue` gives turns."""
    count = 0
    for level, clients in hub.queue.levels.items():
        lines = {client: [j for j in line if j.model is job.model] for client, line in clients.items()}
        if level > job.priority:
            count += sum(map(len, lines.values()))
        elif level == job.priority:
            place, earlier = lines[job.client].index(job), True
            for client, line in lines.items():
                earlier = earlier and client != job.client
                count += place if client == job.client else min(len(line), place + earlier)
    return count


def standing(hub: Hub, ticket: Ticket) -> dict[str, Any]:
    """Where a request is that has made no step: ``loading``, ``waiting`` behind others, or ``beginning``."""
    waiting = [job for job in ticket.jobs.values() if job.process is None and job.index not in ticket.pictures]
    if len(waiting) < len(ticket.jobs):
        return {"state": "beginning"}
    first = min(waiting, key=lambda job: job.index)
    state = "waiting" if ticket.model.process is not None else "loading"
    return {"state": state, "ahead": ahead(hub, first)}


def shown(ticket: Ticket, happened: dict[str, Any]) -> bytes:
    """One event of a request as the page reads it."""
    kind, index = happened["event"], happened["picture"]
    if kind == "step":
        told = {name: happened[name] for name in ("index", "total", "progress")}
        return event("step", {"picture": index, **told})
    if kind == "preview":
        return event("preview", {"picture": index, "data": base64.b64encode(happened["data"]).decode()})
    picture = ticket.pictures[index]
    told = {
        "data": base64.b64encode(picture.data).decode(),
        "seed": str(picture.seed),
        "seconds": sum(picture.seconds.values()),
        "width": picture.size[0],
        "height": picture.size[1],
        "scheduler": picture.parameters["scheduler"],
        "num_inference_steps": picture.parameters["num_inference_steps"],
        "guidance_scale": picture.parameters["guidance_scale"],
        "warnings": list(picture.warnings),
    }
    return event("picture", {"picture": index, **told})


async def told(hub: Hub, ticket: Ticket, ident: str) -> AsyncIterator[bytes]:
    """The events of a request: where it stands, every step, previews, pictures; ``error`` where there are none."""
    last: dict[str, Any] = {}
    yield event("taken", {"n": ticket.order.count, "width": ticket.size[0], "height": ticket.size[1]})
    while True:
        if ticket.begun is None and not ticket.finished.is_set() and (now := standing(hub, ticket)) != last:
            last = now
            yield event("standing", now)
        try:
            async with asyncio.timeout(LOOK_SECONDS if ticket.begun is None else None):
                happened = await ticket.events.get()
        except TimeoutError:
            continue
        if happened is None:
            break
        yield shown(ticket, happened)
    if ticket.error is not None:
        yield event("error", error_body(ticket.error, ident))


def error_body(error: ServeError, ident: str) -> dict[str, Any]:
    """What the page shows in one line; ``request_id`` names the request in the server's log."""
    return {"error": {"message": error.message, "code": error.code, "param": error.param, "request_id": ident}}


def router(room: Room) -> APIRouter:
    """The routes; they are the page's alone and not part of the documented interface."""
    routes = APIRouter(include_in_schema=False)
    html, policy = document()

    @routes.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The page."""
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @routes.get("/ui/models")
    async def models() -> dict[str, Any]:
        """The served artifacts, and what may be asked of them."""
        limits = {name: room.limits[name] for name in ("pictures", "steps", "pixels")}
        limits["pictures"] = min(limits["pictures"], room.hub.settings.queue)
        return {"models": [form_of(model) for model in room.hub.models.values()], "limits": limits}

    @routes.post("/ui/pictures")
    async def pictures(request: Request, body: PicturesRequest) -> Response:
        """Make pictures, and tell how it goes."""
        ticket = room.hub.submit(room.order(request, body.wish()))
        return EventStream(ticket, told(room.hub, ticket, request.scope["state"]["id"]), UNBUFFERED)

    return routes


PROTOCOL = Protocol(prefixes=("/ui",), router=router, error=error_body)
