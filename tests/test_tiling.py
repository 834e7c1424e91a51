"""Decoding in tiles: close to the whole decode, every tile of one size, and said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from intaglio.runtimes.fidelity import psnr
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.tiling import OVERLAP, VaeTiled, decode_bytes, decode_tiled, ramp, starts

CLOSE = 30.0  # dB of the tiled to the whole picture of the embedded checkpoint at 1024 x 640


@pytest.mark.parametrize("length", [64, 65, 100, 128, 200, 256])
def test_tiles_cover_a_side_overlap_and_have_one_size(length):
    positions = starts(length, 64)
    assert positions[0] == 0 and positions[-1] + 64 == length
    assert all(64 - (b - a) >= 64 * OVERLAP - 1 for a, b in itertools.pairwise(positions))


def test_weights_of_neighbours_add_up_smoothly():
    positions = starts(150, 64)
    total = np.zeros(150 * 2)
    for first in positions:
        total[first * 2 : (first + 64) * 2] += ramp(first, positions, 64, 2)
    assert total.min() > 0.5 and np.abs(np.diff(total)).max() < 0.1


def test_a_decoder_that_is_local_gives_the_same_tiled_as_whole():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 100, 70)).astype(np.float32)

    def decode(part):
        assert part.shape[2:] == (64, 64)
        return np.repeat(np.repeat(part, 8, axis=2), 8, axis=3)

    pixels, tiles = decode_tiled(decode, latents, 8)
    whole = np.repeat(np.repeat(latents, 8, axis=2), 8, axis=3)
    np.testing.assert_allclose(pixels, whole, atol=1e-6)
    assert tiles == 4


def test_large_pictures_are_tiled_above_the_budget_and_it_is_said(emoji_artifact):
    pipeline = load(emoji_artifact, backend="onnxruntime")
    options = {"num_inference_steps": 1, "height": 256, "width": 256, "seed": 3}
    whole = pipeline("red heart", **options)
    assert "vae_tiles" not in whole.parameters
    with pytest.warns(VaeTiled, match=r"decoded in 9 tiles of 128 pixels.*--set vae_memory="):
        tiled = tile_small(pipeline, options)
    assert tiled.parameters["vae_tiles"] == 9
    assert psnr(np.asarray(tiled.images[0]), np.asarray(whole.images[0])) >= CLOSE


def tile_small(pipeline, options):
    import intaglio.runtimes.loop as loop

    kept = loop.TILE, loop.decode_tiled
    loop.TILE, loop.decode_tiled = 128, lambda decode, latents, factor: decode_tiled(decode, latents, factor, 128)
    try:
        return pipeline("red heart", vae_memory=0.0, **options)
    finally:
        loop.TILE, loop.decode_tiled = kept


def test_the_estimate_grows_with_the_picture():
    assert decode_bytes(2048, 2048, 128) == 4 * decode_bytes(1024, 1024, 128) == 8 * decode_bytes(1024, 512, 128)
