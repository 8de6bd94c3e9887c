"""One process of a training run, from its command line to its exit code."""

import contextlib
import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

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


def launch(
    arguments: Sequence[str],
    environ: MutableMapping[str, str],
    note: Callable[[Exception], None] = lambda _: None,
) -> int:
    """Train a recipe, and log an error once for all ranks.

    Args:
        arguments: ``recipe=NAME`` and ``key=value`` overrides.
        environ: the process's environment.
        note: called with the error on the ranks that log it.

    Returns:
        The exit code.
    """
    set_up_process(environ)
    set_up_logging()
    rank = 0  # also if the launcher's variables are wrong: each process that finds this logs it
    try:
        rank = find_rank(environ).rank
        set_up_logging(rank)
        from galaxydist.recipe.resolve import load_recipe  # not above: `galaxydist --help` imports this module

        resolved = load_recipe(arguments)
        with _importing():
            from galaxydist.training.trainer import train
        stop_signal = train(resolved, environ)
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
