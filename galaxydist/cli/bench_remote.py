"""``galaxydist bench remote``: an epoch from a slow server that fails."""

import argparse
import os

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, local_path, non_negative_int, positive_int


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
    from galaxydist.bench.remote import Conditions, measure_remote

    conditions = Conditions(
        arguments.delay_ms / 1000,
        arguments.fail_every,
        arguments.step_ms / 1000,
        arguments.batch_size,
        arguments.streams,
    )
    root = chosen_root(arguments) / "bench" / "remote"
    measure_remote(root, os.environ, conditions, data=arguments.data, num_images=arguments.images)
