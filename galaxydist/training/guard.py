"""The process beside a rank that ends it when it cannot run Python any more; see ``guard_process.py``."""

import contextlib
import os
import subprocess
import sys

from galaxydist.training import guard_process
from galaxydist.training.stacks import DUMP_SIGNAL


class Guard:
    """The process of ``guard_process.py`` beside this one. Where it cannot be had (not Linux, no memory) nothing is done.

    Args:
        tick_s: seconds between two looks.
        message: what it says when it ends this process.
    """

    def __init__(self, tick_s: float, message: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux":
            return
        script = [sys.executable, "-I", "-S", guard_process.__file__]
        arguments = [str(os.getpid()), str(DUMP_SIGNAL), str(tick_s), message]
        try:
            self._process = subprocess.Popen([*script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        except OSError:
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def feed(self, allowed_s: float) -> None:
        """Say that Python runs here, and for how long it may be silent from now on."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it is stopped, or was killed
                os.write(self._process.stdin.fileno(), b"%.3f\n" % allowed_s)

    def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
