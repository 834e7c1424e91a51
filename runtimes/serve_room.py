"""What every protocol of the server shares: from a client's words to an order, from an order to pictures."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from intaglio.profiles.registry import pick, suggestion
from intaglio.runtimes.infotext import infotext
from intaglio.runtimes.picture_files import PICTURE_FORMATS, QUALITY
from intaglio.runtimes.sampling import LARGEST_SEED
from intaglio.runtimes.schedulers import default_name
from intaglio.runtimes.serve_errors import BadRequest, ServeError
from intaglio.runtimes.serve_hub import Hub
from intaglio.runtimes.serve_limits import Limits, shown
from intaglio.runtimes.serve_queue import PRIORITIES
from intaglio.runtimes.serve_ticket import Order, Picture, Ticket

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request

PRIORITY, DEADLINE = "x-priority", "x-deadline-seconds"  # of a request's headers
RANDOM_SEEDS = 2**32  # what webuis draw from; a seed that is given may be larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way to speak to the server.

    Attributes:
        prefixes: of its paths; errors on them have its shape.
        router: its routes.
        error: an error and the request's id as a JSON body.
        media: pattern of a path -> what its bodies may be beside JSON.
    """

    prefixes: tuple[str, ...]
    router: Callable[[Room], APIRouter]
    error: Callable[[ServeError, str], dict[str, Any]]
    media: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client said, whatever its protocol; ``None`` is what it did not say.

    `parameters` are further ones, of the family. `form` is of PICTURE_FORMATS, `compression` 0 to 100.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    count: int = 1
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    scheduler: str | None = None
    seed: int | None = None
    form: str = "png"
    compression: int = QUALITY
    previews: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Room:
    """What routes work with: the hub, the limits, and the names of clients.

    Attributes:
        owners: of keys; 0 where none is asked for.
    """

    def __init__(self, hub: Hub, limits: Limits, *, owners: int = 0) -> None:
        self.hub, self.limits, self.owners = hub, limits, owners

    def order(self, request: Request, wish: Wish) -> Order:
        """A wish within the limits, complete.

        Raises:
            BadRequest: a value is not allowed, or the artifact has no such parameter; ``param`` names it.
            NotFound: no such model.
        """
        limits = self.limits
        model = self.hub.model(wish.model)
        settings, shapes = model.reader.artifact.manifest.settings, model.reader.artifact.manifest.shapes
        pick_form(wish.form)
        for name in ("prompt", "negative_prompt"):
            limits.check("prompt_bytes", utf8_bytes(getattr(wish, name) or "", name), name, name)
        for name in ("guidance_scale", "true_cfg_scale"):
            limits.check("guidance", magnitude(getattr(wish, name) or wish.parameters.get(name)), name, name)
        limits.check("pictures", wish.count, "pictures", "n")
        if wish.count < 1:
            raise BadRequest(f"{wish.count} pictures are not allowed: 1 or more", param="n")
        width = shapes["width"].opt if wish.width is None else wish.width
        height = shapes["height"].opt if wish.height is None else wish.height
        limits.check("pixels", width * height, f"{shown(width)}x{shown(height)} pixels", "size")
        steps = settings["num_inference_steps"] if wish.num_inference_steps is None else wish.num_inference_steps
        limits.check("steps", steps, "num_inference_steps", "num_inference_steps")
        seed = secrets.randbelow(RANDOM_SEEDS) if wish.seed is None else wish.seed
        if seed + wish.count > LARGEST_SEED:
            message = f"seed: {seed} is not allowed for {wish.count} pictures: the last one's is at most 2**64 - 1"
            raise BadRequest(message, param="seed")
        sampler = model.reader.sampler
        check_further(wish, sampler, limits)
        parameters: dict[str, Any] = {
            **wish.parameters,
            **self.guidance(sampler, wish),
            "negative_prompt": wish.negative_prompt,
            "seed": seed,
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "scheduler": wish.scheduler,
        }
        scale = parameters["guidance_scale"]

        def texts(seed: int) -> dict[str, str]:
            said = {**parameters, "seed": seed, "scheduler": wish.scheduler or default_name(sampler.scheduler_config)}
            said["guidance_scale"] = settings["guidance_scale"] if scale is None else scale
            digest = model.reader.artifact.manifest.digest
            return {"parameters": infotext(wish.prompt, said, model=model.name, digest=digest)}

        return Order(
            prompt=wish.prompt,
            parameters=parameters,
            model=model.name,
            count=wish.count,
            form=wish.form,
            compression=wish.compression,
            previews=wish.previews,
            client=self.client(request),
            priority=priority_of(request),
            deadline=deadline_of(request, self.hub.settings.deadline),
            texts=texts,
        )

    def guidance(self, sampler: Any, wish: Wish) -> dict[str, Any]:
        """``guidance_scale`` and ``true_cfg_scale`` as this family takes them.

        Raises:
            BadRequest: the family has no ``true_cfg_scale``.
        """
        found: dict[str, Any] = {"guidance_scale": wish.guidance_scale}
        if wish.true_cfg_scale is None:
            return found
        if sampler.guidance_parameter == "true_cfg_scale":
            return {**found, "true_cfg_scale": wish.true_cfg_scale}
        if sampler.guidance_is_true_cfg and wish.guidance_scale is None:
            return {"guidance_scale": wish.true_cfg_scale}
        raise BadRequest("true_cfg_scale is not a parameter of this model; use guidance_scale", param="true_cfg_scale")

    def client(self, request: Request) -> str:
        """Whose turn a request takes: its key's, or its address's."""
        name = request.scope.get("state", {}).get("client")
        return name or (request.client.host if request.client else "")

    async def fulfil(self, request: Request, ticket: Ticket) -> list[Picture]:
        """The pictures; a client that goes away gives up its place.

        Raises:
            ServeError: there are none.
        """
        result = asyncio.create_task(ticket.result())
        gone = asyncio.create_task(disconnected(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                ticket.cancel()
            return await result
        finally:
            ticket.cancel()  # where this task itself is cancelled
            gone.cancel()
            await asyncio.gather(result, gone, return_exceptions=True)

    async def make(self, request: Request, wish: Wish) -> tuple[Ticket, list[Picture]]:
        """From the wish to the pictures."""
        ticket = self.hub.submit(self.order(request, wish))
        request.scope.setdefault("state", {})["ticket"] = ticket
        return ticket, await self.fulfil(request, ticket)


async def disconnected(request: Request) -> None:
    """Return when the client has gone away; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def utf8_bytes(text: str, name: str) -> int:
    """Bytes of a text.

    Raises:
        BadRequest: it is not text: half of a surrogate pair.
    """
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadRequest(f"{name} is not text: it has half of a surrogate pair", param=name) from None


def magnitude(value: Any) -> float:
    """How large a number is, also where it is the text for one; 0 for what is none, which others refuse."""
    try:
        return abs(float(value or 0))
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return 0.0


def check_further(wish: Wish, sampler: Any, limits: Limits) -> None:
    """Refuse among the further parameters what is not the family's own: `Pipeline.request` has words of its own.

    Raises:
        BadRequest: ``seed`` or ``count``, which would pass by the limits; a text that is longer than prompts may be;
            true or false for a number, which Python would take for 1 or 0.
    """
    declared = sampler.all_parameters
    for name, value in wish.parameters.items():
        if name not in declared:
            allowed, near = ", ".join(declared), suggestion(name, declared)
            family = sampler.manifest.family
            raise BadRequest(
                f"{name!r} is not a parameter of the family {family}; allowed: {allowed}.{near}", param="parameters"
            )
        field = f"parameters.{name}"
        if isinstance(value, str):
            limits.check("prompt_bytes", utf8_bytes(value, field), field, field)
        if isinstance(value, bool) and declared[name].kind in (int, float):
            raise BadRequest(f"{field}: a number is allowed here, not true or false", param=field)


def pick_form(form: str) -> None:
    """Refuse an unknown format of pictures.

    Raises:
        BadRequest: it is unknown.
    """
    if form not in PICTURE_FORMATS:
        raise BadRequest(f"output_format {form!r} is not allowed: {', '.join(PICTURE_FORMATS)}", param="output_format")


def priority_of(request: Request) -> int:
    """By the header ``X-Priority``.

    Raises:
        BadRequest: an unknown word.
    """
    word = request.headers.get(PRIORITY, "normal")
    if word not in PRIORITIES:
        raise BadRequest(f"X-Priority {word!r} is not allowed: {', '.join(PRIORITIES)}", param="X-Priority")
    return pick(PRIORITIES, word, "priority")


def deadline_of(request: Request, most: float) -> float | None:
    """By the header ``X-Deadline-Seconds``.

    Raises:
        BadRequest: it is not a number above 0, or more than `most`.
    """
    text = request.headers.get(DEADLINE)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadRequest("X-Deadline-Seconds is not a number above 0", param="X-Deadline-Seconds")
    if seconds > most:
        raise BadRequest(
            f"X-Deadline-Seconds {seconds:g} is more than the {most:g} allowed", param="X-Deadline-Seconds"
        )
    return seconds


def as_json(value: Any) -> str:
    """JSON as the server writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
