"""What a webui's client may ask for: the body of ``/sdapi/v1/txt2img`` as AUTOMATIC1111 and SD.Next take it.

Their clients send dozens of fields of things that are not here (hires fix, styles, scripts, …), with values that ask
for nothing. Exactly those values are taken, by NEUTRAL; any other is refused by the field's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from intaglio.profiles.errors import ToolError
from intaglio.runtimes.infotext import SAMPLER_NAMES, scheduler_of
from intaglio.runtimes.sampling import LARGEST_SEED
from intaglio.runtimes.schedulers import PROCESSES, default_name, make_scheduler
from intaglio.runtimes.serve_errors import BadRequest
from intaglio.runtimes.serve_limits import Limits
from intaglio.runtimes.serve_model import Model
from intaglio.runtimes.serve_room import Wish, utf8_bytes

OFF, NONE, ZERO, TEXT = (False, None), (None, ""), (0, None), ("", None)
# Field -> the values that ask for nothing: the defaults of AUTOMATIC1111, SD.Next and webuiapi.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": OFF,
    "denoising_strength": (None, 0, 0.7, 0.75),  # of what follows, which is off
    "firstphase_width": ZERO,
    "firstphase_height": ZERO,
    "hr_scale": (2, None, 1, 1.5),
    "hr_upscaler": (None, "", "None", "Latent"),
    "hr_second_pass_steps": ZERO,
    "hr_resize_x": ZERO,
    "hr_resize_y": ZERO,
    "hr_checkpoint_name": NONE,
    "hr_sampler_name": NONE,
    "hr_scheduler": NONE,
    "hr_prompt": TEXT,
    "hr_negative_prompt": TEXT,
    "styles": ([], None),
    "subseed": (-1, None),
    "subseed_strength": ZERO,
    "seed_resize_from_h": (0, -1, None),
    "seed_resize_from_w": (0, -1, None),
    "restore_faces": OFF,
    "tiling": OFF,
    "do_not_save_samples": (False, True, None),  # nothing is saved
    "do_not_save_grid": (False, True, None),
    "save_images": OFF,
    "send_images": (True, None),
    "s_churn": ZERO,
    "s_tmin": ZERO,
    "s_tmax": ZERO,
    "s_noise": (1, None),
    "s_min_uncond": ZERO,
    "override_settings_restore_afterwards": (True, None),  # they are of one request
    "script_name": NONE,
    "script_args": ([], None),
    "alwayson_scripts": ({}, None),
    "refiner_checkpoint": NONE,
    "refiner_switch_at": ZERO,
    "disable_extra_networks": OFF,
    "firstpass_image": NONE,
    "comments": ({}, None),
    "force_task_id": NONE,
    "infotext": NONE,
}
# What `eta` may be: webuis' DDIM and ancestral samplers read it, ours are those with these values.
ETA: dict[str, tuple[float, ...]] = {"ddim": (0,), "euler_a": (1,)}
ANY_ETA = (0, 1)
NETWORKS = re.compile(r"<\s*(lora|lyco|hypernet)\s*:", re.IGNORECASE)
LONGEST_NAME = 500


def add_neutral(schema: dict[str, Any]) -> None:
    """Write the fields of NEUTRAL into the body's JSON schema, and that there are no others."""
    schema["additionalProperties"] = False
    for name, values in NEUTRAL.items():
        schema["properties"][name] = {"enum": list(values), "description": "not supported: values that ask for nothing"}


class TextToImage(BaseModel):
    """The body of ``/sdapi/v1/txt2img``. What is not given is the model's own."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=add_neutral)

    prompt: str = Field("", description="(word:1.2) weighs, as in webuis, where the model's family can")
    negative_prompt: str | None = ""
    seed: int | None = Field(-1, ge=-1, lt=LARGEST_SEED, description="-1: random; picture k has seed + k")
    batch_size: int | None = Field(1, ge=1, description="times n_iter: how many pictures")
    n_iter: int | None = Field(1, ge=1)
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = Field(None, allow_inf_nan=False)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    sampler_name: str | None = Field(None, max_length=LONGEST_NAME)
    sampler_index: str | None = Field(None, max_length=LONGEST_NAME, description="where sampler_name is not given")
    scheduler: str | None = Field(
        None, max_length=LONGEST_NAME, description="karras with DPM++ 2M; automatic: as its name says"
    )
    eta: float | None = Field(None, description="1 for Euler a, 0 for DDIM; others do not read it")
    override_settings: dict[str, Any] | None = Field(None, description="sd_model_checkpoint, CLIP_stop_at_last_layers")


def same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal; 1 is not true."""
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)


