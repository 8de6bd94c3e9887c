"""One process of a run, from its command line to its exit code: what launch.py and a job of the cluster do alike."""

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
from galaxydist.job_environment import find_place
from galaxydist.log import set_up_logging

logger = logging.getLogger(__name__)

# A launcher ends all ranks as soon as one has left. Rank 0 prints what all have found, and may come to it this much later.
PRINTING_S = 3.0


def launch(
    arguments: Sequence[str],
    environ: MutableMapping[str, str],
    note: Callable[[Exception], None] = lambda _: None,
) -> int:
    """Train what ``arguments`` name, and say what goes wrong, once for all ranks.

    Args:
        arguments: ``recipe=NAME`` and ``key=value`` overrides.
        environ: the process's environment.
        note: told what went wrong, on the ranks that say it.

    Returns:
        The exit code.
    """
    set_up_process(environ)
    set_up_logging()
    rank = 0  # also where the launcher's variables are wrong: each process that finds this logs it
    try:
        rank = find_place(environ).rank
        set_up_logging(rank)
        return _train(arguments, environ)
    except (UserError, RunFailedError) as error:
        # One process prints what all have found.
        is_users = isinstance(error, UserError)
        is_alone = not isinstance(error, EveryRankError) if is_users else isinstance(error, OneRankFailedError)
        if rank == 0 or is_alone:
            logger.error("%s", error)
            note(error)
        _leave_for_launcher(f"galaxydist: error: {error}", environ)
        if rank and not is_alone:
            time.sleep(PRINTING_S)
        return EXIT_BAD_INPUT if is_users else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _leave_for_launcher(text: str, environ: Mapping[str, str]) -> None:
    """Write an error to the file from which torch's launcher takes the last thing that it prints.

    The format is that of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``.
    """
    if path := environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError, UserError):
            # Whole or not there: the launcher may read it while it ends this process.
            replace_bytes(Path(path), json.dumps({"message": {"message": text, "extraInfo": details}}).encode())


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """For the first import of what a run needs. All of it stays to the end, so that the garbage collector need not look through
    it again and again, neither while it comes (a quarter of the time that it takes) nor later."""
    if "galaxydist.training.trainer" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _train(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from galaxydist.recipe.resolve import load_recipe

    resolved = load_recipe(arguments)
    with _importing():
        from galaxydist.training.trainer import train
    stop_signal = train(resolved, environ)
    if not stop_signal:
        return 0
    return EXIT_INTERRUPTED if stop_signal == signal.SIGINT else EXIT_STOPPED
