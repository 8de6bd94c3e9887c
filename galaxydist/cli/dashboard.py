"""``galaxydist dashboard``: pages on which runs are watched."""

import argparse
import getpass
import os
import socket
from pathlib import Path

from galaxydist.cli.options import Commands, add_command, add_group, local_path, positive_int
from galaxydist.errors import UserError

LOCAL_EPILOG = """examples:
  galaxydist dashboard local                            the runs in runs/, also those that are still going
  galaxydist dashboard local runs/sweep-a runs/sweep-b
  galaxydist dashboard local /scratch/runs --port 8000

Without an account, a key or a network. Ctrl-C ends it; trackio's folder stays, and the next call adds what it lacks.
"""


def add_dashboard(commands: Commands) -> None:
    """Add ``dashboard local``."""
    inner = add_group(commands, "dashboard", "show runs on a page while they train")
    local = add_command(
        inner,
        "local",
        run_local,
        "show runs on trackio's page on this machine",
        description="Store the runs of a folder for trackio, follow those that are still going, and serve trackio's page on "
        "this machine's loopback address until Ctrl-C.",
        epilog=LOCAL_EPILOG,
    )
    local.add_argument(
        "runs", nargs="*", type=local_path, metavar="RUNS", help="run folders, or folders that hold them (default: runs)"
    )
    local.add_argument("--port", type=positive_int, metavar="N", help="port of the page (default: 7860, or the next free one)")
    local.add_argument("--dir", type=local_path, metavar="DIR", help="trackio's folder (default: trackio in the first folder)")
    local.add_argument("--no-follow", action="store_true", help="show the runs as they are now")
