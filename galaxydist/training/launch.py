"""One process of a training or of other work of several, from its command line to its exit code."""

import contextlib
import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from galaxydist.atomic_files import replace_bytes
from galaxydist.cpus import set_up_process
from galaxydist.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EveryRankError,
    OneRankFailedError,
    RunFailedError,
    UserError,
)
from galaxydist.job_environment import find_rank
from galaxydist.log import set_up_logging

logger = logging.getLogger(__name__)

# Launchers kill all ranks once one has exited: the other ranks leave rank 0 this time to log an error that all have.
LOGGING_S = 3.0


# Work of one process: from its arguments and its environment to the number of the signal that stopped it, or 0.
RankWork = Callable[[Any, MutableMapping[str, str]], int]


def train_recipe(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Train the recipe of ``recipe=NAME`` and ``key=value`` overrides, and return the number of the signal that stopped it."""
    from galaxydist.recipe.resolve import load_recipe  # not above: `galaxydist --help` imports this module

    resolved = load_recipe(arguments)
    with _importing():
        from galaxydist.training.trainer import train
    return train(resolved, environ)


def launch(
    arguments: Any,
    environ: MutableMapping[str, str],
    note: Callable[[Exception], None] = lambda _: None,
    *,
    work: RankWork = train_recipe,
) -> int:
    """Run the work of one process, by default a training, and log an error once for all ranks.

    Args:
        arguments: of the work; for a training ``recipe=NAME`` and ``key=value`` overrides.
        environ: the process's environment.
        note: called with the error on the ranks that log it.
        work: the work.

    Returns:
        The exit code.
    """
    set_up_process(environ)
    set_up_logging()
    rank = 0  # also if the launcher's variables are wrong: each process that finds this logs it
    try:
        rank = find_rank(environ).rank
        set_up_logging(rank)
        stop_signal = work(arguments, environ)
    except (UserError, RunFailedError) as error:
        is_users = isinstance(error, UserError)
        is_alone = not isinstance(error, EveryRankError) if is_users else isinstance(error, OneRankFailedError)
        if rank == 0 or is_alone:
            logger.error("%s", error)
            note(error)
        _write_launcher_error(f"galaxydist: error: {error}", environ)
        if rank and not is_alone:
            time.sleep(LOGGING_S)
        return EXIT_BAD_INPUT if is_users else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if not stop_signal:
        return 0
    return EXIT_INTERRUPTED if stop_signal == signal.SIGINT else EXIT_STOPPED


def _write_launcher_error(text: str, environ: Mapping[str, str]) -> None:
    """Write an error to the file that torch's launcher reads for its final report.

    The format is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``.
    """
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError, UserError):
            # Atomically, since the launcher may read it while it kills this process.
            replace_bytes(Path(path), json.dumps({"message": {"message": text, "extraInfo": details}}).encode())


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Keep the garbage collector from searching the objects of the imported modules, which stay until the process ends.

    Its searches would take a quarter of the time of the imports.
    """
    if "galaxydist.training.trainer" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
