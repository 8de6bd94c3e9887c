"""``galaxydist bench folds``: networks from random weights on real galaxies, at equal compute, cross-validated."""

import argparse
import math
import os

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, local_path, positive_int


def add_folds(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "folds",
        help="networks from random weights on real galaxies, at equal compute",
        description="Train each model from random weights on each fold of a folder of real galaxies, for the same processor "
        "time, and test it on the rest. Prints a table and, last, a line of JSON. A second call takes up what is finished.",
        allow_abbrev=False,
    )
    parser.add_argument("--real", type=local_path, required=True, metavar="DIR", help="real galaxies: <class>/<picture>")
    parser.add_argument(
        "--minutes", type=positive_number, default=10.0, metavar="M", help="processor minutes of a fit (default: %(default)g)"
    )
    parser.add_argument("--folds", type=positive_int, default=3, metavar="N", help="at least 2 (default: %(default)s)")
    parser.add_argument("--models", metavar="NAME,...", help="default: d4_cnn,custom_cnn,resnet18")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipes of all models")
    add_data_dir(parser)
    parser.set_defaults(run=run_folds)


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def run_folds(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.real_galaxies import measure_folds

    measure_folds(
        arguments.real,
        chosen_root(arguments) / "bench" / "folds",
        os.environ,
        minutes=arguments.minutes,
        num_folds=arguments.folds,
        models=arguments.models.split(",") if arguments.models else None,
        overrides=arguments.overrides,
    )
