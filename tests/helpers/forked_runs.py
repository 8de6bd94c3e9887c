"""Processes forked from one that has imported torch already: a run, or the ranks of one as ``torchrun`` would start them.

A new interpreter needs five seconds of a processor before it can train; a forked process starts at once. That the launchers
start the same is proved in ``tests/end_to_end/test_training_runs.py``.
"""

import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

ROOT = Path(__file__).parents[2]
_SERVER = multiprocessing.get_context("forkserver")
# What a run imports, at its start and on its way. Of all these only pyarrow starts a thread, which survives a fork (jemalloc's).
PRELOADED = ("galaxydist.training.trainer", "galaxydist.cli.train", "cv2", "scipy.ndimage", "timm.optim", "sklearn.metrics")
PRELOADED += (
    "pyarrow.parquet",
    "rich.progress",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "tests.helpers.scripts.traced_launch",
)
PRELOADED += ("torch.distributed.checkpoint.hf_storage", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
PRELOADED += ("tests.helpers.settled",)  # the last of all


@dataclass(frozen=True)
class Ranks:
    """Processes that were started together, and what they print."""

    processes: list[BaseProcess]
    folder: Path

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    @property
    def exit_codes(self) -> list[int | None]:
        """By rank; -9: killed; None: still running."""
        return [process.exitcode for process in self.processes]

    def said(self, rank: int, stream: str = "out") -> str:
        """Return the text that one of them wrote to ``out`` or ``err``."""
        path = self.folder / f"{rank}.{stream}"
        return path.read_text(errors="replace") if path.exists() else ""

    def text(self, stream: str = "out") -> str:
        """Return the text that all of them wrote to ``out`` or ``err``."""
        return "".join(self.said(rank, stream) for rank in range(len(self.processes)))

    def kill(self) -> None:
        """End them now, with SIGKILL, and what they started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()

    def wait(self, seconds: float = 280) -> list[int | None]:
        """The exit codes, once all have left. As under torchrun, the first that fails ends the others."""
        deadline = time.monotonic() + seconds
        while living := [process for process in self.processes if process.is_alive()]:
            left = deadline - time.monotonic()
            assert left > 0, f"still running after {seconds:g} s: {self.text('err')[-3000:]}"
            connection.wait([process.sentinel for process in living], left)
            if any(self.exit_codes):
                connection.wait([process.sentinel for process in living if process.is_alive()], 0.1)  # torchrun looks as often
                for process in living:
                    process.terminate()
        return self.exit_codes


def wait_for_exits(processes: Sequence[BaseProcess], seconds: float) -> bool:
    """Return True once all have left by themselves, False if some still run after so many seconds."""
    deadline = time.monotonic() + seconds
    while living := [process.sentinel for process in processes if process.is_alive()]:
        if (left := deadline - time.monotonic()) <= 0:
            return False
        connection.wait(living, left)
    return True


@contextmanager
def forked(
    work: Callable[..., int | None],
    *arguments: object,
    folder: Path,
    size: int = 1,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Call a function in new processes, each in a session of its own; at the end all are gone, and what they started.

    Args:
        work: a function of a module; what it returns is the exit code.
        arguments: of ``work``.
        folder: where what they print is kept, as ``RANK.out`` and ``RANK.err``.
        size: how many; if several, with the variables of a launcher.
        environ: more variables.
    """
    _start_server()
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(size):
        variables = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
        if size > 1:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
            variables |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        variables |= environ or {}
        call = (work.__module__, work.__name__), arguments, variables, folder / str(rank)
        processes.append(_SERVER.Process(target=_call, args=call))
    ranks = Ranks(processes, folder)
    try:
        for process in processes:
            process.start()
        yield ranks
    finally:
        ranks.kill()


def run_forked(work: Callable[..., int | None], *arguments: object, size: int = 1, **options: Any) -> CompletedProcess[str]:
    """``forked``, to its end: the first exit code that is not 0, and what all ranks printed."""
    with tempfile.TemporaryDirectory() as folder, forked(work, *arguments, folder=Path(folder), size=size, **options) as ranks:
        codes = ranks.wait()
        return CompletedProcess([], next((code for code in codes if code), 0), ranks.text(), ranks.text("err"))


def train(settings: Sequence[str]) -> int:
    """Train as launch.py does."""
    from galaxydist.cli.train import main

    return main(settings, os.environ)


def train_watched(settings: Sequence[str], events: Path | None = None, kill: tuple[str, int] | None = None) -> int:
    """Train as launch.py does, in view of the disk.

    Args:
        settings: its arguments.
        events: where each announced change of the checkpoints and the small images is written (see ``atomic_files.py``).
        kill: it kills itself with SIGKILL right before the N-th change, counted from the first whose path holds the text.
    """
    seen = 0
    record = events.open("a", buffering=1) if events else None

    def hook(name: str, paths: tuple[Any, ...]) -> None:
        nonlocal seen
        if not name.startswith("galaxydist.") or not re.search("/checkpoints|/galaxies/", str(paths[0])):
            return
        if record is not None:
            record.write(json.dumps([name, *map(str, paths)]) + "\n")
        if kill is not None and (seen or kill[0] in str(paths[0])):
            if seen == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    return train(settings)


def predict(arguments: Sequence[str], kill_at: int | None = None, one_core: bool = False) -> int:
    """Label as ``galaxydist predict`` does.

    Args:
        arguments: of the command.
        kill_at: it kills itself with SIGKILL right before the N-th file gets its name.
        one_core: on one core, so with one thread in each process.
    """
    from galaxydist.cli.main import main

    seen = 0
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def hook(name: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == "galaxydist.rename":
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(hook)
    return main(["predict", *arguments])


def command(arguments: Sequence[str], event: str = "", kill_at: int | None = None) -> int:
    """Give a command of ``galaxydist``.

    Args:
        arguments: its words.
        event: name of an event of ``sys.addaudithook``.
        kill_at: it kills itself with SIGKILL right before the N-th of these events; None: never.
    """
    from galaxydist.cli.main import main

    seen = 0

    def hook(name: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == event:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(hook)
    return main(arguments)


def _call(function: tuple[str, str], arguments: tuple[Any, ...], environ: dict[str, str], output: Path) -> None:
    """In the new process. The function comes by name, so that its module is imported with the right environment."""
    assert "galaxydist.training.trainer" in sys.modules, "the server could not import what a run needs"
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(output.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    module, name = function
    sys.exit(getattr(importlib.import_module(module), name)(*arguments))


def _start_server() -> None:
    """Before the first process: it imports what a run needs, from here, and starts no thread."""
    _SERVER.set_forkserver_preload([__name__, *PRELOADED])
    with chdir(ROOT):
        forkserver.ensure_running()
