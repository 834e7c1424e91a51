"""Hugging Face's inference API: ``{"inputs": …, "parameters": …}`` answered with the bytes of a picture.

``InferenceClient(model=URL).text_to_image(…)`` posts to the URL itself, so it may be the server's address
(``http://host:8000``, as of an Inference Endpoint), ``/generate``, or ``/models/NAME`` for one of several models.
"""

from __future__ import annotations

import json
import re
from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from intaglio.runtimes.picture_files import PICTURE_FORMATS
from intaglio.runtimes.sampling import LARGEST_SEED
from intaglio.runtimes.schedulers import DIFFUSERS_CLASSES
from intaglio.runtimes.serve_errors import ServeError
from intaglio.runtimes.serve_room import Protocol, Room, Wish
from intaglio.runtimes.serve_ticket import Picture

# Media types of `Accept` -> how pictures are written; the first that fits is taken where several are as welcome.
FORMS = {f"image/{form}": form for form in PICTURE_FORMATS}
# Of texts without spaces around them: a pattern with spaces at both ends tries every way to share them out.
RANGE = re.compile(r"([\w.+-]+|\*)/([\w.+-]+|\*)")
QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")
MOST_NOTES, LONGEST_NOTE = 8, 500  # of warnings in a header, and characters of one


class NotAcceptable(ServeError):
    """`Accept` names no form that pictures have here."""

    status, code = 406, "not_acceptable"


class Parameters(BaseModel):
    """``parameters`` as ``TextToImageParameters`` of huggingface_hub has them. What is not given is the model's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    negative_prompt: str | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    true_cfg_scale: float | None = Field(None, allow_inf_nan=False)
    scheduler: str | None = Field(None, max_length=100, description="ours, or the name of a class of diffusers")
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED, description="random where not given; see X-Seed")


class TextToImage(BaseModel):
    """The body. What is not here is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str = Field(description="what the picture shows")
    parameters: Parameters | None = None


def form_of(accept: str) -> str:
    """How the picture is written, by the header ``Accept`` (RFC 9110, section 12.5.1).

    Raises:
        NotAcceptable: in no way that is asked for.
    """
    welcome = dict.fromkeys(FORMS, (0.0, -1))  # (its weight, how closely the range that gave it fits)
    for part in (accept or "*/*").split(","):
        media_range, *parameters = map(str.strip, part.split(";"))
        found = RANGE.fullmatch(media_range)
        if found is None:
            continue
        weight = next(filter(None, map(QUALITY.fullmatch, parameters)), None)
        closeness = (found[1] != "*") + (found[2] != "*")
        for media in FORMS:
            kind, _, name = media.partition("/")
            if found[1] in (kind, "*") and found[2] in (name, "*") and closeness > welcome[media][1]:
                welcome[media] = (float(weight[1]) if weight else 1.0, closeness)
    best = max(FORMS, key=lambda media: welcome[media][0])
    if welcome[best][0] <= 0:
        raise NotAcceptable(f"Accept names nothing a picture can be here: {', '.join(FORMS)}", param="Accept")
    return FORMS[best]


def wish_of(body: TextToImage, model: str | None, form: str) -> Wish:
    """What a body asks for."""
    given = body.parameters or Parameters.model_validate({})
    scheduler = given.scheduler
    return Wish(
        prompt=body.inputs,
        model=model,
        negative_prompt=given.negative_prompt,
        width=given.width,
        height=given.height,
        num_inference_steps=given.num_inference_steps,
        guidance_scale=given.guidance_scale,
        true_cfg_scale=given.true_cfg_scale,
        scheduler=DIFFUSERS_CLASSES.get(scheduler, scheduler) if scheduler is not None else None,
        seed=given.seed,
        form=form,
    )


def shortened(note: str) -> str:
    """A warning that fits into a header."""
    return note if len(note) <= LONGEST_NOTE else f"{note[:LONGEST_NOTE]}…"


def answer_of(picture: Picture, form: str) -> Response:
    """The picture's bytes; its seed and what there is to say of it are headers."""
    headers = {"X-Seed": str(picture.seed), "Vary": "Accept"}
    if picture.warnings:
        headers["X-Warnings"] = json.dumps([shortened(note) for note in picture.warnings[:MOST_NOTES]])
    return Response(picture.data, media_type=f"image/{form}", headers=headers)


def error_body(error: ServeError, ident: str) -> dict[str, str]:
    """As text-generation-inference has it; ``request_id`` names the request in the server's log."""
    return {"error": error.message, "error_type": error.code, "request_id": ident}


def router(room: Room) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["huggingface"])
    pictures = {"content": {media: {} for media in FORMS}, "description": "the picture, as Accept asks for it"}
    refused = {"description": "a value is not allowed; `error` names it"}

    async def made(request: Request, body: TextToImage, model: str | None) -> Response:
        form = form_of(",".join(request.headers.getlist("accept")))
        _, (picture,) = await room.make(request, wish_of(body, model, form))
        return answer_of(picture, form)

    @routes.post("/models/{name}", response_class=Response, responses={200: pictures, 400: refused})
    async def of_model(
        request: Request, name: Annotated[str, Path(description="a served artifact's name")], body: TextToImage
    ) -> Response:
        """Make a picture with one of the served artifacts."""
        return await made(request, body, name)

    @routes.post("/generate", response_class=Response, responses={200: pictures, 400: refused})
    async def generate(request: Request, body: TextToImage) -> Response:
        """Make a picture with the first artifact."""
        return await made(request, body, None)

    @routes.post("/", response_class=Response, responses={200: pictures, 400: refused})
    async def at_the_root(request: Request, body: TextToImage) -> Response:
        """The same, where a client knows nothing but the server's address."""
        return await made(request, body, None)

    return routes


PROTOCOL = Protocol(prefixes=("/models", "/generate", "/"), router=router, error=error_body)
