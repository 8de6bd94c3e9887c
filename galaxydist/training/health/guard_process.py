"""A small process beside each rank that kills the rank when it can no longer run Python.

``watchdog.HangGuard`` starts it as a script. A thread of the rank writes a line to its standard input every few seconds: the
seconds until the next line is due. C code that never releases the GIL stops that thread and every other check inside the rank.
A timer inside the rank (``faulthandler.dump_traceback_later``) would notice, but it also counts while the rank is stopped and
would kill a healthy rank as soon as it continues. This process counts only while it runs and the rank is not stopped.

It exits when the rank has exited. It imports only the standard library, to stay small.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

# The rank handles signals to the process group; this process exits with the rank.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# Time for the rank to write its stacks or to recover.
LAST_CHANCE_S = 1.0


def watch(pid: int, dump_signal: int, tick_s: float, message: str) -> None:
    """Read lines until end of file, and kill the process ``pid`` when no line arrives in time.

    Args:
        pid: process id of the rank, the parent process.
        dump_signal: signal that makes the rank write its stacks.
        tick_s: seconds between two checks.
        message: printed to standard error when the rank is killed.
    """
    allowed_s, silent_s, last = float("inf"), 0.0, time.monotonic()
    while True:
        ready = select.select([0], [], [], tick_s)[0]
        now = time.monotonic()
        elapsed, last = now - last, now
        if ready:
            lines = os.read(0, 65536)
            if not lines:
                return
            allowed_s, silent_s = _last_number(lines, allowed_s), 0.0
        elif is_stopped(pid):
            silent_s = 0.0
        else:
            silent_s += min(elapsed, 2 * tick_s)
        if silent_s >= allowed_s and os.getppid() == pid:
            os.kill(pid, dump_signal)
            if not select.select([0], [], [], LAST_CHANCE_S)[0]:
                os.write(2, f"{message} for {silent_s:.0f} s\n".encode())
                os.kill(pid, signal.SIGKILL)
                return


def is_stopped(pid: int) -> bool:
    """Return True if a process is stopped by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def _last_number(text: bytes, default: float) -> float:
    lines = text.decode(errors="replace").split("\n")
    try:
        return float(lines[-2])
    except (IndexError, ValueError):
        return default


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
