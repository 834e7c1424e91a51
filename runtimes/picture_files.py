"""Pictures as the files a server sends."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from intaglio.profiles.registry import pick

if TYPE_CHECKING:
    from PIL.Image import Image

# How pictures are written: (Pillow's name, whether ``compression`` 0 to 100 is its quality).
PICTURE_FORMATS = {"png": ("PNG", False), "jpeg": ("JPEG", True), "webp": ("WEBP", True)}
QUALITY = 95
# zlib's strategy for pictures (Z_RLE): 256x256 in 3.5 ms where Pillow's own choice takes 14, and as few bytes.
PNG_OPTIONS = {"compress_type": zlib.Z_RLE}


def picture_bytes(image: Image, form: str, compression: int, texts: Mapping[str, str]) -> bytes:
    """A picture as the bytes of a file; PNG carries `texts`.

    Raises:
        UsageError: the format is unknown.
    """
    from PIL.PngImagePlugin import PngInfo

    name, lossy = pick(PICTURE_FORMATS, form, "output_format")
    target, options = io.BytesIO(), {"quality": compression} if lossy else dict(PNG_OPTIONS)
    if name == "PNG" and texts:
        info = PngInfo()
        for key, value in texts.items():
            info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
        options["pnginfo"] = info  # type: ignore[assignment]
    image.save(target, name, **options)
    return target.getvalue()
