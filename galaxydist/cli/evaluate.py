"""``galaxydist evaluate``, ``gallery`` and ``report``: results of one run, its mistakes, and the comparison of many runs."""

import argparse
import dataclasses
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.jobs import find_folder
from galaxydist.cli.options import Commands, add_command, add_data_dir, add_trust_code, evaluated_split, local_path, positive_int
from galaxydist.errors import UserError
from galaxydist.galaxy import MARGIN, SPLITS, VARIANTS, Variant, check_not_margin
from galaxydist.rank_store import Leave
from galaxydist.training.launch import launch
from galaxydist.version import __version__

if TYPE_CHECKING:
    from galaxydist.report.collect import ReportData


PAGE = Path("report.html")
SUFFIXES = (".html", ".htm")
REPORT_EPILOG = """examples:
  galaxydist report galaxy10                          all runs of the sweep slurm/sweeps/galaxy10.yaml
  galaxydist report runs/galaxy10 -o galaxy10.html    all runs in a folder and its subfolders, down to two levels
  galaxydist report runs/vit-* runs/resnet50-*        some runs
  galaxydist report galaxy10 --gallery                with galleries of mistakes and saliency maps

The tables are also written as Markdown and LaTeX beside the page: report.md, report.tex (\\usepackage{booktabs,graphicx},
\\input{report}).
"""


def add_report(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        run_report,
        "compare many runs on one page",
        description="The results matrix of finished runs beside the published values, tests of the six published claims, "
        "curves, classes, calibration, paired tests, ensembles, speed and cost: one HTML page that works without a network, and "
        "its tables as Markdown and LaTeX. Runs are ranked by validation alone.",
        epilog=REPORT_EPILOG,
    )
    parser.add_argument(
        "targets", nargs="+", metavar="SWEEP|RUN|FOLDER", help="sweeps (file or name), run folders, or folders of runs"
    )
    parser.add_argument(
        "-o", dest="page", type=local_path, default=PAGE, metavar="FILE", help="page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="make the missing galleries of mistakes for the best run of each model by validation (needs the shards)",
    )
    add_trust_code(parser)


def run_report(arguments: argparse.Namespace) -> None:
    """Write the report, and print a summary."""
    from galaxydist.report.collect import collect
    from galaxydist.report.page import write_report

    page: Path = arguments.page
    if page.is_dir():
        raise UserError(f"-o {page} is a folder; give the name of a file, like {page / PAGE}")
    if page.suffix not in SUFFIXES:
        raise UserError(
            f"-o {page} is the HTML page; name it like {page.with_suffix('.html')} (.md and .tex are written beside it)"
        )
    run_dirs, notes = find_runs(arguments.targets)
    results = collect(run_dirs, notes)
    if arguments.gallery:
        results = dataclasses.replace(results, notes=(*results.notes, *_make_galleries(results)))
    paths = write_report(results, page, provenance={"command": arguments.command, "version": __version__})
    _print(results)
    print(f"page: {paths[-1]}; tables: {', '.join(map(str, paths[:-1]))}")


def find_runs(targets: list[str]) -> tuple[list[Path], list[str]]:
    """Return the run folders of the targets, and a note for each run of a sweep that was never started.

    Raises:
        UserError: a target is neither a sweep nor a folder with runs.
    """
    from galaxydist.runs.listing import find_runs as find_inside
    from galaxydist.runs.listing import is_run

    run_dirs: list[Path] = []
    notes: list[str] = []
    for text in targets:
        path = next((path for path in (Path(text), Path("runs") / text) if path.is_dir()), None)
        if path is None:
            for run_dir in _sweep_runs(text):
                if is_run(run_dir):
                    run_dirs.append(run_dir)
                else:
                    notes.append(f"{run_dir}: not started. Start it: galaxydist sweep {text}")
        elif inside := find_inside(path):
            run_dirs += inside
        else:
            raise UserError(f"{path} contains no run, down to two levels. Give a run folder, a folder of runs, or a sweep.")
    return run_dirs, notes


def _make_galleries(results: "ReportData") -> Iterator[str]:
    """Make the missing galleries, and yield a note for each that cannot be made."""
    from galaxydist.gallery.gallery import make_gallery
    from galaxydist.report.page import without_gallery

    for facts in (facts for found in results.datasets for facts in without_gallery(found)):
        run_dir = facts.run.run_dir
        try:
            page, _ = make_gallery(run_dir, "test", os.environ)
            print(f"gallery: {page}")
        except (UserError, OSError, RuntimeError) as error:  # the report does not need the gallery
            yield f"{run_dir}: no gallery: {error}"


