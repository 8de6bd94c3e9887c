"""``galaxydist bench scaling``: what further processes bring."""

import argparse
import os
import sys

from galaxydist.cli.options import Commands, known_model, positive_int


def add_scaling(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "scaling",
        help="how much faster several processes train than one",
        description="The trainer on pictures in memory, by one process and by several, in turn; each process on a "
        "core of its own with one thread, with as many pictures in a step. Prints a line and, last, a line of JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=positive_int, default=2, metavar="N", help="compared with one (default: %(default)s)")
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--image-size", type=positive_int, default=64, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="B", help="of each process (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=20, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.set_defaults(run=run_scaling)


def run_scaling(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.scaling import measure_scaling

    measure_scaling(
        os.environ,
        processes=arguments.processes,
        model=known_model(arguments.model),
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    # One process of the measurement.
    from galaxydist.bench.scaling_worker import main

    sys.exit(main(sys.argv[1], os.environ))
