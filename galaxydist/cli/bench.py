"""``galaxydist bench``: measured figures. ``simulator``: how easy the simulated survey is for classifiers that see no shapes."""

import argparse
from pathlib import Path

from galaxydist.cli.options import Commands, add_workers, non_negative_int, positive_int


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add_parser("bench", help="measured figures", description="Measured figures.", allow_abbrev=False)
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    simulator = inner.add_parser(
        "simulator",
        help="how easy the simulated survey is",
        description="What colour and brightness alone, or 16 x 16 pixels, tell of simulated galaxies: 50 %% at most.",
        allow_abbrev=False,
    )
    simulator.add_argument(
        "--num-galaxies", type=positive_int, default=1000, metavar="N", help="class-balanced (default: %(default)s)"
    )
    simulator.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="default: %(default)s")
    simulator.add_argument("--real", type=Path, metavar="DIR", help="real galaxies to measure beside them: <label>/<row>.jpg")
    add_workers(simulator)
    simulator.set_defaults(run=run_simulator)


def run_simulator(arguments: argparse.Namespace) -> None:
    """Measure and print both guards."""
    from galaxydist.surveys.simulate.guards import measure_guards

    measure_guards(arguments.num_galaxies, arguments.seed, real_dir=arguments.real, workers=arguments.workers)
