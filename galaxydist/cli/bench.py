"""``galaxydist bench``: measured figures.

``simulator``: how easy the simulated survey is for classifiers that see no shapes. ``transfer``: how much it is like the sky.
``loader``: how fast pictures become batches. ``order``: how well and how fast galaxies are shuffled.
``remote``: how an epoch comes from a slow server that fails. ``saving``: how long a training waits for its checkpoints.
``trainer``: what the trainer's loop costs beside a bare one. ``scaling``: what further processes bring. ``startup``: how long
until the first step. ``folds``: networks on real galaxies at equal compute.
"""

import argparse
import os

from galaxydist.cli.bench_folds import add_folds
from galaxydist.cli.bench_loader import add_loader
from galaxydist.cli.bench_order import add_order
from galaxydist.cli.bench_remote import add_remote
from galaxydist.cli.bench_saving import add_saving
from galaxydist.cli.bench_scaling import add_scaling
from galaxydist.cli.bench_startup import add_startup
from galaxydist.cli.bench_trainer import add_trainer
from galaxydist.cli.options import Commands, add_data_dir, add_workers, local_path, non_negative_int, positive_int


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add_parser("bench", help="measured figures", description="Measured figures.", allow_abbrev=False)
    inner = parser.add_subparsers(metavar="COMMAND")
    simulator = inner.add_parser(
        "simulator",
        help="how easy the simulated survey is",
        description="What colour and brightness alone, or 16 x 16 pixels, tell of simulated galaxies: 50 % at most.",
        allow_abbrev=False,
    )
    simulator.add_argument(
        "--num-galaxies", type=positive_int, default=1000, metavar="N", help="class-balanced (default: %(default)s)"
    )
    simulator.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="default: %(default)s")
    simulator.add_argument(
        "--real", type=local_path, metavar="DIR", help="real galaxies to measure beside them: <label>/<row>.jpg"
    )
    add_workers(simulator)
    simulator.set_defaults(run=run_simulator)
    transfer = inner.add_parser(
        "transfer",
        help="how much the simulated survey is like the sky",
        description="Train the demo's recipe on simulated galaxies alone, test it on real ones; several seeds.",
        allow_abbrev=False,
    )
    transfer.add_argument("--real", type=local_path, required=True, metavar="DIR", help="real galaxies: <label>/<row>.jpg")
    transfer.add_argument(
        "--num-galaxies", type=positive_int, default=3000, metavar="N", help="simulated, class-balanced (default: %(default)s)"
    )
    transfer.add_argument("--seeds", type=positive_int, default=3, metavar="K", help="training runs (default: %(default)s)")
    transfer.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    add_data_dir(transfer)
    transfer.set_defaults(run=run_transfer)
    add_loader(inner)
    add_order(inner)
    add_remote(inner)
    add_saving(inner)
    add_trainer(inner)
    add_scaling(inner)
    add_startup(inner)
    add_folds(inner)


def run_simulator(arguments: argparse.Namespace) -> None:
    """Measure and print both guards."""
    from galaxydist.bench.simulator import measure_guards

    measure_guards(arguments.num_galaxies, arguments.seed, real_dir=arguments.real, workers=arguments.workers)


def run_transfer(arguments: argparse.Namespace) -> None:
    """Train on simulated galaxies, test on real ones, print both."""
    from galaxydist.bench.simulator import measure_transfer
    from galaxydist.paths import data_root

    measure_transfer(
        arguments.real,
        data_root(arguments.data_dir, os.environ) / "bench" / "transfer",
        os.environ,
        num_galaxies=arguments.num_galaxies,
        seeds=arguments.seeds,
        overrides=arguments.overrides,
    )
