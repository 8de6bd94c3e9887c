"""Memory of batches, used again: a batch of fresh pages costs a fifth of the time that decoding it does."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray


class Buffers:
    """Arrays whose memory comes back by itself once nothing refers to them any more, tensors made from them included.

    Args:
        keep: how many are kept for the next taker; more are freed.
        pin: whether a GPU is to copy from them while the host goes on: then their pages are locked.
    """

    def __init__(self, keep: int, *, pin: bool = False) -> None:
        self._keep, self._pin = keep, pin
        self._free: list[NDArray[np.uint8]] = []

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array with arbitrary contents."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._free.pop() if self._free else self._allocate(num_bytes)
        if memory.nbytes < num_bytes:
            memory = self._allocate(num_bytes)
        array = memory[:num_bytes].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _allocate(self, num_bytes: int) -> NDArray[np.uint8]:
        if not self._pin:
            return np.empty(num_bytes, np.uint8)
        memory: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        if len(self._free) < self._keep:
            self._free.append(memory)
