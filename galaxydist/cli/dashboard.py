"""``galaxydist dashboard``: pages on which runs are watched."""

import argparse
import os
from pathlib import Path

from galaxydist.cli.options import Commands, add_command, add_group, local_path, port_number
from galaxydist.cli.track import find_targets, going_by_slurm, print_line
from galaxydist.errors import EXIT_FAILED

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
