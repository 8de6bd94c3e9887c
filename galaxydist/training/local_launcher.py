"""The launcher of ``--processes N``: several processes of one training or prediction on this machine."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from galaxydist.errors import UserError
from galaxydist.job_environment import find_rank
from galaxydist.training.launch import RankWork, launch, train_recipe

logger = logging.getLogger(__name__)

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
# After one rank has failed, the others log that and exit; those that have not after this time are killed.
GRACE_S = 60.0


def run_processes(arguments: Any, num_processes: int, environ: Mapping[str, str], *, work: RankWork = train_recipe) -> int:
    """Train, or do other work, with several processes of this machine, and wait for them.

    SIGINT, SIGTERM and SIGUSR2 are forwarded to every process. If this process is killed, the others save and stop.

    Args:
        arguments: of the work; for a training ``recipe=NAME`` and ``key=value`` overrides. They are pickled.
        num_processes: processes to start, at least 2; each uses the GPU of its local rank.
        environ: this process's environment.
        work: the work, a function of a module.

    Returns:
        The exit code of the first process that failed, or 0.

    Raises:
        UserError: this process was itself started by a launcher, or has some of a launcher's variables.
    """
    if (size := find_rank(dict(environ)).size) > 1:
        raise UserError(
            f"--processes {num_processes} was given inside of another launcher (WORLD_SIZE={size}). "
            "Leave out one of them: --processes N needs no launcher."
        )
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [
        context.Process(target=_run_rank, args=(arguments, work, rank, num_processes, port), name=f"rank {rank}")
        for rank in range(num_processes)
    ]
    with _forwarding(ranks):
        for process in ranks:
            process.start()
        return _wait(ranks)


def _run_rank(arguments: Any, work: RankWork, rank: int, num_processes: int, port: int) -> None:
    """Run one process of the run."""
    os.setsid()  # the terminal's Ctrl-C reaches only the parent, which forwards it once
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.exit(launch(arguments, os.environ, work=work))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def _forwarding(ranks: Sequence[SpawnProcess]) -> Iterator[None]:
    """Forward signals to the processes."""

    def forward(number: int, _: FrameType | None) -> None:
        for process in ranks:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[SpawnProcess]) -> int:
    """Wait for all processes; after one has failed, the others have ``GRACE_S`` seconds to exit."""
    code, deadline = 0, math.inf
    while running := [process for process in ranks if process.exitcode is None]:
        wait([process.sentinel for process in running], None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        for process in running:
            if process.exitcode and not code:
                code, deadline = _exit_code(process), time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
            deadline = math.inf
    return code


def _exit_code(process: SpawnProcess) -> int:
    """Return the exit code of a failed process, as a shell reports it if a signal ended it."""
    assert process.exitcode is not None
    if process.exitcode > 0:
        return process.exitcode
    name = signal.Signals(-process.exitcode).name
    logger.error("%s was ended by %s", process.name, name)
    return 128 - process.exitcode
