"""``galaxydist evaluate``: what a run is worth, on galaxies that it has not seen."""

import argparse
import os
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir
from galaxydist.errors import UserError


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a run on a split",
        description="Count every galaxy of a split once; write JSON and figures into the run folder and print the table.",
        allow_abbrev=False,
    )
    parser.add_argument("target", nargs="+", metavar="RUN", help="a run folder, or the recipe=NAME [key=value] that trained it")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument(
        "--tta",
        choices=("none", "d4"),
        help="d4: mean probability over the eight flips and quarter turns (default: the recipe's)",
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest to judge it on (default: the run's own)")
    parser.add_argument(
        "--trained-on", metavar="FILE", help="path or URL of the manifest that the run was trained on, where that has moved"
    )
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a run and print its table."""
    run_dir = _run_dir(arguments.target)

    from galaxydist.training.evaluate import evaluate_run

    places = {"manifest_path": arguments.manifest, "trained_path": arguments.trained_on, "data_dir": arguments.data_dir}
    evaluate_run(run_dir, arguments.split, os.environ, **places, tta=arguments.tta)


def _run_dir(target: list[str]) -> Path:
    if not any(word.startswith("recipe=") for word in target):
        if len(target) > 1:
            raise UserError(f"one run at a time, not {len(target)}: {' '.join(target)}")
        run_dir = Path(target[0])
        if not run_dir.is_dir():
            raise UserError(f"there is no run folder {run_dir}; give one that launch.py made, or the recipe=NAME that it trained")
        return run_dir

    from galaxydist.recipe.identity import run_name
    from galaxydist.recipe.load import load_recipe

    recipe = load_recipe(target).recipe
    path = recipe.run.dir or recipe.run.root / run_name(recipe)
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; train it first: accelerate launch launch.py {' '.join(target)}")
    return path
