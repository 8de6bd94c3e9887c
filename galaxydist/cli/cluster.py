"""``galaxydist cluster``, ``doctor`` and ``plan``: cluster profiles, checks of machines, and the cost of a run."""

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    Commands,
    add_command,
    add_data_dir,
    add_group,
    add_recipe,
    local_path,
    non_negative_int,
    positive_int,
    positive_number,
)
from galaxydist.cli.recipes import print_files, print_resolved
from galaxydist.errors import EXIT_FAILED, UserError
from galaxydist.paths import data_root

if TYPE_CHECKING:
    from galaxydist.cluster.profile import ClusterConfig


FOLDER = Path("slurm") / "clusters"


def add_cluster(commands: Commands) -> None:
    """Add ``cluster list``, ``show`` and ``init``."""
    inner = add_group(commands, "cluster", "list, show or write cluster profiles")
    add_command(inner, "list", run_list, "list the profiles")
    show = add_command(inner, "show", run_show, "show all values of a profile with their origins")
    show.add_argument("name", metavar="NAME", help="name or file of a profile")
    show.add_argument("overrides", nargs="*", metavar="cluster.key=value", help="values that override the profile")
    init = add_command(
        inner,
        "init",
        run_init,
        "write a profile for the cluster of this machine",
        description=f"Ask SLURM on this machine for its partitions and nodes and your accounts, and write {FOLDER}/NAME.yaml.",
    )
    init.add_argument("name", metavar="NAME", help="name of the profile")
    init.add_argument("--partition", metavar="P", help="partition (default: one with GPUs)")
    init.add_argument("--overwrite", action="store_true", help="replace a profile of this name")


def run_list(_: argparse.Namespace) -> None:
    """List the profiles."""
    from galaxydist.cluster.profile import list_clusters

    print_files(list_clusters())


def run_show(arguments: argparse.Namespace) -> None:
    """Show all values of a profile."""
    from galaxydist.cluster.profile import CLUSTERS, load_cluster

    name = arguments.name.removeprefix("cluster=")
    resolved = load_cluster([f"cluster={name}", *arguments.overrides])
    config, schema = resolved.config, CLUSTERS.schema
    print(f"# {resolved.path}; {_size(config)}; on the command line: cluster={name} cluster.key=value")
    notes = {key: known.description for key, known in schema.fields.items()}
    print_resolved(schema.flatten(config), resolved.origins, notes)


def run_init(arguments: argparse.Namespace) -> None:
    """Write a profile for the cluster of this machine."""
    from galaxydist.atomic_files import replace_bytes
    from galaxydist.cluster.profile import load_cluster
    from galaxydist.cluster.profile_init import profile_text
    from galaxydist.cluster.site import read_site

    name = arguments.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise UserError(f"{name!r} is not a valid name of a profile; use letters, digits, '_' and '-', such as my_cluster")
    path = FOLDER / f"{name}.yaml"
    if path.exists() and not arguments.overwrite:
        raise UserError(f"{path} exists; choose another name, or --overwrite to replace it")
    text = profile_text(read_site(), name, arguments.partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, text.encode())
    config = load_cluster([f"cluster={path}"]).config
    print(f"{path}: partition {config.partition}, {_size(config)}.")
    print(f"Check it, then: galaxydist submit recipe=vit cluster={name}")


def _size(config: "ClusterConfig") -> str:
    processes = f"{config.nodes} x {config.tasks_on_node} processes" if config.num_tasks > 1 else "one process"
    return f"{processes} {'on this machine' if config.scheduler == 'local' else f'for {config.time_min} minutes'}"


DOCTOR_EPILOG = """examples:
  galaxydist doctor                                 check this machine
  galaxydist doctor cluster=a100                    and the nodes of a cluster, as its profile requests them
  galaxydist doctor cluster=a100 cluster.nodes=4 --wait 3600
  galaxydist doctor cluster=local cluster.tasks_per_node=2

Exit code 0: no failure (but perhaps warnings); 1: a failure; 2: bad input.
"""


