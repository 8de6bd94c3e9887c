"""``galaxydist train`` and launch.py: read the recipe, call the trainer, turn how it ended into an exit code.

Exit codes: 0 finished, 2 bad input, 130 interrupted (Ctrl-C), 75 stopped by SIGTERM or SIGUSR2 with everything saved (start the
same command again to continue), 70 hung, 1 anything else. ``accelerate launch`` and ``torchrun`` turn every code but 0 into 1.
"""

import argparse
import os
from collections.abc import MutableMapping, Sequence

from galaxydist.cli.options import Commands, positive_int
from galaxydist.errors import EXIT_BAD_INPUT
from galaxydist.training.launch import launch

USAGE = """usage: accelerate launch launch.py recipe=NAME [key=value ...]

Trains a recipe, or continues it where it stopped.
`galaxydist recipes` lists the recipes, `galaxydist recipes NAME` shows every key.
Several processes: accelerate launch --multi_gpu --num_processes N launch.py ... (also without a GPU),
or torchrun --nproc-per-node N launch.py ...
"""

EPILOG = """examples:
  galaxydist train recipe=custom_cnn
  galaxydist train vit optim.lr=1e-4 --processes 4     four GPUs of this machine (or four processes on its CPU)

The same as `accelerate launch launch.py` on one machine. The same command again continues the run.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train a recipe on this machine",
        description="Train a recipe, or continue it where it stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="the recipe, and values that differ from it")
    parser.add_argument("--processes", type=positive_int, default=1, metavar="N", help="one a GPU (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code."""
    if arguments.processes == 1:
        return launch(arguments.recipe, os.environ)
    from galaxydist.recipe.resolve import load_recipe
    from galaxydist.training.processes import run_processes

    load_recipe(arguments.recipe)  # a mistake is told before processes are started
    return run_processes(arguments.recipe, arguments.processes, os.environ)


def main(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Train what ``arguments`` name: launch.py.

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