def _sweep_runs(text: str) -> list[Path]:
    """Return the run folders of a sweep, in its order."""
    from galaxydist.cluster.sweep import find_sweep, list_sweeps, read_sweep, resolve

    if not Path(text).is_file() and text not in list_sweeps():
        nor = "" if Path(text).is_absolute() else f" (nor {Path('runs') / text})"
        raise UserError(
            f"{text}: there is no such folder{nor}, and no such sweep. Give a run folder, a folder of runs, "
            f"or a sweep: {', '.join(list_sweeps()) or 'none found'}."
        )
    return [run.run_dir for run in resolve(read_sweep(find_sweep(text)))]


def _print(results: "ReportData") -> None:
    from galaxydist.report.tables import about

    print(about(results))
    for found in results.datasets:
        for regime, claims in found.claims.items():
            print(f"{found.table.dataset}, {regime} recipes:")
            for one in claims:
                print(f"  {one.number}. {one.statement} {one.verdict}")
    for note in results.notes:
        print(f"note: {note}")


TARGET_HELP = (
    "run folder, or its name in ./runs, optionally with data.manifest=FILE or data.variant=NAME; "
    "or the recipe=NAME [key=value] that trained it"
)
_KEYS = ("data.manifest", "data.variant")


def read_target(words: list[str], manifest: str | None) -> tuple[Path, str | None, Variant | None]:
    """Return the run folder of a command line, and the manifest and variant to evaluate it on (None: the run's own).

    Args:
        words: run folder and keys, or recipe and keys (``TARGET_HELP``).
        manifest: the option ``--manifest``, a path or URL.

    Raises:
        UserError: no run or several runs, an unknown key, or two keys for the data.
    """
    if any(word.startswith("recipe=") for word in words):
        return _trained_by(words), manifest, None
    folders = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(folders) == 2 and folders[1] in (*SPLITS, MARGIN):
        check_not_margin(folders[1])
        raise UserError(f"{folders[1]} is a split: give it as --split {folders[1]}")
    if len(folders) != 1:
        raise UserError(f"one run at a time, not {len(folders)}: {' '.join(words)}")
    keys = dict(word.split("=", 1) for word in words if word not in folders)
    if unknown := [key for key in keys if key not in _KEYS]:
        raise UserError(
            f"{unknown[0]} cannot be changed for an evaluation; with a run folder there are {', '.join(_KEYS)} (with "
            "recipe=NAME all keys of the recipe that trained the run)"
        )
    given = [*keys, *(["--manifest"] if manifest is not None else [])]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both name the data: keep one")
    named = keys.get("data.variant")
    variant = next((known for known in VARIANTS if known == named), None)
    if named is not None and variant is None:
        raise UserError(f"data.variant={named}: there are {' and '.join(VARIANTS)}")
    return find_folder(folders[0]), keys.get("data.manifest", manifest), variant


def _trained_by(words: list[str]) -> Path:
    from galaxydist.recipe.identity import run_path
    from galaxydist.recipe.resolve import load_recipe

    path = run_path(load_recipe(words).recipe)
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; train it first: accelerate launch launch.py {' '.join(words)}")
    return path


EVALUATE_EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             on the test split of its own data set
  galaxydist evaluate runs/vit-0123abcd data.variant=balanced       on another variant of the survey
  galaxydist evaluate runs/vit-0123abcd data.manifest=FILE --tta d4
  galaxydist evaluate --predictions runs/vit-0123abcd/evaluation/test-predictions.parquet
"""


def add_evaluate(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "evaluate a run on a split",
        description="Count each galaxy of a split once, write predictions, JSON and figures into the run folder, and print the "
        "table. The temperature is fitted on the validation split, which is evaluated as well.",
        epilog=EVALUATE_EPILOG,
    )
    parser.add_argument("target", nargs="*", metavar="RUN", help=TARGET_HELP)
    parser.add_argument("--split", type=evaluated_split, metavar="SPLIT", help="split: train, val or test (default: test)")
    parser.add_argument(
        "--tta",
        choices=("none", "d4"),
        help="test-time augmentation; d4: mean probability over the eight flips and quarter turns (default: the recipe's)",
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest of other data, as data.manifest=FILE")
    parser.add_argument(
        "--trained-on", metavar="FILE", help="path or URL of the manifest of the training data, if it has moved since"
    )
    parser.add_argument(
        "--predictions",
        type=local_path,
        metavar="FILE",
        help="evaluate stored predictions without a run: a *-predictions.parquet",
    )
    parser.add_argument(
        "--validation",
        type=local_path,
        metavar="FILE",
        help="with --predictions: predictions on the validation split, for the temperature (default: those in the same folder)",
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="with --predictions: folder to write (default: that of the predictions)"
    )
    add_trust_code(parser)
    add_data_dir(parser)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Evaluate a run, or stored predictions, print the table and return the exit code."""
    if arguments.predictions is not None:
        _evaluate_predictions(arguments)
        return 0
    if given := [option for option in ("validation", "out") if getattr(arguments, option) is not None]:
        raise UserError(f"--{given[0]} goes with --predictions FILE: the evaluation of a run is in its folder")
    if not arguments.target:
        raise UserError("give a run folder, the recipe=NAME that trained it, or --predictions FILE")
    return launch(arguments, os.environ, work=evaluate_rank)


