"""Job states from squeue and sacct, and cancellation of jobs with scancel.

submitit's own watcher is not used: it polls only every 600 s unless forced, needs accounting, and knows neither why a job waits
nor its time left. Here one call covers all jobs: squeue for those that are queued, run or have just ended, sacct for the rest.

The text output is parsed, not ``--json``: in SLURM 22.05 sacctmgr and scontrol have none, types of fields change between versions
(``job_state`` was a string and became a list), and sites may lack the serializer plugin.
"""

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from galaxydist.errors import UserError

TIMEOUT_S = 30.0
# The user's settings of SLURM's output are removed; SLURM_BITSTR_LEN=0: array ids are not shortened.
_OWN_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
_ENVIRONMENT = {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
# Connection failures, timeouts and a standby controller in src/common/slurm_errno.c; and our own messages.
_UNAVAILABLE = re.compile(
    r"unable to contact|connection (refused|reset|timed out)|socket timed out|zero bytes were transmitted|in standby mode|"
    r"communication|SLURM did not answer|no SLURM on this machine|try again",
    re.IGNORECASE,
)


class SlurmUnavailableError(UserError):
    """SLURM is not installed on this machine, or does not answer."""


def is_slurm_here() -> bool:
    """Return True if SLURM's programs are on this machine."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol"))


def run_slurm(command: Sequence[str], *, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's programs without the user's output settings; any exit code is returned.

    Args:
        command: the program and its arguments.
        text: its standard input.

    Raises:
        SlurmUnavailableError: the program does not exist, or does not answer.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
    try:
        return subprocess.run(
            command,
            env=environ | _ENVIRONMENT,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(
            f"SLURM did not answer: {command[0]} did not finish within {TIMEOUT_S:.0f} s. Try again in a minute."
        ) from None
    except FileNotFoundError:
        raise SlurmUnavailableError(
            f"There is no SLURM on this machine ({command[0]} is not on the PATH). Use a login node of a cluster, "
            "or load the module that brings SLURM's programs."
        ) from None
    except OSError as error:
        raise SlurmUnavailableError(f"SLURM did not answer: {command[0]}: {error.strerror or error}.") from error


def is_unavailable(message: str) -> bool:
    """Return True if SLURM's message means that it did not answer, not that it refused."""
    return _UNAVAILABLE.search(message) is not None


def last_message(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of stderr, or the exit code if stderr is empty."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def check_controller() -> None:
    """Raise an error at once if slurmctld is down; other programs than scontrol retry for 18 s."""
    text = run_slurm(["scontrol", "ping"]).stdout
    answers = re.findall(r"^Slurmctld\(.*\) (?:at \S+ )?is (UP|DOWN)", text, re.MULTILINE)
    if answers and "UP" not in answers:
        raise SlurmUnavailableError("SLURM did not answer: slurmctld is down. Running jobs continue; try again in a minute.")


TIMED_STATES = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT"})
WAITING_STATES = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "RESV_DEL_HOLD"}
)
UNKNOWN = "UNKNOWN"

_SQUEUE_FIELDS = "JobArrayID:|,State:|,RestartCnt:|,TimeLeft:|,NodeList:|,Reason:|"
_SACCT_FIELDS = "JobID,State,NodeList,Reason"
_ALLOCATION_FIELDS = "JobID,Submit,Start,End,AllocCPUS,AllocTRES"
_IDS = re.compile(r"(\d+)_\[([^\]]*?)(?:%\d+)?\]")
_CANCEL_ERROR = re.compile(r"Kill job error on job id (\S+?):\s*(.*)")
_NO_SUCH_JOB = "Invalid job id"
_LOST = "accounting says {}, but slurmctld does not know this job"
# SLURM's spellings of a missing value.
_MISSING = frozenset({"", "None", "None assigned", "(null)", "N/A"})


@dataclass(frozen=True)
class JobState:
    """The state of a job.

    Args:
        state: SLURM's state, such as PENDING, RUNNING, TIMEOUT or NODE_FAIL; UNKNOWN if SLURM does not report one.
        reason: why the job waits, who cancelled it, or why its state is unknown; may be empty.
        time_left_s: seconds until the time limit; None if the job does not run or has no limit.
        nodes: the nodes of the job, such as ``n[1-2]``.
        restarts: restarts by SLURM; 0 if only accounting knows the job, which does not count them.
    """

    state: str
    reason: str = ""
    time_left_s: float | None = None
    nodes: str = ""
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        """True if the job waits or runs."""
        return self.state in TIMED_STATES | WAITING_STATES


