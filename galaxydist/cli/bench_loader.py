"""``galaxydist bench loader``: how fast pictures become batches, against other loaders and against what decoding allows."""

import argparse
import os
from pathlib import Path

from galaxydist.bench.loader_processes import PEERS
from galaxydist.bench.loader_worker import TASKS
from galaxydist.cli.options import Commands, add_data_dir, chosen_root, local_path, positive_int


def add_loader(commands: Commands) -> None:
    """Add the command."""
    peers = [peer.name for peer in PEERS]
    parser = commands.add_parser(
        "loader",
        help="how fast pictures become batches, against other loaders",
        description="Our loader, other loaders and the bare decoder on the same pictures and cores, in turn. Prints tables and, "
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
    parser.add_argument("--images", type=positive_int, metavar="N", help="pictures in an epoch (default: 2,000 a worker)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--peers", nargs="*", choices=peers, metavar="PEER", help=f"of {', '.join(peers)} (default: all)")
    parser.add_argument(
        "--environments",
        type=local_path,
        default=Path(),
        metavar="DIR",
        help="where .venv-bench and .venv-mosaic lie (default: here)",
    )
    parser.add_argument("--quick", action="store_true", help="few pictures, once: to see that it works, not to quote")
    add_data_dir(parser)
    parser.set_defaults(run=run_loader)


def run_loader(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from galaxydist.bench.loader_speed import measure_loader

    measure_loader(
        chosen_root(arguments) / "bench" / "loader",
        os.environ,
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
