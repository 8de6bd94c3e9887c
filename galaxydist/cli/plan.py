"""``galaxydist plan``: what a run would cost; nothing is started and no GPU is needed."""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir, positive_int

EPILOG = """examples:
  galaxydist plan recipe=vit --nodes 16 --gpus-per-node 8
  galaxydist plan recipe=vit model.size=base train.batch_size=1024 --nodes 4 --gpus-per-node 8 --gpu-memory 80 --img-s 1800
  galaxydist plan recipe=resnet50 --galaxies 8700000 --shards 8700 --nodes 16 --gpus-per-node 8

key=value words stand together, before the options or after them.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="what a run would cost",
        description="Steps, time, memory, shards and bytes, disk of a run. Nothing is started, no GPU is needed. "
        "Refuses what could not run and says what would.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="the recipe")
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=positive_int, default=1, metavar="G", help="GPUs of each (default: %(default)s)")
    parser.add_argument("--img-s", type=positive_number, metavar="X", help="images a second that one GPU trains on, for the time")
    parser.add_argument("--gpu-memory", type=positive_number, metavar="GB", help="of one GPU, in 10^9 bytes")
    parser.add_argument(
        "--galaxies", type=positive_int, metavar="N", help="training galaxies, instead of the shards on this machine"
    )
    parser.add_argument("--shards", type=positive_int, metavar="M", help="with --galaxies: how many shards hold them")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Work it out and print it."""
    from galaxydist.paths import data_root
    from galaxydist.recipe.resolve import load_recipe

    recipe = load_recipe(arguments.recipe).recipe
    root: Path = data_root(arguments.data_dir or recipe.data.dir, os.environ)

    from galaxydist.planner.estimate import Job, plan_run
    from galaxydist.planner.table import render_plan

    job = Job(arguments.nodes, arguments.gpus_per_node, arguments.img_s, arguments.gpu_memory)
    plan = plan_run(recipe, root, job, galaxies=arguments.galaxies, shards=arguments.shards)
    print(json.dumps(dataclasses.asdict(plan)) if arguments.json else render_plan(plan))
