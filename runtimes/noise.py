"""Starting and ancestral noise: the numbers of torch's CPU generator, without torch.

A seed means the same picture everywhere only when every engine starts from the same noise. torch.randn on the CPU
takes the 32-bit words of MT19937 (Matsumoto and Nishimura, 1998) and turns pairs of uniforms into pairs of normals by
the Box-Muller transform (1958), in two ways that this module reproduces:

* 16 values or more: uniforms of 24 bits in single precision, in blocks of 16, the first 8 of a block giving radii and
  the last 8 angles. A tail shorter than 16 is not drawn by itself: the last 16 values are drawn again from new words.
* fewer than 16: one value at a time in double precision from uniforms of 53 bits; the second normal of each pair is
  kept for the next such value, even when a longer draw comes between.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from intaglio.profiles.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BLOCK = 16
HALF = BLOCK // 2
STATE_WORDS = 624
MASK_24 = (1 << 24) - 1
MASK_32 = (1 << 32) - 1
MASK_53 = (1 << 53) - 1
SEED_MIN = -(1 << 63)
SEED_MAX = (1 << 64) - 1
# torch multiplies by 2*pi rounded to single precision; the rounding reaches the fourth digit of the last place.
TWO_PI_32 = np.float32(2.0 * math.pi)
# Words are turned into normals in pieces of this many values so that the temporaries stay in the cache.
PIECE = BLOCK << 12


def _mt19937(seed: int) -> np.random.MT19937:
    """A generator seeded by Knuth's recurrence (`init_genrand`), which NumPy's own constructor does not use."""
    key = np.empty(STATE_WORDS, np.uint32)
    # torch keeps 64 bits of seed but starts the twister from the low 32: -1, 2**32 - 1 and 2**64 - 1 are one stream.
    word = seed & MASK_32
    for i in range(STATE_WORDS):
        key[i] = word
        word = (1812433253 * (word ^ (word >> 30)) + i + 1) & MASK_32
    bits = np.random.MT19937(0)
    bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": STATE_WORDS}}
    return bits


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """float32 normals [n] from n raw 32-bit words, n a multiple of 16."""
    uniform = (words & MASK_24).astype(np.float32) * np.float32(2.0**-24)
    pairs = uniform.reshape(-1, 2, HALF)
    # 1 - u is in (0, 1], so the logarithm is finite.
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    angle = TWO_PI_32 * pairs[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class Noise:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``, read by successive `randn` calls.

    Args:
        seed: from -2**63 to 2**64 - 1, as torch allows. torch uses its low 32 bits only.

    Raises:
        UsageError: `seed` is outside of that range.
    """

    def __init__(self, seed: int) -> None:
        if not SEED_MIN <= seed <= SEED_MAX:
            message = f"seed {seed} is out of range; allowed: {SEED_MIN} to {SEED_MAX}"
            raise UsageError(message)
        self._bits = _mt19937(seed)
        self._second: float | None = None

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal values, float32 [*shape], equal to ``torch.randn(shape, generator=...)`` within 2e-6."""
        size = math.prod(shape)
        if size < BLOCK:
            return np.array([self._scalar() for _ in range(size)], np.float32).reshape(shape)
        return self._vector(size).reshape(shape)

    def _vector(self, size: int) -> NDArray[np.float32]:
        values = np.empty(size, np.float32)
        whole = size - size % BLOCK
        for start in range(0, whole, PIECE):
            count = min(PIECE, whole - start)
            values[start : start + count] = _box_muller(self._bits.random_raw(count))
        if whole < size:
            # The uniforms of the incomplete block were drawn by torch too, then thrown away.
            self._bits.random_raw(size - whole)
            values[-BLOCK:] = _box_muller(self._bits.random_raw(BLOCK))
        return values

    def _scalar(self) -> float:
        if self._second is not None:
            value, self._second = self._second, None
            return value
        angle = 2.0 * math.pi * self._uniform_53()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform_53()))
        self._second = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform_53(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return (((high << 32) | low) & MASK_53) * 2.0**-53


def batch_randn(noises: Sequence[Noise], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One draw per image, float32 [*shape]: image k depends on its own seed alone, whatever the batch.

    Args:
        noises: one stream per image.
        shape: of the whole batch; its first number is the number of images.

    Raises:
        UsageError: `shape` does not begin with the number of streams.
    """
    if not shape or shape[0] != len(noises):
        message = f"{len(noises)} seeds for a batch of shape {shape}; give one seed per image"
        raise UsageError(message)
    return np.concatenate([noise.randn((1, *shape[1:])) for noise in noises])
