"""One process of a training or of other work of several, from its command line to its exit code."""

import contextlib
import gc
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.atomic_files import replace_bytes
from galaxydist.cpus import set_up_process
from galaxydist.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EveryRankError,
    OneRankFailedError,
    RunFailedError,
    UserError,
    exit_code_of,
)
from galaxydist.job_environment import LauncherRank, find_rank
from galaxydist.log import set_up_logging
from galaxydist.rank_store import ExitTask, Leave, end_process

if TYPE_CHECKING:
    from galaxydist.training.resume import Prune

logger = logging.getLogger(__name__)

# Launchers kill all ranks once one has exited: the other ranks leave rank 0 this time to log an error that all have.
LOGGING_S = 3.0
# The launcher's report of an error may take this time; a log on a hung file system must not keep the process.
REPORT_S = 10.0

# Work of one process: from its arguments, its environment and ``Leave`` to the number of the signal that stopped it, or 0.
RankWork = Callable[[Any, MutableMapping[str, str], Leave], int]


def train_recipe(arguments: Sequence[str], environ: MutableMapping[str, str], leave: Leave, prune: "Prune | None" = None) -> int:
    """Train the recipe of ``recipe=NAME`` and ``key=value`` overrides, and return the number of the signal that stopped it.

    Args:
        arguments, environ, leave: as for ``RankWork``.
        prune: as for ``trainer.train``.
    """
    from galaxydist.recipe.resolve import load_recipe  # not above: `galaxydist --help` imports this module

    resolved = load_recipe(arguments)
    with _importing():
        from galaxydist.training.trainer import train
    return train(resolved, environ, leave, prune)


def launch(
    arguments: Any,
    environ: MutableMapping[str, str],
    note: Callable[[BaseException], None] = lambda _: None,
    *,
    work: RankWork = train_recipe,
) -> int:
    """Run the work of one process, by default a training, and log an error once for all ranks.

    One process of several does not return after an error: it ends by ``os._exit``, since the interpreter's own end might wait
    for the other ranks.

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
    # Rank 0 also if the launcher's variables are wrong: each process that finds this logs it.
    end = _RankEnd(LauncherRank(), environ, note)
    try:
        end.launched = find_rank(environ)
        set_up_logging(end.launched.rank)
        stop_signal = work(arguments, environ, end.leave)
    except (Exception, KeyboardInterrupt) as error:
        end.leave(error)
        if not isinstance(error, UserError | RunFailedError | KeyboardInterrupt):
            raise
        end.report(error)
        return exit_code_of(error)
    if not stop_signal:
        return 0
    return EXIT_INTERRUPTED if stop_signal == signal.SIGINT else EXIT_STOPPED


@dataclass
class _RankEnd:
    """The end of a rank after an error.

    Args:
        launched: rank and world size.
        environ: the process's environment.
        note: see ``launch``.
    """

    launched: LauncherRank
    environ: Mapping[str, str]
    note: Callable[[BaseException], None]

    def leave(self, error: BaseException, tasks: Iterable[ExitTask] = ()) -> None:
        """Report the error and end this process, if it is one of several (``Leave``)."""
        if self.launched.size > 1:
            end_process(exit_code_of(error), [(lambda: self.report(error), REPORT_S), *tasks])

    def report(self, error: BaseException) -> None:
        """Log an error, unless another rank does, and write it for the launcher."""
        if isinstance(error, KeyboardInterrupt):
            return
        rank, is_explained = self.launched.rank, isinstance(error, UserError | RunFailedError)
        is_alone = isinstance(error, OneRankFailedError) or not isinstance(error, EveryRankError | RunFailedError)
        if not is_explained:
            traceback.print_exception(error)
        elif rank == 0 or is_alone:
            logger.error("%s", error)
        if rank == 0 or is_alone:
            self.note(error)
        _write_launcher_error(f"galaxydist: error: {'' if is_explained else type(error).__name__ + ': '}{error}", self.environ)
        if rank and not is_alone:
            time.sleep(LOGGING_S)


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
