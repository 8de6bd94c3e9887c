"""Signals that ask a run to stop: taken at once, also while the main thread is busy in C code, and acted on by the loop.

Python runs a signal's handler only between two of its own instructions, and a backward pass of minutes is one. So the C part of
the handler wakes a thread (``signal.set_wakeup_fd``), which answers the user and sets the flag.
"""

import _thread
import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from galaxydist.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# A launcher may pass on the Ctrl-C that the terminal has sent to this process too: so soon after the first it is the same one.
ECHO_S = 1.0
# After the second Ctrl-C the process closes what it has open; then it ends, wherever it is.
LEAVING_S = 5.0


def signal_name(number: int) -> str:
    """``Ctrl-C``, ``SIGTERM`` or another signal's name."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopFlag:
    """Set by Ctrl-C, SIGTERM or SIGUSR2 while the context is open. A second Ctrl-C ends the process without saving.

    To be opened in the main thread.

    Args:
        speaks: tell the user on stderr that a signal has arrived; of several processes one should.

    Attributes:
        signal_number: the first signal that arrived, 0 until then.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.signal_number = 0
        self._speaks = speaks
        self._previous: dict[int, Any] = {}
        self._interrupted_at: float | None = None
        self._leaves_at: float | None = None

    def __enter__(self) -> "StopFlag":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the signals to whoever had them before. May be called twice."""
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        """Python's part of the handler, in the main thread."""
        if self._leaves_at is not None:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """The thread: a byte is a signal's number; at the end of the pipe the context is closed."""
        while True:
            left_s = None if self._leaves_at is None else max(0.0, self._leaves_at - time.monotonic())
            if not select.select([self._read_end], [], [], left_s)[0]:
                os._exit(EXIT_INTERRUPTED)
            numbers = os.read(self._read_end, 16)
            if not numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if number != signal.SIGINT:
            if self.signal_number == 0:
                self._say(f"{signal_name(number)}: stopping after this step")
        elif self._interrupted_at is None:
            self._interrupted_at = now
            self._say("stopping after this step; Ctrl-C again ends without saving")
        elif now - self._interrupted_at >= ECHO_S and self._leaves_at is None:
            self._leaves_at = now + LEAVING_S
            self._say("ending without saving")
            _thread.interrupt_main(signal.SIGINT)
        self.signal_number = self.signal_number or number

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):  # past Python's buffers, whose locks the main thread may hold
                os.write(2, f"\ngalaxydist: {text}\n".encode())
