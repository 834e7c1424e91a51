"""What the webui's API says of requests, pictures and models, in the shapes of AUTOMATIC1111's webui."""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Sequence
from typing import Any

from intaglio import __version__
from intaglio.profiles.errors import UsageError
from intaglio.runtimes.host_memory import available_bytes
from intaglio.runtimes.infotext import SAMPLER_NAMES, png_texts, shown, stopped
from intaglio.runtimes.schedulers import default_name
from intaglio.runtimes.serve_errors import BadRequest
from intaglio.runtimes.serve_hub import Hub
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_pace import total
from intaglio.runtimes.serve_sdapi_request import TextToImage, schedulers_of
from intaglio.runtimes.serve_ticket import Job, Picture, Ticket

DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,")
IDLE = {
    "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
    "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
}  # fmt: skip


def digest_of(model: Model) -> str:
    """Of the artifact that is served now."""
    return str(model.reader.artifact.manifest.digest)


def title_of(model: Model) -> str:
    """As a webui shows a checkpoint: its name and ten digits of its hash."""
    return f"{model.name} [{digest_of(model)[:10]}]"


def checkpoint_of(model: Model) -> dict[str, Any]:
    """A served artifact as a checkpoint; it has no file that a client could name."""
    digest = digest_of(model)
    facts = {"model_name": model.name, "hash": digest[:10], "sha256": digest}
    return {"title": title_of(model), **facts, "filename": model.name, "config": None}


def running_job(ticket: Ticket) -> Job | None:
    """The first picture that is under way."""
    jobs = (job for job in ticket.jobs.values() if job.process is not None and job.index not in ticket.pictures)
    return next(jobs, None)


def remaining(ticket: Ticket, now: float) -> float:
    """Seconds until a request's pictures are there, by its own pace, or what the model's was before."""
    left = ticket.steps * ticket.order.count - ticket.steps_done
    if ticket.begun is not None and ticket.steps_done > 1:
        return max(0.0, left * (now - ticket.begun) / (ticket.steps_done - 1))
    return ticket.model.pace.estimate(total(job.rest for job in ticket.jobs.values()))


def state_of(ticket: Ticket, asked: set[str]) -> dict[str, Any]:
    """A webui's ``state``; a job is a picture."""
    job = running_job(ticket)
    started = time.localtime(time.time() - (time.monotonic() - ticket.arrival))
    return {
        "skipped": "skipped" in asked,
        "interrupted": "interrupted" in asked,
        "stopping_generation": "interrupted" in asked,
        "job": "txt2img",
        "job_count": ticket.order.count,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", started),
        "job_no": len(ticket.pictures),
        "sampling_step": job.done if job is not None else 0,
        "sampling_steps": ticket.steps,
    }


def infotext_of(ticket: Ticket, picture: Picture) -> str:
    """As the PNG has it."""
    text, steps = ticket.order.texts(picture.seed)["parameters"], picture.parameters.get("stopped_after_steps")
    return stopped(text, steps) if steps else text


def info_of(ticket: Ticket, model: Model, pictures: Sequence[Picture], body: TextToImage) -> dict[str, Any]:
    """What a webui says of the pictures it made."""
    parameters, count = ticket.order.parameters, len(pictures)
    scale, negative = pictures[0].parameters.get("guidance_scale"), parameters["negative_prompt"] or ""
    scheduler = parameters["scheduler"] or default_name(model.reader.sampler.scheduler_config)
    notes = {note: None for picture in pictures for note in picture.warnings}
    return {
        "prompt": ticket.order.prompt,
        "all_prompts": [ticket.order.prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": pictures[0].seed,
        "all_seeds": [picture.seed for picture in pictures],
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": ticket.size[0],
        "height": ticket.size[1],
        "sampler_name": SAMPLER_NAMES[scheduler],
        "cfg_scale": scale,
        "steps": ticket.steps,
        "stopped_after_steps": [picture.parameters.get("stopped_after_steps") for picture in pictures],
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": digest_of(model)[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [infotext_of(ticket, picture) for picture in pictures],
        "styles": [],
        "comments": list(notes),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": parameters.get("clip_skip", 0) + 1,
        "version": f"intaglio {__version__}",
    }


def picture_info(text: str) -> dict[str, Any]:
    """What a PNG says of how it was made; empty where it says nothing.

    Raises:
        BadRequest: it is no PNG in base64.
    """
    encoded = DATA_URL.sub("", text, count=1) if text.startswith("data:") else text
    try:
        texts = png_texts(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError):
        raise BadRequest("image: not base64; send the bytes of a PNG, no address", param="image") from None
    except UsageError as error:
        raise BadRequest(f"image: {error}", param="image") from error
    info = texts.pop("parameters", "")
    try:
        parameters = shown(info) if info else {}
    except UsageError as error:
        raise BadRequest(f"image: {error}", param="image") from error
    return {"info": info, "items": texts, "parameters": parameters}


def samplers_of(model: Model) -> list[dict[str, Any]]:
    """Those that fit a model."""
    return [{"name": SAMPLER_NAMES[name], "aliases": [name], "options": {}} for name in schedulers_of(model)]


def memory_of(hub: Hub) -> dict[str, Any]:
    """Bytes the workers hold and bytes there are; devices' own memory is not looked at."""
    free, used = available_bytes(), hub.held()
    ram = {"error": "unknown"} if free is None else {"free": free, "used": used, "total": free + used}
    return {"ram": ram, "cuda": {"error": "unavailable"}}
