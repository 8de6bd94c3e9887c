"""The doctor's job: submission, waiting, merged reports, and the cluster's preemption settings.

The job is cancelled if it does not start in time or the user interrupts the command.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from galaxydist.cluster.batch_script import build_executor, explain_refusal
from galaxydist.cluster.partition_check import chosen_partitions
from galaxydist.cluster.profile import MIN_SIGNAL_S, ClusterConfig
from galaxydist.cluster.site import SAVE_REMEDY, Partition, Site, find_preemption, read_site
from galaxydist.cluster.slurm import UNKNOWN, WAITING_STATES, JobState, SlurmUnavailableError, cancel_jobs, read_states
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.submit import deferred_signals, without_job_environment
from galaxydist.doctor.check import Check, failure, ok, read_reports, warning, worst_first
from galaxydist.doctor.merge import merge_reports
from galaxydist.doctor.rank import MEETING_S, Examination, examine_task
from galaxydist.errors import UserError

logger = logging.getLogger(__name__)

ENDING_S = 10.0
NAME = "preemption"


class QueuedJob:
    """The submitted job: a SLURM job, or processes that submitit started on this machine.

    Args:
        job: submitit's job.
        is_local: True for processes of this machine.
    """

    def __init__(self, job: Any, *, is_local: bool) -> None:
        self._job = job
        self._is_local = is_local

    def state(self) -> JobState:
        """Return the job's state; UNKNOWN with a reason if it cannot be determined."""
        if self._is_local:
            return JobState(self._job.state)
        try:
            return read_states([self._job.job_id])[self._job.job_id]
        except SlurmUnavailableError as error:
            return JobState(UNKNOWN, str(error))

    def has_ended(self) -> bool:
        return _has_ended(self.state())

    def cancel(self) -> None:
        """Cancel the job if it still exists."""
        if self._is_local:
            self._kill_processes()
        else:
            with contextlib.suppress(SlurmUnavailableError):
                cancel_jobs([self._job.job_id])

    def _kill_processes(self) -> None:
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


def _has_ended(state: JobState) -> bool:
    return not state.is_active and state.state != UNKNOWN


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
    except SlurmUnavailableError as error:
        return [warning(NAME, f"unknown: {error}", "see PreemptMode and GraceTime in `scontrol show partition`")]
    except UserError:
        return []
    found = [_check_partition(cluster, site, site.partitions[name]) for name in names]
    if len(found) < 2:
        return found
    worst = worst_first(found)[0]
    return [replace(worst, text="\n".join(check.text for check in found))]


def _check_partition(cluster: ClusterConfig, site: Site, partition: Partition) -> Check:
    qos = site.qos_of(cluster.qos, cluster.account, partition.name)
    preemption = find_preemption(site, partition, qos)
    name = f"partition {partition.name}"
    if preemption is None:
        return ok(NAME, f"{name}: its jobs are not preempted")
    if preemption.mode == "SUSPEND":
        return ok(NAME, f"{name}: a preempted job is suspended and resumed later (PreemptMode=SUSPEND)")
    is_requeued = preemption.mode == "REQUEUE" and cluster.requeue != "never"
    end, remedy = "ends and requeues the job" if is_requeued else "ends the job", SAVE_REMEDY
    if preemption.mode == "CANCEL":
        remedy += "; then submit it again"
    if preemption.grace_s is None:
        return warning(
            NAME,
            f"{name}: the time between the signal and the moment at which SLURM {end} is unknown ({preemption.kind})",
            remedy,
        )
    if preemption.grace_s == 0:
        return warning(NAME, f"{name}: no warning before preemption (GraceTime=0): SLURM {end} at once", remedy)
    text = f"{name}: SLURM sends {preemption.signal} {preemption.grace_s} s before it {end}"
    if preemption.is_too_short:
        return warning(NAME, f"{text}, less than the {MIN_SIGNAL_S} s that a save needs", remedy)
    return ok(NAME, text)


