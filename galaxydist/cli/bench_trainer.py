"""``galaxydist bench trainer``: what the trainer costs beside a bare loop."""

import argparse
import os

from galaxydist.cli.options import Commands, known_model, positive_int


def add_trainer(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trainer",
        help="how fast the trainer is beside a bare PyTorch loop",
        description="The trainer's loop with the default checks, timers, metrics and tracker (wandb, offline) against a bare "
        "PyTorch loop with the same model, tensors and optimizer; in turn within one process, on pictures in memory. Prints a "
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
