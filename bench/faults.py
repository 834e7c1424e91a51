"""Faults that exports have had, put into one case on purpose: a benchmark that misses one cannot be trusted.

`load` has the signature of `intaglio.load`; ``settings["fault"]`` names a row of FAULTS.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.exporters.store import DATA
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import pick
from intaglio.runtimes.pipeline import load as load_pipeline

NUDGE = 1.1  # factor of the faults of scale


def on_pictures(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """A fault behind the decoder: uint8 [H, W, 3] to the same."""

    def put(pipe: Any) -> None:
        from PIL import Image

        decode = pipe.sampler.decode

        def changed(*args: Any) -> Any:
            result = decode(*args)
            images = [
                Image.fromarray(np.ascontiguousarray(change(np.asarray(i.convert("RGB"))))) for i in result.images
            ]
            return dataclasses.replace(result, images=images)

        pipe.sampler.decode = changed

    return put


def on_method(name: str, change: Callable[..., Any]) -> Callable[[Any], None]:
    """A fault in the loop: ``change(method, *arguments)`` stands in for a method of the sampler."""

    def put(pipe: Any) -> None:
        method = getattr(pipe.sampler, name)
        setattr(pipe.sampler, name, lambda *args: change(method, *args))

    return put


def on_schedule(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """A fault in the schedule that the loop follows."""

    def made(method: Callable[..., Any], *args: Any) -> Any:
        scheduler = method(*args)
        change(scheduler)
        return scheduler

    return on_method("make_scheduler", made)


def on_weights(
    wanted: Callable[[str, Any], bool], change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Path], bool]:
    """A fault in a file: the first tensor of the denoiser that is `wanted` by name and record is stored changed."""

    def put(folder: Path) -> bool:
        manifest = Artifact.open(folder, verify=False).manifest
        component = next(n for n in manifest.components if n in ("unet", "transformer"))
        kinds = {"FLOAT": np.float32, "FLOAT16": np.float16, "BFLOAT16": np.uint16, "INT8": np.int8, "UINT8": np.uint8}
        for name, record in manifest.components[component].tensors.items():
            if record.dtype not in kinds or not wanted(name, record):
                continue
            stored = np.memmap(
                folder / component / DATA, kinds[record.dtype], "r+", offset=record.offset, shape=tuple(record.shape)
            )
            stored[...] = change(np.array(stored))
            stored.flush()
            return True
        return False

    return put


def rolled(pixels: np.ndarray) -> np.ndarray:
    """One pixel to the right."""
    return np.roll(pixels, 1, axis=1)


def stale(pipe: Any) -> None:
    """The denoiser sees the latents of the step before."""
    feeds = pipe.sampler.model_feeds
    last: dict[str, np.ndarray] = {}

    def changed(request: Any, sample: np.ndarray, timestep: np.float32, branch: Any) -> Any:
        before = last.get(branch.name, sample)
        last[branch.name] = sample
        return feeds(request, before if before.shape == sample.shape else sample, timestep, branch)

    pipe.sampler.model_feeds = changed


def padded(pipe: Any) -> None:
    """Prompts are padded with token 0 where the text encoder was trained on another one."""
    tokenize = pipe.sampler.tokenizer

    def changed(prompts: Any) -> Any:
        tokens = tokenize(prompts)
        ids = np.array(tokens.ids)
        for row in ids:
            end = len(row) - int(np.argmax(row[::-1] != row[-1]))
            row[end + 1 :] = 0
        return dataclasses.replace(tokens, ids=ids)

    pipe.sampler.tokenizer = changed


def overflowing(method: Callable[..., np.ndarray], *args: Any) -> np.ndarray:
    """A prediction through float16, beyond its largest number."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (method(*args) * np.float32(1e6)).astype(np.float16).astype(np.float32)


def swapped_encoders(pipe: Any) -> None:
    """The two text encoders in each other's place.

    Raises:
        UsageError: there is one alone.
    """
    loaded = pipe.engines.loaded
    if "text_encoder_2" not in loaded:
        raise UsageError("the fault swapped_encoders needs a second text encoder")
    loaded["text_encoder"], loaded["text_encoder_2"] = loaded["text_encoder_2"], loaded["text_encoder"]


def swapped_branches(method: Callable[..., Any], request: Any, predictions: Mapping[str, np.ndarray]) -> Any:
    """Guidance away from the prompt."""
    names = list(predictions)
    return method(request, dict(zip(names, [predictions[n] for n in reversed(names)], strict=True)))


def square(name: str, record: Any) -> bool:
    """A square matrix of some size."""
    return len(record.shape) == 2 and record.shape[0] == record.shape[1] >= 16


def scale_of_int8(name: str, record: Any) -> bool:
    """The scale of an int8 weight."""
    return record.dtype == "FLOAT" and "scale" in name and int(np.prod(record.shape)) > 1


FAULTS: Mapping[str, Callable[[Any], None]] = {
    "channel_swap": on_pictures(lambda pixels: pixels[..., ::-1]),
    "shift_1px": on_pictures(rolled),
    "contrast": on_pictures(lambda pixels: (128 + (pixels.astype(np.float32) - 128) * 0.95).round().astype(np.uint8)),
    "vae_scale": on_method("unscale", lambda method, latents: method(latents) * np.float32(NUDGE)),
    "dropped_guidance": on_method("combine", lambda method, request, found: found["conditional"]),
    "swapped_branches": on_method("combine", swapped_branches),
    "scheduler_order": on_schedule(lambda s: setattr(s, "timesteps", s.timesteps[::-1].copy())),
    "off_by_one_timestep": on_method("model_feeds", lambda m, r, sample, t, b: m(r, sample, t - np.float32(1), b)),
    "lost_step": on_schedule(lambda s: setattr(s, "timesteps", s.timesteps[:-1])),
    "stale_latents": stale,
    "noise_scale": on_method("initial", lambda m, *args: (m(*args)[0] * np.float32(NUDGE), m(*args)[1])),
    "prompt_padding": padded,
    "fp16_overflow": on_method("prediction", overflowing),
    "swapped_encoders": swapped_encoders,
}
FILE_FAULTS: Mapping[str, Callable[[Path], bool]] = {
    "transposed_weight": on_weights(square, lambda w: w.T),
    "doubled_scale": on_weights(scale_of_int8, lambda w: w * 2),
}


def hit(fault: str, folder: Path) -> None:
    """Put a fault into a file of an artifact.

    Raises:
        UsageError: it has nothing of the kind.
    """
    if not FILE_FAULTS[fault](folder):
        raise UsageError(f"the fault {fault} finds no weight of its kind in this artifact")


def load(artifact: str, *, settings: Mapping[str, str] | None = None, **options: Any) -> Any:
    """`intaglio.load` of an artifact with a fault.

    Raises:
        UsageError: there is no such fault, or the artifact has nothing that it could hit.
    """
    given = dict(settings or {})
    fault = given.pop("fault", "")
    if fault in FILE_FAULTS:
        folder = Path(tempfile.mkdtemp(prefix="intaglio-fault-"))
        copy = Path(shutil.copytree(artifact, folder / "artifact"))
        try:
            hit(fault, copy)
            pipe = load_pipeline(copy, settings=given, **options)
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(pipe, shutil.rmtree, folder)
        return pipe
    pipe = load_pipeline(artifact, settings=given, **options)
    if fault:
        pick(FAULTS, fault, "fault")(pipe)
    return pipe
