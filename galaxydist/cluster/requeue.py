"""Whether a job that has ended goes on: decided after ``srun``, from what the run folder says, never by a rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from galaxydist.cluster.records import RestartRecord
from galaxydist.errors import EXIT_STOPPED

Decision = Literal["finished", "requeue", "resubmit", "stop"]
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
        failure: ``failure.json`` of this start, where a rank wrote one.
        step: optimizer steps that the run folder shows.
    """

    exit_code: int
    is_finished: bool
    failure: Mapping[str, Any] | None
    step: int | None

    @property
    def error(self) -> str | None:
        """What went wrong, in a line; None after a stop with everything saved."""
        if self.failure is not None:
            return str(self.failure["error"])
        if self.exit_code in (0, EXIT_STOPPED):
            return None
        if self.exit_code > 128:
            return f"a rank was ended by signal {self.exit_code - 128}"
        return f"a rank ended with exit code {self.exit_code}"

    @property
    def crash_step(self) -> int | None:
        return self.step if self.failure is None else self.failure["step"]


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
        return "finished", "the run is finished"
    if ending.failure is not None and (reason := FOR_GOOD.get(ending.failure["kind"])):
        return "stop", f"{reason}: it would end the same way again"
    why = "it was told to stop, and everything is saved" if ending.error is None else ending.error
    if ending.error is not None and history and _is_same_crash(ending, history[-1]):
        return "stop", f"the same crash at the same step ({ending.crash_step}) twice: {ending.error}"
    if policy == "never":
        return "stop", f"{why}; cluster.requeue=never"
    # A start that SLURM would not requeue has two records, and went on once.
    num_requeues = len({(record.job_id, record.restart) for record in history if record.decision in ("requeue", "resubmit")})
    if num_requeues >= max_requeues:
        return "stop", f"{why}; it was requeued {num_requeues} times, and cluster.max_requeues={max_requeues}"
    return ("requeue" if policy == "auto" else "resubmit"), why


def _is_same_crash(ending: Ending, before: RestartRecord) -> bool:
    return (before.error, before.step) == (ending.error, ending.crash_step)
