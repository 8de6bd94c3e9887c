"""``galaxydist data simulate``: a simulated survey in Galaxy10's schema."""

import argparse
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir, add_workers, chosen_root, local_path, non_negative_int, positive_int
from galaxydist.errors import UserError

DEFAULT_GALAXIES = 3000


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "simulate",
        help="make a simulated survey",
        description="Draw a simulated survey in Galaxy10's schema. The same number and seed give the same bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-galaxies", type=positive_int, default=DEFAULT_GALAXIES, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--balanced", action="store_true", help="equally many of each class, not Galaxy10's proportions")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="HDF5 file to write (default: hdf5/simulated.h5 in the data root)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is another survey")
    add_workers(parser)
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draw the survey, unless it is there."""
    from galaxydist.paths import hdf5_path

    path = arguments.out or hdf5_path(chosen_root(arguments), "simulated")
    difference = _difference(path, arguments) if path.exists() else ""
    if path.exists() and not difference:
        print(f"simulated survey: {path} (there already)")
        return
    if difference and not arguments.overwrite:
        raise UserError(f"{path} {difference}. Give --overwrite to replace it, or --out FILE to write another")

    from galaxydist.surveys.simulate.survey import simulate_survey

    simulate_survey(path, arguments.num_galaxies, arguments.seed, arguments.workers, arguments.balanced)
    print(f"simulated survey: {path} ({arguments.num_galaxies} galaxies, {path.stat().st_size / 1e6:.0f} MB)")


def _difference(path: Path, arguments: argparse.Namespace) -> str:
    """How the file differs from the survey that is asked for; empty where it is that survey."""
    from galaxydist.surveys.galaxy10 import read_survey_file
    from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION

    wanted = {
        "simulator_version": SIMULATOR_VERSION,
        "seed": arguments.seed,
        "num_galaxies": arguments.num_galaxies,
        "balanced": int(arguments.balanced),
    }
    try:
        attributes = read_survey_file(path).attributes
    except UserError as error:
        return f"is in the way ({error})"
    different = [f"{key} is {attributes.get(key)}, not {value}" for key, value in wanted.items() if attributes.get(key) != value]
    return f"holds another survey ({'; '.join(different)})" if different else ""
