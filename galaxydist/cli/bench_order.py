"""``galaxydist bench order``: the order of reading, measured."""

import argparse

from galaxydist.cli.options import Commands


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
