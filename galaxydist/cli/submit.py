"""``galaxydist submit``: one run as a job of the cluster."""

import argparse
import os

from galaxydist.cli.options import Commands
from galaxydist.errors import UserError

EPILOG = """examples:
  galaxydist submit                                         list the cluster profiles
  galaxydist submit recipe=vit cluster=a100
  galaxydist submit recipe=vit cluster=a100 cluster.nodes=2 cluster.time=04:00:00 optim.lr=1e-4
  galaxydist submit recipe=demo cluster=local               processes of this machine
  galaxydist submit recipe=vit cluster=a100 --dry-run       the batch script, and nothing else
  galaxydist submit recipe=vit cluster=a100 --test          when and where SLURM would start it
  galaxydist submit recipe=vit cluster=a100 cluster.after=123     once job 123 has ended well

The same command again continues the run; with cluster.nodes=1 on fewer nodes.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "submit",
        help="send a run to a cluster",
        description="Check a run on this machine, then send it to a cluster. It survives preemption and time limits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", metavar="recipe=NAME cluster=NAME [key=value]", help="what to run, and where")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the batch script")
    parser.add_argument("--test", action="store_true", help="check everything and ask SLURM when the job would start")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Submit it and say how to follow it."""
    from galaxydist.cluster.profile import list_clusters, load_cluster, split_arguments

    recipe_arguments, cluster_arguments = split_arguments(arguments.arguments)
    if not any(argument.startswith("cluster=") for argument in cluster_arguments):
        listed = "\n".join(f"  cluster={name:<12} {path}" for name, path in list_clusters().items())
        if not arguments.arguments:
            print(f"cluster profiles:\n{listed}\n\n`galaxydist cluster init NAME` writes one for the cluster of this machine.")
            return
        raise UserError(
            f"cluster=NAME is missing; there are\n{listed}\n"
            "`galaxydist cluster init NAME` writes one for the cluster of this machine."
        )
    from galaxydist.recipe.resolve import load_recipe

    cluster = load_cluster(cluster_arguments)
    resolved = load_recipe(recipe_arguments)

    from galaxydist.cluster.preflight import check_request
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.submit import alone_in, ask_start, build_request, check_idle, script_of, submit_requests

    request = build_request(resolved, recipe_arguments)
    is_due = check_request(resolved, cluster.config, os.environ)
    if cluster.config.scheduler == "slurm":
        from galaxydist.cluster.partition_check import check_partition

        check_partition(cluster.config)
    folder, name = JobFiles(request.run_dir).slurm_dir, request.run_dir.name
    if arguments.dry_run or arguments.test:
        script = script_of([request], cluster, folder=folder, name=name)
        print(ask_start(script, cluster.config.name) if arguments.test else script)
        return
    if not is_due:
        print(f"{request.run_dir} is finished; `galaxydist evaluate {request.run_dir}` judges it again.")
        return
    with alone_in(request.run_dir.parent):
        check_idle(request.run_dir)
        (job_id,) = submit_requests([request], cluster, folder=folder, name=name)
    print(
        f"submitted job {job_id} to {cluster.config.name}: {cluster.config.num_tasks} processes on {cluster.config.nodes} nodes\n"
        f"run folder  {request.run_dir}\n"
        f"follow it   galaxydist status {request.run_dir} --watch\n"
        f"            galaxydist logs {request.run_dir} --follow\n"
        f"stop it     galaxydist cancel {request.run_dir}"
    )
