"""Which shard is needed next: the uses of a run, epoch after epoch, taken one by one. Pure: no files, no threads."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rows of ``USE``, one epoch after another; their steps count on from epoch to epoch.
Uses = Iterator[NDArray[np.void]]


class Schedule:
    """The uses that nobody has taken yet; of the coming epochs one is looked at.

    Args:
        uses: epoch after epoch, or the one of an evaluation.
        steps_ahead: that a reader may be of the last step that it has finished.
    """

    def __init__(self, uses: Uses, steps_ahead: int = 1) -> None:
        self._uses, self._steps_ahead = uses, steps_ahead
        self._epochs: deque[tuple[NDArray[np.void], NDArray[np.bool_]]] = deque()
        self._place = 0
        self._newest_begins = -1  # the step at which the newest of these epochs begins

    def first(self, step: int) -> int | None:
        """The shard that is needed first of all after ``step``; None where the current epoch and the next are taken."""
        while self._epochs or (step >= self._newest_begins and self._load()):
            rows, taken = self._epochs[0]
            while self._place < rows.size and (taken[self._place] or rows["last_step"][self._place] <= step):
                self._place += 1
            if self._place < rows.size:
                return int(rows["shard"][self._place])
            self._epochs.popleft()
            self._place = 0
        return None

    def take(self, shard: int, step: int) -> int:
        """Take the shard's first use that is not over: the step after which it is no longer needed."""
        number = 0
        while number < len(self._epochs) or (self._newest_begins <= step + self._steps_ahead and self._load()):
            rows, taken = self._epochs[number]
            fits = np.flatnonzero((rows["shard"] == shard) & ~taken & (rows["last_step"] > step))
            if fits.size:
                taken[fits[0]] = True
                return int(rows["last_step"][fits[0]])
            number += 1
        raise AssertionError(f"shard {shard} is read, but was not said to be used")

    def _load(self) -> bool:
        rows = next(self._uses, None)
        if rows is None:
            return False
        self._epochs.append((rows, np.zeros(rows.size, bool)))
        if rows.size:
            self._newest_begins = int(rows["first_step"].min())
        return True


def shifted(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    """The same uses, so many steps later."""
    later = lengthened(uses, steps)
    later["first_step"] += steps
    return later


def lengthened(uses: NDArray[np.void], steps: int) -> NDArray[Any]:
    """The same uses, each so many steps longer."""
    longer = uses.copy()
    longer["last_step"] += steps
    return longer
