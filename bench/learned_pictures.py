"""Resize rules of the learned metrics, and pictures as the tensors of their networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need, pick

FILTERS = {"bilinear": 2, "bicubic": 3, "lanczos": 1}  # PIL.Image.Resampling; PIL's filters antialias
FITS = ("short", "square")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB in 0..1, as torchvision's networks expect


@dataclass(frozen=True, slots=True)
class Resize:
    """A resize rule such as ``none``, ``short 256 bicubic`` or ``square 299 bicubic``.

    ``short`` keeps the shape of the picture, its shorter side as given; ``square`` does not. Filters are PIL's, which
    antialias: another library's give another metric (Parmar et al., On Aliased Resizing, CVPR 2022).

    Raises:
        UsageError: it is none of these.
    """

    rule: str

    def __post_init__(self) -> None:
        """Refuse other rules when they are read."""
        self.parts()

    def parts(self) -> tuple[str, int, str] | None:
        """How, to how many pixels, and with which filter; None for ``none``."""
        match self.rule.split():
            case ["none"]:
                return None
            case [fit, side, name] if fit in FITS and side.isascii() and side.isdigit() and int(side) > 0:
                pick(FILTERS, name, "resize filter")
                return fit, int(side), name
        message = f"resize {self.rule!r}; allowed: none, 'short 256 bicubic' or 'square 299 bilinear'"
        raise UsageError(message)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """The picture uint8 [H, W, 3] at its new size."""
        parts = self.parts()
        if parts is None:
            return picture
        from PIL import Image

        fit, side, name = parts
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (side, side) if fit == "square" else (width * side // short, height * side // short)
        resized = Image.fromarray(picture).resize(size, Image.Resampling(FILTERS[name]))
        return np.asarray(resized)

    def __str__(self) -> str:
        """As in a printed name."""
        return "no resize" if self.rule == "none" else self.rule


def tensor(picture: np.ndarray) -> Any:
    """uint8 [H, W, 3] as a float32 torch tensor [1, 3, H, W] in 0..1."""
    torch = need("torch", extra="export")
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))[None].astype(np.float32) / 255)


def standardized(x: Any, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Any:
    """``(x - mean) / std`` of each channel of a torch tensor [B, 3, H, W]."""
    return (x - x.new_tensor(mean)[None, :, None, None]) / x.new_tensor(std)[None, :, None, None]
