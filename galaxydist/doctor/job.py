"""The doctor's job: submission, waiting, merged report, and the cluster's preemption settings.

The job is cancelled if it does not start in time or the user interrupts the command.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import psutil

from galaxydist.cluster.executor import build_executor, explain_refusal
from galaxydist.cluster.partition_check import chosen_partitions
from galaxydist.cluster.profile import MIN_SIGNAL_S, ClusterConfig
from galaxydist.cluster.site import SAVE_REMEDY, Partition, Preemption, Site, SiteUnknownError, find_preemption, read_site
from galaxydist.cluster.slurm import UNKNOWN, WAITING_STATES, JobState, SlurmUnavailableError, cancel_jobs, read_states
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.submit import deferred_signals, without_job_environment
from galaxydist.doctor.check import LEVELS, Check, RankReport, failure, ok, read_reports, warning
from galaxydist.doctor.merge import merge_reports
from galaxydist.doctor.rank import MEETING_S, Examination, examine_task
from galaxydist.errors import UserError

logger = logging.getLogger(__name__)

ENDING_S = 10.0


class QueuedJob(Protocol):
    """A submitted job."""

    def look(self) -> JobState:
        """Return the job's state; UNKNOWN with a reason if it cannot be determined."""

    def end(self) -> None:
        """Cancel the job if it still exists."""


def is_waiting(state: JobState) -> bool:
    """Return True if the job has not started."""
    return state.state in WAITING_STATES


def has_ended(state: JobState) -> bool:
    """Return True if the job has ended."""
    return not state.is_active and state.state != UNKNOWN


class SlurmQueuedJob:
    """A SLURM job.

    Args:
        job_id: SLURM's job id.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id

    def look(self) -> JobState:
        try:
            return read_states([self.job_id])[self.job_id]
        except SlurmUnavailableError as error:
            return JobState(UNKNOWN, str(error))

    def end(self) -> None:
        with contextlib.suppress(SlurmUnavailableError):
            cancel_jobs([self.job_id])


class LocalQueuedJob:
    """Processes that submitit started on this machine.

    Args:
        job: submitit's local job.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def look(self) -> JobState:
        return JobState(self._job.state)

    def end(self) -> None:
        """Signal every process of the job's process tree, because its shell does not forward signals."""
        try:
            root = psutil.Process(int(self._job.job_id))
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    stop(process)
            _, tree = psutil.wait_procs(tree, timeout=ENDING_S)


NAME = "preemption"


def check_preemption(cluster: ClusterConfig, site: Site | None = None) -> list[Check]:
    """Check in the cluster's settings that SLURM sends a signal to a run of this profile before preempting it.

    Args:
        cluster: the profile.
        site: the cluster description; default: from this machine's SLURM.

    Returns:
        One check; none for local runs, and none for partitions that sbatch refuses anyway.
    """
    if cluster.scheduler == "local":
        return []
    try:
        site = site or read_site()
        names = chosen_partitions(cluster, site)
    except SiteUnknownError as error:
        return [warning(NAME, f"not known: {error}", "look at PreemptMode and GraceTime in `scontrol show partition`")]
    except UserError:
        return []
    found = [_judge(cluster, site, site.partitions[name]) for name in names]
    if len(found) < 2:
        return found
    worst = max(found, key=lambda check: LEVELS.index(check.level))
    return [Check(NAME, worst.level, "\n".join(check.text for check in found), worst.remedy)]


def _judge(cluster: ClusterConfig, site: Site, partition: Partition) -> Check:
    qos = site.qos_of(cluster.qos, cluster.account, partition.name)
    preemption = find_preemption(site, partition, qos)
    where = f"partition {partition.name}"
    if preemption is None:
        return ok(NAME, f"{where}: its jobs are not preempted")
    if preemption.mode == "SUSPEND":
        return ok(NAME, f"{where}: a preempted job is suspended, and goes on later (PreemptMode=SUSPEND)")
    end, remedy = _end(cluster, preemption), SAVE_REMEDY
    if preemption.mode == "CANCEL":
        remedy += "; then submit it again"
    if preemption.grace_s is None:
        return warning(NAME, f"{where}: SLURM does not tell how long before it {end} ({preemption.kind}) it says so", remedy)
    if preemption.grace_s == 0:
        return warning(NAME, f"{where}: no warning before preemption (GraceTime=0): SLURM {end} at once", remedy)
    text = f"{where}: SLURM sends {preemption.signal} {preemption.grace_s} s before it {end}"
    if preemption.is_too_short:
        return warning(NAME, f"{text}, less than the {MIN_SIGNAL_S} s that a save needs", remedy)
    return ok(NAME, text)


def _end(cluster: ClusterConfig, preemption: Preemption) -> str:
    is_requeued = preemption.mode == "REQUEUE" and cluster.requeue != "never"
    return "ends and requeues the job" if is_requeued else "ends the job"


# Longer than all parts of the examination if each one times out.
JOB_MIN = 15
# SLURM's signal before the time limit must not interrupt the examination, so it comes at most this long before the end.
MOST_SIGNAL_S = 60
LOOK_S = 1.0
# On a network file system the last reports may appear this much later than the end of the job.
SETTLING_S = 10.0
LAST_LINES = 3


def doctor_cluster(
    cluster: ClusterConfig,
    *,
    runs: Path,
    data_dir: Path | None,
    wait_s: float,
    meeting_s: float = MEETING_S,
) -> list[Check]:
    """Submit a short job of the profile's size and return the checks of its ranks.

    Args:
        cluster: the profile.
        runs: the folder of run folders; the reports go to its subfolder ``doctor/``.
        data_dir: the data root, if given.
        wait_s: seconds that the job may wait for its start.
        meeting_s: seconds that a rank waits for the others.
    """
    folder = _new_folder(runs / "doctor", cluster.name)
    short = short_profile(cluster)
    code = take_snapshot(runs / "doctor" / "code", {})
    examination = Examination(folder, data_dir, cluster.scratch, cluster.gpus_per_node, meeting_s)
    queued: QueuedJob | None = None
    try:
        # An interrupt during or right after the submission must cancel the job too.
        with deferred_signals(), without_job_environment(), explain_refusal(cluster.name):
            executor = build_executor(short, folder / "output", name=f"doctor-{cluster.name}", code=code)
            job = executor.submit(examine_task, examination)
            queued = LocalQueuedJob(job) if cluster.scheduler == "local" else SlurmQueuedJob(job.job_id)
        logger.info("job %s, %d processes on %d nodes; reports go to %s", job.job_id, cluster.num_tasks, cluster.nodes, folder)
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
    """Return the profile of the doctor's job: short, and never requeued."""
    return cluster.model_copy(
        update={
            "time": min(cluster.time_min, JOB_MIN),
            "signal_s": min(cluster.signal_s, MOST_SIGNAL_S),
            "requeue": "never",
            "after": None,
        }
    )


def _follow(job: QueuedJob, folder: Path, cluster: ClusterConfig, wait_s: float) -> list[Check]:
    """Wait until all ranks are done or the job has ended, and merge the reports."""
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
    """Wait a few seconds for the job to end after its ranks are done."""
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
    """Return the failure of a job that ended early, with the last lines of its output."""
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
    """Create a new folder for this examination."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        folder = (parent / (stem if number == 0 else f"{stem}-{number}")).absolute()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError(f"{parent} is full of {stem}")
