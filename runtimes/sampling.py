"""What goes into the sampling loop and what comes out of it; shared by every family."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.profiles.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SEED = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call. `width` and `height` are pixels; image k of `count` has the seed ``seed + k``.

    `latents` replaces the noise: standard normal float32 [count, C, h, w].
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    count: int
    latents: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse what no family can do.

        Raises:
            UsageError: naming the value and what is allowed.
        """
        if self.count < 1:
            raise UsageError(f"count {self.count} is not allowed: 1 or more")
        if self.num_inference_steps < 1:
            raise UsageError(f"steps {self.num_inference_steps} is not allowed: 1 or more")
        if not 0 <= self.seed <= LARGEST_SEED - self.count:
            raise UsageError(f"seed {self.seed} is not allowed: 0 to 2**64 - 1")
        for prompt in (self.prompt, self.negative_prompt):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UsageError(f"prompt {prompt!r} is not text: its bytes are not UTF-8")
        if not np.isfinite(self.guidance_scale):
            raise UsageError(f"guidance {self.guidance_scale} is not a finite number")

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + k for k in range(self.count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """One evaluation of the denoiser is done.

    `index` counts from 0 to `total` - 1, `timestep` is what the denoiser was told, `latents` float32 [count, C, h, w]
    are the ones after the step, `seconds` took the whole step.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Pictures, the latents before the VAE, and the seconds of each stage."""

    images: list[Image]
    latents: np.ndarray
    seeds: list[int]
    seconds: dict[str, float]
    parameters: dict[str, Any]


@dataclass(slots=True)
class Clock:
    """Adds up seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def check_finite(component: str, values: np.ndarray, *, step: int | None = None) -> np.ndarray:
    """Pass `values` on if they are finite.

    Raises:
        NumericsError: naming the component and the step.
    """
    if np.isfinite(values).all():
        return values
    bad = int(values.size - np.isfinite(values).sum())
    where = f" at step {step}" if step is not None else ""
    raise NumericsError(
        f"{component} returned {bad} of {values.size} values as NaN or infinity{where}; compare with --backend torch"
    )


def to_images(pixels: np.ndarray) -> list[Image]:
    """Pixels float32 [B, 3, H, W] in [-1, 1] to RGB images, rounded as diffusers' VaeImageProcessor does.

    Raises:
        NumericsError: NaN, infinity, or a picture of one single colour.
    """
    from PIL import Image

    scaled = (check_finite("vae_decoder", pixels) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
    bytes_ = (scaled.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    for index, picture in enumerate(bytes_):
        if picture.min() == picture.max():
            raise NumericsError(f"image {index} has a single colour ({int(picture.min())}): the result is degenerate")
    return [Image.fromarray(p) for p in bytes_]
