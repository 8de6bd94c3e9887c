"""``galaxydist status``, ``logs`` and ``cancel``: what runs do, what they print, and how to end them."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands, non_negative_int, positive_int
from galaxydist.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.status import Overview

RUNS = Path("runs")
WATCH_S = 10
# Of a file, or a pipe.
_WIDE = 200

STATUS_EPILOG = """examples:
  galaxydist status                    all runs under ./runs, down to two levels
  galaxydist status runs/vit-0123abcd  one run, by its folder
  galaxydist status vit-0123abcd       the same, by its name
  galaxydist status runs/sweep --watch a sweep, looked at every 10 s

States are SLURM's words; FINISHED, STOPPED, FAILED, NEW: what the run folder tells where no job waits or runs.
"time left" is until the job's time limit, "to do" the rest of the training at the speed measured last.
"""


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    status = commands.add_parser(
        "status",
        help="what runs do: a table",
        description="State from SLURM, progress from the run folders.",
        epilog=STATUS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    status.add_argument("folders", nargs="*", metavar="RUN|FOLDER", help="runs, sweeps, or folders of them (default: ./runs)")
    status.add_argument(
        "--watch",
        nargs="?",
        type=positive_int,
        const=WATCH_S,
        metavar="SECONDS",
        help="look again and again, till Ctrl-C (default: every %(const)s s)",
    )
    status.add_argument("--json", action="store_true", help="a list of JSON objects instead of the table")
    status.set_defaults(run=run_status)

    logs = commands.add_parser(
        "logs", help="what a run printed", description="The last lines that a rank of a run printed.", allow_abbrev=False
    )
    logs.add_argument("folder", metavar="RUN", help="the run folder, or its name under ./runs")
    logs.add_argument("--rank", type=non_negative_int, default=0, metavar="R", help="which rank (default: %(default)s)")
    logs.add_argument("--lines", type=positive_int, default=50, metavar="N", help="how many (default: %(default)s)")
    logs.add_argument("--follow", "-f", action="store_true", help="go on with what is added, till Ctrl-C")
    logs.set_defaults(run=run_logs)

    cancel = commands.add_parser(
        "cancel",
        help="end the jobs of runs",
        description="End the jobs of runs or sweeps, or take them from the queue. A run that is submitted again goes on.",
        allow_abbrev=False,
    )
    cancel.add_argument("targets", nargs="+", metavar="RUN|FOLDER|JOBID", help="runs, sweeps, or SLURM's job ids")
    cancel.add_argument("--yes", action="store_true", help="do not ask before several jobs are ended")
    cancel.set_defaults(run=run_cancel)


def find_folder(text: str) -> Path:
    """The folder that the user means: itself, or one of that name under ./runs.

    Raises:
        UserError: there is neither.
    """
    for path in (Path(text), RUNS / text):
        if path.is_dir():
            return path
    raise UserError(f"{text}: there is no such folder, nor {RUNS / text}. Give a run, or a folder that holds some.")


def run_status(arguments: argparse.Namespace) -> None:
    """Print the table, once or again and again."""
    if arguments.json and arguments.watch:
        raise UserError("--json with --watch: a program asks again by itself; leave --watch out.")

    from galaxydist.cluster.status import read_overview

    folders = [find_folder(text) for text in arguments.folders]
    if not folders and RUNS.is_dir():
        folders = [RUNS]
    if arguments.json:
        overview = read_overview(folders)
        print(json.dumps([status.to_dict() for status in overview.runs], indent=2))
        if overview.trouble:
            print(f"galaxydist: {overview.trouble}", file=sys.stderr)
        return
    console = _console()
    if arguments.watch is None:
        _print_overview(console, read_overview(folders), is_default=not arguments.folders)
    else:
        _watch(console, folders, arguments.watch)


def _print_overview(console: "Console", overview: "Overview", *, is_default: bool) -> None:
    from galaxydist.cluster.status_table import render_overview

    if not overview.runs and is_default:
        print(f"no runs under ./{RUNS}; give another folder: galaxydist status FOLDER")
        return
    with console.capture() as capture:  # rich would end the program where whoever read our output went away
        console.print(render_overview(overview, console.width))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _watch(console: "Console", folders: list[Path], interval_s: int) -> None:
    """Till Ctrl-C, which is no failure here."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from galaxydist.cluster.status import read_overview
    from galaxydist.cluster.status_table import render_overview, summary_text

    def look() -> Group:
        overview = read_overview(folders)
        # On top: a long table is cut at the terminal's end.
        stamp = f"{time.strftime('%H:%M:%S')}  {summary_text(overview.runs)}  (every {interval_s} s, Ctrl-C ends)"
        return Group(Text(stamp, "dim"), render_overview(overview, console.width))

    try:
        if not console.is_terminal:
            while True:
                console.print(look())
                time.sleep(interval_s)
        with Live(look(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_WIDE)


def run_logs(arguments: argparse.Namespace) -> None:
    """Print the end of a log, and what is added to it."""
    from galaxydist.cluster.logs import find_logs, follow, last_lines, sizes
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.status import is_run

    folder = find_folder(arguments.folder)
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder. Give one: `galaxydist status {folder}` lists those below it.")
    files = JobFiles(folder)
    logs = sizes(find_logs(files, arguments.rank))
    if not logs and not arguments.follow:
        raise UserError(_no_logs(files, arguments.rank))
    for path, size in logs.items():
        if path != files.rank_log(arguments.rank):
            print(f"==> {path} <==", flush=True)
        sys.stdout.buffer.writelines(line + b"\n" for line in last_lines(path, arguments.lines, size))
    sys.stdout.flush()
    if arguments.follow:
        try:
            for added in follow(lambda: find_logs(files, arguments.rank), logs):
                sys.stdout.buffer.write(added)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


def _no_logs(files: "JobFiles", rank: int) -> str:
    ranks = [path.stem.removeprefix("rank-") for path in files.rank_logs() if path.stat().st_size > 0]
    if ranks:
        return f"Rank {rank} of {files.run_dir} has printed nothing; there are logs of rank {', '.join(ranks)}."
    jobs = files.jobs()
    if not jobs:
        return f"{files.run_dir} has no logs: it was started by hand, and printed where that was done."
    return f"{files.run_dir} has printed nothing yet (job {jobs[-1].job_id}); `galaxydist status {files.run_dir}` tells why."


def run_cancel(arguments: argparse.Namespace) -> None:
    """End jobs, after asking where there are several; say what was done."""
    from galaxydist.cluster.cancel import cancel, find_targets

    found = find_targets(arguments.targets, find_folder)
    for text in found.notes:
        print(text)
    if not found.jobs:
        print("nothing to cancel")
        return
    if len(found.jobs) > 1 and not arguments.yes:
        _ask(len(found.jobs), [job.text for job in found.jobs])
    for text in cancel(found.jobs):
        print(text)


def _ask(count: int, texts: list[str]) -> None:
    if not sys.stdin.isatty():
        raise UserError(
            f"This would end {count} jobs ({', '.join(texts[:5])}{', ...' if count > 5 else ''}). Add --yes to do so."
        )
    for text in texts:
        print(f"  {text}")
    if input(f"End these {count} jobs? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was cancelled.")
