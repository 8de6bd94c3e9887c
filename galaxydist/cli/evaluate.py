"""``galaxydist evaluate``: what a run is worth, on galaxies that it has not seen."""

import argparse
import os

from galaxydist.cli import run_target
from galaxydist.cli.options import Commands, add_data_dir, local_path
from galaxydist.errors import UserError

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
        help=run_target.HELP,
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
        "--predictions", type=local_path, metavar="FILE", help="judge stored predictions, without a run: a *-predictions.parquet"
    )
    parser.add_argument(
        "--validation",
        type=local_path,
        metavar="FILE",
        help="with --predictions: those of the validation split, for the temperature (default: the ones beside it)",
    )
    parser.add_argument("--out", type=local_path, metavar="DIR", help="with --predictions: where to write (default: beside it)")
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
    target = run_target.read_target(arguments.target, arguments.manifest)

    from galaxydist.evaluation.evaluator import evaluate_run

    evaluate_run(
        target.run_dir,
        arguments.split or "test",
        os.environ,
        manifest_path=target.manifest,
        variant=target.variant,
        trained_path=arguments.trained_on,
        data_dir=arguments.data_dir,
        tta=arguments.tta,
    )


def _judge_predictions(arguments: argparse.Namespace) -> None:
    for option in ("target", "split", "tta", "manifest", "trained_on", "data_dir"):
        if getattr(arguments, option):
            name = "RUN" if option == "target" else f"--{option.replace('_', '-')}"
            raise UserError(f"--predictions FILE needs no {name}: what was judged stands in the file")

    from galaxydist.evaluation.results_files import judge_predictions, render_evaluation

    out_dir = arguments.out or arguments.predictions.parent
    print(render_evaluation(judge_predictions(arguments.predictions, arguments.validation, out_dir), out_dir))
