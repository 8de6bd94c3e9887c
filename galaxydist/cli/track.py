"""``galaxydist track`` and ``galaxydist dashboard``: send run folders to a tracker, and pages on which runs are watched."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from galaxydist.cli.options import Commands, add_command, add_group, local_path, port_number
from galaxydist.errors import EXIT_FAILED, UserError

EPILOG = """examples:
  galaxydist track push runs/vit-0123abcd             one run to wandb; without a key or a network as offline files
  galaxydist track push runs/galaxy10 --watch         a sweep, followed until its last run ends: on a login node
  galaxydist track push runs --to tensorboard         event files in each run's folder
"""
# Seconds between two questions to SLURM.
SLURM_S = 60.0


def add_parser(commands: Commands) -> None:
    """Add ``track`` with its subcommands."""
    _add_push(add_group(commands, "track", "send runs to wandb, trackio or TensorBoard"))


def _add_push(commands: Commands) -> None:
    parser = add_command(
        commands,
        "push",
        run_push,
        "send run folders to a tracker",
        description="Send run folders to a tracker, of runs that are training, were stopped, crashed or are finished. What the "
        "tracker has already is not sent again, so that the command may be repeated. A run that sends itself is left out until "
        "it ends.",
        epilog=EPILOG,
    )
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN|SWEEP", help="run folders, and folders of run folders")
    parser.add_argument(
        "--to",
        choices=("wandb", "trackio", "tensorboard"),
        default="wandb",
        metavar="TRACKER",
        help="wandb, trackio or tensorboard (default: %(default)s)",
    )
    parser.add_argument("--watch", action="store_true", help="follow runs that are training, until the last one ends or Ctrl-C")
    parser.add_argument("--project", metavar="NAME", help="project (default: each run's tracker.project)")
    parser.add_argument("--entity", metavar="NAME", help="team or user of wandb (default: each run's tracker.entity)")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        default="auto",
        help="of wandb (default: auto, which is online if there is an API key and a network)",
    )
    parser.add_argument(
        "--dir", type=local_path, metavar="DIR", help="trackio's folder (default: trackio in the folder of the runs)"
    )


def run_push(arguments: argparse.Namespace) -> int:
    from galaxydist.tracking.push import PushOptions, push_runs, watch_runs
    from galaxydist.tracking.trackio_sink import trackio_folder

    if arguments.dir is not None and arguments.to != "trackio":
        raise UserError(f"--dir is trackio's folder, and these runs go to {arguments.to}: leave it out, or give --to trackio")
    if arguments.to != "wandb" and (arguments.entity is not None or arguments.mode != "auto"):
        raise UserError(f"--entity and --mode are of wandb, and these runs go to {arguments.to}: leave them out")
    if arguments.to == "tensorboard" and arguments.project is not None:
        raise UserError("--project: TensorBoard has no projects; leave it out")
    find_targets(arguments.runs)
    trackio_dir = arguments.dir or trackio_folder(arguments.runs[0])
    options = PushOptions(arguments.to, os.environ, arguments.project, arguments.entity, arguments.mode, trackio_dir)
    if arguments.watch:
        report = watch_runs(lambda: find_targets(arguments.runs), going_by_slurm(arguments.runs), options, print_line)
    else:
        report = push_runs(find_targets(arguments.runs), options, print_line)
    for line in report.skipped.values():
        print_line(line)
    for line in report.failed.values():
        print(f"galaxydist: not sent: {line}", file=sys.stderr, flush=True)
    return EXIT_FAILED if report.failed else 0


def print_line(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def find_targets(folders: list[Path]) -> list[Path]:
    """Return the run folders at and below folders.

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    from galaxydist.runs.listing import find_runs

    runs: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}. Give a run folder, or a folder of runs such as runs.")
        found = find_runs(folder)
        if not found:
            raise UserError(f"{folder} contains no run, down to two levels. Give a run folder or a folder of runs.")
        runs |= dict.fromkeys(found)
    return list(runs)