def evaluate_rank(arguments: argparse.Namespace, environ: MutableMapping[str, str], _leave: Leave) -> int:
    """Evaluate a run in this process, one of those that the launcher has started."""
    from galaxydist.evaluation.evaluator import EvaluationData, evaluate_run

    run_dir, manifest, variant = read_target(arguments.target, arguments.manifest)
    data = EvaluationData(manifest, variant, arguments.trained_on, arguments.data_dir)
    evaluate_run(run_dir, arguments.split or "test", environ, data, tta=arguments.tta)
    return 0


def _evaluate_predictions(arguments: argparse.Namespace) -> None:
    for option in ("target", "split", "tta", "manifest", "trained_on", "trust_code", "data_dir"):
        if getattr(arguments, option):
            name = "RUN" if option == "target" else f"--{option.replace('_', '-')}"
            raise UserError(f"--predictions FILE needs no {name}: the file contains it")

    from galaxydist.evaluation.results_files import evaluate_predictions, render_evaluation

    out_dir = arguments.out or arguments.predictions.parent
    print(render_evaluation(evaluate_predictions(arguments.predictions, arguments.validation, out_dir), out_dir))


GALLERY_EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             first: its predictions
  galaxydist gallery runs/vit-0123abcd                              then: evaluation/test-gallery.html in the run folder
  galaxydist gallery recipe=vit seed=1                              a run by its recipe
  galaxydist gallery runs/vit-0123abcd data.variant=balanced        of the evaluation on another variant
"""
MOST = 50  # galaxies of each class and kind; a page with more is too long to read


def add_gallery(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "gallery",
        run_gallery,
        "show mistakes and uncertain galaxies of a run, with saliency maps",
        description="Show the most confident mistakes and the least certain galaxies of each class in an evaluation, with "
        "saliency maps: Grad-CAM for convolutional networks, attention rollout for vision transformers. Writes one page, two "
        "contact sheets and a JSON file beside the predictions.",
        epilog=GALLERY_EPILOG,
    )
    parser.add_argument("target", nargs="+", metavar="RUN", help=TARGET_HELP)
    parser.add_argument(
        "--split", type=evaluated_split, metavar="SPLIT", default="test", help="split: train, val or test (default: %(default)s)"
    )
    parser.add_argument("--tta", choices=("none", "d4"), help="test-time augmentation of the evaluation (default: the recipe's)")
    parser.add_argument(
        "--per-class",
        type=positive_int,
        default=4,
        metavar="N",
        help=f"galaxies of each class and kind, at most {MOST} (default: %(default)s)",
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest that the run was evaluated on")
    parser.add_argument("-o", "--out", type=local_path, metavar="FILE", help="page to write (default: beside the predictions)")
    add_trust_code(parser)
    add_data_dir(parser)


def run_gallery(arguments: argparse.Namespace) -> None:
    """Write the gallery, and print its path."""
    if arguments.per_class > MOST:
        raise UserError(f"--per-class {arguments.per_class}: a gallery has at most {MOST} galaxies of each class")
    if arguments.out is not None and arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder: give the page a name, like {arguments.out / 'gallery.html'}")
    run_dir, manifest, variant = read_target(arguments.target, arguments.manifest)

    from galaxydist.evaluation.evaluator import EvaluationData
    from galaxydist.gallery.gallery import make_gallery

    data = EvaluationData(manifest, variant, data_dir=arguments.data_dir)
    page, picks = make_gallery(
        run_dir,
        arguments.split,
        os.environ,
        data,
        per_class=arguments.per_class,
        page=arguments.out,
        tta=arguments.tta,
    )
    shown = sum(map(len, picks.confident)), sum(map(len, picks.uncertain))
    print(
        f"{shown[0]} of {sum(picks.num_mistakes):,} mistakes and the {shown[1]} least certain of {sum(picks.num_galaxies):,} "
        f"galaxies: {page}"
    )
    if picks.num_undefined:
        print(f"left out: {picks.num_undefined:,} galaxies without finite probabilities")
