"""The doctor's job: submitted, awaited, merged into a table; cancelled when it does not start or the user does not wait."""

import time
from collections.abc import Callable
from pathlib import Path

from galaxydist.cluster.doctor.check import Check, failure
from galaxydist.cluster.doctor.merge import merge_reports
from galaxydist.cluster.doctor.preemption import check_preemption
from galaxydist.cluster.doctor.queue import LocalQueuedJob, QueuedJob, SlurmQueuedJob, has_ended, is_waiting
from galaxydist.cluster.doctor.rank import MEETING_S, Examination, examine_task
from galaxydist.cluster.doctor.report import RankReport, read_reports
from galaxydist.cluster.executor import build_executor, explain_refusal
from galaxydist.cluster.profile import ClusterConfig
from galaxydist.cluster.slurm import UNKNOWN, JobState
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.submit import plain_environment, signals_later
from galaxydist.errors import UserError

# Longer than all parts of the examination take when every one of them fails by its limit.
JOB_MIN = 15
# The signal before the time limit is no part of the examination: as late as a profile of a minute or two has it.
MOST_SIGNAL_S = 60
LOOK_S = 1.0
# A network file system may show the last reports so much later than SLURM the job's end.
SETTLING_S = 10.0
LAST_LINES = 3


def doctor_cluster(
    cluster: ClusterConfig,
    *,
    runs: Path,
    data_dir: Path | None,
    wait_s: float,
    say: Callable[[str], None],
    meeting_s: float = MEETING_S,
) -> list[Check]:
    """Submit a short job of the profile's size and judge what its ranks find.

    Args:
        cluster: the profile.
        runs: the folder of run folders; the reports go to ``doctor/`` in it.
        data_dir: the data root, where it was given.
        wait_s: how long the job may wait for its start.
        say: tells the user how it goes on.
        meeting_s: how long a rank waits for the others.
    """
    folder = _new_folder(runs / "doctor", cluster.name)
    short = short_profile(cluster)
    code = take_snapshot(runs / "doctor" / "code", {})
    examination = Examination(folder, data_dir, cluster.scratch, cluster.gpus_per_node, meeting_s)
    queued: QueuedJob | None = None
    try:
        # Whoever is interrupted while SLURM takes the job, or right after it, cancels it too.
        with signals_later(), plain_environment(), explain_refusal(cluster.name):
            executor = build_executor(short, folder / "output", name=f"doctor-{cluster.name}", code=code)
            job = executor.submit(examine_task, examination)
            queued = LocalQueuedJob(job) if cluster.scheduler == "local" else SlurmQueuedJob(job.job_id)
        say(f"job {job.job_id}, {cluster.num_tasks} processes on {cluster.nodes} nodes; reports go to {folder}")
        return [*_follow(queued, folder, short, wait_s), *check_preemption(cluster)]
    except UserError as error:
        if queued is not None:
            raise
        said, _, remedy = str(error).partition("\n")
        return [failure("job", said, remedy)]
    finally:
        if queued is not None and not has_ended(queued.look()):
            queued.end()


def short_profile(cluster: ClusterConfig) -> ClusterConfig:
    """The profile for the doctor's job: short, and never requeued."""
    return cluster.model_copy(
        update={
            "time": min(cluster.time_min, JOB_MIN),
            "signal_s": min(cluster.signal_s, MOST_SIGNAL_S),
            "requeue": "never",
            "after": None,
        }
    )


def _follow(job: QueuedJob, folder: Path, cluster: ClusterConfig, wait_s: float) -> list[Check]:
    """Wait until all ranks are done or the job is no more."""
    began = started = time.monotonic()
    seen = JobState(UNKNOWN)
    while True:
        reports = read_reports(folder)
        if len(reports) == cluster.num_tasks and all(report.is_done for report in reports):
            _await_end(job)
            break
        seen, now = job.look(), time.monotonic()
        if has_ended(seen):
            reports = _settle(folder, cluster.num_tasks)
            break
        if reports or not (is_waiting(seen) or seen.state == UNKNOWN):
            if now - started > cluster.time_min * 60 + SETTLING_S:
                break
        elif now - began > wait_s:
            return [_not_started(seen, wait_s)]
        else:
            started = now
        time.sleep(LOOK_S)
    checks = merge_reports(reports, cluster.num_tasks, cluster.gpus_per_node, in_container=cluster.container is not None)
    if len(reports) < cluster.num_tasks or not all(report.is_done for report in reports):
        checks.append(_broken_off(folder / "output", seen, bool(reports)))
    return checks


def _await_end(job: QueuedJob) -> None:
    """The ranks are done: give the job the moment that it takes to leave."""
    until = time.monotonic() + SETTLING_S
    while time.monotonic() < until and not has_ended(job.look()):
        time.sleep(LOOK_S / 5)


def _settle(folder: Path, num_tasks: int) -> list[RankReport]:
    until = time.monotonic() + SETTLING_S
    while len(reports := read_reports(folder)) < num_tasks and time.monotonic() < until:
        time.sleep(LOOK_S)
    return reports


def _not_started(seen: JobState, wait_s: float) -> Check:
    return failure(
        "job",
        f"did not start within {wait_s:g} s: state {seen.state}, reason {seen.reason or 'not told'}. It was cancelled",
        "wait longer (--wait SECONDS), ask for less (cluster.nodes, cluster.gpus_per_node) or another cluster.partition; "
        "`sinfo` shows what is free, `squeue --start` when",
    )


def _broken_off(output: Path, seen: JobState, has_reports: bool) -> Check:
    """What the output of a job says that did not come to its end."""
    lines: list[str] = []
    for path in sorted(output.glob("*.err")) or sorted(output.glob("*.out")):
        told = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        lines += [f"{path.name}: {line}" for line in told[-LAST_LINES:]]
    text = f"state {seen.state}; output in {output}"
    if lines:
        return failure("job", "\n".join([text, *lines[: 4 * LAST_LINES]]), "the lines above say what failed on the node")
    if has_reports:
        return failure("job", text, "give the command again; if a rank ends at the same part, look at that part")
    return failure(
        "job",
        f"{text}: the nodes wrote nothing there",
        "run folders must be on a file system that all nodes share: give --run-root FOLDER (run.root=FOLDER for runs)",
    )


def _new_folder(parent: Path, name: str) -> Path:
    """A folder of this examination's own."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = (parent / (stem if number == 0 else f"{stem}-{number}")).absolute()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError(f"{parent} is full of {stem}")