def check_neutral(given: Mapping[str, Any]) -> None:
    """Refuse what NEUTRAL does not allow.

    Raises:
        BadRequest: naming the field.
    """
    for name, value in given.items():
        if name not in NEUTRAL:
            raise BadRequest(f"{name[:LONGEST_NAME]!r} is not a field this server supports; leave it out", param=name)
        if not any(same(value, allowed) for allowed in NEUTRAL[name]):
            words = ", ".join("null" if v is None else repr(v) for v in NEUTRAL[name])
            raise BadRequest(f"{name}: this server cannot do that; allowed: {words}", param=name)


def schedulers_of(model: Model) -> list[str]:
    """Those that can sample the checkpoint as it is configured."""
    config, found = model.reader.sampler.scheduler_config, []
    for name in PROCESSES[config.process]:
        try:
            make_scheduler(name, config, 2)
        except ToolError:
            continue
        except ValueError:  # a flow whose shift is the picture's, which is not known here
            pass
        found.append(name)
    return found


def sampler_of(body: TextToImage, model: Model) -> str | None:
    """Our scheduler, ``None`` for the checkpoint's own.

    Raises:
        BadRequest: there is none of these names, or it does not do what `eta` asks for.
    """
    config = model.reader.sampler.scheduler_config
    field = "sampler_name" if body.sampler_name else "sampler_index"
    sampler, schedule = body.sampler_name or body.sampler_index or "", body.scheduler or ""
    chosen = None
    if scheduler_of(body.sampler_index or SAMPLER_NAMES["euler"]) not in SAMPLER_NAMES:
        raise BadRequest(f"sampler_index {body.sampler_index!r} is unknown; leave it out", param="sampler_index")
    if sampler:
        chosen = scheduler_of(sampler, schedule)
        if chosen not in (names := schedulers_of(model)):
            known = scheduler_of(sampler) in names
            fitting = ", ".join(SAMPLER_NAMES[name] for name in names)
            name, value = ("scheduler", schedule) if known and schedule else (field, sampler)
            raise BadRequest(f"{name} {value!r} is not for this model; its samplers: {fitting}", param=name)
    elif schedule.lower() not in ("", "automatic"):
        raise BadRequest(f"scheduler {schedule!r} needs a sampler_name", param="scheduler")
    allowed = ETA.get(chosen or default_name(config), ANY_ETA)
    if body.eta is not None and body.eta not in allowed:
        words = " or ".join(map(str, allowed))
        raise BadRequest(f"eta: this sampler has {words} here; send that, or leave it out", param="eta")
    return chosen


def options_of(body: TextToImage, model: Model) -> dict[str, Any]:
    """The family's own parameters.

    Raises:
        BadRequest: a setting that does not exist here.
    """
    declared = model.reader.sampler.all_parameters
    found: dict[str, Any] = {"prompt_weights": True} if "prompt_weights" in declared else {}
    for name, value in (body.override_settings or {}).items():
        field = f"override_settings.{name[:LONGEST_NAME]}"
        if name == "sd_model_checkpoint":
            continue  # which led to `model`
        if name != "CLIP_stop_at_last_layers":
            message = f"{field!r} is not supported; allowed: sd_model_checkpoint, CLIP_stop_at_last_layers"
            raise BadRequest(message, param=field)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 12:
            raise BadRequest(f"{field}: a whole number, 1 to 12", param=field)
        if value > 1 and "clip_skip" not in declared:
            raise BadRequest(f"{field}: this model's family cannot leave out layers; allowed: 1", param=field)
        if value > 1:
            found["clip_skip"] = value - 1
    return found


def wish_of(body: TextToImage, model: Model, limits: Limits) -> Wish:
    """What a body asks for.

    Raises:
        BadRequest: naming the field.
    """
    check_neutral(body.model_extra or {})
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name) or ""
        limits.check("prompt_bytes", utf8_bytes(text, name), name, name)
        if NETWORKS.search(text):
            message = f"{name}: <lora:…> and the like are not loaded by prompts; build them into an artifact"
            raise BadRequest(message, param=name)
    count = (body.batch_size or 1) * (body.n_iter or 1)
    limits.check("pictures", count, "batch_size times n_iter", "batch_size")
    if body.steps is not None:
        limits.check("steps", body.steps, "steps", "steps")
    return Wish(
        prompt=body.prompt,
        model=model.name,
        negative_prompt=body.negative_prompt or None,
        count=count,
        width=body.width,
        height=body.height,
        num_inference_steps=body.steps,
        guidance_scale=body.cfg_scale,
        scheduler=sampler_of(body, model),
        seed=None if body.seed is None or body.seed < 0 else body.seed,
        parameters=options_of(body, model),
    )