def going_by_slurm(folders: list[Path]) -> Callable[[Path], bool]:
    """Return a function that tells if a run runs here or waits or runs as a job; SLURM is asked once in a while."""
    from galaxydist.cluster.status import read_overview
    from galaxydist.runs.folder import RunFolder
    from galaxydist.runs.lock import live_owner
    from galaxydist.tracking.push import has_end

    asked_at, active = -SLURM_S, set[Path]()

    def is_going(run: Path) -> bool:
        nonlocal asked_at, active
        if time.monotonic() - asked_at > SLURM_S:
            statuses = read_overview(folders).runs
            active = {status.run for status in statuses if status.group in ("running", "pending", "unknown")}
            asked_at = time.monotonic()
        folder = RunFolder(run)
        return not has_end(folder) and (run in active or live_owner(folder.lock_path) is not None)

    return is_going


WANDB_EPILOG = """examples:
  galaxydist dashboard wandb                          the workspace of the project galaxydist
  galaxydist dashboard wandb --project bars --entity my-team

Its address is kept in runs/wandb-workspace.json. The next call updates the same workspace; what was added to it in the browser
stays. It needs WANDB_API_KEY (or `wandb login`) and internet access, and no run on this machine.
"""

LOCAL_EPILOG = """examples:
  galaxydist dashboard local                            the runs in runs/, also those that are training
  galaxydist dashboard local runs/sweep-a runs/sweep-b
  galaxydist dashboard local /scratch/runs --port 8000

It needs no account, key or network. Ctrl-C ends it; trackio's folder stays, and the next call adds what it lacks.
"""


def add_dashboard(commands: Commands) -> None:
    """Add ``dashboard local`` and ``dashboard wandb``."""
    inner = add_group(commands, "dashboard", "show runs on a page while they train")
    _add_local(inner)
    _add_wandb(inner)


def _add_wandb(commands: Commands) -> None:
    parser = add_command(
        commands,
        "wandb",
        run_wandb,
        "make or update a workspace on wandb",
        description="Make a workspace for the runs of a project on wandb: curves by recipe, results, classes, throughput and "
        "scaling, GPU use, restarts and failures. If there is one, bring it up to date.",
        epilog=WANDB_EPILOG,
    )
    parser.add_argument("--project", default="galaxydist", metavar="NAME", help="project (default: %(default)s)")
    parser.add_argument("--entity", metavar="NAME", help="team or user (default: the key's own)")
    parser.add_argument(
        "--runs",
        type=local_path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of the runs, which keeps the address (default: %(default)s)",
    )
    parser.add_argument("--new", action="store_true", help="make a further workspace, even if there is one")


def run_wandb(arguments: argparse.Namespace) -> None:
    """Make or update the workspace."""
    from galaxydist.tracking.wandb_workspace import save_workspace

    saved = save_workspace(
        arguments.runs,
        project=arguments.project,
        entity=arguments.entity,
        make_new=arguments.new,
        environ=os.environ,
    )
    if saved.is_new:
        print(f"New workspace: {saved.url}")
    elif saved.changed:
        print(f"Updated ({', '.join(saved.changed)}): {saved.url}")
    else:
        print(f"Nothing has changed: {saved.url}")


def _add_local(commands: Commands) -> None:
    parser = add_command(
        commands,
        "local",
        run_local,
        "show runs on trackio's page, on this machine",
        description="Store the runs of folders for trackio, follow those that are training, and serve trackio's page on this "
        "machine's loopback address until Ctrl-C.",
        epilog=LOCAL_EPILOG,
    )
    parser.add_argument(
        "runs", nargs="*", type=local_path, metavar="RUNS", help="run folders, and folders of run folders (default: runs)"
    )
    parser.add_argument("--port", type=port_number, metavar="N", help="port of the page (default: 7860, or the next free one)")
    parser.add_argument("--dir", type=local_path, metavar="DIR", help="trackio's folder (default: trackio in the first of RUNS)")
    parser.add_argument("--no-follow", action="store_true", help="show the runs as they are now")


def run_local(arguments: argparse.Namespace) -> int:
    """Store runs, and show them until Ctrl-C."""
    from galaxydist.tracking.local_dashboard import PageOptions, show_runs
    from galaxydist.tracking.trackio_sink import trackio_folder

    folders = arguments.runs or [Path("runs")]
    find_targets(folders)
    folder = arguments.dir or trackio_folder(folders[0])
    options = PageOptions(folder, os.environ, arguments.port, not arguments.no_follow)
    report = show_runs(lambda: find_targets(folders), going_by_slurm(folders), options, print_line)
    return EXIT_FAILED if report.failed else 0
