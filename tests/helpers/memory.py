"""Peak memory of a piece of code."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns, after the block, the peak of its Python objects and NumPy arrays in bytes."""
    found = 0
    tracemalloc.start()
    try:
        yield lambda: found
        found = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
