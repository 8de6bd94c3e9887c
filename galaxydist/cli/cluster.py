"""``galaxydist cluster``: which cluster profiles there are, every value of one, and a new one from what SLURM says."""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands, add_data_dir, local_path, non_negative_int, positive_int
from galaxydist.cli.recipes import print_files, print_resolved
from galaxydist.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from galaxydist.cluster.profile import ClusterConfig


FOLDER = Path("slurm") / "clusters"


def add_cluster(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "cluster",
        help="list, show or write cluster profiles",
        description="Cluster profiles: small YAML files that say what to ask a cluster for.",
        allow_abbrev=False,
    )
    inner = parser.add_subparsers(metavar="COMMAND")
    listing = inner.add_parser("list", help="list the profiles", description="List the profiles.", allow_abbrev=False)
    listing.set_defaults(run=run_list)
    show = inner.add_parser(
        "show",
        help="every value of one, and where it came from",
        description="Every value of a profile, and where it came from.",
        allow_abbrev=False,
    )
    show.add_argument("name", metavar="NAME", help="a profile's name or file")
    show.add_argument("overrides", nargs="*", metavar="cluster.key=value", help="shown as a job would ask for them")
    show.set_defaults(run=run_show)
    _add_init(inner)


def _add_init(commands: Commands) -> None:
    init = commands.add_parser(
        "init",
        help="write a profile for the cluster of this machine",
        description=f"Ask this machine's SLURM for its partitions, nodes and your accounts, and write {FOLDER}/NAME.yaml.",
        allow_abbrev=False,
    )
    init.add_argument("name", metavar="NAME", help="of the profile")
    init.add_argument("--partition", metavar="P", help="which partition (default: one with GPUs)")
    init.add_argument("--overwrite", action="store_true", help="replace a profile of this name")
    init.set_defaults(run=run_init)


def run_list(_: argparse.Namespace) -> None:
    """List the profiles."""
    from galaxydist.cluster.profile import list_clusters

    print_files(list_clusters())


def run_show(arguments: argparse.Namespace) -> None:
    """Show one profile resolved."""
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
        raise UserError(f"{name!r} is no name for a profile; take letters, digits, '_' and '-', such as my_cluster")
    path = FOLDER / f"{name}.yaml"
    if path.exists() and not arguments.overwrite:
        raise UserError(f"there is a {path} already; take another name, or --overwrite to replace it")
    text = profile_text(read_site(), name, arguments.partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, text.encode())
    config = load_cluster([f"cluster={path}"]).config
    print(f"{path}: partition {config.partition}, {_size(config)}.")
    print(f"Look it over, then: galaxydist submit recipe=vit cluster={name}")


def _size(config: "ClusterConfig") -> str:
    processes = f"{config.nodes} x {config.tasks_on_node} processes" if config.num_tasks > 1 else "one process"
    return f"{processes} {'on this machine' if config.scheduler == 'local' else f'for {config.time_min} minutes'}"


# ``galaxydist doctor``: whether this machine, and the nodes of a cluster, are ready for a run.

DOCTOR_EPILOG = """examples:
  galaxydist doctor                                 this machine
  galaxydist doctor cluster=a100                    and nodes of a cluster, as its profile asks for them
  galaxydist doctor cluster=a100 cluster.nodes=4 --wait 3600
  galaxydist doctor cluster=local cluster.tasks_per_node=2

Exit code 0: no failure (warnings may be there); 1: a failure; 2: bad input.
"""


def add_doctor(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="is this machine, or a cluster, ready",
        description="Look at this machine and, with a cluster, at its nodes from within a short job: software, GPUs, cores, "
        "memory, folders, network, rendezvous, all-reduce, shared files, clocks, signals. Each line is ok, warning or failure "
        "with its remedy.",
        epilog=DOCTOR_EPILOG,
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
    parser.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> None:
    """Look and print; leaves with exit code 1 where there is a failure."""
    from galaxydist.cluster.profile import ClusterConfig, load_cluster, split_arguments

    strange, cluster_arguments = split_arguments(arguments.arguments)
    if strange:
        raise UserError(f"{strange[0]}: the doctor takes cluster=NAME and cluster.key=value")
    cluster: ClusterConfig | None = load_cluster(cluster_arguments).config if cluster_arguments else None

    from galaxydist.doctor.check import has_failed, render, to_dicts
    from galaxydist.doctor.job import doctor_cluster
    from galaxydist.doctor.machine import CheckTarget, check_machine
    from galaxydist.doctor.network import check_slurm
    from galaxydist.paths import data_root

    needs_slurm = cluster is not None and cluster.scheduler == "slurm"
    place = CheckTarget(data_root=data_root(arguments.data_dir, os.environ), runs=arguments.run_root)
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


# ``galaxydist plan``: what a run would cost; nothing is started and no GPU is needed.

PLAN_EPILOG = """examples:
  galaxydist plan recipe=vit --nodes 16 --gpus-per-node 8
  galaxydist plan recipe=vit model.size=base train.batch_size=1024 --nodes 4 --gpus-per-node 8 --gpu-memory 80 --img-s 1800
  galaxydist plan recipe=resnet50 --galaxies 8700000 --shards 8700 --nodes 16 --gpus-per-node 8

key=value words stand together, before the options or after them.
"""


def add_plan(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="what a run would cost",
        description="Steps, time, memory, shards and bytes, disk of a run. Nothing is started, no GPU is needed. "
        "Refuses what could not run and says what would.",
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="the recipe")
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=positive_int, default=1, metavar="G", help="GPUs of each (default: %(default)s)")
    parser.add_argument("--img-s", type=positive_number, metavar="X", help="images a second that one GPU trains on, for the time")
    parser.add_argument("--gpu-memory", type=positive_number, metavar="GB", help="of one GPU, in 10^9 bytes")
    parser.add_argument(
        "--galaxies", type=positive_int, metavar="N", help="training galaxies, instead of the shards on this machine"
    )
    parser.add_argument("--shards", type=positive_int, metavar="M", help="with --galaxies: how many shards hold them")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    add_data_dir(parser)
    parser.set_defaults(run=run_plan)


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def run_plan(arguments: argparse.Namespace) -> None:
    """Work it out and print it."""
    from galaxydist.paths import data_root
    from galaxydist.recipe.resolve import load_recipe

    recipe = load_recipe(arguments.recipe).recipe
    root: Path = data_root(arguments.data_dir or recipe.data.dir, os.environ)

    from galaxydist.planner.estimate import ClusterShape, plan_run
    from galaxydist.planner.table import render_plan

    job = ClusterShape(arguments.nodes, arguments.gpus_per_node, arguments.img_s, arguments.gpu_memory)
    plan = plan_run(recipe, root, job, galaxies=arguments.galaxies, shards=arguments.shards)
    print(json.dumps(dataclasses.asdict(plan)) if arguments.json else render_plan(plan))
