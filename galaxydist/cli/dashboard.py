"""``galaxydist dashboard``: pages on which runs are watched."""

import argparse
import os
from pathlib import Path

from galaxydist.cli.options import Commands, add_command, add_group, local_path

WANDB_EPILOG = """examples:
  galaxydist dashboard wandb                          the workspace of the project galaxydist
  galaxydist dashboard wandb --project bars --entity my-team

Its address is kept in runs/wandb-workspace.json. The next call updates the same workspace; what was added to it in the browser
stays. It needs WANDB_API_KEY (or `wandb login`) and internet access, and no run on this machine.
"""


def add_dashboard(commands: Commands) -> None:
    """Add ``dashboard wandb``."""
    inner = add_group(commands, "dashboard", "show runs on a page while they train")
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
