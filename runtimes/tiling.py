"""Decode large latents in overlapping tiles of one size, blended linearly, when the whole would take too much memory.

The idea is that of diffusers' ``AutoencoderKL.tiled_decode``. Here every tile has the same size, so that a compiled
engine sees one shape, and tiles are spread evenly, so that none is a sliver. The decoder's group norms see a tile
instead of the picture: the result is close to the whole decode, not equal to it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

GIB = float(1 << 30)
TILE = 512  # pixels; AutoencoderKL's own tile for SD
OVERLAP = 0.25  # of a tile, at least
# Peak activations, measured with SD 1.5's decoder (128 channels in its last stage) at 256, 512, 768 pixels: 9.6, 10.2
# and 14.1 float32 maps of those channels on ONNX Runtime, 14.4, 9.9 and 9.1 on OpenVINO. What grows faster on ONNX
# Runtime is the attention of the middle block, which it does not compute in blocks: about three matrices of scores.
LIVE_MAPS, SCORES = 10.0, 3.0


class VaeTiled(UserWarning):
    """A picture was decoded in tiles; the message says how many and why."""


def decode_bytes(
    height: int, width: int, channels: int, factor: int, pictures: int = 1, *, attends: bool = True
) -> float:
    """About how much memory the activations of a decode take, in bytes.

    Args:
        height: of the picture, in pixels.
        width: likewise.
        channels: feature channels of the decoder's last stage, at full size.
        factor: pixels per latent along a side.
        pictures: decoded together.
        attends: whether its middle block has attention.
    """
    tokens = height * width / factor**2 if attends else 0
    return 4.0 * pictures * (LIVE_MAPS * channels * height * width + SCORES * tokens**2)


def decoder_kind(config: Path) -> tuple[int, bool]:
    """Feature channels of the last stage of the decoder that a ``config.json`` describes; whether it has attention."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    if facts.get("_class_name") == "AutoencoderTiny":
        return int(facts.get("decoder_block_out_channels", [64])[-1]), False
    return int(facts["block_out_channels"][0] if "block_out_channels" in facts else facts["base_dim"]), True


def starts(length: int, tile: int) -> list[int]:
    """First positions of the tiles along a side: evenly spread, overlapping by OVERLAP at least, the ends included."""
    if length <= tile:
        return [0]
    count = 1 + math.ceil((length - tile) / (tile * (1 - OVERLAP)))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def ramp(first: int, positions: list[int], tile: int, factor: int) -> np.ndarray:
    """Weights float32 [tile * factor] of a tile along one side: 1, falling linearly over what it shares with others."""
    weights = np.ones(tile * factor)
    for other in positions:
        shared = (tile - abs(other - first)) * factor
        if other == first or shared <= 0:
            continue
        line = (np.arange(shared) + 0.5) / shared
        if other < first:
            weights[:shared] = np.minimum(weights[:shared], line)
        else:
            weights[-shared:] = np.minimum(weights[-shared:], line[::-1])
    return weights.astype(np.float32)


def decode_tiled(
    decode: Callable[[np.ndarray], np.ndarray], latents: np.ndarray, factor: int, tile: int = TILE
) -> tuple[np.ndarray, int]:
    """Pixels float32 [B, 3, H, W] of latents [B, C, h, w], and the number of tiles.

    Args:
        decode: latents of one tile to its pixels.
        latents: as the decoder takes them.
        factor: pixels per latent along a side.
        tile: side of a tile in pixels.
    """
    batch, _, height, width = latents.shape
    tall, wide = min(tile // factor, height), min(tile // factor, width)
    rows, columns = starts(height, tall), starts(width, wide)
    pixels = np.zeros((batch, 3, height * factor, width * factor), np.float32)
    total = np.zeros(pixels.shape[2:], np.float32)
    for top, left in itertools.product(rows, columns):
        pieces = np.ascontiguousarray(latents[:, :, top : top + tall, left : left + wide])
        part = np.concatenate([decode(piece[None]) for piece in pieces])  # memory is short: one at a time
        weight = np.outer(ramp(top, rows, tall, factor), ramp(left, columns, wide, factor))
        where = (slice(top * factor, (top + tall) * factor), slice(left * factor, (left + wide) * factor))
        pixels[(..., *where)] += part * weight
        total[where] += weight
    return pixels / total, len(rows) * len(columns)
