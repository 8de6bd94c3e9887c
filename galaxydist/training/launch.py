"""One process of a run, from its command line to its exit code: what launch.py and a job of the cluster do alike."""

import signal
import sys
from collections.abc import Callable, MutableMapping, Sequence

from galaxydist.cores import wait_politely
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
    wait_politely(environ)
    rank = int(environ.get("RANK") or environ.get("SLURM_PROCID") or 0)
    try:
        return _train(arguments, environ)
    except UserError as error:
        # What every rank found is said by one.
        if rank == 0 or not isinstance(error, EveryRankError):
            where = "" if isinstance(error, EveryRankError) or rank == 0 else f" (rank {rank})"
            print(f"galaxydist: error{where}: {error}", file=sys.stderr, flush=True)
            note(error)
        return EXIT_BAD_INPUT
    except RunFailedError as error:
        if rank == 0 or isinstance(error, OneRankFailedError):
            print(f"galaxydist: error: {error}", file=sys.stderr, flush=True)
            note(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _train(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    from galaxydist.recipe.load import load_recipe

    resolved = load_recipe(arguments)

    from galaxydist.training.session import train

    stop_signal = train(resolved, environ)
    if not stop_signal:
        return 0
    return EXIT_INTERRUPTED if stop_signal == signal.SIGINT else EXIT_STOPPED
