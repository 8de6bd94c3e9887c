"""A small process beside each rank, which ends it when it cannot run Python any more. Started by ``guard.py`` as a script.

A thread of the rank writes a line to our standard input every few seconds: the seconds it may stay away. C code that never lets
go of the interpreter's lock silences that thread, and with it everything in the process that could notice. A timer inside the
process (``faulthandler.dump_traceback_later``) would notice, but it counts on while a process is stopped, and ends a healthy one
as soon as it is continued. This process counts only while it runs itself and the rank is not stopped.

It ends by itself when the rank has ended. Only the standard library is used, so that it stays small.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

# Signals to the whole process group are the rank's business; we end with it.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# Time for the stacks to be written, or for the rank to come back.
LAST_CHANCE_S = 1.0


def watch(pid: int, dump_signal: int, tick_s: float, message: str) -> None:
    """Read lines until there are none, and end the process ``pid`` when they stay away too long.

    Args:
        pid: of the rank, our parent.
        dump_signal: makes it write its stacks.
        tick_s: seconds between two looks.
        message: said once when the rank is ended.
    """
    allowed_s, silent_s, last = float("inf"), 0.0, time.monotonic()
    while True:
        ready = select.select([0], [], [], tick_s)[0]
        now = time.monotonic()
        elapsed, last = now - last, now
        if ready:
            told = os.read(0, 65536)
            if not told:
                return
            allowed_s, silent_s = _last_line(told, allowed_s), 0.0
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
    """Whether a process is stopped by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


def _last_line(told: bytes, default: float) -> float:
    lines = told.decode(errors="replace").split("\n")
    try:
        return float(lines[-2])
    except (IndexError, ValueError):
        return default


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
