"""``galaxydist bench startup``: how long until the first step."""

import argparse
import os

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, positive_int


def add_startup(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "startup",
        help="how long until the first step, fresh and continued",
        description="Starts launch.py on a small simulated survey in a new folder and from a checkpoint, in turn, and takes the "
        "time from the start of the process until its first step stands in metrics.jsonl. Prints a line and, last, one of JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="demo", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--num-galaxies", type=positive_int, default=300, metavar="N", help="of the survey (default: %(default)s)"
    )
    parser.add_argument(
        "--step", type=positive_int, default=3, metavar="K", help="of the checkpoint, about (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    add_data_dir(parser)
    parser.set_defaults(run=run_startup)


def run_startup(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.startup import measure_startup

    measure_startup(
        chosen_root(arguments) / "bench" / "startup",
        os.environ,
        recipe=arguments.recipe,
        num_galaxies=arguments.num_galaxies,
        step=arguments.step,
        rounds=arguments.rounds,
        overrides=arguments.overrides,
    )
