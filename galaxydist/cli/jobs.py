"""``galaxydist submit``, ``sweep``, ``status``, ``cost``, ``logs`` and ``cancel``: jobs of runs on a cluster."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import Commands, add_command, confirm, non_negative_int, positive_int
from galaxydist.cluster.slurm import max_array_size, read_states
from galaxydist.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from galaxydist.cluster.profile import ResolvedCluster
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.search.trial_runs import PlannedSearch
    from galaxydist.cluster.status import Overview
    from galaxydist.cluster.sweep import SweepFile, SweepRun
    from galaxydist.recipe.resolve import ResolvedRecipe


RUNS = Path("runs")
WATCH_S = 10
POLL_S = 1.0  # between looks at the processes of a sweep on this machine
_PIPE_WIDTH = 200  # columns of a table that is written to a file or a pipe

STATUS_EPILOG = """examples:
  galaxydist status                    all runs in ./runs and its subfolders, down to two levels
  galaxydist status runs/vit-0123abcd  one run, by its folder
  galaxydist status vit-0123abcd       the same run, by its name
  galaxydist status runs/sweep --watch a sweep, updated every 10 s

States are those of SLURM; without a waiting or running job they come from the run folder: FINISHED, PRUNED, STOPPED, FAILED, NEW.
"time left" is the time until the job's time limit, "to do" the rest of the training at the last measured speed.
"last event" is the kind and the age of the newest line of events.jsonl; --json has its text too.
"""


def add_status(commands: Commands) -> None:
    """Add ``status``, ``logs`` and ``cancel``."""
    status = add_command(
        commands,
        "status",
        run_status,
        "show a table of runs",
        description="Show the state of runs from SLURM and their progress from the run folders.",
        epilog=STATUS_EPILOG,
    )
    status.add_argument("folders", nargs="*", metavar="RUN|FOLDER", help="run folders, or folders of runs (default: ./runs)")
    status.add_argument(
        "--watch",
        nargs="?",
        type=positive_int,
        const=WATCH_S,
        metavar="SECONDS",
        help="update the table until Ctrl-C (default: every %(const)s s)",
    )
    status.add_argument("--json", action="store_true", help="print a list of JSON objects instead of the table")

    description = "Print the last lines of the output of one rank of a run."
    logs = add_command(commands, "logs", run_logs, "show the output of a run", description=description)
    logs.add_argument("folder", metavar="RUN", help="run folder, or its name in ./runs")
    logs.add_argument("--rank", type=non_negative_int, default=0, metavar="R", help="rank (default: %(default)s)")
    logs.add_argument("--lines", type=positive_int, default=50, metavar="N", help="number of lines (default: %(default)s)")
    logs.add_argument("--follow", "-f", action="store_true", help="print new lines until Ctrl-C")

    description = "Cancel the waiting and running jobs of runs or sweeps. A run that is submitted again continues."
    cancel = add_command(commands, "cancel", run_cancel, "cancel the jobs of runs", description=description)
    cancel.add_argument("targets", nargs="+", metavar="RUN|FOLDER|JOBID", help="run folders, folders of runs, or SLURM job ids")
    cancel.add_argument("--yes", action="store_true", help="cancel several jobs without asking")


COST_EPILOG = """examples:
  galaxydist cost                      all runs in ./runs and its subfolders, down to two levels
  galaxydist cost runs/sweep           a sweep, with its sum
  galaxydist cost runs/sweep --json    the same for a program, with every start of every run

