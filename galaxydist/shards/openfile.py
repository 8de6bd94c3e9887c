"""An open file that lives as long as anyone uses it."""

import os


class OpenFile:
    """A descriptor that is closed when its last user lets go of it, so that a thread never reads from a closed one; and the bytes
    that the file had when it was opened. A lock that is held on the descriptor goes with it.

    Args:
        descriptor: becomes this object's.
    """

    __slots__ = ("descriptor", "num_bytes")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size

    @classmethod
    def at(cls, path: str) -> "OpenFile":
        """Open a file for reading."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def __del__(self) -> None:
        os.close(self.descriptor)
