"""Whether a job that has ended goes on: decided after ``srun``, from what the run folder says, never by a rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from galaxydist.cluster.records import Decision, RestartRecord
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_STOPPED

# How a start ended for good, whatever is tried again (``failure.json``).
FOR_GOOD = {
    "bad_input": "the recipe, its data or the run folder cannot be used as they are",
    "nonfinite": "the loss is not a number",
}


@dataclass(frozen=True)
class Ending:
    """How ``srun`` ended.

    Args:
        exit_code: srun's: the highest of its tasks', 128 + N after a signal.
        is_finished: the run has its result.
        failure: ``failure.json`` of this very start, where a rank wrote one.
        step: optimizer steps that the run folder shows.
        saved: the step of the newest checkpoint; None where there is none.
        death: the rank or node that died first, in a line; empty where srun named none.
        ended_by_slurm: why SLURM is ending the job, in a line; empty where it is not.
    """

    exit_code: int
    is_finished: bool
    failure: Mapping[str, Any] | None
    step: int | None
    saved: int | None = None
    death: str = ""
    ended_by_slurm: str = ""

    @property
    def error(self) -> str | None:
        """What went wrong, in a line; None after a stop with everything saved."""
        # The ranks that live on only note that they lost the connection to the one that died.
        if self.death and self.kind not in FOR_GOOD:
            return self.death
        if self.failure is not None:
            return str(self.failure["error"])
        if self.ended_by_slurm:
            return None
        if self.exit_code in (0, EXIT_STOPPED, EXIT_INTERRUPTED):
            return None
        if self.exit_code > 128:
            return f"a rank was ended by signal {self.exit_code - 128}"
        return f"a rank ended with exit code {self.exit_code}"

    @property
    def kind(self) -> str:
        """What kind of failure; empty where nobody has noted one."""
        if self.failure is not None:
            return str(self.failure["kind"])
        return "bad_input" if self.exit_code == EXIT_BAD_INPUT else ""

    @property
    def crash_step(self) -> int | None:
        """The step of the failure, where that is known, else the last that the folder shows."""
        return self.step if self.failure is None or self.failure["step"] is None else self.failure["step"]


def decide(
    ending: Ending, history: Sequence[RestartRecord], *, policy: Literal["auto", "resubmit", "never"], max_requeues: int
) -> tuple[Decision, str]:
    """What becomes of the run, and why.

    Args:
        ending: of this start.
        history: of the earlier ones since somebody submitted the run, oldest first.
        policy: ``cluster.requeue``.
        max_requeues: ``cluster.max_requeues``.
    """
    if ending.is_finished:
        return "finished", "the run is finished" + (f", but {ending.error}" if ending.error else "")
    if reason := _never_again(ending, history, policy, max_requeues):
        return "stop", reason
    return ("requeue" if policy == "auto" else "resubmit"), _why(ending)


def _why(ending: Ending) -> str:
    saved = "" if ending.saved is None else f"; step {ending.saved} is saved"
    return ending.error or f"{ending.ended_by_slurm or 'it was told to stop'}{saved}"


def reason_for_good(ending: Ending, history: Sequence[RestartRecord]) -> str:
    """Why the run would end the same way again if nobody changes anything; empty where it might not."""
    if reason := FOR_GOOD.get(ending.kind):
        return f"{reason}: it would end the same way again"
    if ending.error is not None and history and _is_same_crash(ending, history[-1]):
        return f"the same crash at the same step ({ending.crash_step}) twice: {ending.error}"
    return ""


def _never_again(ending: Ending, history: Sequence[RestartRecord], policy: str, max_requeues: int) -> str:
    """Why the run does not go on by itself; empty where it does."""
    if reason := reason_for_good(ending, history):
        return reason
    if policy == "never":
        return f"{_why(ending)}; cluster.requeue=never"
    idle = _count_idle(ending, history)
    if idle > max_requeues:
        # Of these the first is no repetition.
        return (
            f"{_why(ending)}; {idle} starts in a row saved no new step, and cluster.max_requeues={max_requeues}. If they ended "
            "by their time limit, make cluster.time longer; the same galaxydist submit goes on"
        )
    return ""


def _count_idle(ending: Ending, history: Sequence[RestartRecord]) -> int:
    """Starts in a row, this one included, that left no newer checkpoint than those before."""
    # A start that SLURM would not requeue has two records.
    starts = {(record.job_id, record.restart): record.saved for record in history}
    best, idle = -1, 0
    for saved in (*starts.values(), ending.saved):
        has_progressed = saved is not None and saved > best
        best, idle = (saved, 0) if has_progressed and saved is not None else (best, idle + 1)
    return idle


def _is_same_crash(ending: Ending, before: RestartRecord) -> bool:
    return (before.error, before.step) == (ending.error, ending.crash_step)
