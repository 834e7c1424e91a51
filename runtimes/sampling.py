"""What goes into the sampling loop and what comes out of it; shared by every family."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.profiles.registry import suggestion

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SEED = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A value that one family's requests may carry beyond the common ones (``clip_skip``, ``true_cfg_scale``).

    Attributes:
        kind: ``int``, ``float``, ``bool`` or ``str``.
        default: the value where nothing is said; ``None`` where the checkpoint decides.
        help: one line for people.
        minimum, maximum: bounds of a number, inclusive.
        choices: the words a string may be; empty: any.
    """

    kind: type
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """`value`, or the text a command line has for it, as this parameter's kind.

        Raises:
            UsageError: it is of another kind or outside the bounds.
        """
        if value is None:
            return self.default
        try:
            result = READERS[self.kind](value)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"{name} {value!r} is not {WORDS[self.kind]} ({self.help})") from None
        if self.choices and result not in self.choices:
            raise UsageError(f"{name} {value!r} is not allowed: {', '.join(self.choices)} ({self.help})")
        if isinstance(result, float) and not math.isfinite(result):
            raise UsageError(f"{name} {value!r} is not a finite number ({self.help})")
        low, high = self.minimum, self.maximum
        if (low is not None and not result >= low) or (high is not None and not result <= high):
            bounds = f"{low:g} to {high:g}" if low is not None and high is not None else ""
            bounds = bounds or (f"{low:g} or more" if low is not None else f"{high:g} or less")
            raise UsageError(f"{name} {value} is not allowed: {bounds} ({self.help})")
        return result


def parse_int(value: Any) -> int:
    """A whole number or the text for it.

    Raises:
        ValueError: it is not whole.
    """
    if float(value) != int(float(value)):
        raise ValueError(value)
    return int(value)


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


def parse_bool(value: Any) -> bool:
    """``True`` or the text for it.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() not in BOOLEANS:
        raise ValueError(value)
    return BOOLEANS[str(value).lower()]


READERS: Mapping[type, Callable[[Any], Any]] = {int: parse_int, float: float, bool: parse_bool, str: str}


def read_parameters(declared: Mapping[str, Parameter], given: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Every declared parameter with its value.

    Raises:
        UsageError: `given` has one that the family does not know, or a value is wrong.
    """
    for name in given:
        if name not in declared:
            allowed = ", ".join(declared) or "none"
            near = suggestion(name, declared)
            raise UsageError(f"{name!r} is not a parameter of the family {family}; allowed: {allowed}.{near}")
    return {name: parameter.read(name, given.get(name)) for name, parameter in declared.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call. `width` and `height` are pixels; image k has the seed ``seed + k``.

    Attributes:
        prompts: one or more; each gives `count` pictures, the pictures of a prompt one after the other.
        negative_prompt: for all of them; ``None`` leaves it to the family.
        images: reference pictures, for families that take them.
        latents: replaces the noise: standard normal float32 [pictures, C, h, w].
        options: the family's own parameters, complete.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    count: int
    images: tuple[Image, ...] = ()
    latents: np.ndarray | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no family can do.

        Raises:
            UsageError: naming the value and what is allowed.
        """
        if not self.prompts:
            raise UsageError("no prompt was given: one or more")
        if self.count < 1:
            raise UsageError(f"count {self.count} is not allowed: 1 or more")
        if self.num_inference_steps < 1:
            raise UsageError(f"steps {self.num_inference_steps} is not allowed: 1 or more")
        if not 0 <= self.seed <= LARGEST_SEED - self.pictures:
            raise UsageError(f"seed {self.seed} is not allowed: 0 to 2**64 - 1")
        for prompt in (*self.prompts, self.negative_prompt or ""):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UsageError(f"prompt {prompt!r} is not text: its bytes are not UTF-8")
        if not np.isfinite(self.guidance_scale):
            raise UsageError(f"guidance {self.guidance_scale} is not a finite number")

    @property
    def pictures(self) -> int:
        """How many pictures come out."""
        return len(self.prompts) * self.count

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [self.seed + k for k in range(self.pictures)]

    def per_picture(self, rows: np.ndarray) -> np.ndarray:
        """One row a prompt as one row a picture; a single row serves all."""
        if len(rows) == 1:
            return np.repeat(rows, self.pictures, axis=0)
        return np.repeat(rows, self.count, axis=0)


def no_preview(decoder: str = "") -> list[Image]:
    """Of an event that no pipeline made.

    Raises:
        UsageError: always.
    """
    raise UsageError("this step has no preview: it comes from no pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """One evaluation of the denoiser is done.

    `index` counts from 0 to `total` - 1, `timestep` is what the denoiser was told, `latents` float32 [count, C, h, w]
    are the ones after the step, `seconds` took the whole step. ``preview()`` decodes what the step sees by the
    artifact's tiny VAE, see `intaglio.runtimes.previews`; a UsageError says how to build one in.
    ``preview("vae_decoder")`` takes the one that makes the final pictures.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    seconds: float
    preview: Callable[..., list[Image]] = no_preview


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


def to_bytes(pixels: np.ndarray, decoder: str) -> np.ndarray:
    """Pixels float32 [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded as diffusers' VaeImageProcessor does.

    Raises:
        NumericsError: NaN or infinity, naming the component `decoder` that made them.
    """
    scaled = (check_finite(decoder, pixels) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
    return (scaled.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


def to_images(pixels: np.ndarray, decoder: str = "vae_decoder") -> list[Image]:
    """The same as RGB images.

    Raises:
        NumericsError: NaN, infinity, or a picture of one single colour.
    """
    from PIL import Image

    bytes_ = to_bytes(pixels, decoder)
    for index, picture in enumerate(bytes_):
        if picture.min() == picture.max():
            raise NumericsError(f"image {index} has a single colour ({int(picture.min())}): the result is degenerate")
    return [Image.fromarray(p) for p in bytes_]
