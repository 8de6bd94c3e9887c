"""``galaxydist evaluate``: what a run is worth, on galaxies that it has not seen."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.jobs import find_folder
from galaxydist.cli.options import Commands, add_data_dir, local_path, positive_int
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS, Variant

if TYPE_CHECKING:
    from galaxydist.report.collect import ReportData
    from galaxydist.report.finished_runs import ReportNote


# ``galaxydist report``: the results matrix of many runs, as a page and as tables for a paper.

PAGE = Path("report.html")
SUFFIXES = (".html", ".htm")
REPORT_EPILOG = """examples:
  galaxydist report galaxy10                          all runs of the sweep slurm/sweeps/galaxy10.yaml
  galaxydist report runs/galaxy10 -o galaxy10.html    all runs in a folder, down to two levels
  galaxydist report runs/vit-* runs/resnet50-*        some runs
  galaxydist report galaxy10 --gallery                with mistakes, and where the models look

Beside the page lie its tables as Markdown and LaTeX: report.md, report.tex (\\usepackage{booktabs,graphicx}, \\input{report}).
"""


def add_report(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="many runs in one page: the results matrix, with tests",
        description="The results matrix of finished runs beside the published values, the six published claims "
        "tested, curves, classes, calibration, paired tests, ensembles, speed and cost: one HTML page that needs no network, and "
        "its tables as Markdown and LaTeX. Runs are ranked by validation alone.",
        epilog=REPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "targets", nargs="+", metavar="SWEEP|RUN|FOLDER", help="a sweep's file or name, run folders, or folders that hold some"
    )
    parser.add_argument("-o", dest="page", type=local_path, default=PAGE, metavar="FILE", help="the page (default: %(default)s)")
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="first make the galleries of mistakes that are missing, of each model's best run by validation (needs the shards)",
    )
    parser.set_defaults(run=run_report)


def run_report(arguments: argparse.Namespace) -> None:
    """Write the report, and print what it says in short."""
    from galaxydist import __version__
    from galaxydist.report.collect import collect
    from galaxydist.report.page import write_report

    page: Path = arguments.page
    if page.is_dir():
        raise UserError(f"-o {page} is a folder; give the name of a file, like {page / PAGE}")
    if page.suffix not in SUFFIXES:
        raise UserError(f"-o {page} is the HTML page; name it like {page.with_suffix('.html')} (.md and .tex lie beside it)")
    run_dirs, notes = find_runs(arguments.targets)
    out = ["-o", str(page)] if page != PAGE else []
    command = shlex.join(["galaxydist", "report", *arguments.targets, *(["--gallery"] if arguments.gallery else []), *out])
    results = collect(run_dirs, notes)
    if arguments.gallery:
        results = dataclasses.replace(results, notes=(*results.notes, *_make_galleries(results)))
    paths = write_report(results, page, provenance={"command": command, "version": __version__})
    _print(results)
    print(f"page: {paths[-1]}; tables: {', '.join(map(str, paths[:-1]))}")


def find_runs(targets: list[str]) -> tuple[list[Path], list["ReportNote"]]:
    """The run folders that the targets name, and a note for each run of a sweep that was never started.

    Raises:
        UserError: a target is neither a sweep nor a folder with runs.
    """
    from galaxydist.cluster import status
    from galaxydist.report.finished_runs import ReportNote

    run_dirs: list[Path] = []
    notes: list[ReportNote] = []
    for text in targets:
        path = next((path for path in (Path(text), Path("runs") / text) if path.is_dir()), None)
        if path is None:
            for run_dir in _sweep_runs(text):
                if status.is_run(run_dir):
                    run_dirs.append(run_dir)
                else:
                    notes.append(ReportNote(run_dir, f"not started. Start it: galaxydist sweep {text}"))
        elif inside := status.find_runs(path):
            run_dirs += inside
        else:
            raise UserError(f"{path} holds no run, down to two levels. Give a run folder, a folder of some, or a sweep.")
    return run_dirs, notes


def _make_galleries(results: "ReportData") -> Iterator[str]:
    """Make what is missing; yields a note for each that cannot be made."""
    from galaxydist.cpus import available_cores
    from galaxydist.gallery.gallery import make_gallery
    from galaxydist.report.page import without_gallery

    for facts in (facts for found in results.datasets for facts in without_gallery(found)):
        run_dir = facts.run.run_dir
        try:
            page, _ = make_gallery(run_dir, "test", os.environ, threads=available_cores())
            print(f"gallery: {page}")
        except (UserError, OSError, RuntimeError) as error:  # one run's trouble is no reason to report none
            yield f"{run_dir}: no gallery: {error}"


def _sweep_runs(text: str) -> list[Path]:
    """The run folders of a sweep, in its order."""
    from galaxydist.cluster.sweep import find_sweep, list_sweeps, read_sweep, resolve

    if not Path(text).is_file() and text not in list_sweeps():
        nor = "" if Path(text).is_absolute() else f" (nor {Path('runs') / text})"
        raise UserError(
            f"{text}: there is no such folder{nor}, and no such sweep. Give a run folder, a folder that holds some, "
            f"or a sweep: {', '.join(list_sweeps()) or 'none found'}."
        )
    return [trial.run_dir for trial in resolve(read_sweep(find_sweep(text)))]


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


# What ``evaluate`` and ``gallery`` are told: a run, and the data to judge it on where that is not its own.

HELP = (
    "a run folder, or its name under ./runs [data.manifest=FILE | data.variant=NAME], "
    "or the recipe=NAME [key=value] that trained it"
)
_KEYS = ("data.manifest", "data.variant")


@dataclass(frozen=True)
class RunTarget:
    """A run and its data.

    Args:
        run_dir: the run folder, which is there.
        manifest: path or URL of other data; None for the run's own, or ``variant``.
        variant: another data set of the run's survey.
    """

    run_dir: Path
    manifest: str | None = None
    variant: Variant | None = None


def read_target(words: list[str], manifest: str | None) -> RunTarget:
    """The target of a command line.

    Args:
        words: those of ``HELP``.
        manifest: the option ``--manifest``.

    Raises:
        UserError: no run, several, or keys that name no data or name it twice.
    """
    if any(word.startswith("recipe=") for word in words):
        return RunTarget(_trained_by(words), manifest)
    folders = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(folders) != 1:
        raise UserError(f"one run at a time, not {len(folders)}: {' '.join(words)}")
    keys = dict(word.split("=", 1) for word in words if word not in folders)
    if unknown := [key for key in keys if key not in _KEYS]:
        raise UserError(
            f"{unknown[0]} cannot be changed for an evaluation; with a run folder there are {', '.join(_KEYS)} (with recipe=NAME "
            "all keys: they name the run that was trained so)"
        )
    given = [*keys, *(["--manifest"] if manifest is not None else [])]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both say which data: keep one")
    named = keys.get("data.variant")
    variant = next((known for known in VARIANTS if known == named), None)
    if named is not None and variant is None:
        raise UserError(f"data.variant={named}: there are {' and '.join(VARIANTS)}")
    return RunTarget(find_folder(folders[0]), keys.get("data.manifest", manifest), variant)


def _trained_by(words: list[str]) -> Path:
    from galaxydist.recipe.identity import run_path
    from galaxydist.recipe.resolve import load_recipe

    path = run_path(load_recipe(words).recipe)
    if not path.is_dir():
        raise UserError(f"there is no run at {path}; train it first: accelerate launch launch.py {' '.join(words)}")
    return path


EVALUATE_EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             on the test split of its own data set
  galaxydist evaluate runs/vit-0123abcd data.variant=balanced       on another data set of the survey
  galaxydist evaluate runs/vit-0123abcd data.manifest=FILE --tta d4
  galaxydist evaluate --predictions runs/vit-0123abcd/evaluation/test-predictions.parquet
"""


