"""``galaxydist cluster``: which cluster profiles there are, every value of one, and a new one from what SLURM says."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.listing import print_files, print_resolved
from galaxydist.cli.options import Commands
from galaxydist.errors import UserError

if TYPE_CHECKING:
    from galaxydist.cluster.profile import ClusterConfig

FOLDER = Path("slurm") / "clusters"


def add_parser(commands: Commands) -> None:
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
