"""``galaxydist doctor``: whether this machine, and the nodes of a cluster, are ready for a run."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from galaxydist.cli.options import Commands, add_data_dir, local_path, non_negative_int
from galaxydist.errors import EXIT_FAILED, UserError

EPILOG = """examples:
  galaxydist doctor                                 this machine
  galaxydist doctor cluster=a100                    and nodes of a cluster, as its profile asks for them
  galaxydist doctor cluster=a100 cluster.nodes=4 --wait 3600
  galaxydist doctor cluster=local cluster.tasks_per_node=2

Exit code 0: no failure (warnings may be there); 1: a failure; 2: bad input.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="is this machine, or a cluster, ready",
        description="Look at this machine and, with a cluster, at its nodes from within a short job: software, GPUs, cores, "
        "memory, folders, network, rendezvous, all-reduce, shared files, clocks, signals. Each line is ok, warning or failure "
        "with its remedy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", metavar="cluster=NAME [cluster.key=value]", help="the cluster profile")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--wait",
        type=non_negative_int,
        default=600,
        metavar="SECONDS",
        help="that the job may wait for its start (default: %(default)s)",
    )
    parser.add_argument(
        "--run-root",
        type=local_path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of run folders, where the job's reports go too (default: %(default)s)",
    )
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Look and print; leaves with exit code 1 where there is a failure."""
    from galaxydist.cluster.profile import ClusterConfig, load_cluster, split_arguments

    strange, cluster_arguments = split_arguments(arguments.arguments)
    if strange:
        raise UserError(f"{strange[0]}: the doctor takes cluster=NAME and cluster.key=value")
    cluster: ClusterConfig | None = load_cluster(cluster_arguments).config if cluster_arguments else None

    from galaxydist.doctor.check import has_failed, render, to_dicts
    from galaxydist.doctor.job import doctor_cluster
    from galaxydist.doctor.machine import Place, check_machine
    from galaxydist.doctor.network import check_slurm
    from galaxydist.paths import data_root

    needs_slurm = cluster is not None and cluster.scheduler == "slurm"
    place = Place(data_root=data_root(arguments.data_dir, os.environ), runs=arguments.run_root)
    slurm = check_slurm(is_needed=needs_slurm)
    sections = {"this machine": [*check_machine(place, os.environ), slurm]}
    if cluster is not None and not (needs_slurm and slurm.level == "failure"):
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        sections[f"cluster={cluster.name}"] = doctor_cluster(
            cluster,
            runs=arguments.run_root,
            data_dir=None if arguments.data_dir is None else arguments.data_dir.absolute(),
            wait_s=arguments.wait,
            say=lambda text: print(f"galaxydist: {text}", file=sys.stderr, flush=True),
        )
    failed = any(has_failed(checks) for checks in sections.values())
    if arguments.json:
        print(
            json.dumps({"ok": not failed, "sections": {title: to_dicts(checks) for title, checks in sections.items()}}, indent=2)
        )
    else:
        print(render(sections))
    if failed:
        sys.exit(EXIT_FAILED)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """A lost terminal or a kill ends the doctor as Ctrl-C does: its job is cancelled."""
    raise KeyboardInterrupt
