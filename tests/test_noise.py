"""The noise is torch's: the same seed must start the same picture with and without torch."""

import time

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from intaglio.profiles.errors import UsageError
from intaglio.runtimes.noise import Noise, batch_randn

TOLERANCE = 2e-6  # measured: 4.8e-7, the single-precision logarithm and sine of torch's vector code against NumPy's
SEEDS = (0, 1, 42, -1, -5, -(2**63), 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1)
# Draws of one generator in this order: both paths, incomplete blocks, and a kept second normal across a long draw.
MIXED = [3, 16, 5, 1000, 1, 16387, 15, 17, (1, 4, 64, 64), (2, 3, 5), (), (0,), 7, 31, 1, 1]


def both(seed):
    return Noise(seed), torch.Generator("cpu").manual_seed(seed)


def assert_equal_draws(noise, generator, shapes):
    for shape in shapes:
        shape = (shape,) if isinstance(shape, int) else shape
        ours = noise.randn(shape)
        assert ours.dtype == np.float32
        assert ours.shape == shape
        np.testing.assert_allclose(ours, torch.randn(shape, generator=generator).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_seed_gives_torch_noise(seed):
    assert_equal_draws(*both(seed), MIXED)


@pytest.mark.parametrize("size", range(1, 18))
def test_small_sizes_repeatedly(size):
    assert_equal_draws(*both(size), [size] * 5)


def test_millions_of_values_quickly():
    noise, generator = both(2024)
    start = time.process_time()
    ours = noise.randn((3_000_001,))
    assert time.process_time() - start < 1.0  # measured: 0.04 s
    np.testing.assert_allclose(ours, torch.randn(3_000_001, generator=generator).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seed_out_of_range_is_refused_as_torch_does(seed):
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator("cpu").manual_seed(seed)
    with pytest.raises(UsageError, match=str(seed)):
        Noise(seed)


def test_batch_equals_single_images_and_diffusers():
    seeds, shape = (5, 6, -7), (3, 4, 9, 7)
    noises = [Noise(seed) for seed in seeds]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    for _ in range(2):
        batch = batch_randn(noises, shape)
        expected = randn_tensor(shape, generator=generators, dtype=torch.float32).numpy()
        np.testing.assert_allclose(batch, expected, rtol=0, atol=TOLERANCE)
    first = batch_randn([Noise(seed) for seed in seeds], shape)
    for k, seed in enumerate(seeds):
        assert np.array_equal(first[k : k + 1], batch_randn([Noise(seed)], (1, *shape[1:])))


@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_batch_needs_one_seed_per_image(shape):
    with pytest.raises(UsageError, match="2 seeds"):
        batch_randn([Noise(0), Noise(1)], shape)
