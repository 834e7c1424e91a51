"""What Stable Diffusion XL's UNet is told of a picture: sizes, a corner, a score; section 2.2 of arXiv:2307.01952."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from intaglio.profiles.errors import UsageError

if TYPE_CHECKING:
    from intaglio.runtimes.sampling import Request

# diffusers' defaults of StableDiffusionXLImg2ImgPipeline.__call__
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
PAIRS = {
    "original_size": "WIDTHxHEIGHT of the picture it is made to look cut from; the size if not given",
    "target_size": "WIDTHxHEIGHT it is made to look like; the size if not given",
    "crops_coords_top_left": "TOPxLEFT of the corner it is made to look cut at; 0x0 if not given",
}
# Whether the UNet takes a score -> what it does not take.
UNTOLD: dict[bool, tuple[str, ...]] = {False: tuple(SCORES), True: ("target_size", "negative_target_size")}


def time_ids(request: Request, *, scored: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the UNet is told of sizes and corners, and of the score where it takes one: float32 [1, 6] or [1, 5].

    Heights come before widths. The negative numbers are the positive ones where none are given; given one, the other
    sizes are still the positive ones and the corner is 0x0. (diffusers' text-to-image drops a lone negative size.)

    Raises:
        UsageError: a size or corner cannot be read; a value this UNet is not told.
    """
    for name in UNTOLD[scored]:
        if request.options[name] not in (None, ""):
            raise UsageError(f"{name} is nothing that this artifact's UNet is told; leave it out")
    options, own = request.options, (request.height, request.width)
    given = {name: pair(name, options[name]) for name in (*PAIRS, *(f"negative_{n}" for n in PAIRS)) if options[name]}
    original, target = given.get("original_size", own), given.get("target_size", own)
    corner = given.get("crops_coords_top_left", (0, 0))
    apart = bool(request.images) or any(name.startswith("negative_") for name in given)
    rows = [
        (original, corner, target, "aesthetic_score"),
        (
            given.get("negative_original_size", original),
            given.get("negative_crops_coords_top_left", (0, 0) if apart else corner),
            given.get("negative_target_size", target),
            "negative_aesthetic_score",
        ),
    ]
    scores = {name: default if options[name] is None else options[name] for name, default in SCORES.items()}
    positive, negative = (
        np.array([[*first, *second, *((scores[score],) if scored else third)]], np.float32)
        for first, second, third, score in rows
    )
    return positive, negative


def pair(name: str, text: str) -> tuple[int, int]:
    """``"WIDTHxHEIGHT"`` as height and width, or ``"TOPxLEFT"`` as it stands.

    Raises:
        UsageError: it is not two whole numbers.
    """
    first, _, second = text.lower().partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        kind, example = ("TOPxLEFT", "0x0") if "crops" in name else ("WIDTHxHEIGHT", "1024x1024")
        raise UsageError(f"{name} {text!r} is not {kind}; for example {example}")
    return (int(first), int(second)) if "crops" in name else (int(second), int(first))
