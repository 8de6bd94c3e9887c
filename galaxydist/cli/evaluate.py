"""``galaxydist evaluate``: what a run is worth, on galaxies that it has not seen."""

import argparse
import os
from pathlib import Path
from typing import Any

from galaxydist.cli.options import Commands, add_data_dir
from galaxydist.errors import UserError

KEYS = ("data.manifest", "data.variant")
EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             on the test split of its own data set
  galaxydist evaluate runs/vit-0123abcd data.variant=balanced       on another data set of the survey
  galaxydist evaluate runs/vit-0123abcd data.manifest=FILE --tta d4
  galaxydist evaluate --predictions runs/vit-0123abcd/evaluation/test-predictions.parquet
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a run on a split",
        description="Count every galaxy of a split once; write predictions, JSON and figures into the run folder and print the "
        "table. The temperature is fitted on the validation split, which is evaluated too.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        nargs="*",
        metavar="RUN",
        help="a run folder [data.manifest=FILE | data.variant=NAME], or the recipe=NAME [key=value] that trained it",
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test")
    parser.add_argument(
        "--tta",
        choices=("none", "d4"),
        help="d4: mean probability over the eight flips and quarter turns (default: the recipe's)",
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest to judge it on, as data.manifest=FILE")
    parser.add_argument(
        "--trained-on", metavar="FILE", help="path or URL of the manifest that the run was trained on, where that has moved"
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="judge stored predictions, without a run: a *-predictions.parquet"
    )
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="FILE",
        help="with --predictions: those of the validation split, for the temperature (default: the ones beside it)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --predictions: where to write (default: beside it)")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a run, or stored predictions, and print the table."""
    if arguments.predictions is not None:
        _judge_predictions(arguments)
        return
    if given := [option for option in ("validation", "out") if getattr(arguments, option) is not None]:
        raise UserError(f"--{given[0]} goes with --predictions FILE: a run's evaluation lies in its folder")
    if not arguments.target:
        raise UserError("give a run folder, the recipe=NAME that trained it, or --predictions FILE")
    run_dir, keys = _split_target(arguments.target, arguments.manifest)

    from galaxydist.training.evaluate import evaluate_run

    evaluate_run(
        run_dir,
        arguments.split or "test",
        os.environ,
        manifest_path=keys.get("data.manifest"),
        variant=keys.get("data.variant"),
        trained_path=arguments.trained_on,
        data_dir=arguments.data_dir,
        tta=arguments.tta,
    )


def _judge_predictions(arguments: argparse.Namespace) -> None:
    for option in ("target", "split", "tta", "manifest", "trained_on", "data_dir"):
        if getattr(arguments, option):
            name = "RUN" if option == "target" else f"--{option.replace('_', '-')}"
            raise UserError(f"--predictions FILE needs no {name}: what was judged stands in the file")

    from galaxydist.evaluation.report import judge_predictions, render_evaluation

    out_dir = arguments.out or arguments.predictions.parent
    print(render_evaluation(judge_predictions(arguments.predictions, arguments.validation, out_dir), out_dir))


def _split_target(target: list[str], manifest: str | None) -> tuple[Path, dict[str, Any]]:
    """The run folder, and what its data is to be replaced by."""
    if any(word.startswith("recipe=") for word in target):
        return _run_dir(target), {} if manifest is None else {"data.manifest": manifest}
    folders = [word for word in target if "=" not in word or Path(word).is_dir()]
    if len(folders) != 1:
        raise UserError(f"one run at a time, not {len(folders)}: {' '.join(target)}")
    keys = dict(word.split("=", 1) for word in target if word not in folders)
    if unknown := [key for key in keys if key not in KEYS]:
        raise UserError(
            f"{unknown[0]} cannot be changed for an evaluation; with a run folder there are {', '.join(KEYS)} (with recipe=NAME "
            "all keys: they name the run that was trained so)"
        )
    given = [*keys, *(["--manifest"] if manifest is not None else [])]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both say which data: keep one")
    if keys.get("data.variant", "original") not in ("original", "balanced"):
        raise UserError(f"data.variant={keys['data.variant']}: there are original and balanced")
    return _run_dir(folders), keys if manifest is None else {"data.manifest": manifest}


def _run_dir(target: list[str]) -> Path:
    if not any(word.startswith("recipe=") for word in target):
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
