"""What launch.py does: read the recipe, call the trainer, turn how it ended into an exit code.

Exit codes: 0 finished, 2 bad input, 130 interrupted (Ctrl-C), 75 stopped by SIGTERM or SIGUSR2 with everything saved (start the
same command again to continue), 1 anything else. ``accelerate launch`` and ``torchrun`` turn every code but 0 into 1.
"""

import signal
import sys
from collections.abc import MutableMapping, Sequence

from galaxydist.cli.threads import wait_politely
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_FAILED, EveryRankError, OneRankFailedError, RunFailedError, UserError

EXIT_INTERRUPTED = 130
EXIT_STOPPED = 75  # EX_TEMPFAIL: try again
USAGE = """usage: accelerate launch launch.py recipe=NAME [key=value ...]

Trains a recipe, or continues it where it stopped.
`galaxydist recipes` lists the recipes, `galaxydist recipes NAME` shows every key.
Several processes: accelerate launch --multi_gpu --num_processes N launch.py ... (also without a GPU),
or torchrun --nproc-per-node N launch.py ...
"""


def main(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Train what ``arguments`` name.

    Args:
        arguments: ``recipe=NAME`` and ``key=value`` overrides.
        environ: the process's environment.

    Returns:
        The exit code.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    wait_politely(environ)
    rank = int(environ.get("RANK") or environ.get("SLURM_PROCID") or 0)
    try:
        return _train(arguments, environ)
    except UserError as error:
        # What every rank found is said by one.
        if rank == 0 or not isinstance(error, EveryRankError):
            where = "" if isinstance(error, EveryRankError) or rank == 0 else f" (rank {rank})"
            print(f"galaxydist: error{where}: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except RunFailedError as error:
        if rank == 0 or isinstance(error, OneRankFailedError):
            print(f"galaxydist: error: {error}", file=sys.stderr, flush=True)
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
