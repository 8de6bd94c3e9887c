"""The stacks of a process's threads, written where a user finds them after a hang."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

# Nothing else uses the last of the real-time signals. (macOS has none: no guard there.)
DUMP_SIGNAL = int(getattr(signal, "SIGRTMAX", 0))


class StacksFile:
    """``rank-0003.txt`` of a rank. Opened at once, since opening a file may be what hangs; removed at the end if nothing was
    written. What an earlier hang left there is kept, and new stacks are added to it.

    Args:
        folder: made if it is not there.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:04d}.txt"
        self._file: TextIO = self.path.open("a")
        if DUMP_SIGNAL:
            faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True, chain=False)

    def dump(self, title: str) -> None:
        """Write the stacks of all threads, the main thread's first."""
        # faulthandler stops after a hundred threads and comes to the main thread last.
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
