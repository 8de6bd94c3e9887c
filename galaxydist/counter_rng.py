"""Counter-based random numbers: each one is a hash of (seed, epoch, position, stream).

There is no generator state. The streams of numpy's and torch's generators may change between versions; the values of this hash
are fixed by a test.

``hash64(a)`` is the first output of SplitMix64 seeded with a; further integers are chained in by exclusive or:
``h(a) = mix(a + GAMMA)``, ``h(a, b) = mix((h(a) ^ b) + GAMMA)``, and so on, all modulo 2^64.
SplitMix64 and its constants: Steele, Lea & Flood (2014), "Fast splittable pseudorandom number generators", OOPSLA, section 6,
in the form of Vigna's public-domain splitmix64.c.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MODULUS = 1 << 64


def mix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finaliser, a bijection of uint64: each input bit flips half of the output bits on average."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
        return state ^ (state >> np.uint64(31))


def hash64(*integers: ArrayLike) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each tuple of integers.

    Args:
        integers: one or more integers or integer arrays, broadcast against each other; each modulo 2^64, so -1 is 2^64 - 1.

    Returns:
        uint64 of the broadcast shape (a 0-d array for plain integers).

    Raises:
        TypeError: a value is not an integer.
    """
    if not integers:
        raise TypeError("hash64 needs at least one integer")
    state: NDArray[np.uint64] = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for value in integers:
            state = mix64((state ^ _as_uint64(value)) + GAMMA)
    return np.asarray(state)


def uniform(*integers: ArrayLike) -> NDArray[np.float64]:
    """Return a uniform float64 in [0, 1) for each tuple of integers: the upper 53 bits of :func:`hash64`."""
    return np.asarray((hash64(*integers) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _as_uint64(value: ArrayLike) -> NDArray[np.uint64]:
    if isinstance(value, int):
        return np.asarray(value % _MODULUS, np.uint64)
    array = np.asarray(value)
    if array.dtype.kind not in "iub":
        raise TypeError(f"hash64 takes integers, not {array.dtype}")
    return array.astype(np.uint64)


class Stream(IntEnum):
    """Random streams: the last integer of every hash, so that two random choices for one galaxy are independent.

    The numbers are part of ``order_version``: never change or reuse one.
    """

    SHARDS = 1
    WINDOW = 2
    CLASS_DRAWS = 3
    GALAXY_DRAWS = 4
    POSITIONS = 5
    STORAGE = 6
    SPLIT_CELL = 7
    SPLIT_ID = 8
    ANGLE = 16
    FLIP = 17
    ZOOM = 18
    SHIFT_X = 19
    SHIFT_Y = 20
    BRIGHTNESS = 21
    NOISE_LEVEL = 22
    NOISE_PLACE = 23
    NOISE_TABLE = 24
    MIXUP_FACTOR = 32
    CUTMIX_BOX = 33
    MIX_CHANGED = 34
    MIX_KIND = 35
    MODEL = 48
    GALAXY_TABLE = 64