def read_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """Ask SLURM for the states of many jobs at once.

    Args:
        job_ids: ``123``, or ``123_4`` for a task of an array.

    Returns:
        A state for each id: UNKNOWN, with a reason, if the job was submitted this second, or has ended and accounting is missing
        or does not answer.

    Raises:
        SlurmUnavailableError: slurmctld does not answer, or there is no SLURM on this machine.
    """
    if not job_ids:
        return {}
    queued = parse_squeue(_run_squeue(_whole_ids(job_ids)))
    found = {job_id: state for job_id in job_ids if (state := _find(job_id, queued)) is not None}
    rest = [job_id for job_id in job_ids if job_id not in found or found[job_id].state == "CANCELLED"]
    for job_id, ended in (_read_accounting(rest) if rest else {}).items():
        if job_id not in found:
            found[job_id] = ended
        elif ended.state == "CANCELLED":
            found[job_id] = replace(found[job_id], reason=ended.reason)  # squeue does not report the user who cancelled it
        elif ended.state != UNKNOWN and job_id not in queued:  # the array was cancelled after this task had ended
            found[job_id] = ended
    return {job_id: found[job_id] for job_id in job_ids}


def cancel_jobs(job_ids: Iterable[str]) -> dict[str, str]:
    """Cancel jobs that are queued or running.

    Returns:
        SLURM's message for each job that it did not cancel, such as one that is over.

    Raises:
        SlurmUnavailableError: slurmctld does not answer.
    """
    ids = list(job_ids)
    if not ids:
        return {}
    check_controller()
    done = run_slurm(["scancel", "--verbose", *ids])  # without --verbose it does not report unknown ids
    refused = {job_id: message for job_id, message in _CANCEL_ERROR.findall(done.stderr) if job_id in ids}
    if done.returncode != 0 and not refused:
        raise SlurmUnavailableError(f"scancel failed: {last_message(done)}")
    return refused


def max_array_size() -> int:
    """Return the most tasks that an array may have on this cluster, at least 1.

    It is the smaller of MaxArraySize (array indices stay below it) and ``max_array_tasks``.

    Raises:
        SlurmUnavailableError: slurmctld does not answer.
    """
    done = run_slurm(["scontrol", "show", "config"])
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    if match is None:
        raise SlurmUnavailableError(f"scontrol does not report MaxArraySize: {last_message(done)}")
    # 0: no arrays; an array of one is sent as a job. Some sites limit the tasks but not the indices.
    limits = [int(match[1]), *(int(found) for found in re.findall(r"max_array_tasks=(\d+)", done.stdout))]
    return max(1, min(limits))


def parse_squeue(text: str) -> dict[str, JobState]:
    """Parse squeue's output (``_SQUEUE_FIELDS``) into states by job id."""
    states: dict[str, JobState] = {}
    for ids, state, restarts, left, nodes, shown_reason in split_rows(text, 6):
        reason = _clean(shown_reason.removesuffix("|").rstrip())
        time_left_s = parse_duration(left) if state in TIMED_STATES else None
        job_state = JobState(
            state,
            "" if state in TIMED_STATES or state == "CANCELLED" else reason,  # squeue still shows why the job waited before
            time_left_s,
            _clean(nodes),
            int(restarts) if restarts.isdecimal() else 0,
        )
        states |= dict.fromkeys(expand_ids(ids), job_state)
    return states


def parse_sacct(text: str) -> dict[str, JobState]:
    """Parse sacct's output (``_SACCT_FIELDS``) into states by job id."""
    states: dict[str, JobState] = {}
    for ids, label, nodes, shown_reason in split_rows(text, 4):
        state, _, by = label.partition(" by ")
        reason = f"by {_user_name(by)}" if by else "" if state == "CANCELLED" else _clean(shown_reason)
        if state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED"):
            # squeue does not know this job, so its accounting record was never closed.
            state, reason = UNKNOWN, _LOST.format(state)
        states |= dict.fromkeys(expand_ids(ids), JobState(state, reason, None, _clean(nodes)))
    return states


def split_rows(text: str, num_columns: int) -> Iterator[list[str]]:
    """Yield the columns of each line of output that is separated by ``|``; other lines, such as warnings, are skipped."""
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|", num_columns - 1)]
        if len(columns) == num_columns:
            yield columns


def expand_ids(text: str) -> list[str]:
    """Expand array ids: ``12_[1-3,7%2]`` gives 12_1, 12_2, 12_3 and 12_7; other text stays as it is."""
    match = _IDS.fullmatch(text)
    if match is None:
        return [text]
    array, ids = match.groups()
    found = []
    for part in filter(None, ids.split(",")):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            continue  # "...": SLURM shortened the list
        found += [f"{array}_{index}" for index in range(int(first), int(last or first) + 1, int(step or 1))]
    return found


