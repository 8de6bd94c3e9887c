"""``galaxydist report``: the results matrix of many runs, as a page and as tables for a paper."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands, local_path
from galaxydist.errors import UserError

if TYPE_CHECKING:
    from galaxydist.report.collect import Results
    from galaxydist.report.finished_runs import Note

PAGE = Path("report.html")
SUFFIXES = (".html", ".htm")
EPILOG = """examples:
  galaxydist report galaxy10                          all runs of the sweep slurm/sweeps/galaxy10.yaml
  galaxydist report runs/galaxy10 -o galaxy10.html    all runs in a folder, down to two levels
  galaxydist report runs/vit-* runs/resnet50-*        some runs
  galaxydist report galaxy10 --gallery                with mistakes, and where the models look

Beside the page lie its tables as Markdown and LaTeX: report.md, report.tex (\\usepackage{booktabs,graphicx}, \\input{report}).
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="many runs in one page: the results matrix, with tests",
        description="The results matrix of finished runs beside the published values, the six published observations put to the "
        "test, curves, classes, calibration, paired tests, ensembles, speed and cost: one HTML page that needs no network, and "
        "its tables as Markdown and LaTeX. Runs are ranked by validation alone.",
        epilog=EPILOG,
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report, and print what it says in short."""
    from galaxydist import __version__
    from galaxydist.report.collect import gather
    from galaxydist.report.page import write_report

    page: Path = arguments.page
    if page.is_dir():
        raise UserError(f"-o {page} is a folder; give the name of a file, like {page / PAGE}")
    if page.suffix not in SUFFIXES:
        raise UserError(f"-o {page} is the HTML page; name it like {page.with_suffix('.html')} (.md and .tex lie beside it)")
    run_dirs, notes = find_runs(arguments.targets)
    out = ["-o", str(page)] if page != PAGE else []
    command = shlex.join(["galaxydist", "report", *arguments.targets, *(["--gallery"] if arguments.gallery else []), *out])
    results = gather(run_dirs, notes)
    if arguments.gallery:
        results = dataclasses.replace(results, notes=(*results.notes, *_make_galleries(results)))
    paths = write_report(results, page, provenance={"command": command, "version": __version__})
    _print(results)
    print(f"page: {paths[-1]}; tables: {', '.join(map(str, paths[:-1]))}")


def find_runs(targets: list[str]) -> tuple[list[Path], list["Note"]]:
    """The run folders that the targets name, and a note for each run of a sweep that was never started.

    Raises:
        UserError: a target is neither a sweep nor a folder with runs.
    """
    from galaxydist.cluster import status
    from galaxydist.report.finished_runs import Note

    run_dirs: list[Path] = []
    notes: list[Note] = []
    for text in targets:
        path = next((path for path in (Path(text), Path("runs") / text) if path.is_dir()), None)
        if path is None:
            for run_dir in _sweep_runs(text):
                if status.is_run(run_dir):
                    run_dirs.append(run_dir)
                else:
                    notes.append(Note(run_dir, f"not started. Start it: galaxydist sweep {text}"))
        elif inside := status.find_runs(path):
            run_dirs += inside
        else:
            raise UserError(f"{path} holds no run, down to two levels. Give a run folder, a folder of some, or a sweep.")
    return run_dirs, notes


def _make_galleries(results: "Results") -> Iterator[str]:
    """Make what is missing; yields a note for each that cannot be made."""
    from galaxydist.cpus import available_cores
    from galaxydist.gallery.gallery import make_gallery
    from galaxydist.report.page import without_gallery

    for facts in (facts for found in results.findings for facts in without_gallery(found)):
        run_dir = facts.trial.run_dir
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


def _print(results: "Results") -> None:
    from galaxydist.report.tables import about

    print(about(results))
    for found in results.findings:
        for regime, observations in found.observations.items():
            print(f"{found.table.dataset}, {regime} recipes:")
            for one in observations:
                print(f"  {one.number}. {one.statement} {one.verdict}")
    for note in results.notes:
        print(f"note: {note}")
