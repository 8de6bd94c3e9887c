"""``galaxydist bench``: measurements of speed, data quality and cost.

``simulator``: classification of simulated galaxies without their shapes. ``transfer``: training on simulated galaxies, test on
real ones. ``loader``: speed of the data loader. ``order``: quality and speed of shuffling. ``remote``: an epoch from a slow and
unreliable server. ``saving``: waiting for checkpoints. ``trainer``: the training loop against a bare one. ``scaling``: one and
several processes. ``predict``: predictions against the bare forward pass. ``startup``: time to the first step.
``folds``: networks on real galaxies with equal compute. ``app``: start and answers of the app.
"""

import argparse
import os
import sys
from pathlib import Path

from galaxydist.bench.loader_processes import PEERS
from galaxydist.bench.loader_worker import TASKS
from galaxydist.cli.options import (
    Commands,
    add_command,
    add_data_dir,
    add_group,
    add_overrides,
    add_workers,
    chosen_root,
    known_model,
    local_path,
    non_negative_int,
    positive_int,
    positive_number,
)
from galaxydist.errors import UserError


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    inner = add_group(commands, "bench", "measurements of speed, data quality and cost")
    for add in (
        _add_simulator,
        _add_transfer,
        _add_loader,
        _add_order,
        _add_remote,
        _add_saving,
        _add_trainer,
        _add_scaling,
        _add_startup,
        _add_tracking,
        _add_folds,
        _add_predict,
        _add_app,
    ):
        add(inner)


def add_int(parser: argparse.ArgumentParser, option: str, default: int, metavar: str, help: str) -> None:
    """Add an option with a positive whole number; its help ends with the default."""
    parser.add_argument(option, type=positive_int, default=default, metavar=metavar, help=f"{help} (default: %(default)s)")


def bench_root(arguments: argparse.Namespace, name: str) -> Path:
    """Return the folder of a measurement in the data root."""
    return chosen_root(arguments) / "bench" / name


def _add_simulator(commands: Commands) -> None:
    parser = add_command(
        commands,
        "simulator",
        run_simulator,
        "difficulty of the simulated survey",
        description="Classify simulated galaxies by colour and brightness alone, and by 16 x 16 pixels; the accuracy should be "
        "at most 50 %.",
    )
    add_int(parser, "--num-galaxies", 1000, "N", "simulated galaxies, equally many of each class")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="random seed (default: %(default)s)")
    parser.add_argument(
        "--real", type=local_path, metavar="DIR", help="real galaxies to measure in the same way: <label>/<row>.jpg"
    )
    add_workers(parser)


