"""Stack dumps of a rank after a hang, and the process that kills a rank that cannot run Python."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

from galaxydist.training.health import guard_process

# Nothing else uses the last real-time signal. (macOS has none, so there is no guard.)
DUMP_SIGNAL = int(getattr(signal, "SIGRTMAX", 0))


class StacksFile:
    """The stacks file of a rank, such as ``rank-0003.txt``.

    It is opened at once, since opening a file later may hang, and removed at the end if it is empty. New stacks are appended
    to those of an earlier hang.

    Args:
        folder: created if missing.
        rank: rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:04d}.txt"
        self._file: TextIO = self.path.open("a")
        if DUMP_SIGNAL:
            faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True, chain=False)

    def dump(self, title: str) -> None:
        """Write the stacks of all threads, the main thread's first."""
        # faulthandler stops after a hundred threads and writes the main thread last.
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(main)) if main is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{when} {title}\n\nMain thread (most recent call last):\n{stack}\nAll threads:\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()

    def close(self) -> None:
        """Remove the file if nothing was written."""
        if DUMP_SIGNAL:
            faulthandler.unregister(DUMP_SIGNAL)
        self._file.close()
        if self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, or removed by another rank
                self.path.parent.rmdir()


class HangGuard:
    """Start and feed ``guard_process.py``; do nothing where it cannot start (not Linux, no memory).

    Args:
        tick_s: seconds between two checks.
        message: printed when the guard kills this process.
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
        """Report that Python runs here, and the seconds until the next report is due."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the guard is stopped or was killed
                os.write(self._process.stdin.fileno(), b"%.3f\n" % allowed_s)

    def close(self) -> None:
        """Stop the guard process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
