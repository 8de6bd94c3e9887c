"""Keyed permutations of 0 ... n-1 that give any place without a table.

A Feistel network over mixed radices (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5): n is covered by
a x b >= n, a number is split into its two digits, and each round adds a hash of one digit to the other. Numbers that land in
n ... ab-1 are sent through again until they fall inside (cycle walking); as ab - n < a, that is rare.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galaxydist.counter_rng import GAMMA, mix64

ROUNDS = 6

Integers = NDArray[np.uint64]


def permute(indexes: ArrayLike, sizes: ArrayLike, keys: ArrayLike) -> NDArray[np.int64]:
    """The image of each index under the permutation of 0 ... size-1 that its key names.

    Args:
        indexes: integers, each >= 0 and below its size.
        sizes: how many numbers are permuted, per index or one for all; at least 1.
        keys: uint64 hashes, per index or one for all.

    Returns:
        int64 of the broadcast shape.
    """
    return _walk(indexes, sizes, keys, range(ROUNDS), forward=True)


def unpermute(images: ArrayLike, sizes: ArrayLike, keys: ArrayLike) -> NDArray[np.int64]:
    """The inverse of :func:`permute`."""
    return _walk(images, sizes, keys, range(ROUNDS - 1, -1, -1), forward=False)


def _walk(values: ArrayLike, sizes: ArrayLike, keys: ArrayLike, rounds: range, *, forward: bool) -> NDArray[np.int64]:
    value, size, key = np.broadcast_arrays(
        np.asarray(values).astype(np.uint64), np.asarray(sizes).astype(np.uint64), np.asarray(keys, np.uint64)
    )
    shape = value.shape
    value, size, key = value.reshape(-1), size.reshape(-1), key.reshape(-1)
    first = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    second = (size + first - np.uint64(1)) // first
    value = _rounds(value, first, second, key, rounds=rounds, forward=forward)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _rounds(value[outside], first[outside], second[outside], key[outside], rounds=rounds, forward=forward)
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64).reshape(shape)


def _rounds(value: Integers, first: Integers, second: Integers, key: Integers, *, rounds: range, forward: bool) -> Integers:
    left, right = value // second, value % second
    with np.errstate(over="ignore"):
        for number in rounds:
            constant = np.uint64(number + 1) * GAMMA
            if number % 2 == 0:
                change = mix64((key ^ right) + constant) % first
                left = (left + (change if forward else first - change)) % first
            else:
                change = mix64((key ^ left) + constant) % second
                right = (right + (change if forward else second - change)) % second
        return left * second + right
