"""How the ranks of the doctor's job talk to one another: through the store of the rendezvous alone, so that a backend which does
not work is found by ranks that can still say so."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore

PINGS = 5


class Link:
    """A rank's end of it.

    Args:
        store: of all ranks.
        rank, size: this process and how many there are.
        clock: seconds since 1970.
    """

    def __init__(self, store: Store, rank: int, size: int, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self._clock = clock

    def set_timeout(self, seconds: float) -> None:
        """How long to wait for another rank from now on."""
        self.store.set_timeout(timedelta(seconds=seconds))

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks; all take part, once for each name.

        Raises:
            RuntimeError: a rank did not come within the store's time.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.size)]

    def meet(self, name: str) -> None:
        """Wait for all ranks."""
        self.gather(name, None)

    def tell(self, name: str, value: Any = None) -> None:
        """Say something to all."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """What somebody tells, as soon as it does."""
        return json.loads(self.store.get(name))

    def leave(self) -> None:
        """The last thing: rank 0, which keeps the store, stays until all have gone."""
        self.tell(f"left/{self.rank}")
        if self.rank == 0:
            for rank in range(self.size):
                self.hear(f"left/{rank}")

    def measure_clock(self) -> tuple[float, float]:
        """This clock minus rank 0's, and the round trip within which it was measured, in seconds.

        The shortest of several round trips counts; the error is at most half of it (F. Cristian, Distributed Computing 3, 1989,
        146-158). Rank 0 answers the ranks one by one.
        """
        if self.rank == 0:
            for rank in range(1, self.size):
                for number in range(PINGS):
                    self.hear(f"clock/{rank}/{number}/ask")
                    self.tell(f"clock/{rank}/{number}/answer", self._clock())
            return 0.0, 0.0
        trips = []
        for number in range(PINGS):
            start, began = self._clock(), time.monotonic()
            self.tell(f"clock/{self.rank}/{number}/ask")
            theirs = self.hear(f"clock/{self.rank}/{number}/answer")
            trip = time.monotonic() - began
            trips.append((trip, start + trip / 2 - theirs))
        trip, offset = min(trips)
        return offset, trip


def open_link(host: str, port: int, rank: int, size: int, timeout_s: float) -> Link:
    """Join the rendezvous.

    Args:
        host, port: where rank 0 is.
        rank, size: this process and how many there are.
        timeout_s: to wait for rank 0, and later for any other rank.

    Raises:
        RuntimeError: rank 0 cannot be reached there, or the port is taken.
    """
    store = TCPStore(host, port, size, rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return Link(store, rank, size)
