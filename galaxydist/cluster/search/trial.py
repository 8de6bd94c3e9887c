"""One trial of a search in its run folder: its values (trial.json), its training, and its end as the study is told."""

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.running_jobs import lock_holder, newest_job
from galaxydist.cluster.search.search_files import (
    PREFIX,
    RECORD_NAME,
    SearchRecord,
    read_trial,
    trial_dir,
    trial_number,
    value_arguments,
    write_trial,
)
from galaxydist.cluster.search.search_space import describe_values
from galaxydist.cluster.search.search_study import Outcome, SearchStudy
from galaxydist.cluster.slurm import UNKNOWN, JobState, SlurmUnavailableError, read_states
from galaxydist.errors import RunFailedError, UserError
from galaxydist.job_environment import find_rank
from galaxydist.rank_store import Leave
from galaxydist.runs.folder import RunFolder, read_newest_state
from galaxydist.runs.listing import TRIAL_FILE
from galaxydist.runs.lock import guarded
from galaxydist.training.launch import train_recipe

logger = logging.getLogger(__name__)

# Time in which the other ranks find the values that rank 0 has written, with its wait for the journal's lock.
VALUES_S, POLL_S = 300.0, 0.2
# Time after a submission in which SLURM may not know the job yet.
SETTLING_S = 60.0

ReadStates = Callable[[Sequence[str]], Mapping[str, JobState]]


def train_trial(arguments: Sequence[str], environ: MutableMapping[str, str], leave: Leave, *, run_dir: Path) -> int:
    """Train a trial with the values that the search gives it at its first start; every rank of its job calls it.

    Args:
        arguments: of all trials, with ``run.dir``.
        environ: the process's environment.
        leave: as for ``RankWork``.
        run_dir: the trial's folder.

    Returns:
        The number of the signal that stopped it, or 0.

    Raises:
        UserError: the search's files are missing or damaged.
        RunFailedError: rank 0 has not written the values.
    """
    record = SearchRecord.read(run_dir.parent)
    if record is None:
        raise UserError(f"{run_dir.parent / RECORD_NAME} is missing: submit the sweep again, which writes it")
    is_main = find_rank(environ).rank == 0
    study = _start(run_dir, record) if is_main else None
    values = _wait_for_values(run_dir)
    stop_signal = 0
    if not RunFolder(run_dir).is_pruned:  # else it was stopped before it could tell its end
        if is_main:
            logger.info("trial %d: %s", trial_number(run_dir), describe_values(values))
        prune = partial(_should_prune, study, trial_number(run_dir)) if record.prune is not None else None
        stop_signal = train_recipe([*arguments, *value_arguments(values)], environ, leave, prune)
    if study is not None:
        _tell_end(study, run_dir)
    return stop_signal


def _start(run_dir: Path, record: SearchRecord) -> SearchStudy:
    """Ask for the values of a trial, unless it has some, and write them into its folder."""
    number = trial_number(run_dir)
    study = SearchStudy(run_dir.parent, record, number)
    if record.method == "tpe":  # which learns from the ends of the others
        try:
            settle(study, run_dir.parent, read_states, leave_out=number)
        except UserError as error:
            logger.warning("the ends of other trials are not known: %s", error)
    run_dir.mkdir(parents=True, exist_ok=True)
    with guarded(run_dir / TRIAL_FILE):  # two jobs of a trial that start at the same time get the same values
        stored = read_trial(run_dir)
        values = study.start(number, stored)
        if stored is None:
            write_trial(run_dir, values)
    return study


def _wait_for_values(run_dir: Path) -> dict[str, Any]:
    deadline = time.monotonic() + VALUES_S
    while (values := read_trial(run_dir)) is None:
        if time.monotonic() > deadline:
            raise RunFailedError(f"rank 0 has not written {run_dir / TRIAL_FILE} within {VALUES_S:.0f} s")
        time.sleep(POLL_S)
    return values


def _should_prune(study: SearchStudy | None, number: int, epoch: int, value: float | None) -> bool:
    """Ask the study on rank 0. A journal that cannot be written must not end the training."""
    assert study is not None, "rank 0 has the study"
    try:
        return study.should_prune(number, epoch, value)
    except Exception as error:  # Optuna and the file system raise errors of many kinds
        logger.warning("the search could not be asked whether to prune the trial, which continues: %s", error)
        return False


def _tell_end(study: SearchStudy, run_dir: Path) -> None:
    """Tell the end of a trial. If that fails, the next look at the search does it."""
    end = read_end(run_dir)
    if end is None:
        return
    try:
        study.end(trial_number(run_dir), *end)
    except Exception as error:  # Optuna and the file system raise errors of many kinds
        logger.warning("the search could not be told the end of the trial: %s", error)


def read_end(run_dir: Path) -> tuple[Outcome, float | None] | None:
    """Return the end of a trial and its best validation, from its run folder; None if it is neither finished nor pruned."""
    folder = RunFolder(run_dir)
    if folder.is_finished:
        state = read_newest_state(folder.checkpoints_dir)
        best = state["progress"]["stopping"]["best"] if state is not None else None
        return ("complete", best) if best is not None else ("failed", None)
    return ("pruned", None) if folder.is_pruned else None


def settle(study: SearchStudy, root: Path, read_states: ReadStates, *, leave_out: int | None = None) -> None:
    """Tell the study the ends of trials that could not do it themselves, because they were killed or cancelled.

    If its journal was lost, it is told all trials that have ended.

    Args:
        study: the study.
        root: the sweep's folder.
        read_states: returns SLURM's states of job ids.
        leave_out: number of a trial that is not looked at.
    """
    for number in sorted(_trials_in(root) - study.known() - {leave_out}):
        run_dir = trial_dir(root, number)
        values, end = read_trial(run_dir), read_end(run_dir)
        if values is not None and end is not None:
            study.start(number, values)
            study.end(number, *end)
    running = {number: trial_dir(root, number) for number in study.running() if number != leave_out}
    unknown: dict[int, Path] = {}
    for number, run_dir in running.items():
        end = read_end(run_dir)
        if end is None:
            unknown[number] = run_dir
        else:
            study.end(number, *end)
    jobs = {number: JobFiles(run_dir).jobs() for number, run_dir in unknown.items()}
    ids = [job.job_id for known in jobs.values() for job in known if job.scheduler == "slurm"]
    try:
        states = read_states(ids) if ids else {}
    except SlurmUnavailableError as error:
        logger.info("SLURM was not asked which trials are gone: %s", error)
        return
    for number, run_dir in unknown.items():
        if is_gone(run_dir, states):
            study.end(number, *(read_end(run_dir) or ("failed", None)))  # it may have ended since it was looked at


def _trials_in(root: Path) -> set[int]:
    """Return the numbers of the trials that have a run folder."""
    names = (path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*"))
    return {int(name) for name in names if name.isdecimal()}


def is_gone(run_dir: Path, states: Mapping[str, JobState]) -> bool:
    """Return True if a run has no job that waits or runs, and no process.

    Args:
        run_dir: its folder.
        states: states from SLURM, by job id.
    """
    job, state = newest_job(JobFiles(run_dir).jobs(), states)
    if state is not None and state.is_active:
        return False
    is_unknown = job is not None and job.scheduler == "slurm" and (state is None or state.state == UNKNOWN)
    if is_unknown and job is not None and time.time() - job.time < SETTLING_S:
        return False
    return lock_holder(RunFolder(run_dir).lock_path, states) is None
