"""What the tests of a model family need to know: its tiny checkpoint, a request, and diffusers' own answer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT, WIDTH = 96, 64  # not square, not the traced size


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Final latents [pictures, C, h, w] before any unscaling; pixels as decoded, not clamped, [pictures, 3, H, W]."""

    latents: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint of a family and one way to ask it.

    Attributes:
        family: key of FAMILIES.
        checkpoint: writes the tiny checkpoint into an empty folder and returns it.
        request: keyword arguments of `Pipeline.__call__`, prompt aside.
        theirs: the same for diffusers' pipeline: what is named otherwise there.
        latents: diffusers' ``output_type="latent"`` to [pictures, C, h, w], given height and width in pixels.
        options: family options of the build (``{"KEY": "VALUE"}``).
        pipeline: diffusers' pipeline class.
        drops_padding: the text encoder masks padding and the pipeline drops it, so that its token cannot matter.
    """

    family: str
    checkpoint: Callable[[Path], Path]
    request: Mapping[str, Any]
    theirs: Mapping[str, Any]
    pipeline: str
    latents: Callable[[np.ndarray, int, int], np.ndarray] = lambda packed, height, width: packed
    options: Mapping[str, str] = field(default_factory=dict)
    drops_padding: bool = False


def diffusers_pipeline(case: Case, folder: Path) -> Any:
    """Diffusers' own pipeline on the checkpoint, float32, silent."""
    import diffusers
    import torch

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = dict.fromkeys(part for part, kind in index.items() if kind == [None, None])  # diffusers wants them named
    pipeline = getattr(diffusers, case.pipeline).from_pretrained(folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_answer(
    case: Case,
    pipeline: Any,
    prompt: str | list[str],
    *,
    seed: int,
    steps: int,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> Answer:
    """Latents and pixels of diffusers, each picture from its own generator: seed, seed + 1, …"""
    import torch

    count = 1 if isinstance(prompt, str) else len(prompt)
    processor = pipeline.image_processor
    texts = {k: [v] * count for k, v in case.theirs.items() if isinstance(v, str) and "prompt" in k and count > 1}
    raw: list[np.ndarray] = []

    def keep(image: Any, **_: Any) -> Any:
        raw.append(image.detach().float().numpy())
        return image

    def ask(output_type: str) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = pipeline(
                prompt=prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                generator=generators,
                output_type=output_type,
                **{**case.theirs, **texts},
            ).images
        return np.asarray(made.detach() if hasattr(made, "detach") else made, np.float32)

    latents = case.latents(ask("latent"), height, width)
    raw.clear()
    processor.postprocess = keep  # shadows the method: diffusers would clamp the pixels
    try:
        ask("pt")
    finally:
        del processor.postprocess
    return Answer(latents=latents, pixels=raw[-1])