def add_evaluate(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a run on a split",
        description="Count every galaxy of a split once; write predictions, JSON and figures into the run folder and print the "
        "table. The temperature is fitted on the validation split, which is evaluated too.",
        epilog=EVALUATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        nargs="*",
        metavar="RUN",
        help=HELP,
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
    parser.set_defaults(run=run_evaluate)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a run, or stored predictions, and print the table."""
    if arguments.predictions is not None:
        _judge_predictions(arguments)
        return
    if given := [option for option in ("validation", "out") if getattr(arguments, option) is not None]:
        raise UserError(f"--{given[0]} goes with --predictions FILE: a run's evaluation lies in its folder")
    if not arguments.target:
        raise UserError("give a run folder, the recipe=NAME that trained it, or --predictions FILE")
    target = read_target(arguments.target, arguments.manifest)

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


# ``galaxydist gallery``: a run's most confident mistakes and least certain galaxies, and where its model looks.

GALLERY_EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             first: its predictions
  galaxydist gallery runs/vit-0123abcd                              then: evaluation/test-gallery.html in the run folder
  galaxydist gallery recipe=vit seed=1                              a run by its recipe
  galaxydist gallery runs/vit-0123abcd data.variant=balanced        of the evaluation on another data set
"""
# Of each class and kind: more make a page that nobody reads to its end.
MOST = 50


def add_gallery(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "gallery",
        help="a run's mistakes and uncertain galaxies, with what its model looked at",
        description="Show of each class the most confident mistakes and the least certain galaxies of an evaluation, with "
        "saliency over them: Grad-CAM of convolutional networks, attention rollout of vision transformers. Writes one page, two "
        "sheets and a JSON file beside the predictions.",
        epilog=GALLERY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", nargs="+", metavar="RUN", help=HELP)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--tta", choices=("none", "d4"), help="which evaluation (default: the recipe's)")
    parser.add_argument(
        "--per-class", type=positive_int, default=4, metavar="N", help=f"galaxies of a class and kind, up to {MOST} (default: 4)"
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest that it was evaluated on")
    parser.add_argument("-o", "--out", type=local_path, metavar="FILE", help="the page (default: beside the predictions)")
    add_data_dir(parser)
    parser.set_defaults(run=run_gallery)


def run_gallery(arguments: argparse.Namespace) -> None:
    """Write the gallery and say where it is."""
    if arguments.per_class > MOST:
        raise UserError(f"--per-class {arguments.per_class}: a gallery has {MOST} galaxies of a class at most")
    if arguments.out is not None and arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder: give the page a name, like {arguments.out / 'gallery.html'}")
    target = read_target(arguments.target, arguments.manifest)

    from galaxydist.cpus import available_cores
    from galaxydist.gallery.gallery import make_gallery

    page, picks = make_gallery(
        target.run_dir,
        arguments.split,
        os.environ,
        per_class=arguments.per_class,
        page=arguments.out,
        manifest_path=target.manifest,
        variant=target.variant,
        data_dir=arguments.data_dir,
        tta=arguments.tta,
        threads=available_cores(),
    )
    shown = sum(map(len, picks.confident)), sum(map(len, picks.uncertain))
    print(
        f"{shown[0]} of {sum(picks.num_mistakes):,} mistakes and the {shown[1]} least certain of {sum(picks.num_galaxies):,} "
        f"galaxies: {page}"
    )
    if picks.num_undefined:
        print(f"left out: {picks.num_undefined:,} galaxies without finite probabilities")
