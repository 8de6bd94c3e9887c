"""The chances of one simulated galaxy: a run of hashes of (seed, purpose, row), dealt in order."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from galaxydist.counter_rng import hash64, uniform

# What a hash is about. Numbers, not names, because they enter the
# hash; a new purpose gets a new number, an old one keeps its own.
GALAXY, SKY, PIXELS, PLACES, PAIRS, TWICE = range(101, 107)

_BLOCK = 512


class Draws:
    """Deals random numbers that depend on the key alone, so that a galaxy is the same whoever draws it, and beside whatever.

    Args:
        key: integers that say what this is about, e.g. (seed, GALAXY, row).
    """

    def __init__(self, *key: int) -> None:
        self._key = key
        self._uniforms = np.empty(0)
        self._dealt = 0

    def uniforms(self, num: int) -> NDArray[np.float64]:
        """The next ``num`` uniforms of [0, 1)."""
        start, self._dealt = self._dealt, self._dealt + num
        if self._dealt > len(self._uniforms):
            size = -(-self._dealt // _BLOCK) * _BLOCK
            self._uniforms = uniform(*self._key, np.arange(size))
        return self._uniforms[start : self._dealt]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number of [low, high)."""
        return float(low + (high - low) * self.uniforms(1)[0])

    def normals(self, num: int) -> NDArray[np.float64]:
        """``num`` normal deviates, cut at 3 sigma (a wild outlier would be no galaxy)."""
        return np.asarray(np.clip(ndtri(np.maximum(self.uniforms(num), 1e-12)), -3.0, 3.0))

    def normal(self, mean: float = 0.0, sigma: float = 1.0) -> float:
        """A normal deviate, cut at 3 sigma."""
        return float(mean + sigma * self.normals(1)[0])

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """One of low ... high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, weights: Sequence[float]) -> int:
        """An index, with probabilities in proportion to the weights."""
        return int(np.searchsorted(np.cumsum(weights) / np.sum(weights), self.uniform(), side="right"))

    def poisson(self, mean: float) -> int:
        """A Poisson count by its inverse distribution function."""
        left, term, count = self.uniform(), float(np.exp(-mean)), 0
        while left >= term and count < 10 * mean + 50:
            left -= term
            count += 1
            term *= mean / count
        return count


def pixel_normals(shape: tuple[int, ...], *key: int) -> NDArray[np.float32]:
    """White noise: one float32 normal deviate a pixel, from 16 bits of hash each (so cut at 4.3 sigma)."""
    num = int(np.prod(shape))
    bits = hash64(*key, np.arange(-(-num // 4))).astype("<u8").view("<u2")[:num]
    return np.asarray(_normal_table()[bits].reshape(shape))


@lru_cache(maxsize=1)
def _normal_table() -> NDArray[np.float32]:
    return np.asarray(ndtri((np.arange(65536) + 0.5) / 65536), np.float32)