# Longer than all parts together if each one times out.
JOB_MIN = 15
# SLURM's signal before the time limit must not come during the checks, so it is sent at most this long before the end.
MAX_SIGNAL_S = 60
POLL_S = 1.0
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
            queued = QueuedJob(job, is_local=cluster.scheduler == "local")
        logger.info("job %s, %d processes on %d nodes; reports go to %s", job.job_id, cluster.num_tasks, cluster.nodes, folder)
        return [*_follow(queued, folder, short, wait_s), *check_preemption(cluster)]
    except UserError as error:
        if queued is not None:
            raise
        text, _, remedy = str(error).partition("\n")
        return [failure("job", text, remedy)]
    finally:
        if queued is not None and not queued.has_ended():
            queued.cancel()


def short_profile(cluster: ClusterConfig) -> ClusterConfig:
    """Return the profile of the doctor's job: short, and never requeued."""
    return cluster.model_copy(
        update={
            "time": min(cluster.time_min, JOB_MIN),
            "signal_s": min(cluster.signal_s, MAX_SIGNAL_S),
            "requeue": "never",
            "after": None,
        }
    )


def _follow(job: QueuedJob, folder: Path, cluster: ClusterConfig, wait_s: float) -> list[Check]:
    """Wait until all ranks are done or the job has ended, and merge the reports."""
    submitted = started = time.monotonic()
    state = JobState(UNKNOWN)
    while True:
        reports = read_reports(folder)
        if len(reports) == cluster.num_tasks and all(report.is_done for report in reports):
            _wait_until(job.has_ended)
            break
        state, now = job.state(), time.monotonic()
        if _has_ended(state):
            _wait_until(lambda: len(read_reports(folder)) == cluster.num_tasks)
            reports = read_reports(folder)
            break
        if reports or state.state not in (*WAITING_STATES, UNKNOWN):
            if now - started > cluster.time_min * 60 + SETTLING_S:
                break
        elif now - submitted > wait_s:
            return [_not_started(state, wait_s)]
        else:
            started = now
        time.sleep(POLL_S)
    checks = merge_reports(reports, cluster.num_tasks, cluster.gpus_per_node, in_container=cluster.container is not None)
    if len(reports) < cluster.num_tasks or not all(report.is_done for report in reports):
        checks.append(_ended_early(folder / "output", state, bool(reports)))
    return checks


def _wait_until(is_true: Callable[[], bool]) -> None:
    """Wait a few seconds for a job to end after its ranks are done, or for its last reports after its end."""
    until = time.monotonic() + SETTLING_S
    while time.monotonic() < until and not is_true():
        time.sleep(POLL_S / 5)


def _not_started(state: JobState, wait_s: float) -> Check:
    return failure(
        "job",
        f"did not start within {wait_s:g} s: state {state.state}, reason {state.reason or 'unknown'}. It was cancelled",
        "wait longer (--wait SECONDS), request less (cluster.nodes, cluster.gpus_per_node) or another cluster.partition; "
        "`sinfo` shows free nodes, `squeue --start` the expected start",
    )


def _ended_early(output: Path, state: JobState, has_reports: bool) -> Check:
    """Return the failure of a job that ended early, with the last lines of its output."""
    lines: list[str] = []
    for path in sorted(output.glob("*.err")) or sorted(output.glob("*.out")):
        written = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        lines += [f"{path.name}: {line}" for line in written[-LAST_LINES:]]
    text = f"state {state.state}; output in {output}"
    if lines:
        return failure("job", "\n".join([text, *lines[: 4 * LAST_LINES]]), "the lines above show the failure on the node")
    if has_reports:
        return failure("job", text, "run the command again; if a rank ends in the same part, check that part")
    return failure(
        "job",
        f"{text}: the nodes wrote no output there",
        "run folders must be on a file system that all nodes share: give --run-root FOLDER (run.root=FOLDER for runs)",
    )


def _new_folder(parent: Path, name: str) -> Path:
    """Create a new folder for the reports of this job, which other users may read."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-", dir=parent.absolute()))
    folder.chmod(0o755)
    return folder
