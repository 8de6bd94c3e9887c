"""``galaxydist bench``: measured figures.

``simulator``: how easy the simulated survey is for classifiers that see no shapes. ``transfer``: how much it is like the sky.
``loader``: how fast images become batches. ``order``: how well and how fast galaxies are shuffled.
``remote``: how an epoch comes from a slow server that fails. ``saving``: how long a training waits for its checkpoints.
``trainer``: what the trainer's loop costs beside a bare one. ``scaling``: what further processes bring. ``startup``: how long
until the first step. ``folds``: networks on real galaxies at equal compute.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from galaxydist.bench.loader_processes import PEERS
from galaxydist.bench.loader_worker import TASKS
from galaxydist.cli.options import (
    Commands,
    add_data_dir,
    add_workers,
    chosen_root,
    known_model,
    local_path,
    non_negative_int,
    positive_int,
)

# ``galaxydist bench loader``: how fast images become batches, against other loaders and against what decoding allows.


def add_loader(commands: Commands) -> None:
    """Add the command."""
    peers = [peer.name for peer in PEERS]
    parser = commands.add_parser(
        "loader",
        help="how fast images become batches, against other loaders",
        description="Our loader, other loaders and the bare decoder on the same images and cores, in turn. Prints tables and, "
        "last, a line of JSON for each task. `make bench` installs the other loaders into environments of their own.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=local_path, metavar="MANIFEST", help="shards to take JPEGs from (default: simulated galaxies)"
    )
    source.add_argument("--real", type=local_path, metavar="DIR", help="a folder of JPEGs to take instead: <class>/<name>.jpg")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="workers, on N cores (default: all cores)")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--images", type=positive_int, metavar="N", help="images in an epoch (default: 2,000 a worker)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--peers", nargs="*", choices=peers, metavar="PEER", help=f"of {', '.join(peers)} (default: all)")
    parser.add_argument(
        "--environments",
        type=local_path,
        default=Path(),
        metavar="DIR",
        help="where .venv-bench and .venv-mosaic lie (default: here)",
    )
    parser.add_argument("--quick", action="store_true", help="few images, once: to see that it works, not to quote")
    add_data_dir(parser)
    parser.set_defaults(run=run_loader)


def run_loader(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.loader_speed import LoaderOptions, measure_loader

    options = LoaderOptions(
        environments=arguments.environments,
        data=arguments.data,
        real=arguments.real,
        workers=arguments.workers,
        num_images=arguments.images,
        rounds=arguments.rounds,
        tasks=arguments.tasks,
        peers=arguments.peers,
        quick=arguments.quick,
    )
    measure_loader(chosen_root(arguments) / "bench" / "loader", os.environ, options)


# ``galaxydist bench folds``: networks from random weights on real galaxies, at equal compute, cross-validated.


def add_folds(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "folds",
        help="networks from random weights on real galaxies, at equal compute",
        description="Train each model from random weights on each fold of a folder of real galaxies, for the same processor "
        "time, and test it on the rest. Prints a table and, last, a line of JSON. A second call takes up what is finished.",
        allow_abbrev=False,
    )
    parser.add_argument("--real", type=local_path, required=True, metavar="DIR", help="real galaxies: <class>/<image>")
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


# ``galaxydist bench order``: the order of reading, measured.


def add_order(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "order",
        help="how well and how fast galaxies are shuffled",
        description="How well an epoch is shuffled; how long a new process takes to open 10^9 samples in 10^5 shards; "
        "how many shards each of 128 nodes fetches, for several numbers of streams. Prints tables and, last, lines of JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="smaller surveys: to see that it works, not to quote")
    parser.set_defaults(run=run_order)


def run_order(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.order_speed import measure_order

    measure_order(quick=arguments.quick)


# ``galaxydist bench remote``: an epoch from a slow server that fails.


def add_remote(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "remote",
        help="how an epoch comes from a slow server that fails",
        description="Read an epoch through the cache from a web server on this machine that delays, cuts, corrupts and refuses; "
        "by one process and by two, with a cold cache and with a warm one. Says how long training would wait, how often shards "
        "were asked for, and whether the epoch is the local one. Prints a table and, last, lines of JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=local_path, metavar="MANIFEST", help="local shards to serve (default: simulated galaxies)")
    parser.add_argument(
        "--images", type=positive_int, default=12_800, metavar="N", help="simulated galaxies (default: %(default)s)"
    )
    parser.add_argument(
        "--delay-ms", type=non_negative_int, default=50, metavar="MS", help="before each answer (default: %(default)s)"
    )
    parser.add_argument("--fail-every", type=positive_int, default=50, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument("--step-ms", type=non_negative_int, default=100, metavar="MS", help="of training (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="G", help="default: %(default)s")
    parser.add_argument(
        "--streams",
        type=positive_int,
        default=2,
        metavar="C",
        help="of the order (default: %(default)s, so that the shards of an epoch this short are not all needed at once)",
    )
    add_data_dir(parser)
    parser.set_defaults(run=run_remote)


def run_remote(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.remote import RemoteConditions, measure_remote

    conditions = RemoteConditions(
        arguments.delay_ms / 1000,
        arguments.fail_every,
        arguments.step_ms / 1000,
        arguments.batch_size,
        arguments.streams,
    )
    root = chosen_root(arguments) / "bench" / "remote"
    measure_remote(root, os.environ, conditions, data=arguments.data, num_images=arguments.images)


# ``galaxydist bench saving``: what checkpoints cost a training.


def add_saving(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "saving",
        help="how long a training waits for its checkpoints",
        description="Train on random images without saving, saving in the background and saving synchronously, taking turns. "
        "Says which share of the time the training waits, how much slower its steps are, and how long a save on a signal takes. "
        "Prints a table and, last, lines of JSON.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--every", type=positive_int, default=30, metavar="S", help="seconds between saves (default: %(default)s)"
    )
    parser.add_argument("--saves", type=positive_int, default=4, metavar="N", help="of each training (default: %(default)s)")
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--image-size", type=positive_int, default=64, metavar="PIXELS", help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="B", help="default: %(default)s")
    parser.add_argument("--folder", type=local_path, metavar="DIR", help="write into DIR/saving (default: under the data root)")
    add_data_dir(parser)
    parser.set_defaults(run=run_saving)


def run_saving(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.checkpointing import SavingConditions, measure_saving

    conditions = SavingConditions(
        known_model(arguments.model), arguments.image_size, arguments.batch_size, float(arguments.every), arguments.saves
    )
    root = arguments.folder or chosen_root(arguments) / "bench"
    measure_saving(root / "saving", conditions)


# ``galaxydist bench scaling``: what further processes bring.


def add_scaling(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "scaling",
        help="how much faster several processes train than one",
        description="The trainer on images in memory, by one process and by several, in turn; each process on a "
        "core of its own with one thread, with as many images in a step. Prints a line and, last, a line of JSON.",
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
    from galaxydist.bench.scaling import main

    sys.exit(main(sys.argv[1], os.environ))


# ``galaxydist bench startup``: how long until the first step.


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


# ``galaxydist bench trainer``: what the trainer costs beside a bare loop.


def add_trainer(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trainer",
        help="how fast the trainer is beside a bare PyTorch loop",
        description="The trainer's loop with the default checks, timers, metrics and tracker (wandb, offline) against a bare "
        "PyTorch loop with the same model, tensors and optimizer; in turn within one process, on images in memory. Prints a "
        "line and, last, a line of JSON for each model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["custom_cnn", "resnet18"],
        metavar="NAME",
        help="default: custom_cnn resnet18",
    )
    parser.add_argument("--rounds", type=positive_int, default=10, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=20, metavar="N", help="of each loop's turn (default: %(default)s)")
    parser.add_argument("--image-size", type=positive_int, metavar="PIXELS", help="default: 64, on a GPU 224")
    parser.add_argument("--batch-size", type=positive_int, metavar="B", help="default: 48 and 32, on a GPU 192")
    parser.add_argument("--width", type=positive_int, default=24, metavar="W", help="of custom_cnn (default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "no", "bf16"), default="auto", help="default: %(default)s")
    parser.set_defaults(run=run_trainer)


def run_trainer(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.trainer_speed import Sizes, measure_trainer

    measure_trainer(
        os.environ,
        models=[known_model(name) for name in arguments.models],
        sizes=Sizes(arguments.width, arguments.image_size, arguments.batch_size),
        steps=arguments.steps,
        rounds=arguments.rounds,
        precision=arguments.precision,
    )


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
