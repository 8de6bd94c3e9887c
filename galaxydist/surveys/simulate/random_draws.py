"""Reproducible random numbers for one simulated galaxy: consecutive hashes of (seed, stream, row)."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from galaxydist.counter_rng import hash64, uniform

# RNG streams. The numbers enter the hash: an existing stream keeps its number, a new one gets a new number.
GALAXY, SKY, PIXELS, POSITIONS, PAIRS, TWICE = range(101, 107)

_BLOCK = 512


class Draws:
    """Draws random numbers that depend on the key alone, so that a galaxy is the same in any process and any image.

    Args:
        key: integers that identify the stream, e.g. (seed, GALAXY, row).
    """

    def __init__(self, *key: int) -> None:
        self._key = key
        self._uniforms = np.empty(0)
        self._dealt = 0

    def uniforms(self, num: int) -> NDArray[np.float64]:
        """Return the next ``num`` uniform numbers in [0, 1)."""
        start, self._dealt = self._dealt, self._dealt + num
        if self._dealt > len(self._uniforms):
            size = -(-self._dealt // _BLOCK) * _BLOCK
            self._uniforms = uniform(*self._key, np.arange(size))
        return self._uniforms[start : self._dealt]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a uniform number in [low, high)."""
        return float(low + (high - low) * self.uniforms(1)[0])

    def normals(self, num: int) -> NDArray[np.float64]:
        """Return ``num`` normal deviates, clipped at 3 sigma (extreme outliers would not look like galaxies)."""
        return np.asarray(np.clip(ndtri(np.maximum(self.uniforms(num), 1e-12)), -3.0, 3.0))

    def normal(self, mean: float = 0.0, sigma: float = 1.0) -> float:
        """Return a normal deviate, clipped at 3 sigma."""
        return float(mean + sigma * self.normals(1)[0])

    def bernoulli(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """Return a uniform integer in low ... high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, weights: Sequence[float]) -> int:
        """Return an index, with probabilities in proportion to the weights."""
        return int(np.searchsorted(np.cumsum(weights) / np.sum(weights), self.uniform(), side="right"))

    def poisson(self, mean: float) -> int:
        """Return a Poisson count, drawn by inversion of the distribution function."""
        left, term, count = self.uniform(), float(np.exp(-mean)), 0
        while left >= term and count < 10 * mean + 50:
            left -= term
            count += 1
            term *= mean / count
        return count


def pixel_normals(shape: tuple[int, ...], *key: int) -> NDArray[np.float32]:
    """Return white noise: one float32 normal deviate per pixel, from 16 bits of hash each (so limited to 4.3 sigma)."""
    num = int(np.prod(shape))
    bits = hash64(*key, np.arange(-(-num // 4))).astype("<u8").view("<u2")[:num]
    return np.asarray(_normal_table()[bits].reshape(shape))


@lru_cache(maxsize=1)
def _normal_table() -> NDArray[np.float32]:
    return np.asarray(ndtri((np.arange(65536) + 0.5) / 65536), np.float32)
