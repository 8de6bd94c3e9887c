"""``galaxydist bench saving``: what checkpoints cost a training."""

import argparse

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, known_model, local_path, positive_int


def add_saving(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "saving",
        help="how long a training waits for its checkpoints",
        description="Train on random pictures without saving, saving in the background and saving synchronously, taking turns. "
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
    from galaxydist.bench.checkpointing import Conditions, measure_saving

    conditions = Conditions(
        known_model(arguments.model), arguments.image_size, arguments.batch_size, float(arguments.every), arguments.saves
    )
    root = arguments.folder or chosen_root(arguments) / "bench"
    measure_saving(root / "saving", conditions)