Device hours count every start of a run, from the start to the end of its job or process, times its GPUs; without a GPU times its
CPU cores. "lost" are steps that a restart repeated, "unknown" is what neither the run folder nor SLURM records.
"""


def add_cost(commands: Commands) -> None:
    """Add the command."""
    cost = add_command(
        commands,
        "cost",
        run_cost,
        "show the device hours of runs",
        description="Show the GPU hours (else CPU core hours) of runs, and how many were lost to restarts, start-up and waiting.",
        epilog=COST_EPILOG,
    )
    cost.add_argument("folders", nargs="*", metavar="RUN|FOLDER", help="run folders, or folders of runs (default: ./runs)")
    cost.add_argument("--json", action="store_true", help="print a JSON object instead of the table")


def run_cost(arguments: argparse.Namespace) -> None:
    """Print the table."""
    from galaxydist.cluster.status import name_runs
    from galaxydist.report.cost import read_all_hours, render_hours, total_hours

    folders = [find_folder(text) for text in arguments.folders] or [RUNS] * RUNS.is_dir()
    names = name_runs(folders)
    if not names:
        places = ", ".join(map(str, folders)) or f"./{RUNS}"
        raise UserError(f"There is no run in {places}: give a run folder, or a folder that contains some.")
    runs, notes = read_all_hours(names)
    if arguments.json:
        content = {"total": total_hours(runs), "runs": [run.to_dict() for run in runs], "notes": notes}
        print(json.dumps(content, indent=2))
        return
    print(render_hours(runs))
    for note in notes:
        print(f"galaxydist: {note}", file=sys.stderr)


def find_folder(text: str) -> Path:
    """Return the folder of this path, or of this name in ./runs.

    Raises:
        UserError: there is neither.
    """
    for path in (Path(text), RUNS / text):
        if path.is_dir():
            return path
    raise UserError(f"{text}: there is no such folder, nor {RUNS / text}; `galaxydist status FOLDER` lists the runs of a folder")


def run_status(arguments: argparse.Namespace) -> None:
    """Print the table, once or repeatedly."""
    if arguments.json and arguments.watch:
        raise UserError("--json prints once and --watch repeatedly: leave one of them out.")

    from galaxydist.cluster.status import read_overview

    folders = [find_folder(text) for text in arguments.folders]
    if not folders and RUNS.is_dir():
        folders = [RUNS]
    if arguments.json:
        overview = read_overview(folders)
        print(json.dumps([status.to_dict() for status in overview.runs], indent=2))
        if overview.slurm_error:
            print(f"galaxydist: {overview.slurm_error}", file=sys.stderr)
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
    with console.capture() as capture:  # rich itself would end the program when the output's reader closes the pipe
        console.print(render_overview(overview, console.width))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _watch(console: "Console", folders: list[Path], interval_s: int) -> None:
    """Update the table until Ctrl-C, which is not an error here."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from galaxydist.cluster.status import read_overview
    from galaxydist.cluster.status_table import render_overview, summary_text

    def look() -> Group:
        overview = read_overview(folders)
        # On top, because a long table is cut at the bottom of the terminal.
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
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_PIPE_WIDTH)


def run_logs(arguments: argparse.Namespace) -> None:
    """Print the end of a log, and follow it."""
    from galaxydist.cluster.logs import find_logs, follow, last_lines, sizes
    from galaxydist.cluster.records import JobFiles
    from galaxydist.runs.listing import is_run

    folder = find_folder(arguments.folder)
    if not is_run(folder):
        raise UserError(f"{folder} is not a run folder. Give a run folder: `galaxydist status {folder}` lists those inside.")
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
        return f"{files.run_dir} has no logs: it was started without `galaxydist submit`, and its output went to that terminal."
    return (
        f"{files.run_dir} has printed nothing yet (job {jobs[-1].job_id}); `galaxydist status {files.run_dir}` shows its state."
    )


def run_cancel(arguments: argparse.Namespace) -> None:
    """Cancel jobs, after a confirmation if there are several."""
    from galaxydist.cluster.running_jobs import cancel, find_targets

    jobs, notes = find_targets(arguments.targets, find_folder)
    for text in notes:
        print(text)
    if not jobs:
        print("nothing to cancel")
        return
    if len(jobs) > 1 and not arguments.yes:
        _confirm_cancel([job.text for job in jobs])
    for text in cancel(jobs):
        print(text)


def _confirm_cancel(texts: list[str]) -> None:
    refusal = f"This would end {len(texts)} jobs ({', '.join(texts[:5])}{', ...' if len(texts) > 5 else ''}). Add --yes to do so."
    if sys.stdin.isatty():
        print(*(f"  {text}" for text in texts), sep="\n")
    if not confirm(f"End these {len(texts)} jobs?", refusal):
        raise UserError("Nothing was cancelled.")


SUBMIT_EPILOG = """examples:
  galaxydist submit                                         list the cluster profiles
  galaxydist submit recipe=vit cluster=a100
  galaxydist submit recipe=vit cluster=a100 cluster.nodes=2 cluster.time=04:00:00 optim.lr=1e-4
  galaxydist submit recipe=demo cluster=local               run processes on this machine
  galaxydist submit recipe=vit cluster=a100 --dry-run       print the batch script only
  galaxydist submit recipe=vit cluster=a100 --test          ask SLURM when and where the job would start
  galaxydist submit recipe=vit cluster=a100 cluster.after=123     start after job 123 has succeeded

The same command again continues the run, also on another number of nodes.
"""


