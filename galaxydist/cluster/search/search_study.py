"""Optuna's study of a search: a journal in the sweep's folder that the processes of all trials append to.

A file that is created exclusively locks the journal, so that it is sound on NFS too. Optuna removes the lock of a process that
was killed; a line that such a process left half-written is cut off here, since Optuna would refuse the whole journal.

Optuna numbers its trials in the order of their starts. Each has the number of its run as a user attribute; of several with one
number, the last counts: a run that was told as failed and starts again gets a new one with the same values.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from galaxydist.cluster.search.search_files import SearchRecord
from galaxydist.cluster.search.search_space import Dimension, Interval, draw
from galaxydist.counter_rng import hash64
from galaxydist.errors import UserError
from galaxydist.recipe.scalars import to_text

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

JOURNAL_NAME = "optuna.jsonl"
STUDY_NAME = "search"
# A lock that is older belonged to a killed process. Its holder needs it for milliseconds, unless the file system hangs.
LOCK_GRACE_S = 15
# User attributes of Optuna's trials: the run's number, and the epoch after which it was to be pruned.
NUMBER, PRUNED_AT = "trial", "pruned_at"
# Prefix of the system attributes of optuna.pruners.SuccessiveHalvingPruner.
RUNG = "completed_rung_"
# Trials that end before the median of others prunes any.
MEDIAN_STARTUP = 5
# Successive halving compares trials for the first time after this share of their epochs.
ASHA_FIRST_SHARE = 16

Outcome = Literal["complete", "pruned", "failed"]


def check_optuna() -> None:
    """Raise an error if Optuna is not installed.

    Raises:
        UserError: it is missing; contains pip's command.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("A search needs optuna, which is not installed: pip install 'galaxydist[track]'") from None


