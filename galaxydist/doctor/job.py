"""The doctor's job: submitted, awaited, merged into a table; cancelled when it does not start or the user does not wait."""

import contextlib
import time
from collections.abc import Callable
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

# The doctor's job, of SLURM or of this machine: its state, and ending it with all of its processes.

ENDING_S = 10.0


class QueuedJob(Protocol):
    """What was submitted."""

    def look(self) -> JobState:
        """Its state; UNKNOWN with a reason where it cannot be told."""

    def end(self) -> None:
        """Cancel it, if it is still there."""


def is_waiting(state: JobState) -> bool:
    """It has not started."""
    return state.state in WAITING_STATES


def has_ended(state: JobState) -> bool:
    """It is over."""
    return not state.is_active and state.state != UNKNOWN


class SlurmQueuedJob:
    """A job of SLURM.

    Args:
        job_id: its number.
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
        job: submitit's.
    """

    def __init__(self, job: Any) -> None:
        self._job = job

    def look(self) -> JobState:
        return JobState(self._job.state)

    def end(self) -> None:
        """Its shell does not hand signals on: every process of the tree gets its own."""
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


# Whether a run is warned before SLURM preempts it: not tried, but read from the cluster's settings.

NAME = "preemption"


def check_preemption(cluster: ClusterConfig, site: Site | None = None) -> list[Check]:
    """What a preempted run of this profile can save; nothing for local runs and partitions that sbatch refuses anyway.

    Args:
        cluster: the profile.
        site: the cluster; default: this machine's SLURM is asked.
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
        with deferred_signals(), without_job_environment(), explain_refusal(cluster.name):
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
