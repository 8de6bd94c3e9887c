"""Runs of launch.py in forked processes of a parent that has already imported everything, to be killed at chosen moments.

A line of JSON on stdin starts one: ``{"arguments": [...], "log": FILE, "events": FILE or null, "kill": [TEXT, N] or null}``. The
answer on stdout is its process number, then its exit status (-9: killed). ``events``: each announced change of the checkpoints'
folder is written there; ``kill``: the process kills itself, with SIGKILL, right before the N-th of them, counted from the first
whose path holds the text.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from galaxydist.cli.train import main


def watch_disk(events: str | None, kill: list[Any] | None) -> None:
    """Count the announced changes of the checkpoints' folder (see ``galaxydist/files.py``)."""
    seen = 0
    record = Path(events).open("a", buffering=1) if events else None  # noqa: SIM115

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not name.startswith("galaxydist.") or "/checkpoints" not in str(arguments[0]):
            return
        if record is not None:
            record.write(json.dumps([name, *map(str, arguments)]) + "\n")
        if kill is not None and (seen or kill[0] in str(arguments[0])):
            if seen == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def run(command: dict[str, Any]) -> int:
    """In the child: one run; its exit code."""
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if command["events"] or command["kill"]:
        watch_disk(command["events"], command["kill"])
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return main(command["arguments"], environ)


def serve() -> None:
    """Import what a run needs, without starting a thread; then fork a process for each line."""
    import galaxydist.training.session  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = run(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
                import threading

                for thread in threading.enumerate():
                    if thread is not threading.main_thread() and not thread.daemon:
                        thread.join()
            finally:
                os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
