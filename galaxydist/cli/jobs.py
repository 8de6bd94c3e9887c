"""``galaxydist status``, ``logs`` and ``cancel``: what runs do, what they print, and how to end them."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands, non_negative_int, positive_int
from galaxydist.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from galaxydist.cluster.profile import ResolvedCluster
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.status import Overview
    from galaxydist.cluster.sweep import SweepFile, SweepRun


RUNS = Path("runs")
WATCH_S = 10
# Of a file, or a pipe.
_WIDE = 200

STATUS_EPILOG = """examples:
  galaxydist status                    all runs under ./runs, down to two levels
  galaxydist status runs/vit-0123abcd  one run, by its folder
  galaxydist status vit-0123abcd       the same, by its name
  galaxydist status runs/sweep --watch a sweep, looked at every 10 s

States are SLURM's words; FINISHED, STOPPED, FAILED, NEW: what the run folder tells where no job waits or runs.
"time left" is until the job's time limit, "to do" the rest of the training at the speed measured last.
"""


def add_status(commands: Commands) -> None:
    """Add the commands."""
    status = commands.add_parser(
        "status",
        help="what runs do: a table",
        description="State from SLURM, progress from the run folders.",
        epilog=STATUS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    status.add_argument("folders", nargs="*", metavar="RUN|FOLDER", help="runs, sweeps, or folders of them (default: ./runs)")
    status.add_argument(
        "--watch",
        nargs="?",
        type=positive_int,
        const=WATCH_S,
        metavar="SECONDS",
        help="look again and again, till Ctrl-C (default: every %(const)s s)",
    )
    status.add_argument("--json", action="store_true", help="a list of JSON objects instead of the table")
    status.set_defaults(run=run_status)

    logs = commands.add_parser(
        "logs", help="what a run printed", description="The last lines that a rank of a run printed.", allow_abbrev=False
    )
    logs.add_argument("folder", metavar="RUN", help="the run folder, or its name under ./runs")
    logs.add_argument("--rank", type=non_negative_int, default=0, metavar="R", help="which rank (default: %(default)s)")
    logs.add_argument("--lines", type=positive_int, default=50, metavar="N", help="how many (default: %(default)s)")
    logs.add_argument("--follow", "-f", action="store_true", help="go on with what is added, till Ctrl-C")
    logs.set_defaults(run=run_logs)

    cancel = commands.add_parser(
        "cancel",
        help="end the jobs of runs",
        description="End the jobs of runs or sweeps, or take them from the queue. A run that is submitted again goes on.",
        allow_abbrev=False,
    )
    cancel.add_argument("targets", nargs="+", metavar="RUN|FOLDER|JOBID", help="runs, sweeps, or SLURM's job ids")
    cancel.add_argument("--yes", action="store_true", help="do not ask before several jobs are ended")
    cancel.set_defaults(run=run_cancel)


def find_folder(text: str) -> Path:
    """The folder that the user means: itself, or one of that name under ./runs.

    Raises:
        UserError: there is neither.
    """
    for path in (Path(text), RUNS / text):
        if path.is_dir():
            return path
    raise UserError(f"{text}: there is no such folder, nor {RUNS / text}. Give a run, or a folder that holds some.")


def run_status(arguments: argparse.Namespace) -> None:
    """Print the table, once or again and again."""
    if arguments.json and arguments.watch:
        raise UserError("--json with --watch: a program asks again by itself; leave --watch out.")

    from galaxydist.cluster.status import read_overview

    folders = [find_folder(text) for text in arguments.folders]
    if not folders and RUNS.is_dir():
        folders = [RUNS]
    if arguments.json:
        overview = read_overview(folders)
        print(json.dumps([status.to_dict() for status in overview.runs], indent=2))
        if overview.trouble:
            print(f"galaxydist: {overview.trouble}", file=sys.stderr)
        return
    console = _console()
    if arguments.watch is None:
        _print_overview(console, read_overview(folders), is_default=not arguments.folders)
    else:
        _watch(console, folders, arguments.watch)


def _print_overview(console: "Console", overview: "Overview", *, is_default: bool) -> None:
    from galaxydist.cluster.status_table import render_overview

    if not overview.runs and is_default:
        print(f"no runs under ./{RUNS}; give another folder: galaxydist status FOLDER")
        return
    with console.capture() as capture:  # rich would end the program where whoever read our output went away
        console.print(render_overview(overview, console.width))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _watch(console: "Console", folders: list[Path], interval_s: int) -> None:
    """Till Ctrl-C, which is no failure here."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from galaxydist.cluster.status import read_overview
    from galaxydist.cluster.status_table import render_overview, summary_text

    def look() -> Group:
        overview = read_overview(folders)
        # On top: a long table is cut at the terminal's end.
        stamp = f"{time.strftime('%H:%M:%S')}  {summary_text(overview.runs)}  (every {interval_s} s, Ctrl-C ends)"
        return Group(Text(stamp, "dim"), render_overview(overview, console.width))

    try:
        if not console.is_terminal:
            while True:
                console.print(look())
                time.sleep(interval_s)
        with Live(look(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(look(), refresh=True)
    except KeyboardInterrupt:
        return


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_WIDE)


def run_logs(arguments: argparse.Namespace) -> None:
    """Print the end of a log, and what is added to it."""
    from galaxydist.cluster.logs import find_logs, follow, last_lines, sizes
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.status import is_run

    folder = find_folder(arguments.folder)
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder. Give one: `galaxydist status {folder}` lists those below it.")
    files = JobFiles(folder)
    logs = sizes(find_logs(files, arguments.rank))
    if not logs and not arguments.follow:
        raise UserError(_no_logs(files, arguments.rank))
    for path, size in logs.items():
        if path != files.rank_log(arguments.rank):
            print(f"==> {path} <==", flush=True)
        sys.stdout.buffer.writelines(line + b"\n" for line in last_lines(path, arguments.lines, size))
    sys.stdout.flush()
    if arguments.follow:
        try:
            for added in follow(lambda: find_logs(files, arguments.rank), logs):
                sys.stdout.buffer.write(added)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return


def _no_logs(files: "JobFiles", rank: int) -> str:
    ranks = [path.stem.removeprefix("rank-") for path in files.rank_logs() if path.stat().st_size > 0]
    if ranks:
        return f"Rank {rank} of {files.run_dir} has printed nothing; there are logs of rank {', '.join(ranks)}."
    jobs = files.jobs()
    if not jobs:
        return f"{files.run_dir} has no logs: it was started by hand, and printed where that was done."
    return f"{files.run_dir} has printed nothing yet (job {jobs[-1].job_id}); `galaxydist status {files.run_dir}` tells why."


def run_cancel(arguments: argparse.Namespace) -> None:
    """End jobs, after asking where there are several; say what was done."""
    from galaxydist.cluster.cancel import cancel, find_targets

    found = find_targets(arguments.targets, find_folder)
    for text in found.notes:
        print(text)
    if not found.jobs:
        print("nothing to cancel")
        return
    if len(found.jobs) > 1 and not arguments.yes:
        _ask(len(found.jobs), [job.text for job in found.jobs])
    for text in cancel(found.jobs):
        print(text)


def _ask(count: int, texts: list[str]) -> None:
    if not sys.stdin.isatty():
        raise UserError(
            f"This would end {count} jobs ({', '.join(texts[:5])}{', ...' if count > 5 else ''}). Add --yes to do so."
        )
    for text in texts:
        print(f"  {text}")
    if input(f"End these {count} jobs? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was cancelled.")


# ``galaxydist submit``: one run as a job of the cluster.

SUBMIT_EPILOG = """examples:
  galaxydist submit                                         list the cluster profiles
  galaxydist submit recipe=vit cluster=a100
  galaxydist submit recipe=vit cluster=a100 cluster.nodes=2 cluster.time=04:00:00 optim.lr=1e-4
  galaxydist submit recipe=demo cluster=local               processes of this machine
  galaxydist submit recipe=vit cluster=a100 --dry-run       the batch script, and nothing else
  galaxydist submit recipe=vit cluster=a100 --test          when and where SLURM would start it
  galaxydist submit recipe=vit cluster=a100 cluster.after=123     once job 123 has ended well

The same command again continues the run; with cluster.nodes=1 on fewer nodes.
"""


def add_submit(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "submit",
        help="send a run to a cluster",
        description="Check a run on this machine, then send it to a cluster. It survives preemption and time limits.",
        epilog=SUBMIT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", metavar="recipe=NAME cluster=NAME [key=value]", help="what to run, and where")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the batch script")
    parser.add_argument("--test", action="store_true", help="check everything and ask SLURM when the job would start")
    parser.set_defaults(run=run_submit)


def run_submit(arguments: argparse.Namespace) -> None:
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
    from galaxydist.cluster.submit import ask_start, build_request, check_idle, script_of, submission_lock, submit_requests

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
    with submission_lock(request.run_dir.parent):
        check_idle(request.run_dir)
        (job_id,) = submit_requests([request], cluster, folder=folder, name=name)
    print(
        f"submitted job {job_id} to {cluster.config.name}: {cluster.config.num_tasks} processes on {cluster.config.nodes} nodes\n"
        f"run folder  {request.run_dir}\n"
        f"follow it   galaxydist status {request.run_dir} --watch\n"
        f"            galaxydist logs {request.run_dir} --follow\n"
        f"stop it     galaxydist cancel {request.run_dir}"
    )


# ``galaxydist sweep``: many runs from one file, as arrays of the cluster; again, what is missing of them.

POLL_SECONDS = 1.0
SWEEP_EPILOG = """examples:
  galaxydist sweep                                          list the sweeps
  galaxydist sweep slurm/sweeps/smoke.yaml                  a few tiny runs on this machine
  galaxydist sweep galaxy10 cluster=a100 --dry-run          what would be submitted, and the batch script
  galaxydist sweep galaxy10 cluster=a100 train.epochs=50    for all runs
  galaxydist sweep galaxy10 cluster=a100 recipe=vit         of that axis one value only

The same command again submits what was cut off, cancelled or never sent, and leaves alone what is finished, queued or running.
What failed so that it would fail again (bad input, a loss that is not a number, the same crash twice) waits for --retry-failed.
A key on the command line takes the place of the file's, of a whole axis too; run.root=DIR that of the folder of the runs.
"""


def add_sweep(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sweep",
        help="send many runs to a cluster",
        description="Check all runs of a sweep's file, then submit those that are neither finished nor on their way.",
        epilog=SWEEP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="the sweep's file, or the name of one in slurm/sweeps")
    parser.add_argument("arguments", nargs="*", metavar="cluster=NAME [key=value]", help="where to, and values for all runs")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the runs and the batch script")
    parser.add_argument("--retry-failed", action="store_true", help="also what failed so that it would fail again")
    parser.add_argument("--yes", action="store_true", help="submit without asking")
    parser.set_defaults(run=run_sweep)


def run_sweep(arguments: argparse.Namespace) -> None:
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


def _submit(due: "list[SweepRun]", sweep: "SweepFile", cluster: "ResolvedCluster", *, retry_failed: bool) -> None:
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.slurm import max_array_size, read_states
    from galaxydist.cluster.submit import JobRequest, submission_lock, submit_requests
    from galaxydist.cluster.sweep_runner import decide, is_local_job_running, read_facts, run_here, submit_arrays

    folder = due[0].run_dir.parent / "slurm"
    parallel = _parallel(sweep, cluster)

    def send(requests: "Sequence[JobRequest]", at_once: int | None, after: str | None) -> list[str]:
        return submit_requests(requests, cluster, folder=folder, name=sweep.path.stem, parallel=at_once, after=after)

    if cluster.config.scheduler == "slurm":
        with submission_lock(folder.parent):
            # Another command may have sent some while this one asked.
            decisions = [decide(facts, retry_failed=retry_failed) for facts in read_facts(due, read_states)]
            due = [trial for trial, decision in zip(due, decisions, strict=True) if decision.is_due]
            submit_arrays(due, send=send, chunk_size=max_array_size(), parallel=parallel)
        print(f"{parallel} run at the same time\nstop them   galaxydist cancel {folder.parent}")
        return
    print(
        f"{parallel} at the same time on this machine; this command waits for them. After Ctrl-C, the same command goes on.",
        flush=True,
    )
    failed = run_here(
        due,
        send=send,
        parallel=parallel,
        is_running=lambda trial: is_local_job_running(JobFiles(trial.run_dir).jobs()[-1]),
        judge=lambda trial: decide(read_facts([trial], read_states)[0], retry_failed=True),  # it was sent: any failure counts
        pause=lambda: time.sleep(POLL_SECONDS),
    )
    if failed:
        logs = "\n".join(f"  {trial.run_dir / 'logs'}" for trial in failed)
        print(f"{len(failed)} of {len(due)} trials did not finish; their logs:\n{logs}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _parallel(sweep: "SweepFile", cluster: "ResolvedCluster") -> int:
    from galaxydist.recipe.resolve import COMMAND_LINE

    is_typed = cluster.origins.get("parallel") == COMMAND_LINE
    return cluster.config.parallel if is_typed or sweep.parallel is None else sweep.parallel


def _show_script(due: "list[SweepRun]", sweep: "SweepFile", cluster: "ResolvedCluster") -> None:
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
