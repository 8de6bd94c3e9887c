"""Events of a run, events.jsonl: starts, stops, restarts and what went wrong, with the time of each.

Any process of a run, and the batch script that restarts it, may append events. They are never cut back: a run that continues
from a checkpoint keeps what happened after it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from galaxydist.runs.record_file import append_record, read_records

EventKind = Literal["start", "stop", "finish", "failure", "nonfinite", "loss_spike", "hang", "data_wait", "requeue", "pruned"]
# Events of which a person is told at once.
ALERTS: frozenset[EventKind] = frozenset({"finish", "failure", "nonfinite", "loss_spike", "hang", "data_wait", "requeue"})


@dataclass(frozen=True)
class Event:
    """One event.

    Args:
        time: seconds since 1970.
        kind: of the event.
        text: one line for a person.
        step: optimizer steps done; None if it is unknown.
        start: job and restart in which it happened (``job_environment.start_of``); None outside of a job.
        details: further values of this kind, such as the world size of a start.
    """

    time: float
    kind: EventKind
    text: str
    step: int | None = None
    start: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def append_event(path: Path, event: Event) -> None:
    """Append an event to a run's file.

    Raises:
        UserError: the disk is full.
    """
    append_record(path, event)


def read_events(path: Path) -> list[Event]:
    """Return all events of a file, oldest first; empty if there is none.

    Raises:
        UserError: a line is damaged.
    """
    return list(read_records(path, Event))
