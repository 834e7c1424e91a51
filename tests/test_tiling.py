"""Decoding in tiles: close to the whole decode, every tile of one size, and said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from intaglio.runtimes.fidelity import psnr
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.tiling import OVERLAP, VaeTiled, decode_bytes, decode_tiled, ramp, starts

CLOSE = 25.0  # dB of the tiled to the whole picture; 26.5 measured, with tiles of 8x8 latents, not 64x64


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


def test_pictures_of_a_batch_are_decoded_apart_when_they_do_not_fit_together(emoji_artifact):
    pipeline = load(emoji_artifact, backend="onnxruntime")
    options = {"num_inference_steps": 1, "height": 128, "width": 128}
    together = pipeline("red heart", seed=3, count=3, vae_memory=0.0, **options)
    assert "vae_tiles" not in together.parameters  # not larger than a tile
    for k in range(3):
        alone = pipeline("red heart", seed=3 + k, **options)
        np.testing.assert_array_equal(np.asarray(together.images[k]), np.asarray(alone.images[0]))


def tile_small(pipeline, options):
    import intaglio.runtimes.loop as loop

    kept = loop.TILE, loop.decode_tiled
    loop.TILE, loop.decode_tiled = 128, lambda decode, latents, factor: decode_tiled(decode, latents, factor, 128)
    try:
        return pipeline("red heart", vae_memory=0.0, **options)
    finally:
        loop.TILE, loop.decode_tiled = kept


def test_the_estimate_is_near_what_was_measured_and_grows_faster_than_the_picture():
    """Peaks of SD 1.5's decoder on ONNX Runtime, GiB: 0.30, 1.27 and 3.98 (OpenVINO 0.45, 1.24, 2.55)."""
    for side, measured in ((256, 0.30), (512, 1.27), (768, 3.98)):
        assert 0.75 < decode_bytes(side, side, 128, 8) / 2**30 / measured < 1.35, side
    assert decode_bytes(2048, 2048, 128, 8) > 4 * decode_bytes(1024, 1024, 128, 8)
    assert decode_bytes(1024, 1024, 128, 8, pictures=3) == 3 * decode_bytes(1024, 1024, 128, 8)