def add_submit(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "submit",
        run_submit,
        "submit a run to a cluster",
        description="Check a run on this machine, then submit it to a cluster. The run survives preemption and time limits.",
        epilog=SUBMIT_EPILOG,
    )
    parser.add_argument("arguments", nargs="*", metavar="recipe=NAME cluster=NAME [key=value]", help="recipe and cluster profile")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the batch script")
    parser.add_argument("--test", action="store_true", help="check everything and ask SLURM when the job would start")


def run_submit(arguments: argparse.Namespace) -> None:
    """Submit a run and print how to follow it."""
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

    from galaxydist.cluster.partition_check import check_partition
    from galaxydist.cluster.preflight import check_request
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.submit import ask_start, build_request, check_idle, script_of, submission_lock, submit_requests

    request = build_request(resolved, recipe_arguments)
    is_due = check_request(resolved, cluster.config, os.environ)
    check_partition(cluster.config)
    folder, name = JobFiles(request.run_dir).slurm_dir, request.run_dir.name
    if arguments.dry_run or arguments.test:
        script = script_of([request], cluster, folder=folder, name=name)
        print(ask_start(script, cluster.config.name) if arguments.test else script)
        return
    if not is_due:
        print(f"{request.run_dir} is finished; `galaxydist evaluate {request.run_dir}` evaluates it again.")
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


SWEEP_EPILOG = """examples:
  galaxydist sweep                                          list the sweeps
  galaxydist sweep slurm/sweeps/smoke.yaml                  a few tiny runs on this machine
  galaxydist sweep galaxy10 cluster=a100 --dry-run          print the runs and the batch script only
  galaxydist sweep galaxy10 cluster=a100 train.epochs=50    change a key of all runs
  galaxydist sweep galaxy10 cluster=a100 recipe=vit         only one value of this axis of the grid

The same command again submits runs that were interrupted, cancelled or never submitted; it skips finished, queued and running
ones. A run that would fail again (bad input, a non-finite loss, the same crash twice) is submitted only with --retry-failed.
A key on the command line replaces the value, or the whole axis, of the sweep file; run.root=DIR replaces its folder of runs.
"""


