"""Memory of batches, used again: a batch of fresh pages costs a fifth of the time that decoding it does."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Buffers:
    """Arrays whose memory comes back by itself once nothing refers to them any more, tensors made from them included.

    Args:
        keep: how many are kept for the next taker; more are freed.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array with arbitrary contents."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._free.pop() if self._free else np.empty(num_bytes, np.uint8)
        if memory.nbytes < num_bytes:
            memory = np.empty(num_bytes, np.uint8)
        array = memory[:num_bytes].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        if len(self._free) < self._keep:
            self._free.append(memory)
