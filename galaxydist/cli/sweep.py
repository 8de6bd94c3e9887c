"""``galaxydist sweep``: many runs from one file, as arrays of the cluster; again, what is missing of them."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands
from galaxydist.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from galaxydist.cluster.profile import ResolvedCluster
    from galaxydist.cluster.sweep import SweepFile, Trial

POLL_SECONDS = 1.0
EPILOG = """examples:
  galaxydist sweep                                          list the sweeps
  galaxydist sweep slurm/sweeps/smoke.yaml                  a few tiny runs on this machine
  galaxydist sweep galaxy10 cluster=a100 --dry-run          what would be submitted, and the batch script
  galaxydist sweep galaxy10 cluster=a100 train.epochs=50    for all runs
  galaxydist sweep galaxy10 cluster=a100 recipe=vit         of that axis one value only

The same command again submits what was cut off, cancelled or never sent, and leaves alone what is finished, queued or running.
What failed so that it would fail again (bad input, a loss that is not a number, the same crash twice) waits for --retry-failed.
A key on the command line takes the place of the file's, of a whole axis too; run.root=DIR that of the folder of the runs.
"""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sweep",
        help="send many runs to a cluster",
        description="Check all runs of a sweep's file, then submit those that are neither finished nor on their way.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the sweep's file, or the name of one in slurm/sweeps")
    parser.add_argument("arguments", nargs="*", metavar="cluster=NAME [key=value]", help="where to, and values for all runs")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the runs and the batch script")
    parser.add_argument("--retry-failed", action="store_true", help="also what failed so that it would fail again")
    parser.add_argument("--yes", action="store_true", help="submit without asking")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check a sweep, and submit what is missing of it."""
    from galaxydist.cluster.sweep import find_sweep, list_sweeps, read_sweep

    if arguments.file is None:
        print("sweeps:", *(f"  {path}" for path in list_sweeps().values()), sep="\n")
        return

    from galaxydist.cluster.profile import load_cluster, split_arguments

    recipe_arguments, cluster_arguments = split_arguments(arguments.arguments)
    sweep = read_sweep(find_sweep(arguments.file))
    if sweep.cluster is not None and not any(argument.startswith("cluster=") for argument in cluster_arguments):
        cluster_arguments = [f"cluster={sweep.cluster}", *cluster_arguments]
    cluster = load_cluster(cluster_arguments)

    from galaxydist.cluster.preflight import check_request
    from galaxydist.cluster.slurm import read_states
    from galaxydist.cluster.sweep import resolve
    from galaxydist.cluster.sweep_runner import decide, read_facts, render_trials, summarise

    trials = resolve(sweep, recipe_arguments, check=lambda resolved: check_request(resolved, cluster.config, os.environ))
    if cluster.config.scheduler == "slurm":
        from galaxydist.cluster.partition_check import check_partition

        check_partition(cluster.config)
    decisions = [decide(facts, retry_failed=arguments.retry_failed) for facts in read_facts(trials, read_states)]
    due = [trial for trial, decision in zip(trials, decisions, strict=True) if decision.is_due]
    if arguments.dry_run:
        print(f"{render_trials(trials, decisions)}\n\n{sweep.path}: {summarise(decisions)}")
        _show_script(due, sweep, cluster)
        return
    print(f"{sweep.path}: {summarise(decisions)}")
    if due and (arguments.yes or _is_confirmed(len(due), cluster)):
        _submit(due, sweep, cluster, retry_failed=arguments.retry_failed)
    print(f"runs        {trials[0].run_dir.parent}\nfollow them galaxydist status {trials[0].run_dir.parent} --watch")


def _is_confirmed(count: int, cluster: "ResolvedCluster") -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{count} trials would go to {cluster.config.name}, and nobody is there to ask: add --yes, or --dry-run")
    answer = input(f"submit {count} to {cluster.config.name}? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _submit(due: "list[Trial]", sweep: "SweepFile", cluster: "ResolvedCluster", *, retry_failed: bool) -> None:
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.slurm import max_array_size, read_states
    from galaxydist.cluster.submit import JobRequest, alone_in, submit_requests
    from galaxydist.cluster.sweep_runner import decide, is_local_job_running, read_facts, run_here, submit_arrays

    folder = due[0].run_dir.parent / "slurm"
    parallel = _parallel(sweep, cluster)

    def send(requests: "Sequence[JobRequest]", at_once: int | None, after: str | None) -> list[str]:
        return submit_requests(requests, cluster, folder=folder, name=sweep.path.stem, parallel=at_once, after=after)

    say = partial(print, flush=True)
    if cluster.config.scheduler == "slurm":
        with alone_in(folder.parent):
            # Another command may have sent some while this one asked.
            decisions = [decide(facts, retry_failed=retry_failed) for facts in read_facts(due, read_states)]
            due = [trial for trial, decision in zip(due, decisions, strict=True) if decision.is_due]
            submit_arrays(due, send=send, chunk_size=max_array_size(), parallel=parallel, say=say)
        say(f"{parallel} run at the same time\nstop them   galaxydist cancel {folder.parent}")
        return
    say(f"{parallel} at the same time on this machine; this command waits for them. After Ctrl-C, the same command goes on.")
    failed = run_here(
        due,
        send=send,
        parallel=parallel,
        is_running=lambda trial: is_local_job_running(JobFiles(trial.run_dir).jobs()[-1]),
        judge=lambda trial: decide(read_facts([trial], read_states)[0], retry_failed=True),  # it was sent: any failure counts
        pause=lambda: time.sleep(POLL_SECONDS),
        say=say,
    )
    if failed:
        logs = "\n".join(f"  {trial.run_dir / 'logs'}" for trial in failed)
        print(f"{len(failed)} of {len(due)} trials did not finish; their logs:\n{logs}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _parallel(sweep: "SweepFile", cluster: "ResolvedCluster") -> int:
    from galaxydist.recipe.resolve import COMMAND_LINE

    is_typed = cluster.origins.get("parallel") == COMMAND_LINE
    return cluster.config.parallel if is_typed or sweep.parallel is None else sweep.parallel


def _show_script(due: "list[Trial]", sweep: "SweepFile", cluster: "ResolvedCluster") -> None:
    """The batch script of the first array."""
    if not due:
        return
    if cluster.config.scheduler == "local":
        print(f"\nno batch script: {_parallel(sweep, cluster)} at the same time as processes of this machine")
        return
    from galaxydist.cluster.slurm import max_array_size
    from galaxydist.cluster.submit import build_request, script_of

    size = max_array_size()
    requests = [build_request(trial.resolved, trial.arguments) for trial in due[:size]]
    arrays = -(-len(due) // size)
    print(f"\n# the batch script{f' of the first of {arrays} arrays' if arrays > 1 else ''}")
    folder, parallel = due[0].run_dir.parent / "slurm", _parallel(sweep, cluster)
    print(script_of(requests, cluster, folder=folder, name=sweep.path.stem, parallel=parallel))