class JournalLock:
    """Lock of the journal: Optuna's, and a journal without a half-written line.

    Args:
        path: the journal.
        grace_s: seconds after which a lock that does not change is taken from a process that was killed.
    """

    def __init__(self, path: Path, grace_s: int = LOCK_GRACE_S) -> None:
        from optuna.storages.journal import JournalFileOpenLock

        self._path = path
        self._lock = JournalFileOpenLock(str(path), grace_s)

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            _cut_half_line(self._path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # this process was stopped for so long that another one took the lock
            logger.warning("the lock of %s was taken from this process, which had held it for too long", self._path)


def _cut_half_line(path: Path) -> None:
    """Remove the line that a killed process left incomplete."""
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class SearchStudy:
    """The study of a search, which every process opens for itself.

    Args:
        root: the sweep's folder.
        record: the search.
        number: of the trial of this process; decides the random numbers of ``tpe``.
        grace_s: see ``JournalLock``.

    Raises:
        UserError: Optuna is not installed, or the journal is damaged.
    """

    def __init__(self, root: Path, record: SearchRecord, number: int = 0, grace_s: int = LOCK_GRACE_S) -> None:
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.record = record
        path = root / JOURNAL_NAME
        lock = cast(Any, JournalLock(path, grace_s))
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
        try:
            self._storage = optuna.storages.JournalStorage(backend)
            self._study = self._open(_build_sampler(record, number), _build_pruner(record))
        except (ValueError, KeyError, TypeError, AssertionError) as error:  # Optuna raises these for foreign lines
            raise UserError(
                f"{path} is damaged ({error}): it was edited, or its disk has failed. Restore it; or remove it, and the ended "
                "trials are read from their run folders."
            ) from error

    def _open(self, sampler: "BaseSampler", pruner: "BasePruner") -> "Study":
        import optuna

        names = [study.study_name for study in self._storage.get_all_studies()]
        if STUDY_NAME in names:  # each attempt to create it would be a line of the journal
            return optuna.load_study(study_name=STUDY_NAME, storage=self._storage, sampler=sampler, pruner=pruner)
        return optuna.create_study(
            study_name=STUDY_NAME,
            storage=self._storage,
            direction="minimize" if self.record.is_smaller_better else "maximize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )

    def start(self, number: int, values: Mapping[str, Any] | None) -> dict[str, Any]:
        """Start a trial, continue it, or leave it as it ended, and return its values by recipe key.

        Args:
            number: of the run.
            values: that it has already; None: it needs some.
        """
        from optuna.trial import TrialState

        space = self.record.space
        newest = self._newest(number)
        if values is not None and newest is not None and newest.state in (TrialState.COMPLETE, TrialState.PRUNED):
            return self._values_of(newest)  # a job that only evaluates it must not make it count twice
        if newest is None or newest.state == TrialState.FAIL:
            if values is None and newest is not None:
                values = self._values_of(newest)
            elif values is None:
                values = draw(space, self.record.seed, number) if self.record.method == "random" else {}
            self._add(number, values, newest)
        trial = self._trial(number)
        return {key: _suggest(trial, key, dimension) for key, dimension in space.items()}

    def should_prune(self, number: int, epoch: int, value: float | None) -> bool:
        """Report the metric of a running trial, once for each epoch, and return True if the trial is to end.

        Args:
            number: of the run.
            epoch: epochs done.
            value: the metric; None: it was not finite.
        """
        trial = self._trial(number)
        if trial.user_attrs.get(PRUNED_AT) is not None:  # it was killed before it could end
            return True
        frozen = self._newest(number)
        assert frozen is not None, "the trial was just found"
        if epoch not in frozen.intermediate_values:
            trial.report(math.nan if value is None else value, epoch)
        if not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED_AT, epoch)
        return True

    def end(self, number: int, outcome: Outcome, value: float | None = None) -> None:
        """Tell the end of a trial, unless it is known.

        Args:
            number: of the run.
            outcome: the end.
            value: best value of the metric, of a complete trial.
        """
        import optuna
        from optuna.trial import TrialState

        newest = self._newest(number)
        is_failed = newest is not None and newest.state == TrialState.FAIL
        if newest is None or (newest.state.is_finished() and (not is_failed or outcome == "failed")):
            return
        if is_failed:  # it was taken for failed too early
            self._add(number, self._values_of(newest), newest)
            newest = self._newest(number)
            assert newest is not None, "it was just added"
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome]
        try:
            self._study.tell(newest.number, value if outcome == "complete" else None, state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            logger.debug("another process has told the end of trial %d", number)

    def known(self) -> set[int]:
        """Return the numbers of the runs that have started."""
        return set(self._by_number())

    def running(self) -> list[int]:
        """Return the numbers of the runs that have started and whose end is not known."""
        return [number for number, trial in self._by_number().items() if not trial.state.is_finished()]

    def best(self) -> tuple[int, float, dict[str, Any]] | None:
        """Return number, value and settings of the best complete trial; None if there is none."""
        from optuna.trial import TrialState

        complete = {
            number: trial
            for number, trial in self._by_number().items()
            if trial.state == TrialState.COMPLETE and trial.value is not None
        }
        if not complete:
            return None
        sign = 1 if self.record.is_smaller_better else -1
        number, trial = min(complete.items(), key=lambda item: (sign * cast(float, item[1].value), item[0]))
        return number, cast(float, trial.value), self._values_of(trial)

    def _by_number(self) -> dict[int, "FrozenTrial"]:
        """Return the newest of Optuna's trials for each run."""
        trials = self._study.get_trials(deepcopy=False)
        return {trial.user_attrs[NUMBER]: trial for trial in trials if NUMBER in trial.user_attrs}

    def _newest(self, number: int) -> "FrozenTrial | None":
        return self._by_number().get(number)

    def _trial(self, number: int) -> "Trial":
        """Return Optuna's running trial of a run; a new one if the last was taken for failed."""
        import optuna

        newest = self._newest(number)
        if newest is not None and newest.state.is_finished():
            self._add(number, self._values_of(newest), newest)
            newest = self._newest(number)
        assert newest is not None, "the trial was started"
        study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        return optuna.Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study_id, newest.number))

    def _add(self, number: int, values: Mapping[str, Any], earlier: "FrozenTrial | None") -> None:
        """Add a running trial, in one line of the journal, with what an earlier one of the same run has reported."""
        import optuna

        space = {key: dimension for key, dimension in self.record.space.items() if key in values}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params={key: _to_optuna(dimension, values[key]) for key, dimension in space.items()},
                distributions={key: _distribution(dimension) for key, dimension in space.items()},
                user_attrs={NUMBER: number},
                intermediate_values=dict(earlier.intermediate_values) if earlier is not None else {},
                system_attrs=_rungs(earlier) if earlier is not None else {},
            )
        )

    def _values_of(self, trial: "FrozenTrial") -> dict[str, Any]:
        space = self.record.space
        return {key: _from_optuna(space[key], trial.params[key]) for key in space if key in trial.params}


def _rungs(trial: "FrozenTrial") -> dict[str, Any]:
    """Return the values with which a trial has passed the comparisons of successive halving."""
    return {key: value for key, value in trial.system_attrs.items() if key.startswith(RUNG)}


def _build_sampler(record: SearchRecord, number: int) -> "BaseSampler":
    import optuna

    seed = int(hash64(record.seed, number)) % 2**32
    if record.method == "random":  # its values come from ``draw``
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: running trials count as poor ones, so that those that start together differ.
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _build_pruner(record: SearchRecord) -> "BasePruner":
    import optuna

    if record.prune == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_STARTUP)
    if record.prune == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, record.epochs // ASHA_FIRST_SHARE))
    return optuna.pruners.NopPruner()


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(dimension, Interval):
        return CategoricalDistribution([to_text(value) for value in dimension.values])
    if dimension.is_int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _to_optuna(dimension: Dimension, value: Any) -> Any:
    return value if isinstance(dimension, Interval) else to_text(value)


def _from_optuna(dimension: Dimension, value: Any) -> Any:
    if isinstance(dimension, Interval):
        return value
    return next(known for known in dimension.values if to_text(known) == value)


def _suggest(trial: "Trial", key: str, dimension: Dimension) -> Any:
    """Return the trial's value of a key, the one that it has or a new one."""
    if not isinstance(dimension, Interval):
        return _from_optuna(dimension, trial.suggest_categorical(key, [to_text(value) for value in dimension.values]))
    if dimension.is_int:
        return trial.suggest_int(key, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log)
