"""What launch.py does: read the recipe, call the trainer, turn how it ended into an exit code.

Exit codes: 0 finished, 2 bad input, 130 interrupted (Ctrl-C), 75 stopped by SIGTERM or SIGUSR2 with everything saved (start the
same command again to continue), 70 hung, 1 anything else. ``accelerate launch`` and ``torchrun`` turn every code but 0 into 1.
"""

from collections.abc import MutableMapping, Sequence

from galaxydist.errors import EXIT_BAD_INPUT
from galaxydist.training.launch import launch

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
    return launch(arguments, environ)