def add_doctor(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        run_doctor,
        "check whether this machine or a cluster is ready",
        description="Check this machine and, with a cluster profile, its nodes from a short job: software, GPUs, cores, "
        "folders, network, rendezvous, all-reduce, shared files, clocks, signals. Each line is ok, warning or failure with its "
        "remedy.",
        epilog=DOCTOR_EPILOG,
    )
    parser.add_argument("arguments", nargs="*", metavar="cluster=NAME [cluster.key=value]", help="cluster profile")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--wait",
        type=non_negative_int,
        default=600,
        metavar="SECONDS",
        help="longest time that the job may wait for its start (default: %(default)s)",
    )
    parser.add_argument(
        "--run-root",
        type=local_path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of the run folders, and of the job's reports (default: %(default)s)",
    )
    add_data_dir(parser)


def run_doctor(arguments: argparse.Namespace) -> None:
    """Check and print the results; exit with code 1 after a failure."""
    from galaxydist.cluster.profile import ClusterConfig, load_cluster, split_arguments

    unknown, cluster_arguments = split_arguments(arguments.arguments)
    if unknown:
        raise UserError(f"{unknown[0]}: doctor takes cluster=NAME and cluster.key=value only")
    cluster: ClusterConfig | None = load_cluster(cluster_arguments).config if cluster_arguments else None

    from galaxydist.doctor.check import has_failed, render
    from galaxydist.doctor.job import doctor_cluster
    from galaxydist.doctor.machine import CheckTarget, check_machine

    target = CheckTarget(data_root=data_root(arguments.data_dir, os.environ), runs=arguments.run_root)
    sections = {"this machine": check_machine(target, os.environ)}
    if cluster is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # like Ctrl-C, so that the job is cancelled
        sections[f"cluster={cluster.name}"] = doctor_cluster(
            cluster,
            runs=arguments.run_root,
            data_dir=None if arguments.data_dir is None else arguments.data_dir.absolute(),
            wait_s=arguments.wait,
        )
    failed = any(has_failed(checks) for checks in sections.values())
    if arguments.json:
        plain = {title: list(map(dataclasses.asdict, checks)) for title, checks in sections.items()}
        print(json.dumps({"ok": not failed, "sections": plain}, indent=2))
    else:
        print(render(sections))
    if failed:
        sys.exit(EXIT_FAILED)


PLAN_EPILOG = """examples:
  galaxydist plan recipe=vit --nodes 16 --gpus-per-node 8
  galaxydist plan recipe=vit model.size=base train.batch_size=1024 --nodes 4 --gpus-per-node 8 --gpu-memory 80 --img-s 1800
  galaxydist plan recipe=resnet50 --galaxies 8700000 --shards 8700 --nodes 16 --gpus-per-node 8
"""


def add_plan(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        run_plan,
        "estimate the cost of a run",
        description="Estimate the steps, time, memory, shards, bytes and disk space of a run. Nothing is started and no GPU is "
        "needed. Impossible runs are refused, with the changes that make them possible.",
        epilog=PLAN_EPILOG,
    )
    add_recipe(parser)
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=positive_int, default=1, metavar="G", help="GPUs of each node (default: %(default)s)"
    )
    parser.add_argument(
        "--img-s", type=positive_number, metavar="X", help="training speed of one GPU in images/s, to estimate the time"
    )
    parser.add_argument("--gpu-memory", type=positive_number, metavar="GB", help="memory of one GPU in GB (10^9 bytes)")
    parser.add_argument(
        "--galaxies", type=positive_int, metavar="N", help="training galaxies, instead of the shards on this machine"
    )
    parser.add_argument("--shards", type=positive_int, metavar="M", help="with --galaxies: number of shards")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_data_dir(parser)


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the estimate."""
    from galaxydist.recipe.resolve import load_recipe

    recipe = load_recipe(arguments.recipe).recipe
    root: Path = data_root(arguments.data_dir or recipe.data.dir, os.environ)

    from galaxydist.planner.estimate import ClusterShape, plan_run
    from galaxydist.planner.table import render_plan

    job = ClusterShape(arguments.nodes, arguments.gpus_per_node, arguments.img_s, arguments.gpu_memory)
    plan = plan_run(recipe, root, job, galaxies=arguments.galaxies, shards=arguments.shards)
    print(json.dumps(dataclasses.asdict(plan)) if arguments.json else render_plan(plan))
