"""``galaxydist train`` and launch.py: train a recipe and return the exit code.

Exit codes: 0 finished, 2 bad input, 130 interrupted (Ctrl-C), 75 stopped by SIGTERM or SIGUSR2 after saving (the same command
continues the run), 70 hung, 1 anything else. ``accelerate launch`` and ``torchrun`` turn every code but 0 into 1.
"""

import argparse
import os
from collections.abc import MutableMapping, Sequence

from galaxydist.cli.options import Commands, add_command, add_recipe, positive_int
from galaxydist.errors import EXIT_BAD_INPUT
from galaxydist.training.launch import launch

USAGE = """usage: accelerate launch launch.py recipe=NAME [key=value ...]

Train a recipe, or continue it from its last checkpoint.
`galaxydist recipes` lists the recipes, `galaxydist recipes NAME` shows all keys of one.
Several processes: accelerate launch --multi_gpu --num_processes N launch.py ... (also without a GPU),
or torchrun --nproc-per-node N launch.py ...
"""

EPILOG = """examples:
  galaxydist train recipe=custom_cnn
  galaxydist train vit optim.lr=1e-4 --processes 4     on four GPUs of this machine (or in four processes on its CPU)

The command does the same as `accelerate launch launch.py` on one machine. The same command again continues the run.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    description = "Train a recipe, or continue it from its last checkpoint."
    parser = add_command(commands, "train", run, "train a recipe on this machine", description=description, epilog=EPILOG)
    add_recipe(parser)
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="number of processes, one per GPU (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train and return the exit code."""
    if arguments.processes == 1:
        return launch(arguments.recipe, os.environ)
    from galaxydist.recipe.resolve import load_recipe
    from galaxydist.training.local_launcher import run_processes

    load_recipe(arguments.recipe)  # reports a mistake once, before processes are started
    return run_processes(arguments.recipe, arguments.processes, os.environ)


def main(arguments: Sequence[str], environ: MutableMapping[str, str]) -> int:
    """Run launch.py and return the exit code.

    Args:
        arguments: ``recipe=NAME`` and ``key=value`` overrides.
        environ: the environment of the process.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    return launch(arguments, environ)