def run_simulator(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.simulator import measure_guards

    measure_guards(arguments.num_galaxies, arguments.seed, real_dir=arguments.real, workers=arguments.workers)


def _add_transfer(commands: Commands) -> None:
    parser = add_command(
        commands,
        "transfer",
        run_transfer,
        "similarity of the simulated survey and real galaxies",
        description="Train the demo's recipe on simulated galaxies alone and test it on real ones, with several seeds.",
    )
    parser.add_argument("--real", type=local_path, required=True, metavar="DIR", help="real galaxies: <label>/<row>.jpg")
    add_int(parser, "--num-galaxies", 3000, "N", "simulated galaxies, equally many of each class")
    add_int(parser, "--seeds", 3, "K", "training runs")
    add_overrides(parser)
    add_data_dir(parser)


def run_transfer(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.simulator import measure_transfer

    measure_transfer(
        arguments.real,
        bench_root(arguments, "transfer"),
        os.environ,
        num_galaxies=arguments.num_galaxies,
        seeds=arguments.seeds,
        overrides=arguments.overrides,
    )


def _add_loader(commands: Commands) -> None:
    peers = [peer.name for peer in PEERS]
    parser = add_command(
        commands,
        "loader",
        run_loader,
        "speed of the data loader, against other loaders",
        description="Run our loader, other loaders and the decoder alone in turn, on the same images and cores. Prints tables "
        "and, at the end, a line of JSON for each task. `make bench` installs the other loaders into environments of their own.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=local_path, metavar="MANIFEST", help="shards with JPEG images (default: simulated galaxies)"
    )
    source.add_argument("--real", type=local_path, metavar="DIR", help="folder with JPEG images: <class>/<name>.jpg")
    parser.add_argument("--workers", type=positive_int, metavar="N", help="workers, each on one core (default: all cores)")
    add_int(parser, "--rounds", 3, "N", "measurements of each loader")
    parser.add_argument("--images", type=positive_int, metavar="N", help="images per epoch (default: 2,000 per worker)")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument("--in-place", action="store_true", help="measure the same tars indexed in place, as foreign ones, too")
    parser.add_argument("--peers", nargs="*", choices=peers, metavar="PEER", help=f"of {', '.join(peers)} (default: all)")
    parser.add_argument(
        "--environments",
        type=local_path,
        default=Path(),
        metavar="DIR",
        help="folder that contains .venv-bench and .venv-mosaic (default: the current folder)",
    )
    parser.add_argument("--quick", action="store_true", help="few images and one round, for tests; the figures mean nothing")
    add_data_dir(parser)


def run_loader(arguments: argparse.Namespace) -> None:
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
        in_place=arguments.in_place,
    )
    measure_loader(bench_root(arguments, "loader"), os.environ, options)


def _add_order(commands: Commands) -> None:
    parser = add_command(
        commands,
        "order",
        run_order,
        "quality and speed of shuffling",
        description="Measure how well an epoch is shuffled, how long a new process takes to open 10^9 samples in 10^5 shards, "
        "and how many shards each of 128 nodes fetches for several numbers of streams. Prints tables and, at the end, lines of "
        "JSON.",
    )
    parser.add_argument("--quick", action="store_true", help="small surveys, for tests; the figures mean nothing")


def run_order(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.order_speed import measure_order

    measure_order(quick=arguments.quick)


def _add_remote(commands: Commands) -> None:
    parser = add_command(
        commands,
        "remote",
        run_remote,
        "an epoch from a slow and unreliable server",
        description="Read an epoch through the cache from a web server on this machine that delays, cuts, corrupts and refuses "
        "answers, in one process and in two, with a cold and a warm cache. Measures the time that training would wait and the "
        "requests for each shard, and compares the epoch with the local one. Prints a table and, at the end, lines of JSON.",
    )
    parser.add_argument("--data", type=local_path, metavar="MANIFEST", help="local shards to serve (default: simulated galaxies)")
    add_int(parser, "--images", 12_800, "N", "simulated galaxies")
    parser.add_argument(
        "--delay-ms", type=non_negative_int, default=50, metavar="MS", help="delay of each answer in ms (default: %(default)s)"
    )
    add_int(parser, "--fail-every", 50, "N", "requests per failure")
    parser.add_argument(
        "--step-ms", type=non_negative_int, default=100, metavar="MS", help="time of a training step in ms (default: %(default)s)"
    )
    add_int(parser, "--batch-size", 64, "G", "global batch size")
    add_int(parser, "--streams", 2, "C", "streams of the order; few, so that this short epoch does not need all shards at once")
    add_data_dir(parser)


def run_remote(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.remote import RemoteConditions, measure_remote

    conditions = RemoteConditions(
        arguments.delay_ms / 1000,
        arguments.fail_every,
        arguments.step_ms / 1000,
        arguments.batch_size,
        arguments.streams,
    )
    root = bench_root(arguments, "remote")
    measure_remote(root, os.environ, conditions, data=arguments.data, num_images=arguments.images)


def _add_saving(commands: Commands) -> None:
    parser = add_command(
        commands,
        "saving",
        run_saving,
        "time that training waits for checkpoints",
        description="Train on random images without saving, with background saving and with synchronous saving, in turn. "
        "Measures the fraction of time that training waits, the slowdown of its steps, and the time of a save on a signal. "
        "Prints a table and, at the end, lines of JSON.",
    )
    add_int(parser, "--every", 30, "S", "seconds between saves")
    add_int(parser, "--saves", 4, "N", "saves of each training run")
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="architecture (default: %(default)s)")
    add_int(parser, "--image-size", 64, "PIXELS", "image width in pixels")
    add_int(parser, "--batch-size", 16, "B", "batch size")
    parser.add_argument("--folder", type=local_path, metavar="DIR", help="write into DIR/saving (default: in the data root)")
    add_data_dir(parser)


def run_saving(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.checkpointing import SavingConditions, measure_saving

    conditions = SavingConditions(
        known_model(arguments.model), arguments.image_size, arguments.batch_size, float(arguments.every), arguments.saves
    )
    measure_saving(arguments.folder / "saving" if arguments.folder else bench_root(arguments, "saving"), conditions)


def _add_trainer(commands: Commands) -> None:
    parser = add_command(
        commands,
        "trainer",
        run_trainer,
        "speed of the trainer, against a bare PyTorch loop",
        description="Run the training loop with the default checks, timers, metrics and tracker (wandb, offline), from images "
        "in memory and with its loader, in turn with a bare PyTorch loop: the same model and optimizer on augmented images that "
        "are on the device. Prints a line and, at the end, a line of JSON for each model.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["custom_cnn", "resnet18"],
        metavar="NAME",
        help="architectures (default: custom_cnn resnet18)",
    )
    add_int(parser, "--rounds", 10, "N", "measurements of each loop")
    add_int(parser, "--steps", 20, "N", "steps of each measurement")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="image width in pixels (default: 64, on a GPU 224)"
    )
    parser.add_argument("--batch-size", type=positive_int, metavar="B", help="batch size (default: 48 and 32, on a GPU 192)")
    add_int(parser, "--width", 24, "W", "width of custom_cnn")
    parser.add_argument(
        "--precision", choices=("auto", "no", "bf16", "fp64"), default="auto", help="train.precision (default: %(default)s)"
    )


def run_trainer(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.trainer_speed import Sizes, measure_trainer

    measure_trainer(
        os.environ,
        models=[known_model(name) for name in arguments.models],
        sizes=Sizes(arguments.width, arguments.image_size, arguments.batch_size),
        steps=arguments.steps,
        rounds=arguments.rounds,
        precision=arguments.precision,
    )


def _add_scaling(commands: Commands) -> None:
    parser = add_command(
        commands,
        "scaling",
        run_scaling,
        "speed of several processes, against one",
        description="Train on images in memory in one process and in several, in turn; each process runs one thread on a core "
        "of its own, with equally many images per step. Prints a line and, at the end, a line of JSON.",
    )
    add_int(parser, "--processes", 2, "N", "processes to compare with one")
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="architecture (default: %(default)s)")
    add_int(parser, "--image-size", 64, "PIXELS", "image width in pixels")
    add_int(parser, "--batch-size", 32, "B", "batch size of each process")
    add_int(parser, "--steps", 20, "N", "steps of each measurement")
    add_int(parser, "--rounds", 3, "N", "measurements")


def run_scaling(arguments: argparse.Namespace) -> None:
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


def _add_predict(commands: Commands) -> None:
    parser = add_command(
        commands,
        "predict",
        run_predict,
        "speed of predictions, against the bare forward pass",
        description="Label shards and a folder with the same images, and run the loader and the forward pass alone, in turn in "
        "one process, with a model of random weights. Compares the logits. Prints a line and, at the end, a line of JSON for "
        "each source.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=local_path, metavar="MANIFEST", help="shards with JPEG images (default: simulated galaxies)"
    )
    source.add_argument("--real", type=local_path, metavar="DIR", help="folder with JPEG images: <class>/<name>.jpg")
    parser.add_argument("--recipe", default="resnet18", metavar="NAME", help="recipe of the model (default: %(default)s)")
    add_int(parser, "--images", 4000, "N", "images to label")
    add_int(parser, "--rounds", 5, "N", "measurements of each way")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="width that the model sees (default: 64, on a GPU 224)"
    )
    add_data_dir(parser)


def run_predict(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.prediction_speed import PredictionConditions, measure_prediction

    conditions = PredictionConditions(
        arguments.recipe, arguments.images, arguments.rounds, arguments.image_size, arguments.data, arguments.real
    )
    measure_prediction(bench_root(arguments, "predict"), os.environ, conditions)


def _add_tracking(commands: Commands) -> None:
    parser = add_command(
        commands,
        "tracking",
        run_tracking,
        "steps with and without a tracker",
        description="Train on images in memory with wandb in offline mode, and in turn without it, in one run. Prints the ratio "
        "of the times of a step with its interval and, at the end, a line of JSON.",
    )
    parser.add_argument("--model", default="custom_cnn", metavar="NAME", help="architecture (default: %(default)s)")
    add_int(parser, "--image-size", 64, "PIXELS", "image width in pixels")
    add_int(parser, "--batch-size", 48, "B", "batch size")
    add_int(parser, "--steps", 60, "N", "steps of each measurement")
    add_int(parser, "--rounds", 15, "N", "measurements with, and without")
    add_int(parser, "--log-every", 20, "N", "steps between two rows for the tracker")


def run_tracking(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.tracking_speed import TrackingConditions, measure_tracking

    conditions = TrackingConditions(
        known_model(arguments.model),
        arguments.image_size,
        arguments.batch_size,
        arguments.steps,
        arguments.rounds,
        arguments.log_every,
    )
    measure_tracking(os.environ, conditions)


def _add_startup(commands: Commands) -> None:
    parser = add_command(
        commands,
        "startup",
        run_startup,
        "time to the first step of a new and a continued run",
        description="Start launch.py on a small simulated survey in a new folder and from a checkpoint, in turn, and measure "
        "the time from the start of the process to its first step in metrics.jsonl. Prints a line and, at the end, a line of "
        "JSON.",
    )
    parser.add_argument("--recipe", default="demo", metavar="NAME", help="recipe (default: %(default)s)")
    add_int(parser, "--num-galaxies", 300, "N", "galaxies of the survey")
    add_int(parser, "--step", 3, "K", "step of the checkpoint, approximately")
    add_int(parser, "--rounds", 5, "N", "measurements after the first")
    add_overrides(parser)
    add_data_dir(parser)


def run_startup(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.startup import measure_startup

    measure_startup(
        bench_root(arguments, "startup"),
        os.environ,
        recipe=arguments.recipe,
        num_galaxies=arguments.num_galaxies,
        step=arguments.step,
        rounds=arguments.rounds,
        overrides=arguments.overrides,
    )


def _add_app(commands: Commands) -> None:
    parser = add_command(
        commands,
        "app",
        run_app_bench,
        "start of the app, its first answer and later ones",
        description="Start `galaxydist app` for each run in turn, once before it is published and once after, and ask it about a "
        "picture over HTTP. Without RUN, for small runs on simulated galaxies. Prints a line and, at the end, a line of JSON for "
        "each.",
    )
    parser.add_argument("runs", nargs="*", type=local_path, metavar="RUN", help="run folders; RUN/published is written anew")
    parser.add_argument("--picture", type=local_path, metavar="FILE", help="picture to ask about (default: a simulated galaxy)")
    add_int(parser, "--rounds", 3, "N", "starts of each kind")
    add_int(parser, "--answers", 10, "N", "answers after the first one of each start")
    add_data_dir(parser)


def run_app_bench(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.app_speed import AppConditions, measure_app

    conditions = AppConditions(arguments.runs, arguments.picture, arguments.rounds, arguments.answers)
    measure_app(bench_root(arguments, "app"), os.environ, conditions)


def _add_folds(commands: Commands) -> None:
    parser = add_command(
        commands,
        "folds",
        run_folds,
        "networks on real galaxies, cross-validated",
        description="Cross-validation on a folder of real galaxies: train each model from random weights on each fold, for the "
        "same processor time, or one recipe as it is, and test it on the rest. Prints a table and, at the end, a line of JSON. "
        "The same command again reuses finished fits.",
    )
    parser.add_argument("--real", type=local_path, required=True, metavar="DIR", help="real galaxies: <class>/<image>")
    parser.add_argument("--minutes", type=positive_number, metavar="M", help="processor minutes of a fit (default: 10)")
    add_int(parser, "--folds", 3, "N", "number of folds, at least 2")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--models", metavar="NAME,...", help="architectures (default: d4_cnn,custom_cnn,resnet18)")
    either.add_argument(
        "--recipe", metavar="NAME", help="instead, one recipe as it is, with its own epochs and starting weights; no --minutes"
    )
    add_overrides(parser)
    add_data_dir(parser)


def run_folds(arguments: argparse.Namespace) -> None:
    from galaxydist.bench.real_galaxies import measure_folds, measure_recipe

    if arguments.recipe is not None:
        if arguments.minutes is not None:
            raise UserError(
                f"--minutes {arguments.minutes:g} and --recipe {arguments.recipe}: a recipe has its own length; leave --minutes "
                "out, or set train.epochs=N"
            )
        root, folds = bench_root(arguments, "folds"), {"num_folds": arguments.folds, "overrides": arguments.overrides}
        measure_recipe(arguments.recipe, arguments.real, root, os.environ, **folds)
        return
    measure_folds(
        arguments.real,
        bench_root(arguments, "folds"),
        os.environ,
        minutes=10.0 if arguments.minutes is None else arguments.minutes,
        num_folds=arguments.folds,
        models=arguments.models.split(",") if arguments.models else None,
        overrides=arguments.overrides,
    )


if __name__ == "__main__":
    # A measuring process of ``bench scaling``: the commands may read the environment, the benchmarks may not.
    from galaxydist.bench.scaling import main

    sys.exit(main(sys.argv[1], os.environ))