def add_sweep(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "sweep",
        run_sweep,
        "submit many runs to a cluster",
        description="Check all runs of a sweep file, then submit those that are neither finished nor queued nor running.",
        epilog=SWEEP_EPILOG,
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="sweep file, or the name of one in slurm/sweeps")
    parser.add_argument(
        "arguments", nargs="*", metavar="cluster=NAME [key=value]", help="cluster profile, and values for all runs"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, and print the runs and the batch script")
    parser.add_argument("--retry-failed", action="store_true", help="also submit runs that would probably fail again")
    parser.add_argument("--yes", action="store_true", help="submit without asking")


def run_sweep(arguments: argparse.Namespace) -> None:
    """Check a sweep, and submit the runs that are missing."""
    from galaxydist.cluster.sweep import find_sweep, list_sweeps, read_sweep, resolve

    if arguments.file is None:
        print("sweeps:", *(f"  {path}" for path in list_sweeps().values()), sep="\n")
        return

    from galaxydist.cluster.profile import load_cluster, split_arguments

    recipe_arguments, cluster_arguments = split_arguments(arguments.arguments)
    sweep = read_sweep(find_sweep(arguments.file))
    if sweep.cluster is not None and not any(argument.startswith("cluster=") for argument in cluster_arguments):
        cluster_arguments = [f"cluster={sweep.cluster}", *cluster_arguments]
    cluster = load_cluster(cluster_arguments)

    from galaxydist.cluster.partition_check import check_partition
    from galaxydist.cluster.preflight import check_request
    from galaxydist.cluster.sweep_runner import decide, read_run_states, render_runs, summarise

    def check(resolved: "ResolvedRecipe") -> None:
        check_request(resolved, cluster.config, os.environ)

    runs = resolve(sweep, recipe_arguments, check=check)
    search = None
    if sweep.search is not None:
        search = _plan_search(sweep, runs, cluster, check)
        runs = list(search.runs)
    check_partition(cluster.config)
    decisions = [decide(facts, retry_failed=arguments.retry_failed) for facts in read_run_states(runs, read_states)]
    due = [run for run, decision in zip(runs, decisions, strict=True) if decision.is_due]
    if arguments.dry_run or search is not None:
        print(f"{render_runs(runs, decisions, search.values() if search is not None else None)}\n")
    print(f"{sweep.path}: {summarise(decisions)}")
    if arguments.dry_run:
        if due:
            _show_script(due, sweep, cluster)
        return
    name = cluster.config.name
    refusal = f"{len(due)} runs would go to {name}, and stdin is no terminal: add --yes, or --dry-run"
    num_failed = 0
    if due and (arguments.yes or confirm(f"submit {len(due)} to {name}?", refusal)):
        if search is not None:
            search.open_study()
        num_failed = _submit(due, sweep, cluster, retry_failed=arguments.retry_failed)
    if search is not None:
        search.settle(read_states)
        print(search.describe_best())
    print(f"runs        {runs[0].run_dir.parent}\nfollow them galaxydist status {runs[0].run_dir.parent} --watch")
    if num_failed:
        sys.exit(EXIT_FAILED)


def _plan_search(
    sweep: "SweepFile",
    corners: "Sequence[SweepRun]",
    cluster: "ResolvedCluster",
    check: "Callable[[ResolvedRecipe], None]",
) -> "PlannedSearch":
    from galaxydist.cluster.preflight import check_validation
    from galaxydist.cluster.search.trial_runs import plan_search

    check_validation(corners[0].resolved, cluster.config, os.environ)
    return plan_search(sweep, corners, check=check)


def _submit(due: "list[SweepRun]", sweep: "SweepFile", cluster: "ResolvedCluster", *, retry_failed: bool) -> int:
    """Submit runs, or run them on this machine, and return the number of those that did not finish here."""
    from galaxydist.cluster.records import JobFiles
    from galaxydist.cluster.running_jobs import local_state
    from galaxydist.cluster.submit import JobRequest, submission_lock, submit_requests
    from galaxydist.cluster.sweep_runner import decide, read_run_states, run_here, submit_arrays

    folder = due[0].run_dir.parent / "slurm"
    parallel = _parallel(sweep, cluster)

    def send(requests: "Sequence[JobRequest]", at_once: int | None, after: str | None) -> list[str]:
        return submit_requests(requests, cluster, folder=folder, name=sweep.path.stem, parallel=at_once, after=after)

    if cluster.config.scheduler == "slurm":
        with submission_lock(folder.parent):
            # Another command may have submitted some of them in the meantime.
            decisions = [decide(facts, retry_failed=retry_failed) for facts in read_run_states(due, read_states)]
            due = [run for run, decision in zip(due, decisions, strict=True) if decision.is_due]
            submit_arrays(due, send=send, chunk_size=max_array_size(), parallel=parallel)
        print(f"{parallel} run at the same time\nstop them   galaxydist cancel {folder.parent}")
        return 0
    print(
        f"{parallel} at the same time on this machine; this command waits for them. After Ctrl-C, the same command continues.",
        flush=True,
    )
    failed = run_here(
        due,
        send=send,
        lock=lambda: submission_lock(folder.parent),
        parallel=parallel,
        is_running=lambda run: local_state(JobFiles(run.run_dir).jobs()[-1]) is not None,
        decide_again=lambda run: decide(read_run_states([run], read_states)[0], retry_failed=True),  # any failure counts
        pause=lambda: time.sleep(POLL_S),
    )
    if failed:
        logs = "\n".join(f"  {run.run_dir / 'logs'}" for run in failed)
        print(f"{len(failed)} of {len(due)} runs did not finish; their logs:\n{logs}", file=sys.stderr)
    return len(failed)


def _parallel(sweep: "SweepFile", cluster: "ResolvedCluster") -> int:
    from galaxydist.recipe.resolve import COMMAND_LINE

    is_typed = cluster.origins.get("parallel") == COMMAND_LINE
    return cluster.config.parallel if is_typed or sweep.parallel is None else sweep.parallel


def _show_script(due: "list[SweepRun]", sweep: "SweepFile", cluster: "ResolvedCluster") -> None:
    """Print the batch script of the first array."""
    if cluster.config.scheduler == "local":
        print(f"\nno batch script: {_parallel(sweep, cluster)} at the same time as processes of this machine")
        return
    from galaxydist.cluster.submit import script_of
    from galaxydist.cluster.sweep_runner import request_of

    size = max_array_size()
    requests = [request_of(run) for run in due[:size]]
    arrays = -(-len(due) // size)
    print(f"\n# the batch script{f' of the first of {arrays} arrays' if arrays > 1 else ''}")
    folder, parallel = due[0].run_dir.parent / "slurm", _parallel(sweep, cluster)
    print(script_of(requests, cluster, folder=folder, name=sweep.path.stem, parallel=parallel))