def parse_duration(text: str) -> int | None:
    """Return the seconds of ``D-HH:MM:SS``, ``HH:MM:SS`` or ``MM:SS``; None for text such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _find(job_id: str, states: Mapping[str, JobState]) -> JobState | None:
    """Return the state of a job or task; unstarted tasks of a cancelled array are listed under its id."""
    return states.get(job_id) or states.get(job_id.partition("_")[0])


def _run_squeue(job_ids: Sequence[str]) -> str:
    check_controller()
    # Array ids without task ids keep the command short.
    done = run_slurm(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(job_ids)}", f"--Format={_SQUEUE_FIELDS}"]
    )
    if done.returncode == 0 or _NO_SUCH_JOB in done.stderr:
        return done.stdout
    raise SlurmUnavailableError(f"SLURM did not answer: squeue: {last_message(done)}")


def _read_accounting(job_ids: Sequence[str]) -> dict[str, JobState]:
    """Return the states of jobs from sacct; UNKNOWN with the reason if it does not know them or does not work."""
    states, reason = {}, "SLURM does not know it: it was submitted just now, or its record was removed"
    command = ["sacct", "-X", "-P", "-n", f"--format={_SACCT_FIELDS}", f"--jobs={','.join(_whole_ids(job_ids))}"]
    try:
        done = run_slurm(command) if shutil.which("sacct") else None
        if done is None or "accounting storage is disabled" in done.stderr.lower():
            missing = "SLURM keeps no accounting here" if done else "SLURM has no accounting here (no sacct)"
            reason = f"{missing}: the end of a job is known from the run folder only"
        elif done.returncode == 0:
            states = parse_sacct(done.stdout)
        else:
            reason = f"accounting did not answer: {last_message(done)}"
    except SlurmUnavailableError as error:
        reason = f"accounting did not answer: {error}"
    return {job_id: _find_ended(job_id, states) or JobState(UNKNOWN, reason) for job_id in job_ids}


def _whole_ids(job_ids: Iterable[str]) -> list[str]:
    """Return the ids of jobs and arrays without their tasks, in numeric order."""
    return sorted({job_id.partition("_")[0] for job_id in job_ids}, key=lambda job_id: (len(job_id), job_id))


def _find_ended(job_id: str, states: Mapping[str, JobState]) -> JobState | None:
    """Return a job's state in accounting; None if it is unknown there.

    An array task that was cancelled before it started is missing from its array, or listed as PENDING for some seconds. The
    record under the array's own id is its last task's, so it is not used for the others.
    """
    found, array = states.get(job_id), job_id.partition("_")[0]
    is_known = any(other.startswith(f"{array}_") for other in states)
    if job_id != array and ((found is None and is_known) or (found is not None and found.reason == _LOST.format("PENDING"))):
        return JobState("CANCELLED", "before it started")
    return found


@dataclass(frozen=True)
class Allocation:
    """One start of a job, from accounting; times in seconds since 1970, None if it has not come so far.

    Args:
        submitted: time at which the job began to wait for this start.
        began, ended: times at which it began and ended.
        cores, gpus: on all nodes; 0 if accounting does not count them.
    """

    submitted: float | None
    began: float | None
    ended: float | None
    cores: int
    gpus: int


def read_allocations(job_ids: Sequence[str]) -> tuple[dict[str, list[Allocation]], str]:
    """Return all starts of jobs, oldest first, by job id; and why they are not known (else an empty text).

    Args:
        job_ids: ``123``, or ``123_4`` for a task of an array.
    """
    if not job_ids:
        return {}, ""
    if not shutil.which("sacct"):
        return {}, "SLURM has no accounting here (no sacct)"
    command = ["sacct", "--duplicates", "-X", "-P", "-n", f"--format={_ALLOCATION_FIELDS}"]
    try:
        done = run_slurm([*command, f"--jobs={','.join(_whole_ids(job_ids))}"])
    except SlurmUnavailableError as error:
        return {}, str(error)
    if done.returncode != 0:
        return {}, f"accounting did not answer: {last_message(done)}"
    return parse_allocations(done.stdout, job_ids), ""


def parse_allocations(text: str, job_ids: Sequence[str]) -> dict[str, list[Allocation]]:
    """Parse sacct's output (``_ALLOCATION_FIELDS``) into the starts of some jobs."""
    found: dict[str, list[Allocation]] = {}
    for job_id, submitted, began, ended, cores, resources in split_rows(text, 6):
        gpus = re.search(r"\bgres/gpu=(\d+)", resources)
        times = (_read_time(submitted), _read_time(began), _read_time(ended))
        if job_id in job_ids:
            number = int(cores) if cores.isdecimal() else 0
            found.setdefault(job_id, []).append(Allocation(*times, number, int(gpus[1]) if gpus else 0))
    for allocations in found.values():
        allocations.sort(key=lambda one: one.submitted or 0.0)
    return found


def _read_time(text: str) -> float | None:
    """Return a local time of SLURM in seconds since 1970; None for ``Unknown`` and ``None``."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _clean(text: str) -> str:
    return "" if text in _MISSING else text


def _user_name(uid: str) -> str:
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (KeyError, ValueError):
        return f"user {uid}"
